"""How long does a question take that notebook 13 is asked, each changed in something from the one before?

    python -m benchmarks.what_if [--workers 2] [--json FILE]

The first starts processes and reads tables. CPU seconds are those of this process and of all that it starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import psutil
from tabulate import tabulate

from erlib import config
from erlib.paper_scale.exploring import Explorer
from erlib.paper_scale.questions import Question

CHANGES: list[dict[str, Any]] = [
    {},
    {"requests_per_s": 200.0},
    {"spread": "uniform"},
    {"ttft_s": 0.05},
    {"gpus": 4},
    {"model": "llama-3-70b", "gpus": 8, "requests_per_s": 30.0},
    {"formats": ("fp8",)},
    {"lengths": "p1", "model": "llama-2-13b", "formats": (), "requests_per_s": 8.0},
    {"requests_per_s": None, "users": 200},
    {"model": "llama-3-8b", "lengths": "p2", "users": 1000},
    {"gpu": "h200-pytorch", "experts": 4},
]


def main() -> None:
    """Ask, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    question = Question("llama-3-8b", 8, 150.0, spread="normal")
    rows = []
    with Explorer(config.load_profile("laptop"), options.workers) as explorer:
        for change in CHANGES:
            question = replace(question, **change)
            cpu_s, start_s = _cpu_s(), time.perf_counter()
            answer = explorer.answer(question)
            seconds = time.perf_counter() - start_s
            rows.append(
                {
                    "change": ", ".join(f"{name} {value}" for name, value in change.items()) or "(the first)",
                    "designs": len(answer.table),
                    "simulations": int(answer.table["draws"].sum()),
                    "seconds": seconds,
                    "cpu_s": _cpu_s() - cpu_s,
                    "best": answer.table["design"][0],
                }
            )
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _cpu_s() -> float:
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


if __name__ == "__main__":
    main()
