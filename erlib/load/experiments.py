"""What is to be measured: experiments of a profile, and the systems they are about."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from tokenizers import Tokenizer

from erlib import config
from erlib.config import Configuration, Mix, Paper, Profile, Relay, Routing
from erlib.config.system import EXPERTS_ON_GPUS, HAVE_GATEWAYS
from erlib.experts import texts
from erlib.load import backends
from erlib.load.backends import Workloads
from erlib.load.users import Client
from erlib.routing import building, clusterer
from erlib.serving import share, wire
from erlib.serving.triton import ServerPlan
from erlib.workload import lengths, prompts
from erlib.workload.prompts import Workload

Experiment = Literal["load", "preliminary", "overhead", "ablation", "replicas", "experts", "near_capacity"]


@dataclass(frozen=True)
class System:
    """A configuration made concrete on this machine: what a :class:`~erlib.serving.stack.Stack` serves."""

    config: str
    routing: Routing
    servers: list[ServerPlan]
    tokenizer: Path
    router: Path
    """Directory of the clusterer."""
    classifier: share.Classifier = "ours"
    relay: Relay = "front"
    """Who relays the tokens, where there are gateways."""
    added: tuple[int, ...] = ()
    """Experts that have one more server, each as often as it has one more; `servers` are in the experts' order."""
    adapters: int = 0
    """How many experts each server has, if it has all of them as adapters."""

    @property
    def has_gateways(self) -> bool:
        return self.routing in HAVE_GATEWAYS

    @property
    def replicas(self) -> list[int]:
        """How many servers each expert has."""
        return [1 + self.added.count(expert) for expert in range(len(self.servers) - len(self.added))]

    @property
    def backend(self) -> str:
        return self.servers[0].backend

    @property
    def source(self) -> Literal["measured", "emulated"]:
        """What its records are."""
        return "emulated" if self.backend == "emulated" else "measured"

    @property
    def slow_motion(self) -> float:
        """Wall seconds that stand for one second of its engines."""
        return float(self.servers[0].parameters.get("slow_motion", 1))

    @property
    def description(self) -> dict[str, Any]:
        """What a point's hash knows of the system: engine and router by their content hashes, not by where they lie."""
        return {
            "config": self.config,
            "routing": self.routing,
            "servers": [server.description for server in self.servers],
            "router": self.router.name,
            "classifier": self.classifier,
            "added": self.added,
            "relay": self.relay if self.has_gateways else None,
            **({"adapters": self.adapters} if self.adapters else {}),
        }


@dataclass(frozen=True)
class Series:
    """All points of one system with one workload."""

    paper: Paper
    experiment: Experiment
    system: System
    workload: Workload
    users: list[int]
    repeats: int
    mixes: list[Mix]
    client: Client = "asyncio"
    window_s: float = 0.0
    """All users come within so long, at moments of a Poisson process, by the engines' clock (0: all at once)."""

    @property
    def continues(self) -> bool:
        """Whether users send a continuation prompt: paper 1's chat scenario does (section IV-B), paper 2's does not."""
        return self.paper == "p1" and self.experiment == "load"


def load_sweep(profile: Profile, paper: Paper) -> list[Series]:
    """The papers' main experiment: all configurations of one paper under rising load.

    Mixes other than the first are measured only where requests are routed by cluster: to a baseline that ignores the
    cluster they are the same.
    """
    settings = profile.paper1 if paper == "p1" else profile.paper2
    pool = build_workload(profile, paper)
    series = []
    for target in systems(profile, backends.of(profile).configurations(profile, settings.configs)):
        mixes = settings.mixes if target.routing == "expert_router" else settings.mixes[:1]
        series.append(Series(paper, "load", target, pool, settings.users, settings.repeats, mixes))
    return series


def preliminary_sweep(profile: Profile) -> list[Series]:
    """Paper 2's search for its baselines (section IV-C): data types x batch sizes x tensor parallelism, one
    instance; nothing where a machine carries none of it."""
    settings = profile.preliminary
    if not (carried := backends.of(profile).preliminary_configurations(profile)):
        return []
    pool = build_workload(profile, "preliminary")
    targets = systems(profile, carried, "preliminary")
    return [
        Series("p2", "preliminary", target, pool, settings.users, settings.repeats, ["uniform"]) for target in targets
    ]


def overhead_sweep(profile: Profile) -> list[Series]:
    """The gateway's own latency, span by span, against users, whoever relays; short answers, so that many pass it."""
    settings = profile.overhead
    pool = build_workload(profile, "p2")
    short = pool.frame.assign(max_tokens=settings.output_tokens, end_id=wire.NEVER_STOP)
    pool = dataclasses.replace(pool, frame=short)
    (target,) = systems(profile, backends.of(profile).configurations(profile, [settings.config]))
    paper = config.paper_of(settings.config)
    both = [dataclasses.replace(target, relay=relay) for relay in get_args(Relay)]
    return [Series(paper, "overhead", each, pool, settings.users, settings.repeats, ["uniform"]) for each in both]


def experts_sweep(profile: Profile) -> list[Series]:
    """Trained experts beside the same engines without adapters, asked with texts of the corpus of their training."""
    settings, at = profile.experts, texts.on_own_corpus(profile)
    if not settings.users:
        return []
    pool = build_workload(at, "p2")
    names = {"openvino": ("x1.T", "x1.U"), "vllm": ("x1.L", "x1.U")}.get(at.serving.backend, EXPERTS_ON_GPUS)
    targets = systems(at, backends.of(at).configurations(at, names))
    return [Series("p2", "experts", target, pool, settings.users, settings.repeats, ["uniform"]) for target in targets]


def systems(profile: Profile, configurations: Sequence[Configuration], sized_for: Workloads = "load") -> list[System]:
    """What stands for `configurations` on this machine, with their engines built if need be.

    Raises
    ------
    ConfigError
        If a KV cache cannot hold one sequence, or GPUs are too few.
    """
    backend = backends.of(profile)
    served = backend.served(profile, configurations, sized_for)

    @functools.cache
    def router(of_own_corpus: bool) -> Path:
        return building.build_clusterer(texts.on_own_corpus(profile) if of_own_corpus else profile)

    return [
        System(
            *(each.id, each.routing, plans, backend.tokenizer_file(profile, each.system.model)),
            router(each.laptop.weights == "trained"),
            relay=profile.serving.relay,
            adapters=profile.clusterer.n_clusters if each.adapters else 0,
        )
        for each, plans in zip(configurations, served, strict=True)
    ]


def all_configurations(profile: Profile) -> list[Configuration]:
    """Systems of all experiments of a profile."""
    backend = backends.of(profile)
    named = dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config])
    return [*backend.configurations(profile, list(named)), *backend.preliminary_configurations(profile)]


def build_workload(profile: Profile, paper: lengths.Paper) -> Workload:
    """A paper's prompts, cut and counted with the tokenizer of its models; see :func:`erlib.workload.prompts.build`."""
    router = clusterer.Clusterer.load(building.build_clusterer(profile))
    return prompts.build(profile, paper, tokenizer(profile, paper), router)


def tokenizer(profile: Profile, paper: lengths.Paper) -> Tokenizer:
    """Tokenizer of a paper's models, with which its prompts are cut and counted; of those served, where it has none."""
    family, model = ("llama-2-", "llama-2-70b") if paper == "p1" else ("llama-3-", "llama-3-70b")
    if paper != "preliminary":
        settings = profile.paper1 if paper == "p1" else profile.paper2
        served = [config.load_configuration(name).system.model for name in settings.configs]
        model = next((each for each in served if each.startswith(family)), served[0])
    return Tokenizer.from_file(str(backends.of(profile).tokenizer_file(profile, model)))


def overview(series: Iterable[Series]) -> pd.DataFrame:
    """What serves each configuration of some series, in the words of its backend.

    Returns
    -------
    DataFrame
        One row per configuration: ``routing``, ``servers``, and of each server its engine, slots in the batch, KV
        blocks and threads, or its GPUs and image.
    """
    rows = []
    for one in series:
        server, system = one.system.servers[0].description, one.system
        told = {**server.pop("parameters", {}), **server}
        told["engine"] = told["engine"].rpartition("-")[0] or told["engine"]  # without the hash
        shown = {title: told[name] for name, title in _TOLD.items() if name in told}
        routing = system.routing.replace("_", " ")
        rows.append({"config": system.config, "routing": routing, "servers": len(system.servers), **shown})
    return pd.DataFrame(rows).set_index("config")


_TOLD = {
    **{"engine": "engine", "max_batch_size": "slots", "kv_blocks": "KV blocks", "kv_cache": "KV cache"},
    **{"threads": "threads", "gpus": "GPUs", "image": "image"},
}
