"""Which way to serve a model on some H100s: every design that step times are known for, simulated, the best first.

    python scripts/plan.py --model llama-3-70b --gpus 8 --requests-per-s 20
    python scripts/plan.py --model llama-3-8b --gpus 4 --requests-per-s 100 --spread normal --ttft 1 --csv plan.csv

Nothing is measured here, and no GPU is needed. What a simulation leaves out is printed with its answer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
from tabulate import tabulate

from erlib import config
from erlib.config import Mix, Paper
from erlib.paper_scale import service_levels, what_if

ASSUMPTIONS = """\
Simulated on {gpus} H100s in virtual time, nothing but engines and users around: no host, no gateway, no network.
Prompts and answers of paper {paper}; requests come as a Poisson process for {window:g} s; up to {slots} sequences in an
engine, the KV cache has all the memory that weights leave. "An expert each": a request goes to the one server of its
expert ({spread}). "Adapters": all experts on every server, with steps {slower:g} times as long, which is assumed.
How good answers are is not asked: one model, experts and formats differ in that (docs/experts.md, notebooks 03 and 11).
Near saturation the simulation's latencies are too good (docs/results.md); a margin is yours to add.
Prices are in what --gpu-hour is in, of all {gpus} GPUs."""


FORMATS = ("", "", ".3g", ".2f", "", ".3f", ".4f", ",.0f", ".3f")
"""Of the table's columns."""


def main() -> int:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="e.g. llama-3-70b")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--requests-per-s", type=float, required=True)
    parser.add_argument("--ttft", type=float, default=service_levels.TTFT_S, help="bound of its p99, in seconds")
    parser.add_argument("--tpot", type=float, default=service_levels.TPOT_S, help="likewise")
    parser.add_argument("--lengths", choices=get_args(Paper), default="p2", help="whose prompts and answers")
    parser.add_argument("--spread", choices=get_args(Mix), default="uniform", help="of the requests over the experts")
    parser.add_argument("--slots", type=int, default=256, help="sequences that an engine runs at a time")
    parser.add_argument("--adapters-slower", type=float, default=1.25, help="steps with adapters, times those without")
    parser.add_argument("--gpu-hour", type=float, default=1.0, help="price of an hour of one GPU")
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    options = parser.parse_args()
    if options.csv and not options.csv.absolute().parent.is_dir():
        parser.error(f"--csv: there is no folder {options.csv.absolute().parent}")
    try:
        question = what_if.Question(
            options.model, options.gpus, options.requests_per_s, options.ttft, options.tpot, options.lengths,
            options.spread, options.slots, options.adapters_slower,
        )  # fmt: skip
        profile = config.load_profile("dgx-h100", {"sensitivity.gpu_hour": options.gpu_hour})
        table = what_if.answered(question, profile)
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.csv:
        table.to_csv(options.csv, index=False)
    print(tabulate(table, headers="keys", tablefmt="simple", showindex=False, floatfmt=FORMATS, maxcolwidths=40))
    print(f"\n{what_if.verdict(question, table)}\n")
    told = {"paper": question.lengths[1], "window": question.window_s, "slots": question.slots}
    told |= {"spread": question.spread, "slower": question.adapters_slower, "gpus": question.gpus}
    print(ASSUMPTIONS.format(**told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
