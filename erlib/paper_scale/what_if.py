"""The most that every way to serve carries, found by search: one question, the best design first.

Where :mod:`erlib.paper_scale.exploring` simulates only what is asked, this looks for what is carried at most, from the
bound downwards that arithmetic gives (:mod:`erlib.paper_scale.capacity`): beyond it a queue grows as long as the load
lasts, whatever a short simulation says. Where a simulation is known to be too good, and by how much,
:mod:`erlib.paper_scale.known_error` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from erlib.config import ConfigError, Profile
from erlib.machine import processes
from erlib.machine.progress import Bar
from erlib.paper_scale import exploring, known_error, questions, service_levels
from erlib.paper_scale.batching import CannotServe
from erlib.paper_scale.designs import PRECISION
from erlib.paper_scale.exploring import Effort
from erlib.paper_scale.questions import Question
from erlib.paper_scale.steptimes import OutOfRange

_DRAWS = 3
_WINDOW_S = 30.0
_MOST_REQUESTS = 20_000
_PARTS = 100
"""Of what arithmetic allows: in such parts the most is searched for."""


def answered(question: Question, profile: Profile, workers: int = 2) -> pd.DataFrame:
    """Every way to serve, the one that carries most first.

    Returns
    -------
    DataFrame
        ``design``; ``kind``; ``gpus`` that it uses; ``most`` within the service level (requests per second, or users;
        found within :data:`~erlib.paper_scale.designs.PRECISION`), with ``most_low`` and ``most_high``, the 90 %
        interval of its mean over draws, widened by the known error of the simulation's throughput; ``headroom``, `most`
        over what is asked; ``bottleneck``, the latency that breaks first, or what fills up; ``ttft_p99_s``,
        ``tpot_p99_s`` at the load that is asked, each with the 90 % interval of its mean over draws (``_low``,
        ``_high``);
        ``tokens_per_gpu_hour`` and ``price_per_million_tokens`` at the most.

    Raises
    ------
    ConfigError
        If there are no step times for the question, or no design can serve such requests at all.
    """
    errors = known_error.between(known_error.known_error(), questions.throughput_error(question))
    with processes.pool(workers) as pool:
        names = questions.ways(question, profile)
        jobs = {pool.submit(_answer, question, profile, name, errors): name for name in names}
        rows = [job.result() for job in Bar(jobs, desc="designs", unit="design")]
    if not any("price_per_million_tokens" in row for row in rows):
        raise ConfigError(f"no design can serve this: {rows[0]['bottleneck']}")
    return pd.DataFrame(rows).sort_values("most", ascending=False, kind="stable", ignore_index=True)


def verdict(question: Question, table: pd.DataFrame) -> str:
    """What follows from :func:`answered`, in a sentence or two."""
    best = table.iloc[0]
    level = f"p99 TTFT {question.ttft_s:g} s and TPOT {question.tpot_s:g} s"
    if not best["most"]:
        return f"No design serves even a lone request within {level}: ask for less, or for another model."
    able = table[table["headroom"] >= 1]
    if able.empty:
        return f"No design carries {question.load} within {level}: the most is {best['most']:.3g}, by {best['design']}."
    ties = able[able["most"] * PRECISION >= best["most"]]
    others = f"; not told from it: {', '.join(ties['design'][1:])}" if len(ties) > 1 else ""
    sure = able["most_low"] / able["most"] * able["headroom"] > 1
    unit = "users" if question.users else "requests/s"
    return (
        f"Most is carried by {best['design']}: {best['most']:.3g} {unit} within {level}, "
        f"{best['headroom']:.3g} times what is asked, limited by {best['bottleneck']}{others}. "
        f"{len(able)} of {len(table)} designs carry what is asked, {sure.sum()} of them even at the lower end of the "
        "interval."
    )


def _answer(question: Question, profile: Profile, name: str, errors: tuple[float, float]) -> dict[str, object]:
    way = questions.ways(question, profile)[name]
    bound = exploring.bound(question, profile, way)
    at_most = exploring.room(question, bound)
    unit = 1 / question.users if question.users else (at_most or 1.0) / _PARTS
    about: dict[str, object] = {"design": name, "kind": way.kind, "gpus": way.gpus}

    def seen(faster: float, draw: int) -> dict[str, float]:
        effort = exploring.effort_for(question, bound, faster, _MOST_REQUESTS)
        if question.own_arrivals is not None:
            effort = Effort(len(question.own_arrivals))
        elif not question.users:
            window_s = question.window_s or _WINDOW_S
            requests = max(1, round(faster * question.rate_per_s * window_s))
            if not question.window_s:
                requests = min(max(requests, 2 * effort.requests), 2 * _MOST_REQUESTS)
            effort = Effort(requests)
        return exploring.observe(question, profile, way, effort, draw, faster)

    def keeps(draw: int) -> Callable[[int], bool]:
        return lambda n: max(exploring.over_bounds(question, seen(n * unit, draw)).values()) <= 1

    try:
        limit = math.floor(at_most / unit + 1e-9)
        most = [service_levels.most(keeps(0), PRECISION, limit)]
        for draw in range(1, _DRAWS):
            most.append(service_levels.most(keeps(draw), PRECISION, min(limit, math.ceil(most[0] * PRECISION))))
        typical = round(float(np.mean(most)))
        broken = {bound.limited_by: 1.0}
        if most[0] < limit or not limit:
            broken |= exploring.over_bounds(question, seen(math.ceil(max(1, most[0]) * PRECISION) * unit, 0))
        asked = exploring.over_draws(question, [seen(1.0, draw) for draw in range(_DRAWS)])
        tokens_per_s = seen(typical * unit, 0)["tokens_per_s"] if typical else 0.0
    except (CannotServe, OutOfRange) as error:
        return {**about, "most": 0.0, "headroom": 0.0, "bottleneck": str(error)}
    per_unit = unit * (question.users or question.rate_per_s)
    low, high = exploring.interval([n * per_unit for n in most])
    tokens_per_gpu_hour = tokens_per_s * 3600 / question.gpus
    return {
        **about,
        **{"most": float(np.mean(most)) * per_unit, "most_low": low * errors[0], "most_high": high * errors[1]},
        **{"headroom": float(np.mean(most)) * unit, "bottleneck": max(broken, key=broken.__getitem__)},
        **{name: asked[name] for p99 in ("ttft_p99_s", "tpot_p99_s") for name in (p99, f"{p99}_low", f"{p99}_high")},
        "tokens_per_gpu_hour": tokens_per_gpu_hour,
        "price_per_million_tokens": question.gpu_hour / tokens_per_gpu_hour * 1e6 if typical else np.nan,
    }
