"""What is asked of a deployment, every way to serve it for which there are step times, and the requests that come.

Which step times there are, :mod:`erlib.paper_scale.gpus` knows. KV caches have all the memory that weights leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from erlib.config import ConfigError, Dtype, Mix, Paper, Profile
from erlib.engines import llama
from erlib.paper_scale import gpus, known_error, service_levels, setups
from erlib.paper_scale.batching import System
from erlib.paper_scale.gpus import Form, Gpu
from erlib.workload import prompts, traces
from erlib.workload.prompts import Prompt, Workload
from erlib.workload.traces import Trace

CLUSTERS = 8
IN_TURN, ROUTED, ADAPTERS = "one model", "routed experts", "adapters"
"""Kinds of designs: no expert matters, each has servers of its own, or every server has all of them."""


def throughput_error(question: Question) -> str:
    """Which of the known errors (:mod:`erlib.paper_scale.known_error`) is that of the answer's throughput."""
    return known_error.THROUGHPUT + (known_error.SHEET if question.its_gpu.sheet else "")


@dataclass(frozen=True)
class Question:
    """What is asked: `requests_per_s` or `users`, or neither with a trace as `lengths`, which has its own arrivals."""

    model: str
    """Of ``data/llama_shapes.yaml``."""
    gpus: int
    requests_per_s: float | None = None
    """Poisson arrivals."""
    ttft_s: float = service_levels.TTFT_S
    """Bound of its p99, as the next."""
    tpot_s: float = service_levels.TPOT_S
    lengths: Paper | Trace = "p2"
    """Whose prompts and answers."""
    spread: Mix = "uniform"
    """Of the requests over the experts, where the trace does not say it."""
    slots: int = 256
    """Sequences that an engine runs at a time, at most."""
    adapters_slower: float = 1.35
    """Steps of engines with adapters, times those without, whatever the model: an assumption, where Llama 3 8B in FP16
    has 1.28 to 1.40 with PyTorch's kernels (:mod:`erlib.paper_scale.adapter_steps`; 1 to 256 sequences of 512)."""
    window_s: float | None = None
    """For how long requests come, where the most that is carried is searched for; None: several answers' time."""
    users: int | None = None
    """Who each ask again as soon as they have an answer (closed loop)."""
    gpu: str = "h100"
    """Of :data:`erlib.paper_scale.gpus.GPUS`, or a file with step times."""
    gpu_gb: float | None = None
    """Memory of one, in GB of 10^9 bytes; None: what it is known to have."""
    gpu_hour: float = 1.0
    """Price of an hour of one GPU, in any currency."""
    formats: Sequence[Dtype] = ()
    """Of weights; none: all that there are step times for."""
    experts: int | None = None
    """How many; servers beyond them are replicas. None: one per server, and eight adapters."""

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= CLUSTERS:
            raise ConfigError(f"1 to {CLUSTERS} GPUs, not {self.gpus}: there are prompts of {CLUSTERS} clusters")
        if self.experts is not None and not 1 <= self.experts <= CLUSTERS:
            raise ConfigError(f"1 to {CLUSTERS} experts, not {self.experts}: there are prompts of {CLUSTERS} clusters")
        if self.trace is None and (self.requests_per_s is None) == (self.users is None):
            raise ConfigError("give requests per second (Poisson arrivals) or users (each asks again), one of them")
        if self.requests_per_s is not None and self.users is not None:
            raise ConfigError("requests per second or users, not both")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name} is {least:g} to {most:g}, not {value:g}")
        if self.trace is not None:
            _check(self.trace)
            if not math.isfinite(self.rate_per_s):
                raise ConfigError("all requests of the trace come at once: give requests per second, or users")

    @property
    def trace(self) -> Trace | None:
        return None if isinstance(self.lengths, str) else self.lengths

    @property
    def its_gpu(self) -> Gpu:
        """What is known of the GPU.

        Raises
        ------
        ConfigError
            If nothing is.
        """
        return gpus.gpu(self.gpu, self.gpu_gb)

    @property
    def clusters(self) -> int:
        """How many a request may be of: those that the trace names, if it does."""
        trace = self.trace
        if trace is None or trace.cluster is None:
            return CLUSTERS
        return max(len(trace.experts), int(np.max(trace.cluster)) + 1)

    @property
    def spread_said(self) -> str:
        """How requests spread over the experts, in words."""
        decided = self.trace is not None and self.trace.cluster is not None
        return "as the trace says" if decided else self.spread

    @property
    def own_arrivals(self) -> Trace | None:
        """The trace, if requests come when it says: if neither another rate is asked for, nor users who wait."""
        return self.trace if self.requests_per_s is None and self.users is None else None

    @property
    def rate_per_s(self) -> float:
        """Requests per second that come by themselves; 0 where users wait for answers."""
        trace = self.own_arrivals
        return trace.requests_per_s if trace is not None else self.requests_per_s or 0.0

    @property
    def load(self) -> str:
        """What is asked for, in words."""
        if self.users is not None:
            return f"{self.users:,} users"
        own = ", as its trace has them" if self.own_arrivals is not None else ""
        return f"{self.rate_per_s:.4g} requests/s{own}"


_RANGES = {
    **{"requests_per_s": (1e-3, 1e6), "users": (1, 1e6), "ttft_s": (1e-6, 1e6), "tpot_s": (1e-6, 1e6)},
    **{"slots": (1, 1e5), "adapters_slower": (1e-3, 1e3), "window_s": (1e-3, 1e6), "gpu_gb": (1, 1e4)},
    "gpu_hour": (1e-6, 1e9),
}


def _check(trace: Trace) -> None:
    arrival_s, *tokens = (np.asarray(its) for its in (trace.arrival_s, trace.input_tokens, trace.output_tokens))
    if len({len(arrival_s), *map(len, tokens)}) != 1 or len(arrival_s) < 2:
        raise ConfigError("a trace needs two requests or more, each with arrival, input and output tokens")
    if not np.isfinite(arrival_s).all() or min(np.diff(np.sort(arrival_s))) < 0 or min(map(np.min, tokens)) < 1:
        raise ConfigError("a trace has times, and every prompt and every answer at least one token")
    if trace.cluster is not None and not set(np.asarray(trace.cluster).tolist()) <= set(range(CLUSTERS)):
        raise ConfigError(f"a trace's clusters are 0 to {CLUSTERS - 1}")


def asked_in(profile: Profile) -> Question:
    """The question of a profile's ``what_if``.

    Raises
    ------
    ConfigError
        If it asks for the impossible, or its trace cannot be read.
    """
    settings = profile.what_if
    given = settings.model_dump(exclude={"lengths", "trace"})
    lengths = traces.read(Path(settings.trace)) if settings.trace else settings.lengths
    return Question(**given, lengths=lengths, gpu_hour=profile.sensitivity.gpu_hour)


class Way(NamedTuple):
    """One way to serve."""

    system: System
    kind: str
    form: Form
    """Designs with the same have the same step times."""

    @property
    def gpus(self) -> int:
        """That it uses: as many as an engine is wide, for each engine."""
        return len(self.system.experts) * self.form[2]


def ways(question: Question, profile: Profile) -> dict[str, Way]:
    """Every way for which there are step times, by name; those whose weights leave no room are left out.

    Raises
    ------
    ConfigError
        If there is none, or the model has no shape.
    """
    found: dict[str, Way] = {}
    of = question.its_gpu
    limit = profile.workload.p2_max_output_tokens if question.lengths == "p2" else None
    for form, steps in gpus.forms(of, question.model, question.gpus, question.formats):
        dtype, kv_dtype, width = form
        n = question.gpus // width
        try:
            kv_tokens = llama.most_kv_tokens(question.model, *form, gpu_bytes=of.memory_bytes)
        except ConfigError:
            continue
        name = f"{n} × {dtype.upper()} TP{width}" + (f", KV {kv_dtype.upper()}" if kv_dtype != dtype != "int4" else "")
        slots = int(min(question.slots, steps.limits.batch))
        routed = System(name, "expert_router", steps, n, slots, kv_tokens, limit)
        one = replace(routed, routing="replicas" if n > 1 else "direct")
        found[f"{name}, one model"] = Way(one, IN_TURN, form)
        experts = question.experts or min(n, question.clusters)
        if 1 < experts <= n:
            own = replace(routed, instances=experts, added=_more(question, profile, experts, n - experts))
            said = "an expert each" if experts == n else f"{experts} experts"
            found[f"{name}, {said}"] = Way(own, ROUTED, form)
        if dtype == "fp16":
            every = setups.slower(replace(routed, adapters=True), question.adapters_slower)
            many = question.experts or question.clusters
            found[f"{name}, {many} adapters each"] = Way(every, ADAPTERS, form)
    if not found:
        raise ConfigError(_none(question, of))
    return found


def _none(question: Question, of: Gpu) -> str:
    """Why there is no way."""
    shape = llama.shape(question.model)
    known = gpus.known(of)
    mine = known[known["model"] == question.model]
    if mine.empty:
        source = f"{of.tables[0].name} has" if of.tables else "a data sheet prices"
        return f"no step times for {question.model} on {question.gpus} GPUs; {source} {_listed(known['model'])}"
    formats = f" in {', '.join(question.formats)}" if question.formats else ""
    if question.formats and not set(question.formats) & set(mine["dtype"]):
        return f"no step times for {question.model}{formats} on such GPUs; there are some for {_listed(mine['dtype'])}"
    return (
        f"{question.model}{formats} ({shape.parameters / 1e9:.0f} billion parameters) has no form that fits into "
        f"{question.gpus} GPUs of {of.memory_bytes / 1e9:.0f} GB and whose step times are known: more GPUs, or another "
        "format"
    )


def _listed(names: pd.Series) -> str:
    return ", ".join(sorted(names.unique()))


def shares(question: Question, profile: Profile, experts: int) -> npt.NDArray[np.float64]:
    """Share of the requests that each expert gets."""
    trace = question.trace
    of_cluster: npt.NDArray[np.float64]
    if trace is not None and trace.cluster is not None:
        of_cluster = np.bincount(np.asarray(trace.cluster), minlength=question.clusters) / len(trace.cluster)
    else:
        of_cluster = prompts.mix_shares(question.spread, CLUSTERS, profile.workload.sigma)
    of_expert = np.zeros(experts)
    np.add.at(of_expert, _experts_of(question, experts), of_cluster)
    return of_expert


def _experts_of(question: Question, experts: int) -> npt.NDArray[np.int64]:
    """The expert of each cluster: its own, or, where there are fewer, one that neighbours share."""
    clusters = np.arange(question.clusters)
    return clusters * experts // question.clusters if experts < question.clusters else clusters


def _more(question: Question, profile: Profile, experts: int, servers: int) -> tuple[int, ...]:
    """Whose replicas further servers are."""
    return tuple(sorted(setups.hottest(shares(question, profile, experts), servers)))


# --- what is asked of them ----------------------------------------------------------------------------------------


_POOLS: dict[tuple[str, str], Workload] = {}


def _pool(profile: Profile, paper: Paper) -> Workload:
    """Prompts of a paper's lengths, made once per process."""
    key = profile.digest, paper
    if key not in _POOLS:
        _POOLS[key] = setups.workload(profile, paper, setups.Setup(sigma=profile.workload.sigma))
    return _POOLS[key]


_DRAWS: dict[tuple[Any, ...], list[Prompt]] = {}
_MOST_DRAWS = 64


def drawn(question: Question, profile: Profile, n: int, draw: int) -> list[Prompt]:
    """Prompts of `n` requests, by clusters; the same for every design."""
    lengths = question.lengths
    if not isinstance(lengths, str):
        return _of_trace(question, profile, lengths, n, draw)
    key = profile.digest, lengths, question.spread, n, draw
    if key not in _DRAWS:
        if len(_DRAWS) >= _MOST_DRAWS:
            _DRAWS.clear()
        _DRAWS[key] = prompts.draw(_pool(profile, lengths), n, question.spread, profile.seed, draw)
    return _DRAWS[key]


DRAWS = 5
"""How many there are of a question, at most."""


def stretch(trace: Trace, n: int, draw: int) -> npt.NDArray[np.int64]:
    """Rows of `n` requests that follow each other in a trace, whose end its start follows; draws begin apart."""
    start = draw * len(trace) // DRAWS
    return np.argsort(np.asarray(trace.arrival_s), kind="stable")[(start + np.arange(n)) % len(trace)]


def _of_trace(question: Question, profile: Profile, trace: Trace, n: int, draw: int) -> list[Prompt]:
    rows = stretch(trace, n, draw)
    if trace.cluster is None:
        rng = np.random.default_rng([profile.seed, draw, n])
        of_expert = prompts.spread(n, shares(question, profile, CLUSTERS), rng)
    else:
        of_expert = np.asarray(trace.cluster)[rows]
    return traces.asked(trace, of_expert.tolist(), rows.tolist())


def for_experts(question: Question, asked: Sequence[Prompt], system: System) -> list[Prompt]:
    """The prompts with the system's experts in the place of clusters: where there are fewer, neighbours share one."""
    of_cluster = _experts_of(question, system.instances).tolist()
    return [prompt._replace(cluster=of_cluster[prompt.cluster]) for prompt in asked]
