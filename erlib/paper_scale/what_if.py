"""What if: every way to serve one model on some H100s, simulated under one load and one service level; the best first.

Step times are those of the tables (:mod:`erlib.paper_scale.steptimes`), KV caches all the memory that weights leave,
prompts and answers one paper's. Requests come as a Poisson process. Where a simulation is known to be too good, and by
how much, :mod:`erlib.paper_scale.cited` says; no design here gets a margin for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from erlib.config import ConfigError, Dtype, Mix, Paper, Profile
from erlib.engines import llama
from erlib.load import metrics
from erlib.machine import processes
from erlib.machine.progress import Bar
from erlib.paper_scale import designs, service_levels, setups, steptimes
from erlib.paper_scale.batching import CannotServe, System
from erlib.paper_scale.designs import PRECISION, Design, Seen
from erlib.paper_scale.steptimes import OutOfRange, Table
from erlib.workload import prompts

FORMATS: dict[Dtype, tuple[Dtype, ...]] = {
    "fp16": ("fp16",), "fp8": ("fp8",), "int8": ("int8", "fp16"), "int4": ("fp16",),
}  # fmt: skip
"""Weights, and the KV caches that there are step times for."""
_CLUSTERS = 8


@dataclass(frozen=True)
class Question:
    """What is asked."""

    model: str
    """Of ``data/llama_shapes.yaml``."""
    gpus: int
    requests_per_s: float
    ttft_s: float = service_levels.TTFT_S
    """Bound of its p99, as the next."""
    tpot_s: float = service_levels.TPOT_S
    lengths: Paper = "p2"
    """Whose prompts and answers."""
    spread: Mix = "uniform"
    """Of the requests over the experts, where each has a server of its own."""
    slots: int = 256
    """Sequences that an engine runs at a time, at most."""
    adapters_slower: float = 1.25
    """Steps of engines with adapters, times those without: an assumption."""
    window_s: float = 60.0
    """For how long requests come."""

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= _CLUSTERS:
            raise ConfigError(f"1 to {_CLUSTERS} GPUs, not {self.gpus}: there are prompts of {_CLUSTERS} clusters")
        numbers = (self.requests_per_s, self.ttft_s, self.tpot_s, self.slots, self.adapters_slower, self.window_s)
        if not all(number > 0 for number in numbers):
            raise ConfigError("rates, latencies, slots, factors and windows must be more than 0")


class Way(NamedTuple):
    """One way to serve."""

    design: Design
    width: int
    """GPUs of an engine."""


def ways(question: Question, profile: Profile) -> dict[str, Way]:
    """Every way for which there are step times, by name; those whose weights leave no room are left out.

    Raises
    ------
    ConfigError
        If there is none.
    """
    found: dict[str, Way] = {}
    limit = profile.workload.p2_max_output_tokens if question.lengths == "p2" else None
    for dtype, kv_dtype, width in _forms(question):
        n = question.gpus // width
        try:
            kv_tokens = llama.most_kv_tokens(question.model, dtype, kv_dtype, width)
            steps = _steps(question.model, dtype, kv_dtype, width)
        except (ConfigError, OutOfRange):
            continue
        name = f"{n} × {dtype.upper()} TP{width}" + (f", KV {kv_dtype.upper()}" if kv_dtype != dtype != "int4" else "")
        slots = min(question.slots, int(steps.limits.batch))
        routed = System(name, "expert_router", steps, n, slots, kv_tokens, limit)
        one = replace(routed, routing="replicas" if n > 1 else "direct")
        found[f"{name}, one model"] = Way(Design(one), width)
        if n > 1:
            found[f"{name}, an expert each"] = Way(Design(routed), width)
        if dtype == "fp16":
            slower = question.adapters_slower
            every = setups.slower(replace(routed, adapters=True), slower)
            found[f"{name}, {_CLUSTERS} adapters each"] = Way(Design(every, slower=slower), width)
    if not found:
        raise ConfigError(
            f"no step times for {question.model} on {question.gpus} GPUs; data/h100_step_times.parquet has "
            f"{', '.join(sorted(_known()['model'].unique()))}"
        )
    return found


def answered(question: Question, profile: Profile, workers: int = 2) -> pd.DataFrame:
    """Every way to serve, the one that carries most first.

    Returns
    -------
    DataFrame
        ``design``; ``gpus`` that it uses; ``most_requests_per_s`` within the service level (found within
        :data:`~erlib.paper_scale.designs.PRECISION`); ``headroom``, that over what is asked; ``bottleneck``, the
        latency that breaks first; ``ttft_p99_s``, ``tpot_p99_s`` at the rate that is asked; ``tokens_per_gpu_hour``
        and ``price_per_million_tokens`` at the most.

    Raises
    ------
    ConfigError
        If there are no step times for the question.
    """
    with processes.pool(workers) as pool:
        jobs = {pool.submit(_answer, question, profile, name): name for name in ways(question, profile)}
        rows = [job.result() for job in Bar(jobs, desc="designs", unit="design")]
    return pd.DataFrame(rows).sort_values("most_requests_per_s", ascending=False, kind="stable", ignore_index=True)


def verdict(question: Question, table: pd.DataFrame) -> str:
    """What follows from :func:`answered`, in a sentence or two."""
    best = table.iloc[0]
    level = f"p99 TTFT {question.ttft_s:g} s and TPOT {question.tpot_s:g} s"
    if not best["most_requests_per_s"]:
        return f"No design serves even a lone request within {level}: ask for less, or for another model."
    able = table[table["headroom"] >= 1]
    if able.empty:
        return (
            f"No design carries {question.requests_per_s:g} requests/s within {level}: the most is "
            f"{best['most_requests_per_s']:.3g}, by {best['design']}."
        )
    ties = able[able["most_requests_per_s"] * PRECISION >= best["most_requests_per_s"]]
    others = f"; not told from it: {', '.join(ties['design'][1:])}" if len(ties) > 1 else ""
    return (
        f"Most is carried by {best['design']}: {best['most_requests_per_s']:.3g} requests/s within {level}, "
        f"{best['headroom']:.3g} times what is asked, limited by {best['bottleneck']}{others}. "
        f"{len(able)} of {len(table)} designs carry what is asked."
    )


def _known() -> pd.DataFrame:
    files: list[Path] = [steptimes.TABLE, setups.BESIDE]
    columns = ["model", "dtype", "kv_dtype", "tensor_parallel"]
    return pd.concat([pd.read_parquet(file, columns=columns) for file in files]).drop_duplicates()


def _forms(question: Question) -> Iterator[tuple[Dtype, Dtype, int]]:
    widths = [width for width in (1, 2, 4, 8) if width <= question.gpus]
    for (dtype, caches), width in itertools.product(FORMATS.items(), widths):
        for kv_dtype in caches:
            yield dtype, kv_dtype, width


def _steps(model: str, dtype: Dtype, kv_dtype: Dtype, width: int) -> Table:
    try:
        return Table(model, dtype, kv_dtype, width)
    except OutOfRange:
        return Table(model, dtype, kv_dtype, width, setups.BESIDE)


def _answer(question: Question, profile: Profile, name: str) -> dict[str, object]:
    design, width = ways(question, profile)[name]
    pool = setups.workload(profile, question.lengths)
    bounds = {"TTFT": question.ttft_s, "TPOT": question.tpot_s}

    def seen(n: int) -> Seen:
        drawn = [  # where there are fewer servers than clusters, neighbours share one
            prompt._replace(cluster=prompt.cluster * design.system.instances // pool.n_clusters)
            for prompt in prompts.draw(pool, n, question.spread, profile.seed, 0)
        ]
        starts_s = np.random.default_rng([profile.seed, n]).uniform(0, question.window_s, n).tolist()
        return designs.see(design, drawn, drawn, starts_s)

    def excess(found: Seen) -> dict[str, float]:
        """Each p99 over its bound."""
        latencies = {"TTFT": found.ttft_s, "TPOT": found.tpot_s}
        return {what: metrics.p99(its) / bounds[what] for what, its in latencies.items() if len(its)}

    about: dict[str, object] = {"design": name, "gpus": design.gpus * width}
    try:
        most = service_levels.most(lambda n: max(excess(seen(n)).values()) <= 1, PRECISION)
        broken = excess(seen(max(1, round(most * PRECISION) + 1)))
        asked = seen(max(1, round(question.requests_per_s * question.window_s)))
    except CannotServe as error:
        return {**about, "most_requests_per_s": 0.0, "headroom": 0.0, "bottleneck": str(error)}
    rate = most / question.window_s
    tokens_per_gpu_hour = seen(most).tokens / question.window_s * 3600 / question.gpus if most else 0.0
    price = profile.sensitivity.gpu_hour / tokens_per_gpu_hour * 1e6 if most else np.nan
    return {
        **about,
        **{"most_requests_per_s": rate, "headroom": rate / question.requests_per_s},
        **{"bottleneck": max(broken, key=lambda what: broken[what])},
        **{"ttft_p99_s": metrics.p99(asked.ttft_s), "tpot_p99_s": metrics.p99(asked.tpot_s)},
        **{"tokens_per_gpu_hour": tokens_per_gpu_hour, "price_per_million_tokens": price},
    }
