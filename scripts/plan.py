"""Which way to serve a model on some GPUs: every design that step times are known for, simulated, the best first.

    python scripts/plan.py --model llama-3-70b --gpus 8 --requests-per-s 20
    python scripts/plan.py --model llama-3-8b --gpus 4 --users 200 --spread normal --csv plan.csv --figure plan.png
    python scripts/plan.py --model llama-3-8b --trace requests.csv

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
import pandas as pd
from tabulate import tabulate

from erlib import config
from erlib.config import Dtype, Mix, Paper
from erlib.paper_scale import decisions, gpus, known_error, questions, service_levels, what_if
from erlib.report import plan, style
from erlib.workload import traces

ASSUMPTIONS = """\
Simulated in virtual time on {gpus} {said}; nothing but engines and users around: no host, no gateway, no network.
Prompts and answers of {whose}; {load}; up to {slots} sequences in an engine, the KV cache has all the memory that
weights leave. "An expert each": a request goes to the one server of its expert ({spread}). "Adapters": all experts on
every server, with steps {slower:g} times as long, which is assumed. How good answers are is not asked: one model,
experts and formats differ in that (docs/experts.md, notebooks 03 and 11). Prices are in what --gpu-hour is in, of all
{gpus} GPUs. p99s are at the load that is asked. Intervals are of 90 %: of the mean over three draws; of what is carried
at most, also if the simulation's throughput errs as it does beside published measurements ({low:.2f} to {high:.2f}
times)."""

FIGURES = (".png", ".svg", ".pdf")


def main() -> int:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="e.g. llama-3-70b")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(gpus.GPUS)}, or a file with step times")
    parser.add_argument("--gpu-gb", type=float, help="its memory, where it is another one's step times")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--requests-per-s", type=float, help="Poisson arrivals (neither: as a trace has them)")
    load.add_argument("--users", type=int, help="each asks again when they have an answer")
    parser.add_argument("--ttft", type=float, default=service_levels.TTFT_S, help="bound of its p99, in seconds")
    parser.add_argument("--tpot", type=float, default=service_levels.TPOT_S, help="likewise")
    parser.add_argument("--lengths", choices=get_args(Paper), default="p2", help="whose prompts and answers")
    parser.add_argument("--trace", type=Path, help="a file with requests of your own, in their place (docs/traces.md)")
    parser.add_argument("--spread", choices=get_args(Mix), default="uniform", help="of the requests over the experts")
    parser.add_argument("--formats", nargs="+", choices=get_args(Dtype), default=[], help="of weights; default: all")
    parser.add_argument("--experts", type=int, help="how many; servers beyond are replicas (default: one per server)")
    usual = questions.Question
    parser.add_argument("--slots", type=int, default=usual.slots, help="sequences that an engine runs at a time")
    parser.add_argument(
        "--adapters-slower", type=float, default=usual.adapters_slower, help="steps with adapters, times those without"
    )
    parser.add_argument("--gpu-hour", type=float, default=usual.gpu_hour, help="price of an hour of one GPU")
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    parser.add_argument("--figure", type=Path, help=f"draw it there, too ({', '.join(FIGURES)})")
    options = parser.parse_args()
    for name, file in (("--csv", options.csv), ("--figure", options.figure)):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{name}: there is no folder {file.absolute().parent}")
        if file and file.is_dir():
            parser.error(f"{name}: {file} is a folder: give the name of a file")
    if options.figure and options.figure.suffix not in FIGURES:
        parser.error(f"--figure: {options.figure.name} ends in none of {', '.join(FIGURES)}")
    try:
        lengths = traces.read(options.trace) if options.trace else options.lengths
        question = questions.Question(
            **{name: getattr(options, name) for name in ("model", "gpus", "gpu", "gpu_gb", "requests_per_s", "users")},
            **{"ttft_s": options.ttft, "tpot_s": options.tpot, "lengths": lengths, "spread": options.spread},
            **{name: getattr(options, name) for name in ("formats", "experts", "slots", "adapters_slower", "gpu_hour")},
        )
        table = what_if.answered(question, config.load_profile("dgx-h100"))
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = _shown(question, table)
    print(tabulate(shown, headers="keys", tablefmt="simple", showindex=False, disable_numparse=True, maxcolwidths=34))
    print(f"\n{what_if.verdict(question, table)}\n")
    low, high = known_error.between(known_error.known_error(), questions.throughput_error(question))
    told = {
        **{"gpus": question.gpus, "said": question.its_gpu.said, "low": low, "high": high},
        **{"whose": options.trace or f"paper {options.lengths[1]}", "load": question.load, "slots": question.slots},
        **{"spread": question.spread_said, "slower": question.adapters_slower},
    }
    print(ASSUMPTIONS.format(**told))
    print(" ".join([decisions.too_good(known_error.known_error(), question), *decisions.unknown(question)]))
    try:
        if options.csv:
            table.to_csv(options.csv, index=False)
        if options.figure:
            style()
            plan(table, question).savefig(options.figure)
    except OSError as error:
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _shown(question: questions.Question, table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is printed: intervals behind their values."""
    unit = "users" if question.users else "requests/s"
    shown = table[["design", "gpus"]].copy()
    for name, metric, times in (
        (f"most {unit}", "most", 1.0),
        ("TTFT p99 [ms]", "ttft_p99_s", 1e3),
        ("TPOT p99 [ms]", "tpot_p99_s", 1e3),
    ):
        ends = (
            table.get(f"{metric}{end}", pd.Series(float("nan"), table.index)) * times for end in ("", "_low", "_high")
        )
        shown[name] = [decisions.cell(*row) for row in zip(*ends, strict=True)]
    shown["headroom"] = table["headroom"].map("{:.2f}".format)
    shown["limited by"] = table["bottleneck"]
    shown["price per million tokens"] = [f"{price:.3g}" for price in table["price_per_million_tokens"]]
    return shown


if __name__ == "__main__":
    sys.exit(main())
