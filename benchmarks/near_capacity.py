"""Is the simulation right where somebody decides by it? Systems near their capacity on the real stack, beside it.

Each case is a configuration of the papers on emulated H100s behind the real clients, NGINX, gateways and Tritons, in
slow motion (:mod:`erlib.paper_scale.emulation`), with one length of all answers, one mix, perhaps replicas. Nothing of
the simulation was fitted to any of them. Requests come as a Poisson process for some seconds, and a case *carries* them
while the p99 of TTFT and TPOT keep to a service level. The simulation says how many those are; measured are shares of
that number, near enough to see whether it is so within ten per cent; and if all of them are carried, or none, more or
fewer until one is not, or is. Prediction and measurement have the same prompts and the same moments, so that what is
judged is the simulation and not a draw: another number of requests is another draw, of which more may wait less.

    python -m benchmarks.near_capacity [--json FILE] [--csv FILE] [--cases A B ...] [--levels 0.9 1.1]

Six of the 23 cases, with what was added to them, took 24 minutes on two quiet cores; what is measured is found again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import numpy as np
import pandas as pd

from erlib import config, load
from erlib.config import Mix, Profile
from erlib.load import metrics
from erlib.load.experiments import Series
from erlib.machine.progress import Bar
from erlib.paper_scale import batching, clock, emulation, service_levels, setups
from erlib.serving import wire
from erlib.workload import prompts
from erlib.workload.prompts import Workload

WINDOW_S = 4.0
LEVEL_S = {"ttft": 0.5, "tpot": 0.2}
"""Bounds of the p99. That of TTFT is tighter than MLPerf's: in so short a window, two seconds of queue mean more."""
STEP = 0.15
"""By how much more, or less, of what is predicted is asked for next, where no capacity lies between the levels."""
MOST_STEPS = 3
WALL_TOKENS_PER_S = 1000
LEAST_SLOW_MOTION = 8.0
"""Slow motion is chosen so that two cores carry the tokens, and what gateways, servers and users take of each request
is small beside the engines' time."""


class Case(NamedTuple):
    """One system under one load."""

    config: str
    mix: Mix
    tokens: int
    added: int = 0
    """Replicas of the hottest experts."""


CASES = [
    *(Case(name, "uniform", tokens) for tokens in (24, 96) for name in ("p1.A", "p1.B", "p1.C", "p1.R")),
    *(Case(name, "uniform", tokens) for tokens in (24, 96) for name in ("p2.A", "p2.B", "p2.C", "p2.D")),
    *(Case(name, "normal", tokens) for name, tokens in (("p1.B", 24), ("p1.B", 96), ("p1.C", 24))),
    *(Case("p2.D", "normal", tokens, added) for tokens in (24, 96) for added in (0, 2)),
]


def workload(profile: Profile, case: Case) -> Workload:
    """Prompts of the case's paper with answers of its length."""
    pool = emulation.workload(profile, config.paper_of(case.config))
    return replace(pool, frame=pool.frame.assign(max_tokens=case.tokens, end_id=wire.NEVER_STOP))


class Prediction:
    """What the simulation says of a case."""

    def __init__(self, profile: Profile, case: Case) -> None:
        self.case, self._profile = case, profile
        self.pool = workload(profile, case)
        shares = prompts.mix_shares("normal", self.pool.n_clusters, self.pool.sigma)
        self.added = setups.hottest(shares, case.added)
        limit = profile.workload.p2_max_output_tokens if case.config.startswith("p2") else None
        self._system = replace(batching.paper_system(case.config, limit), added=self.added)
        self.most = service_levels.most(lambda n: keeps(self.p99_s(n)), 1.01)
        """Requests within the window that it carries."""

    def p99_s(self, n: int) -> dict[str, float]:
        """P99 of TTFT and TPOT with `n` requests."""
        drawn = prompts.draw(self.pool, n, self.case.mix, self._profile.seed, 0)
        comes_s = prompts.moments_s(n, WINDOW_S, self._profile.seed, 0)
        return dict(
            zip(
                LEVEL_S,
                map(metrics.p99, clock.trace(self._system, drawn, False, starts_s=comes_s).latencies_s()),
                strict=True,
            )
        )


def keeps(p99_s: dict[str, float]) -> bool:
    """Whether both latencies keep to the level."""
    return all(p99_s[name] <= bound for name, bound in LEVEL_S.items())


def plan(profile: Profile, predictions: Sequence[Prediction], levels: Sequence[float]) -> list[Series]:
    """What to measure."""
    series = []
    for one in predictions:
        case = one.case
        slow_motion = max(LEAST_SLOW_MOTION, math.ceil(2 * one.most * case.tokens / WINDOW_S / WALL_TOKENS_PER_S) / 2)
        system = emulation.system(profile, case.config, slow_motion)
        n = len(system.servers) + len(one.added)
        system = replace(system, servers=system.servers[:1] * n, added=one.added)
        users = sorted({asked(one.most, level) for level in levels})
        paper = config.paper_of(case.config)
        series.append(Series(paper, "near_capacity", system, one.pool, users, 1, [case.mix], window_s=WINDOW_S))
    return series


def asked(most: int, level: float) -> int:
    """Requests of a point."""
    return max(1, round(level * most))


def measured(profile: Profile, one: Prediction, series: Series) -> pd.DataFrame:
    """One row per level, as the records have it, beside the prediction of the same requests."""
    records, rows = load.run(profile, [series]), []
    for users, its in records.groupby("users"):
        found = {
            "ttft": metrics.p99((its["t_first_ns"] - its["t_send_ns"]) * 1e-9),
            "tpot": metrics.p99((its["t_last_ns"] - its["t_first_ns"]) * 1e-9 / (its["output_tokens"] - 1)),
        }
        predicted = one.p99_s(int(users))
        rows.append(
            {
                **one.case._asdict(),
                **{"predicted_most": one.most, "requests": users, "of_predicted": users / one.most},
                **{"slow_motion": series.system.slow_motion, "lost_time": its["lost_time"].iloc[0]},
                **{f"{name}_p99_s": value for name, value in found.items()},
                **{f"{name}_p99_predicted_s": value for name, value in predicted.items()},
                **{"carried": keeps(found), "carried_predicted": keeps(predicted)},
            }
        )
    return pd.DataFrame(rows)


def bracketed(profile: Profile, one: Prediction, levels: Sequence[float]) -> pd.DataFrame:
    """A case measured at `levels`, and beyond them until it carries one and not the other."""
    levels = sorted(levels)
    for _ in range(MOST_STEPS + 1):
        (series,) = plan(profile, [one], levels)
        rows = measured(profile, one, series)
        if rows["carried"].nunique() > 1:
            break
        levels = [*levels, levels[-1] + STEP] if rows["carried"].all() else [levels[0] - STEP, *levels]
    return rows


def judge(rows: pd.DataFrame) -> dict[str, object]:
    """What the issue of trust comes to.

    Returns
    -------
    dict
        ``carried_rightly``: points that keep to the level, or not, as predicted; ``rate_error``: the rate that the
        measured requests show as carried over the rate that the predicted ones do, less 1, and how many are
        ``within_10_percent``; ``between_90_and_110_percent``: cases that carry 0.9 of what is carried by a search with
        other draws and not 1.1; ``ttft_error``: measured over predicted p99 TTFT, less 1, at all points; ``pairs`` of
        designs for the same load, and how many of them were put in the right order; ``regrets``, what is lost by
        following the simulation where it was wrong.
    """
    cases = rows.groupby(list(Case._fields), sort=False)
    most = {case: _most(its) for case, its in cases}
    between = {case: 0.9 <= one.seen / one.searched <= 1.1 for case, one in most.items()}
    pairs, right, regrets = 0, 0, []
    for a, b in itertools.combinations(most, 2):
        same_load = (a[0][:2], a[1], a[2]) == (b[0][:2], b[1], b[2])
        if not same_load or most[a].searched == most[b].searched:
            continue
        pairs += 1
        chosen, other = (a, b) if most[a].searched > most[b].searched else (b, a)
        is_right = most[chosen].seen >= most[other].seen
        right += is_right
        if not is_right:
            regrets.append(1 - most[chosen].seen / most[other].seen)
    ratio = rows["ttft_p99_s"] / rows["ttft_p99_predicted_s"] - 1
    rate = np.array([one.seen / one.predicted - 1 for one in most.values()])
    return {
        **{"cases": len(most), "within_10_percent": int((np.abs(rate) <= 0.1).sum()), "rate_error": _quantiles(rate)},
        "between_90_and_110_percent": sum(between.values()),
        "not_between": [" ".join(map(str, case)) for case, is_so in between.items() if not is_so],
        **{"points": len(rows), "carried_rightly": int((rows["carried"] == rows["carried_predicted"]).sum())},
        **{"ttft_within_25_percent": int((ratio.abs() <= 0.25).sum())},
        "ttft_error": _quantiles(ratio.to_numpy()),
        **{"pairs": pairs, "named_rightly": right, "regrets": [round(r, 3) for r in regrets]},
        "most_lost_time": float(rows["lost_time"].max()),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{q:g}": round(float(np.quantile(values, q)), 3) for q in (0, 0.1, 0.5, 0.9, 1)}


class Most(NamedTuple):
    """Requests that a case carries."""

    searched: float
    """By simulation, whatever the number of requests and so the draw."""
    predicted: float
    """By simulation of what was measured, interpolated between the points."""
    seen: float
    """As measured, in the same way; where all were carried, or none, the outermost point: at least, or at most."""


def _most(its: pd.DataFrame) -> Most:
    return Most(float(its["predicted_most"].iloc[0]), *(_carried(its, which) for which in ("_predicted", "")))


def _carried(its: pd.DataFrame, which: str) -> float:
    worst = np.maximum(*(its[f"{name}_p99{which}_s"] / bound for name, bound in LEVEL_S.items()))
    return float(np.interp(0.0, np.maximum.accumulate(np.log(worst)), its["requests"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    numbers = range(len(CASES))
    parser.add_argument("--cases", type=int, nargs="+", choices=numbers, default=numbers, help="these alone, from 0")
    parser.add_argument(
        "--levels", type=float, nargs="+", default=[0.9, 1.1], help="of what is predicted to be carried"
    )
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    profile = config.load_profile(options.profile, config.read_overrides(options.set))
    cases = [CASES[number] for number in options.cases]
    predictions = [Prediction(profile, case) for case in Bar(cases, "predictions", unit="case")]
    load.run(profile, plan(profile, predictions, options.levels))
    rows = pd.concat([bracketed(profile, one, options.levels) for one in predictions], ignore_index=True)
    if options.csv:
        rows.round(5).to_csv(options.csv, index=False)
    print(rows.round(3).to_string())
    verdict = judge(rows)
    print(json.dumps(verdict, indent=1))
    if options.json:
        options.json.write_text(json.dumps(verdict, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
