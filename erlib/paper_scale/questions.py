"""What is asked of a deployment, every way to serve it for which there are step times, and the requests that come.

Step times are those of a table (:mod:`erlib.paper_scale.steptimes`): NVIDIA's for the H100, what PyTorch's kernels took
on an H100 and an H200, or one of your own; or they follow from a data sheet (A100, H200), for any large Llama shape. KV
caches have all the memory that weights leave.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from erlib import config, paths
from erlib.config import ConfigError, Dtype, Mix, Paper, Profile, nearest
from erlib.engines import llama
from erlib.paper_scale import known_error, measured_steps, service_levels, setups, steptimes
from erlib.paper_scale.batching import System
from erlib.paper_scale.designs import Design
from erlib.paper_scale.steptimes import OutOfRange, Roofline, StepTimes, Table
from erlib.workload import prompts, traces
from erlib.workload.prompts import Prompt, Workload
from erlib.workload.traces import Trace

CLUSTERS = 8
IN_TURN, ROUTED, ADAPTERS = "one model", "routed experts", "adapters"
"""Kinds of designs: no expert matters, each has servers of its own, or every server has all of them."""


class Gpu(NamedTuple):
    """A GPU that step times are known of."""

    tables: tuple[Path, ...]
    memory_bytes: float
    said: str
    """Whose times these are."""
    sheet: steptimes.Gpu | None = None
    """What prices steps where there is no table."""


GPUS = {
    "h100": Gpu((steptimes.TABLE, setups.BESIDE), llama.H100_BYTES, "H100s, kernel times that NVIDIA published"),
    "h100-pytorch": Gpu(
        (paths.FACTS / "h100_pytorch_step_times.csv",), llama.H100_BYTES, "H100s, measured with PyTorch's kernels"
    ),
    "h200-pytorch": Gpu(
        (paths.FACTS / "h200_pytorch_step_times.csv",), 141e9, "H200s, measured with PyTorch's kernels"
    ),
    "h200": Gpu((), 141e9, "H200s, priced from the data sheet and not from kernels", steptimes.H200),
    "a100": Gpu((), 80e9, "A100s, priced from the data sheet and not from kernels", steptimes.A100),
}
"""By name; the memory of A100 and H200 is the data sheet's."""
SMALLEST = 1e9
"""Parameters of a model that a data sheet prices, at least: steps of smaller ones are launches of kernels above all, of
which it knows nothing."""


def gpu(name: str, memory_gb: float | None = None) -> Gpu:
    """A GPU by its name, or by the file of its step times.

    Raises
    ------
    ConfigError
        If there is neither; the message says how to get one.
    """
    measure = "measure it with scripts/measure_step_times.py on one and give the file that it writes"
    if not name.endswith((".csv", ".parquet")):
        if name.lower() not in GPUS:
            others = f"{nearest(name, list(GPUS))}; there are {', '.join(GPUS)}"
            raise ConfigError(f"no step times of GPU {name!r}{others}. For another one, {measure}")
        known = GPUS[name.lower()]
        return known._replace(memory_bytes=memory_gb * 1e9) if memory_gb else known
    if not (file := paths.ROOT / Path(name).expanduser()).is_file():
        raise ConfigError(f"there is no step table {name}: {measure}")
    if not memory_gb:
        raise ConfigError(f"{name} does not say how much memory its GPU has: give that, too, in GB (gpu_gb)")
    return Gpu((file,), memory_gb * 1e9, f"GPUs with {memory_gb:g} GB, step times of {file.name}")


def throughput_error(question: Question) -> str:
    """Which of the known errors (:mod:`erlib.paper_scale.known_error`) is that of the answer's throughput."""
    priced = known_error.SHEET if gpu(question.gpu, question.gpu_gb).sheet else ""
    return known_error.THROUGHPUT + priced


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
    """Of :data:`GPUS`, or a file with step times."""
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
        given = (self.requests_per_s, self.users, self.gpu_gb, self.window_s)
        numbers = [number for number in given if number is not None]
        numbers += [self.ttft_s, self.tpot_s, self.slots, self.adapters_slower, self.gpu_hour]
        if not all(number > 0 for number in numbers):
            raise ConfigError("rates, users, latencies, slots, factors, windows and prices must be more than 0")
        if self.trace is not None:
            _check(self.trace)
            if self.requests_per_s is None and self.users is None and not math.isfinite(self.trace.requests_per_s):
                raise ConfigError("all requests of the trace come at once: give requests per second, or users")

    @property
    def trace(self) -> Trace | None:
        return None if isinstance(self.lengths, str) else self.lengths

    @property
    def rate_per_s(self) -> float:
        """Requests per second that come by themselves; 0 where users wait for answers."""
        if self.users is not None:
            return 0.0
        if self.requests_per_s is not None:
            return self.requests_per_s
        assert self.trace is not None  # or there would be a rate, or users
        return self.trace.requests_per_s

    @property
    def load(self) -> str:
        """What is asked for, in words."""
        if self.users is not None:
            return f"{self.users:,} users"
        own = ", as its trace has them" if self.requests_per_s is None else ""
        return f"{self.rate_per_s:.4g} requests/s{own}"


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

    design: Design
    width: int
    """GPUs of an engine."""
    kind: str
    form: tuple[Dtype, Dtype, int]
    """Weights, KV cache and width: designs with the same have the same step times."""


def ways(question: Question, profile: Profile) -> dict[str, Way]:
    """Every way for which there are step times, by name; those whose weights leave no room are left out.

    Raises
    ------
    ConfigError
        If there is none, or the model has no shape.
    """
    found: dict[str, Way] = {}
    of = gpu(question.gpu, question.gpu_gb)
    limit = profile.workload.p2_max_output_tokens if question.lengths == "p2" else None
    for form, steps in _forms(question, of):
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
        found[f"{name}, one model"] = Way(Design(one), width, IN_TURN, form)
        experts = question.experts or n
        if 1 < experts <= n:
            own = replace(routed, instances=experts, added=_more(question, profile, experts, n - experts))
            said = "an expert each" if experts == n else f"{experts} experts"
            found[f"{name}, {said}"] = Way(Design(own), width, ROUTED, form)
        if dtype == "fp16":
            slower = question.adapters_slower
            every = setups.slower(replace(routed, adapters=True), slower)
            many = question.experts or CLUSTERS
            found[f"{name}, {many} adapters each"] = Way(Design(every, slower=slower), width, ADAPTERS, form)
    if not found:
        raise ConfigError(_none(question, of))
    return found


def models() -> list[str]:
    """Models that some GPU has step times for."""
    return sorted({model for its in GPUS.values() for model in _known(its)["model"]})


def _none(question: Question, of: Gpu) -> str:
    """Why there is no way."""
    shape = llama.shape(question.model)
    mine = _known(of)
    models = ", ".join(sorted(mine["model"].unique()))
    if question.model not in set(mine["model"]):
        source = f"{of.tables[0].name} has" if of.tables else "a data sheet prices"
        return f"no step times for {question.model} on {question.gpus} GPUs; {source} {models}"
    formats = f" in {', '.join(question.formats)}" if question.formats else ""
    return (
        f"{question.model}{formats} ({shape.parameters / 1e9:.0f} billion parameters) has no form that fits into "
        f"{question.gpus} GPUs of {of.memory_bytes / 1e9:.0f} GB and whose step times are known: more GPUs, or another "
        "format"
    )


def _forms(question: Question, of: Gpu) -> Iterator[tuple[tuple[Dtype, Dtype, int], StepTimes]]:
    """Forms of the model that are known of the GPU, the widest weights first."""
    rows = _known(of)
    mine = rows[(rows["model"] == question.model) & (rows["tensor_parallel"] <= question.gpus)]
    order = list(get_args(Dtype))
    forms = {(str(r.dtype), str(r.kv_dtype), int(r.tensor_parallel)) for r in mine.itertuples()}
    for form in sorted(forms, key=lambda form: (order.index(form[0]), form[2], order.index(form[1]))):
        if question.formats and form[0] not in question.formats:
            continue
        if (steps := _steps(question.model, form, of)) is not None:
            yield form, steps  # type: ignore[misc]


@functools.cache
def _known(of: Gpu) -> pd.DataFrame:
    """Forms of models that there are step times for."""
    columns = ["model", "dtype", "kv_dtype", "tensor_parallel"]
    if of.sheet is not None:
        return pd.DataFrame(_of_sheet(of.sheet), columns=columns)
    tables = of.tables
    try:
        parts = [
            pd.read_parquet(file, columns=columns) if file.suffix == ".parquet" else measured_steps.read(file)[columns]
            for file in tables
        ]
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"{tables[0].name} is no table of step times: {str(error).splitlines()[0]}") from None
    return pd.concat(parts).astype({"tensor_parallel": int}).drop_duplicates()


def _of_sheet(sheet: steptimes.Gpu) -> Iterator[tuple[str, Dtype, Dtype, int]]:
    """Forms of every large model, in the formats that the GPU computes with."""
    formats: list[Dtype] = [its for its in get_args(Dtype) if its != "fp8" or sheet.fp8_flops > sheet.fp16_flops]
    large = {model: shape for model, shape in llama.shapes().items() if shape.parameters >= SMALLEST}
    for (model, shape), dtype, width in itertools.product(large.items(), formats, (1, 2, 4, 8)):
        if shape.kv_heads % width == 0:
            for kv_dtype in ("fp16", dtype) if dtype in ("fp8", "int8") else ("fp16",):
                yield model, dtype, kv_dtype, width


@functools.cache
def _steps(model: str, form: tuple[Dtype, Dtype, int], of: Gpu) -> StepTimes | None:
    """Read once: a table has some ten thousand rows."""
    if of.sheet is not None:
        return Roofline(llama.shape(model), of.sheet, *form)
    for file in of.tables:
        try:
            return Table(model, *form, None if file == steptimes.TABLE else file)
        except OutOfRange:  # of a part of a system only, such as one GPU's share without what they exchange
            continue
    return None


def shares(question: Question, profile: Profile, experts: int) -> npt.NDArray[np.float64]:
    """Share of the requests that each expert gets."""
    trace = question.trace
    of_cluster: npt.NDArray[np.float64]
    if trace is not None and trace.cluster is not None:
        of_cluster = np.bincount(np.asarray(trace.cluster), minlength=CLUSTERS) / len(trace.cluster)
    else:
        of_cluster = prompts.mix_shares(question.spread, CLUSTERS, profile.workload.sigma)
    of_expert = np.zeros(experts)
    np.add.at(of_expert, np.arange(CLUSTERS) * experts // CLUSTERS, of_cluster)
    return of_expert


def _more(question: Question, profile: Profile, experts: int, servers: int) -> tuple[int, ...]:
    """Whose replicas further servers are: each the expert's who has the most requests per server."""
    share, has = shares(question, profile, experts), np.ones(experts)
    for _ in range(servers):
        has[np.argmax(share / has)] += 1
    return tuple(np.repeat(np.arange(experts), has.astype(int) - 1).tolist())


# --- what is asked of them ----------------------------------------------------------------------------------------


_POOLS: dict[tuple[str, str], Workload] = {}


def pool(profile: Profile, paper: Paper) -> Workload:
    """Prompts of a paper's lengths, made once per process."""
    key = profile.digest, paper
    if key not in _POOLS:
        at_scale = config.at_paper_scale(profile)
        _POOLS[key] = replace(setups.workload(at_scale, paper), sigma=profile.workload.sigma)
    return _POOLS[key]


_DRAWS: dict[tuple[Any, ...], list[Prompt]] = {}
_MOST_DRAWS = 64


def drawn(question: Question, profile: Profile, n: int, draw: int) -> list[Prompt]:
    """Prompts of `n` requests, by clusters; the same for every design."""
    trace = question.trace
    if trace is not None:
        return _of_trace(question, profile, trace, n, draw)
    key = profile.digest, question.lengths, question.spread, n, draw
    if key not in _DRAWS:
        if len(_DRAWS) >= _MOST_DRAWS:
            _DRAWS.clear()
        its = pool(profile, question.lengths)  # type: ignore[arg-type]
        _DRAWS[key] = prompts.draw(its, n, question.spread, profile.seed, draw)
    return _DRAWS[key]


def stretch(trace: Trace, n: int, draw: int, draws: int) -> npt.NDArray[np.int64]:
    """Rows of `n` requests that follow each other in a trace, whose end its start follows; draws begin apart."""
    start = draw * len(trace.arrival_s) // draws
    return (np.argsort(np.asarray(trace.arrival_s), kind="stable"))[(start + np.arange(n)) % len(trace.arrival_s)]


DRAWS = 5


def _of_trace(question: Question, profile: Profile, trace: Trace, n: int, draw: int) -> list[Prompt]:
    rows = stretch(trace, n, draw, DRAWS)
    if trace.cluster is None:
        rng = np.random.default_rng([profile.seed, draw, n])
        of_expert = prompts.spread(n, shares(question, profile, CLUSTERS), rng)
    else:
        of_expert = np.asarray(trace.cluster)[rows]
    return traces.asked(trace, of_expert.tolist(), rows.tolist())


def for_experts(asked: Sequence[Prompt], system: System) -> list[Prompt]:
    """The prompts with the system's experts in the place of clusters: where there are fewer, neighbours share one."""
    of_cluster = [cluster * system.instances // CLUSTERS for cluster in range(CLUSTERS)]
    return [prompt._replace(cluster=of_cluster[prompt.cluster]) for prompt in asked]
