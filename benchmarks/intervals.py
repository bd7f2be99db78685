"""Are the intervals that verdicts hang on as wide as they should be? Two whole measured runs say.

Both runs measured the same systems, so that whatever one interval of 95 % says of their difference should cover *none*
in 95 % of the cases. Two kinds of numbers are compared, of systems with at least :data:`LEAST_USERS` users: each
metric of each system, which differs between machines, and its ratio to the same metric of the paper's baseline in the
same run, which is what verdicts compare. Three intervals are tried:

``student``
    What verdicts have (:func:`erlib.claims.uncertainty.ratio`): Student's, from the spread over repeats.
``repeats and users``
    A bootstrap in two stages, of the repeats and of the users of each.
``users``
    A bootstrap of users alone, each repeat as it is.

The runs' records are a folder of points (``data/runs/laptop/records``) or the published ones
(``figures/laptop/records/measured.parquet``).

    python -m benchmarks.intervals RECORDS OTHERS
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from erlib.claims import uncertainty
from erlib.claims.uncertainty import CONFIDENCE, Value
from erlib.load import metrics, records

LEAST_USERS = 8
RESAMPLES = 400
SEED = 0

Floats: TypeAlias = npt.NDArray[np.float64]
Repeats: TypeAlias = list[Floats]
"""Of each repeat, what its requests have seen."""

METRICS: dict[str, tuple[str, Callable[[Floats], float]]] = {
    "TTFT, mean": ("ttft_s", lambda values: float(values.mean())),
    "TPOT, mean": ("tpot_s", lambda values: float(values.mean())),
    "response time, mean": ("response_s", lambda values: float(values.mean())),
    "response time, p99": ("response_s", metrics.p99),
}
KEY = ["paper", "config", "mix", "users"]


def load(path: Path) -> pd.DataFrame:
    """Latencies of the base prompts of a run's load experiments, where a point has at least two repeats."""
    frame = pd.read_parquet(path) if path.is_file() else records.read(path)
    wanted = (frame["source"] == "measured") & (frame["experiment"] == "load") & (frame["users"] >= LEAST_USERS)
    done = metrics.latencies(metrics.answers(frame[wanted & (frame["turn"] == "base")]))
    return done[done.groupby(KEY)["repeat"].transform("nunique") > 1]


def observed(frame: pd.DataFrame, column: str) -> dict[tuple[str, ...], Repeats]:
    """What the requests of each point have seen, by :data:`KEY`."""
    return {
        key: [repeat.dropna().to_numpy() for _, repeat in point.groupby("repeat")[column]]
        for key, point in frame.groupby(KEY)
    }


def pairs(ours: dict[tuple[str, ...], Repeats], theirs: dict[tuple[str, ...], Repeats]) -> Iterator[
    tuple[str, list[Repeats], list[Repeats]]
]:  # fmt: skip
    """What is compared: numbers whose product over the product of others is 1 if both runs measured the same."""
    for key in ours.keys() & theirs.keys():
        yield "as it is", [ours[key]], [theirs[key]]
        paper, config, _, users = key
        beside = [other for other in ours if other[0] == paper and other[1].endswith(".A") and other[3] == users]
        if not config.endswith(".A") and beside and beside[0] in theirs:
            yield "to the baseline", [ours[key], theirs[beside[0]]], [theirs[key], ours[beside[0]]]


def student(above: list[Repeats], below: list[Repeats], metric: Callable[[Floats], float]) -> tuple[float, float]:
    """The interval that a verdict would have."""

    def value(repeats: Repeats) -> Value:
        values = np.array([metric(repeat) for repeat in repeats])
        return Value(values.mean(), values.std(ddof=1), len(values))

    estimate = uncertainty.ratio([value(its) for its in above], [value(its) for its in below], "")
    return estimate.low, estimate.high


def bootstrap(
    above: list[Repeats], below: list[Repeats], metric: Callable[[Floats], float], of_repeats: bool
) -> tuple[float, float]:
    """Percentiles of resampled ratios."""
    rng = np.random.default_rng(SEED)

    def resampled(repeats: Repeats) -> float:
        picked = [repeats[i] for i in rng.integers(len(repeats), size=len(repeats))] if of_repeats else repeats
        return math.log(np.mean([metric(rng.choice(repeat, len(repeat))) for repeat in picked]))

    logs = [sum(map(resampled, above)) - sum(map(resampled, below)) for _ in range(RESAMPLES)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.exp(np.percentile(logs, [tail, 100 - tail]))
    return float(low), float(high)


def covered(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """Share of intervals that cover 1, by what is compared, metric and kind of interval; ``points`` are how many."""
    rows = []
    for name, (column, metric) in METRICS.items():
        for compared, above, below in pairs(observed(ours, column), observed(theirs, column)):
            intervals = {
                "student": student(above, below, metric),
                "repeats and users": bootstrap(above, below, metric, of_repeats=True),
                "users": bootstrap(above, below, metric, of_repeats=False),
            }
            rows.append(
                {"compared": compared, "metric": name}
                | {kind: low <= 1 <= high for kind, (low, high) in intervals.items()}
            )
    table = pd.DataFrame(rows)
    by = table.groupby(["compared", "metric"], sort=False)
    return by.mean().assign(points=by.size())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("others", type=Path)
    options = parser.parse_args()
    for path in (options.records, options.others):
        if not path.exists():
            parser.error(f"there is nothing at {path}")
    table = covered(load(options.records), load(options.others))
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
