"""What is known of the simulation's error, for intervals of its answers.

From the comparison that docs/results.md tells of (:mod:`erlib.paper_scale.cited`): published measurements beside the
same conditions, simulated with NVIDIA's kernel times for the H100. It takes a minute, so the reference run's is read
where it is at hand.
"""

from __future__ import annotations

import functools

import pandas as pd

from erlib import cache, paths, provenance
from erlib.paper_scale import cited, setups, validation

REFERENCE = paths.REFERENCE / "laptop" / "simulated-hardware" / "workbench" / "published_points.csv"
"""What notebook 07 writes."""
THROUGHPUT, TPOT, TTFT = "throughput", "TPOT", "TTFT"
OPEN = ", open loop"
"""Behind a metric: where arrivals do not wait, near saturation."""
SHEET = ", roofline"
"""Behind a metric: priced from data sheets (A100 with FP16 weights, H200 with FP8), in static batches."""


@functools.cache
def known_error() -> pd.DataFrame:
    """By how much published values differ from simulated ones.

    Returns
    -------
    DataFrame
        One row per metric (index, :data:`THROUGHPUT`, :data:`TPOT` and :data:`TTFT` of users who wait for answers, the
        latter two also with :data:`OPEN`; :data:`THROUGHPUT` and :data:`TTFT` with :data:`SHEET`): ``points``,
        ``smallest`` and ``largest`` ratio of published to simulated, ``low`` and ``high``, between which it is with
        90 % probability (NaN where there are too few points; with :data:`SHEET`, the smallest and the largest).
    """
    beside = pd.read_csv(REFERENCE) if REFERENCE.exists() else _beside()
    sheet = [THROUGHPUT + SHEET, TTFT + SHEET]
    mine = beside[beside["group"].isin([THROUGHPUT, TPOT, TTFT, TPOT + OPEN, TTFT + OPEN, *sheet])]
    truth = (1 / mine["ratio"]).groupby(mine["group"])
    table = truth.agg(points="count", smallest="min", largest="max")
    table = table.join(cited.intervals(mine, "group", "benchmark")[["low", "high"]])
    table.loc[sheet, ["low", "high"]] = table.loc[sheet, ["smallest", "largest"]].to_numpy()
    return table


def _beside() -> pd.DataFrame:
    own = provenance.code_digest("paper_scale/cited.py", "paper_scale/validation.py")
    digest = cache.digest(setups.code(), own, cited.POINTS, validation.PUBLISHED)
    file = paths.CACHE / "known_error" / f"{digest}.parquet"
    if (kept := cache.recalled(file, pd.read_parquet, "known error")) is not None:
        return kept
    beside = cited.beside_published(validation.published(weights=("parameters",)))
    with cache.writing(file) as partial:
        beside.to_parquet(partial)
    return beside


def between(errors: pd.DataFrame, metric: str) -> tuple[float, float]:
    """The 90 % interval of truth over prediction, NaN if there is none."""
    if metric not in errors.index:
        return float("nan"), float("nan")
    return float(errors.loc[metric, "low"]), float(errors.loc[metric, "high"])
