"""One question answered in a second or two: every design that fits, simulated at the load that is asked.

What :mod:`erlib.paper_scale.what_if` finds by searching, the most that each design carries, is here bounded by
arithmetic (:mod:`erlib.paper_scale.capacity`). All latencies are the simulation's (:mod:`erlib.paper_scale.clock`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from erlib.config import ConfigError, Profile
from erlib.load import metrics
from erlib.machine import processes
from erlib.paper_scale import capacity, clock, known_error, questions, service_levels
from erlib.paper_scale.batching import CannotServe
from erlib.paper_scale.capacity import Capacity
from erlib.paper_scale.questions import DRAWS, Question, Way
from erlib.paper_scale.steptimes import OutOfRange
from erlib.workload.prompts import Floats, Prompt

METRICS = (
    "ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "response_p99_s", "tokens_per_s", "requests_per_s",
    "goodput_per_s", "within",
)  # fmt: skip
"""What is observed; ``within``: the share of the requests whose TTFT and TPOT are both within their bounds."""
FRONTIER = (0.2, 0.45, 0.7, 0.9, 1.0)
"""Loads of the frontier, as shares of what arithmetic says is carried at most."""
_BUDGET = 16_000
"""Requests that an answer may simulate: some one and a half seconds of a core."""
_LEAST, _MOST, _MOST_OF_FRONTIER = 400, 4_000, 1_200
"""Requests of one simulation."""
RESPONSES = 4
"""For how many answers' time requests come."""
_FEWEST_DRAWS = 3
LEVEL = 0.9
"""Probability of an interval."""


# --- one design, one draw -----------------------------------------------------------------------------------------


class Effort(NamedTuple):
    """How much is simulated of a design."""

    requests: int
    """How many come where nobody waits; of so many prompts, users ask one after the other."""
    until_s: float = 0.0
    """For how long users ask again."""
    turns: int = 0
    """How often each may."""


def observe(
    question: Question, profile: Profile, way: Way, effort: Effort, draw: int = 0, faster: float = 1.0
) -> dict[str, float]:
    """Simulate one design at the load that is asked, or one that is so many times `faster`.

    What is told is of the last two thirds of the time in which requests come; all of them are answered. Prompts,
    arrivals and the order of users are another's in each draw.

    Returns
    -------
    dict
        :data:`METRICS`; ``slots_used`` and ``kv_used``, the busiest server's, at most, as shares of what it has.

    Raises
    ------
    CannotServe
        If a request can never be served.
    OutOfRange
        If a step is larger than the step times know.
    """
    system = way.system
    asked = questions.for_experts(question, questions.drawn(question, profile, effort.requests, draw), system)
    rng = np.random.default_rng([profile.seed, draw, len(asked)])
    goes_on: bool | Sequence[Sequence[Prompt]] = False
    if question.users is None:
        starts_s = _arrivals(question, len(asked), draw, rng) / faster
        until_s = float(starts_s[-1])
    else:
        users, until_s = max(1, round(question.users * faster)), effort.until_s
        starts_s = rng.uniform(0, until_s / max(RESPONSES, len(asked) / users), users)
        orders = np.array([rng.permutation(len(asked))[:users] for _ in range(effort.turns)]).T.tolist()
        goes_on = [[asked[other] for other in order] for order in orders]
        asked = asked[:users]
    seen = clock.trace(system, asked, goes_on, starts_s=starts_s.tolist(), until_s=until_s)
    return _summary(question, seen, until_s, faster)


def _arrivals(question: Question, n: int, draw: int, rng: np.random.Generator) -> Floats:
    trace = question.own_arrivals
    if trace is None:
        return rng.exponential(1 / question.rate_per_s, n).cumsum()
    comes_s = np.asarray(trace.arrival_s, float)[questions.stretch(trace, n, draw)]
    gaps_s = np.diff(comes_s, prepend=comes_s[0])
    gaps_s[gaps_s < 0] = 1 / question.rate_per_s  # where it begins anew
    return gaps_s.cumsum()


def _summary(question: Question, seen: clock.Trace, until_s: float, faster: float) -> dict[str, float]:
    since_s = until_s / 3
    stamps_ns = seen.token_ns()
    sent_s = np.array([request.sent_s for request in seen.requests])
    first_s, last_s = (np.array([its[place] for its in stamps_ns]) * 1e-9 for place in (0, -1))
    tokens = np.array([request.output_tokens for request in seen.requests])
    told = (sent_s >= since_s) & (sent_s <= until_s)
    ttft_s = (first_s - sent_s)[told]
    tpot_s = metrics.tpot_s(last_s - first_s, tokens)[told]
    several = tpot_s[tokens[told] > 1]
    good = (ttft_s <= question.ttft_s) & ~(tpot_s > question.tpot_s)
    came = np.concatenate(stamps_ns)
    streamed = ((came > since_s * 1e9) & (came <= until_s * 1e9)).sum()
    answered = ((last_s > since_s) & (last_s <= until_s)).sum()
    lasts_s = until_s - since_s
    came_per_s = told.sum() / lasts_s if question.users else question.rate_per_s * faster
    system = seen.servers[0].engine.system
    return {
        **{"ttft_mean_s": float(ttft_s.mean()), "ttft_p99_s": metrics.p99(ttft_s)},
        "tpot_mean_s": float(several.mean()) if len(several) else math.nan,
        "tpot_p99_s": metrics.p99(several) if len(several) else math.nan,
        "response_p99_s": metrics.p99((last_s - sent_s)[told]),
        **{"tokens_per_s": streamed / lasts_s, "requests_per_s": answered / lasts_s},
        **{"goodput_per_s": good.mean() * came_per_s, "within": float(good.mean())},
        "slots_used": max(max(its.sequences, default=0) for its in seen.servers) / system.batch_size,
        "kv_used": max(max(its.kv_blocks, default=0) / its.engine.kv_blocks_total for its in seen.servers),
    }


class _Job(NamedTuple):
    """A simulation of one design; see :func:`observe`."""

    design: str
    effort: Effort
    draw: int = 0
    faster: float = 1.0


def _observed(question: Question, profile: Profile, job: _Job) -> dict[str, float] | str:
    """:func:`observe` in a process that has nothing but the question; or why that cannot be."""
    way = questions.ways(question, profile)[job.design]
    try:
        return observe(question, profile, way, job.effort, job.draw, job.faster)
    except (CannotServe, OutOfRange) as error:
        return str(error)


# --- one question -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a question gets."""

    question: Question
    table: pd.DataFrame
    """A row per design, the best first: see :meth:`Explorer.answer`."""
    errors: pd.DataFrame
    """What is known of the simulation's error (:func:`erlib.paper_scale.known_error.known_error`)."""

    @property
    def best(self) -> pd.DataFrame:
        """The two best designs."""
        return self.table.head(2)


class Explorer:
    """Answers questions, one after the other, with processes and tables that stay; a context manager.

    Parameters
    ----------
    profile : Profile
        Gives the seed.
    workers : int
        Processes.
    """

    def __init__(self, profile: Profile, workers: int = 2):
        self.profile = profile
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Explorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its processes; the next question starts others."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _map(self, question: Question, jobs: Sequence[_Job]) -> list[dict[str, float] | str]:
        """What is observed in each job; or why that cannot be."""
        if self._pool is None:
            self._pool = processes.pool(self._workers)
        return list(self._pool.map(functools.partial(_observed, question, self.profile), jobs))

    def answer(self, question: Question) -> Answer:
        """The designs, first those that keep most requests within their bounds.

        Of these, first who has most headroom; where users wait for answers, who answers most.

        Returns
        -------
        Answer
            Its ``table``: ``design``, ``kind``, ``gpus`` that it uses; ``draws`` that were simulated (0: arithmetic
            alone says that others are better); means over draws of :data:`METRICS`, the two best designs' with
            ``<metric>_low`` and ``<metric>_high``, the 90 % interval of that mean; ``headroom`` (the most by arithmetic
            over what is asked), with ``headroom_low`` and ``headroom_high``, between which it is if the simulation's
            throughput errs as it does beside published measurements; ``limited_by``, what ends it; ``bottleneck``, the
            latency that is nearest to its bound; ``price_per_million_tokens`` (output tokens at the load that is asked,
            all GPUs); ``refused``, why a design cannot serve.

        Raises
        ------
        ConfigError
            If no design has step times, or none can serve such requests at all.
        """
        known = questions.ways(question, self.profile)
        bounds = self._bounds(question, known)
        errors = known_error.known_error()
        order = sorted(known, key=lambda name: -_expected(question, bounds[name]))
        efforts = {name: effort_for(question, bounds[name]) for name in order}
        requests = max(efforts[name].requests for name in order[:2])  # the same for all: draws are paired
        efforts = {name: its._replace(requests=requests) for name, its in efforts.items()}
        simulations = max(1, _BUDGET // max(requests, RESPONSES * (question.users or 0)))
        draws = next((n for n in (DRAWS, DRAWS - 1) if simulations >= 2 * (n - 1) + len(order)), _FEWEST_DRAWS)
        first = order[: max(2, simulations - 2 * (draws - 1))]
        found = dict(zip(first, self._map(question, [_Job(name, efforts[name]) for name in first]), strict=True))
        able = {name: [its] for name, its in found.items() if not isinstance(its, str)}
        refused = {name: its for name, its in found.items() if isinstance(its, str)}
        if not able:
            raise ConfigError(f"no design can serve this: {next(iter(refused.values()))}")
        best = sorted(able, key=lambda name: _rank(question, able[name][0], order.index(name)))
        again = [_Job(name, efforts[name], draw) for name in best[:2] for draw in range(1, draws)]
        for job, its in zip(again, self._map(question, again), strict=True):
            if not isinstance(its, str):
                able[job.design].append(its)
        ranked = best + [name for name in order if name not in able]
        rows = [
            _about(question, name, known[name], bounds[name], errors)
            | {"draws": len(able.get(name, [])), "refused": refused.get(name, "")}
            | over_draws(question, able.get(name, []))
            for name in ranked
        ]
        return Answer(question, pd.DataFrame(rows), errors)

    def frontier(self, question: Question, loads: Sequence[float] = FRONTIER) -> pd.DataFrame:
        """Every design under loads from little to more than it carries, one draw each.

        Parameters
        ----------
        question : Question
            How much it asks for does not matter, but for how.
        loads : sequence of float
            Shares of what each design carries at most, by arithmetic.

        Returns
        -------
        DataFrame
            One row per design and load: ``design``, ``kind``, ``gpus``, ``load`` (times what is asked), the
            :data:`METRICS`, ``goodput_per_gpu`` and ``on_frontier`` (no row has both more goodput per GPU and an
            earlier p99 TTFT).
        """
        known = questions.ways(question, self.profile)
        bounds = self._bounds(question, known)
        jobs = [
            _Job(name, effort_for(question, bounds[name], share * headroom, _MOST_OF_FRONTIER), faster=share * headroom)
            for name in known
            if (headroom := room(question, bounds[name])) > 0
            for share in loads
        ]
        rows = [
            {"design": job.design, "kind": known[job.design].kind, "gpus": known[job.design].gpus, "load": job.faster}
            | found
            for job, found in zip(jobs, self._map(question, jobs), strict=True)
            if not isinstance(found, str)
        ]
        if not rows:
            raise ConfigError("no design serves even one request within these bounds: ask for less")
        table = pd.DataFrame(rows)
        table["goodput_per_gpu"] = table["goodput_per_s"] / table["gpus"]
        return table.assign(on_frontier=service_levels.unbeaten(table["goodput_per_gpu"], table["ttft_p99_s"]))

    def _bounds(self, question: Question, known: Mapping[str, Way]) -> dict[str, Capacity]:
        return {name: bound(question, self.profile, way) for name, way in known.items()}


def bound(question: Question, profile: Profile, way: Way) -> Capacity:
    """What a design carries at most, by arithmetic."""
    asked = questions.drawn(question, profile, _LEAST, 0)
    share = questions.shares(question, profile, way.system.instances)
    return capacity.capacity(way.system, asked, share, question.tpot_s)


def room(question: Question, bound: Capacity) -> float:
    """The most over what is asked; of users, also those who wait for a first token for no longer than they may."""
    if not question.users:
        return bound.requests_per_s / question.rate_per_s
    return (bound.users + bound.requests_per_s * question.ttft_s) / question.users


def _expected(question: Question, bound: Capacity) -> float:
    """Sorts designs before they are simulated: requests per second."""
    if not question.users:
        return bound.requests_per_s
    return min(question.users / _response_s(bound, question.users), bound.requests_per_s)


def _rank(question: Question, seen: Mapping[str, float], place: int) -> tuple[float, float]:
    return -round(seen["within"], 2), -seen["goodput_per_s"] if question.users else place


def _response_s(bound: Capacity, users: float) -> float:
    """How long an answer takes with so many users, by Little's law: all of them are under way."""
    rate, longest_s = bound.responses_s[-1]
    waits_s = users / rate if rate else longest_s
    return next((its for rate, its in bound.responses_s if rate * its >= users), max(longest_s, waits_s))


def effort_for(question: Question, bound: Capacity, faster: float = 1.0, most: int = _MOST) -> Effort:
    """As many requests, or as long, as the load needs to settle."""
    if question.users is None:
        rate_per_s = faster * question.rate_per_s
        under_way = rate_per_s * bound.response_s(rate_per_s)
        return Effort(round(min(max(RESPONSES * under_way, _LEAST), most)))
    users = max(1, round(faster * question.users))
    responses = max(RESPONSES, _LEAST / users)
    until_s = responses * _response_s(bound, users)
    return Effort(max(users, _LEAST), until_s, 4 + 2 * round(responses))


def _about(question: Question, name: str, way: Way, bound: Capacity, errors: pd.DataFrame) -> dict[str, object]:
    headroom = room(question, bound)
    low, high = known_error.between(errors, questions.throughput_error(question))
    return {
        **{"design": name, "kind": way.kind, "gpus": way.gpus, "form": " ".join(map(str, way.form))},
        **{"headroom": headroom, "headroom_low": headroom * low, "headroom_high": headroom * high},
        "limited_by": bound.limited_by,
    }


def over_draws(question: Question, draws: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means of what was observed, and the 90 % interval of each; price and bottleneck."""
    if not draws:
        return {}
    frame = pd.DataFrame(draws)
    frame["price_per_million_tokens"] = question.gpus * question.gpu_hour / 3600 / frame["tokens_per_s"] * 1e6
    mean = frame.mean().to_dict()
    ends = {name: interval(frame[name]) for name in frame}
    excess = over_bounds(question, mean)
    return {
        **mean,
        **{
            f"{name}{end}": its for name, pair in ends.items() for end, its in zip(("_low", "_high"), pair, strict=True)
        },
        "bottleneck": max(excess, key=excess.__getitem__),
    }


def over_bounds(question: Question, seen: Mapping[str, float]) -> dict[str, float]:
    """Each p99 over its bound; without that of TPOT, where all answers are one token long."""
    p99 = {"TTFT": seen["ttft_p99_s"] / question.ttft_s, "TPOT": seen["tpot_p99_s"] / question.tpot_s}
    return {what: its for what, its in p99.items() if not math.isnan(its)}


def interval(draws: Sequence[float] | pd.Series) -> tuple[float, float]:
    """The interval of a mean over draws, in which it is with probability :data:`LEVEL`; NaN if it cannot be told."""
    if len(draws) < 2 or not np.isfinite(draws).all():
        return math.nan, math.nan
    half = stats.t.ppf((1 + LEVEL) / 2, len(draws) - 1) * stats.sem(draws)
    return max(0.0, float(np.mean(draws) - half)), float(np.mean(draws) + half)
