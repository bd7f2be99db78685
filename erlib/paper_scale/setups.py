"""What both papers leave open, as numbers that can be changed one at a time, and their systems under such numbers.

Everything is simulated with nothing but eight H100s around (preset ``hardware``), and textless prompts of the papers'
lengths. A number that does not concern a system leaves it as it was: :data:`UNKNOWNS` names those that it does.
"""

from __future__ import annotations

import functools
import itertools
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from erlib import cache, config, paths, provenance
from erlib.config import Dtype, Mix, Paper, Profile
from erlib.load import records
from erlib.paper_scale import batching, simulation, steptimes
from erlib.paper_scale.batching import System
from erlib.paper_scale.clock import HARDWARE, Harness
from erlib.paper_scale.steptimes import StepTimes
from erlib.workload import prompts
from erlib.workload.prompts import Prompt, Workload

BESIDE = paths.FACTS / "h100_beside_step_times.parquet"
"""Step times of systems that neither paper has, and what all-reduce takes of the papers'; like ``steptimes.TABLE``."""
WEIGHT_ONLY: tuple[Dtype, ...] = ("int8", "int4")


@dataclass(frozen=True)
class Setup:
    """The defaults are what is simulated elsewhere; factors are relative to that."""

    sigma: float = 2.0
    """Width of paper 2's normal mix, in clusters."""
    answers: float = 1.0
    """Factor of the answers' lengths."""
    weight_only: float = 1.0
    """Factor of the steps of engines with INT8 or INT4 weights."""
    tensor_parallel: float = 1.0
    """Factor of the steps of engines on several GPUs."""
    allreduce: float = 1.0
    """Factor of what all-reduce takes of these steps."""
    slots: float = 1.0
    """Factor of the sequences that an engine runs at a time."""
    server_us: float = 0.0
    """Microseconds for which a token occupies a core that each server has to itself."""
    shared_us: float = 0.0
    """Microseconds for which a token occupies a core, or a client, that all servers share."""
    arrivals_s: float = 0.0
    """Users come at moments of a Poisson process, all of them within so long; 0: all at once."""
    moved: float = 0.0
    """Share of paper 1's continuation prompts that the router sends to another expert than their base prompt."""

    @property
    def around(self) -> Harness:
        """What stands between users and engines; a core that is busy with tokens delays them, and not the engines."""
        around = replace(HARDWARE, arrivals_s=self.arrivals_s)
        if busy_us := self.server_us or self.shared_us:
            own = bool(self.server_us)
            around = replace(around, client_tokens_per_s=1e6 / busy_us, client_slope=math.inf, client_per_server=own)
        return around


class Unknown(NamedTuple):
    """A number of :class:`Setup`, the values to try, and whom it concerns."""

    title: str
    values: tuple[float, ...]
    configs: tuple[str, ...]


_ROUTED1, _ROUTED2 = ("p1.B", "p1.C", "p1.D"), ("p2.D", "p2.E")
_BASELINES = ("p1.A", "p2.A", "p2.B", "p2.C")
CONFIGS = ("p1.A", *_ROUTED1, "p2.A", "p2.B", "p2.C", *_ROUTED2)
"""Both papers' systems."""

UNKNOWNS = {
    "sigma": Unknown("width of the normal mix [clusters]", (0.5, 1, 2, 4), _ROUTED2),
    "answers": Unknown("answer length [×]", (0.125, 0.5, 1, 2), CONFIGS),
    "weight_only": Unknown("steps with INT8 or INT4 weights [×]", (0.75, 1, 1.25), ("p1.B", "p2.D")),
    "tensor_parallel": Unknown("steps on several GPUs [×]", (0.75, 1, 1.25), _BASELINES),
    "allreduce": Unknown("all-reduce [×]", (0, 1, 2, 7), _BASELINES),
    "slots": Unknown("slots [×]", (0.25, 0.5, 1, 2), CONFIGS),
    "server_us": Unknown("host, a core per server [µs a token]", (0, 100, 500), CONFIGS),
    "shared_us": Unknown("host, one core for all [µs a token]", (0, 100, 500), CONFIGS),
    "arrivals_s": Unknown("all users arrive within [s]", (0, 60, 300), CONFIGS),
    "moved": Unknown("continuations that move [share]", (0, 0.16, 0.55), _ROUTED1),
}
"""By field of :class:`Setup`. Kernel prices are good to some 25 %; PCIe is 7 times slower than NVLink; 16 % of
conversations that begin with 250 words, and 55 % of those that begin with 35, change experts
(:func:`erlib.routing.comparison.compare_routers`)."""


class Repriced(StepTimes):
    """Step times, `more_s` longer (by tokens in the step: 0, 1, 2, ...), if at all, and all that times a factor."""

    def __init__(self, steps: StepTimes, factor: float, more_s: Sequence[float] = ()):
        self.limits, self.at_full_speed = steps.limits, steps.at_full_speed
        self._steps, self._factor, self._more_s = steps, factor, more_s

    def step_s(self, prompts: int, prompt_tokens: int, sequences: int, context_tokens: int) -> float:
        seconds = self._steps.step_s(prompts, prompt_tokens, sequences, context_tokens)
        return self._factor * (seconds + self._more(prompt_tokens + sequences))

    def decode_steps_s(self, steps: int, sequences: int, context_tokens: int) -> npt.NDArray[np.float64]:
        seconds = self._steps.decode_steps_s(steps, sequences, context_tokens)
        return self._factor * (seconds + self._more(sequences))

    def _more(self, tokens: int) -> float:
        return self._more_s[tokens] if self._more_s else 0.0


@functools.cache
def allreduce_s(model: str, dtype: Dtype, tensor_parallel: int) -> list[float]:
    """Seconds that all-reduce takes of a step with 0, 1, 2, ... tokens."""
    rows = pd.read_parquet(BESIDE)
    mine = (rows["part"] == "allreduce") & (rows["model"] == model) & (rows["dtype"] == dtype)
    rows = rows[mine & (rows["tensor_parallel"] == tensor_parallel)]
    return (np.interp(np.arange(rows["x"].max() + 1), [0, *rows["x"]], [0, *rows["ms"]]) * 1e-3).tolist()


def system(name: str, setup: Setup = Setup(), answer_limit: int | None = None) -> System:
    """A configuration of a paper under a setup."""
    printed = config.load_configuration(name).system
    known = batching.paper_system(name, answer_limit=answer_limit and math.ceil(answer_limit * setup.answers))
    several = printed.tensor_parallel > 1
    factor = setup.tensor_parallel if several else 1.0
    factor *= setup.weight_only if printed.dtype in WEIGHT_ONLY else 1.0
    steps: StepTimes = known.steps
    if several and setup.allreduce != 1:
        of_step = allreduce_s(printed.model, printed.dtype, printed.tensor_parallel)
        steps = Repriced(steps, factor, [(setup.allreduce - 1) * seconds for seconds in of_step])
        known = replace(known, steps=steps)
    elif factor != 1:
        known = slower(known, factor)
    return replace(known, batch_size=max(1, round(known.batch_size * setup.slots)))


def slower(system: System, factor: float) -> System:
    """The system with steps that take so many times as long."""
    return replace(system, steps=Repriced(system.steps, factor)) if factor != 1 else system


def workload(profile: Profile, paper: Paper, setup: Setup = Setup()) -> Workload:
    """The papers' lengths, with answers as long as `setup` says."""
    pool = simulation.textless_workload(config.at_paper_scale(profile), paper)
    lengths = np.maximum(1, (pool.frame["max_tokens"] * setup.answers).round()).astype(int)
    return replace(pool, frame=pool.frame.assign(max_tokens=lengths), sigma=setup.sigma)


def points(
    setup: Setup,
    configs: Sequence[str],
    profile: Profile,
    users: Sequence[int],
    repeats: int,
    experiment: str = "load",
) -> Iterator[pa.Table]:
    """Records of some systems of one paper under a setup, point by point; ``source`` is "simulated-hardware".

    All of them are of one paper; routed ones of paper 2 run under both mixes. `experiment` is only what records say.
    """
    paper = config.paper_of(configs[0])
    pool = workload(profile, paper, setup)
    limit = profile.workload.p2_max_output_tokens if paper == "p2" else None
    systems = {name: system(name, setup, limit) for name in configs}
    about = {"source": "simulated-hardware", "experiment": experiment, "point_hash": experiment}
    about |= {"profile": profile.name, "profile_hash": profile.digest}
    for level, repeat, mix in itertools.product(users, range(repeats), typing.get_args(Mix)):
        drawn = prompts.draw(pool, level, mix, profile.seed, repeat)
        then = continuations(drawn, setup.moved, pool.n_clusters, [profile.seed, repeat, level])
        for name, its in systems.items():
            if mix in mixes(name):
                yield simulation.simulate(
                    *(its, drawn),
                    **{"paper": paper, "mix": mix, "repeat": repeat, "around": setup.around},
                    seed=profile.seed + repeat,
                    columns=about,
                    continues=then if paper == "p1" else False,
                )


def simulated(*args: Any, **kwargs: Any) -> pd.DataFrame:
    """:func:`points` as one frame."""
    return records.frame(points(*args, **kwargs))


def mixes(name: str) -> list[Mix]:
    """Under which a system is simulated: those that ignore clusters, and all of paper 1, under one only."""
    routed = config.load_configuration(name).routing == "expert_router"
    return ["uniform", "normal"] if routed and config.paper_of(name) == "p2" else ["uniform"]


def hottest(shares: npt.NDArray[np.float64], replicas: int) -> tuple[int, ...]:
    """Experts that get `replicas` more instances, each the one that has the most demand per instance by then.

    In the order in which they are added to; of equally hot ones the first.
    """
    instances = np.ones(len(shares))
    added = []
    for _ in range(replicas):
        expert = int((shares / instances).round(12).argmax())  # rounded: shares that mirror each other are equal
        instances[expert] += 1
        added.append(expert)
    return tuple(added)


@functools.cache
def code() -> str:
    """Hash of what simulated records are computed with: code, step times, and what the papers' systems are."""
    places = ("paper_scale/setups.py", *simulation.CODE)
    systems = [paths.FACTS / "llama_shapes.yaml", *sorted(paths.ENGINE_SPECS.glob("*.yaml"))]
    return cache.digest(provenance.code_digest(*places), steptimes.TABLE, BESIDE, *systems)


def given(profile: Profile) -> str:
    """Hash of :func:`code` and of all that a profile says of prompts and answers."""
    return cache.digest(code(), profile.workload.model_dump(mode="json"), profile.seed)


def continuations(drawn: Sequence[Prompt], moved: float, clusters: int, seed: Sequence[int]) -> list[Prompt]:
    """The base prompts with their answers, a share of them for another expert; the more move, the same move too."""
    rng = np.random.default_rng(seed)
    goes = rng.random(len(drawn)) < moved
    onwards = rng.integers(1, clusters, len(drawn))
    return [
        prompt._replace(
            input_tokens=prompt.input_tokens + prompt.max_tokens,
            cluster=int((prompt.cluster + go * step) % clusters),
        )
        for prompt, go, step in zip(drawn, goes, onwards, strict=True)
    ]
