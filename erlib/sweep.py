"""Sweeps: every configuration, user level, repeat and mix of a profile, measured point by point and resumable.

A point's file name carries a hash of all that it was measured with: the workload, the system (engine, batch size, KV
cache, routing), the router's model and the code on the measured path. A point whose file exists is not measured again;
one whose inputs have changed gets another name, and the old file is left alone.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import inspect
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
from tokenizers import Tokenizer

from erlib import (
    batching,
    builds,
    cluster,
    clusterer,
    config,
    containers,
    engines,
    experts,
    gateway,
    handover,
    hardware,
    limits,
    nginx,
    openvino,
    paths,
    processes,
    prompts,
    records,
    repository,
    routers,
    service,
    stack,
    steptimes,
    telemetry,
    tensorrt_llm,
    threaded_users,
    triton,
    users,
    wire,
)
from erlib.cluster import ClusterStack, ClusterUsers
from erlib.config import ConfigError, Configuration, Mix, Paper, Profile, Relay, Routing
from erlib.progress import Bar
from erlib.prompts import Workload
from erlib.triton import ServerPlan
from erlib.users import Client

if TYPE_CHECKING:
    from erlib import preflight

Experiment = Literal["load", "preliminary", "overhead", "ablation", "replicas"]
Workloads = Literal["load", "preliminary"]
"""Which of the workloads a system is sized for."""

MAX_BATCHED_TOKENS = 1024
_PACKAGES = ("numpy", "openvino", "openvino-genai", "nvidia-pytriton", "grpcio", "tokenizers")


class MissingRecords(RuntimeError):
    """Records that a figure needs have not been measured; the message names the notebook to run."""


@dataclass(frozen=True)
class System:
    """A configuration made concrete on this machine: what a :class:`~erlib.stack.Stack` serves."""

    config: str
    routing: Routing
    servers: list[ServerPlan]
    tokenizer: Path
    router: Path
    """Directory of the clusterer."""
    classifier: stack.Classifier = "ours"
    relay: Relay = "front"
    """Who relays the tokens, where there are gateways."""
    added: tuple[int, ...] = ()
    """Experts that have one more server, each as often as it has one more; `servers` are in the experts' order."""

    @property
    def has_gateways(self) -> bool:
        return self.routing in ("expert_router", "replicas")

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
        }


@dataclass(frozen=True)
class Point:
    """One file of records."""

    paper: Paper
    experiment: Experiment
    system: System
    mix: Mix
    users: int
    repeat: int
    hash: str
    path: Path


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

    @property
    def continues(self) -> bool:
        """Whether users send a continuation prompt: paper 1's chat scenario does (section IV-B), paper 2's does not."""
        return self.paper == "p1" and self.experiment == "load"


# --- what is to be measured ---------------------------------------------------------------------------------------


def load(profile: Profile, paper: Paper) -> list[Series]:
    """The papers' main experiment: all configurations of one paper under rising load.

    Mixes other than the first are measured only where requests are routed by cluster: to a baseline that ignores the
    cluster they are the same.
    """
    settings = profile.paper1 if paper == "p1" else profile.paper2
    pool = workload(profile, paper)
    series = []
    for target in systems(profile, configurations(profile, settings.configs)):
        mixes = settings.mixes if target.routing == "expert_router" else settings.mixes[:1]
        series.append(Series(paper, "load", target, pool, settings.users, settings.repeats, mixes))
    return series


def preliminary(profile: Profile) -> list[Series]:
    """Paper 2's search for its baselines (section IV-C): data types x batch sizes x tensor parallelism, one instance.

    On a laptop TP8 stands for all cores, TP4 for half of them.
    """
    settings = profile.preliminary
    pool = workload(profile, "preliminary")
    targets = systems(profile, preliminary_configurations(profile), "preliminary")
    return [
        Series("p2", "preliminary", target, pool, settings.users, settings.repeats, ["uniform"]) for target in targets
    ]


def overhead(profile: Profile) -> list[Series]:
    """The gateway's own latency, span by span, against users, whoever relays; short answers, so that many pass it."""
    settings = profile.overhead
    pool = workload(profile, "p2")
    short = pool.frame.assign(max_tokens=settings.output_tokens, end_id=wire.NEVER_STOP)
    pool = dataclasses.replace(pool, frame=short)
    (target,) = systems(profile, configurations(profile, [settings.config]))
    paper = config.paper_of(settings.config)
    both = [dataclasses.replace(target, relay=relay) for relay in get_args(Relay)]
    return [Series(paper, "overhead", each, pool, settings.users, settings.repeats, ["uniform"]) for each in both]


def systems(profile: Profile, configurations: Sequence[Configuration], sized_for: Workloads = "load") -> list[System]:
    """What stands for `configurations` on this machine, with their engines built if need be.

    Raises
    ------
    ConfigError
        If a KV cache cannot hold one sequence, or GPUs are too few.
    """
    on_gpus = profile.serving.backend == "tensorrt_llm"
    served = _on_gpus(profile, configurations) if on_gpus else _on_cores(profile, configurations, sized_for)
    router = clusterer.build(profile)
    return [
        System(
            *(each.id, each.routing, plans, tokenizer_file(profile, each.system.model), router),
            relay=profile.serving.relay,
        )
        for each, plans in zip(configurations, served, strict=True)
    ]


def _on_cores(
    profile: Profile, configurations: Sequence[Configuration], sized_for: Workloads
) -> list[list[ServerPlan]]:
    longest = engines.longest_sequence_tokens(profile, "preliminary") if sized_for == "preliminary" else None
    plans = [engines.laptop_system(profile, configuration, longest) for configuration in configurations]
    built = openvino.build_all(profile, [(plan.size, plan.dtype) for plan in plans])
    return [
        [server_plan(engine.path, plan.batch_size, plan.kv_blocks, plan.kv_cache, plan.threads)] * plan.instances
        for plan, engine in zip(plans, built, strict=True)
    ]


def _on_gpus(profile: Profile, configurations: Sequence[Configuration]) -> list[list[ServerPlan]]:
    fitted, settings = _fitted(profile), profile.tensorrt_llm
    plans = [tensorrt_llm.plan(fitted.profile, configuration) for configuration in configurations]
    served = [repository.server_plans(plan, settings.runner, fitted.n_gpus) for plan in plans]
    builds.build(plans, settings.runner)
    for plan, (first, *_) in zip(plans, served, strict=True):
        repository.render(plan, plan.source, first.repository)
    return [list[ServerPlan](each) for each in served]


def configurations(profile: Profile, names: Sequence[str]) -> list[Configuration]:
    """Configurations by name; on GPUs as :func:`erlib.preflight.fitted` gives them to those that there are.

    Raises
    ------
    ConfigError
        If the GPUs cannot carry one of them; says why.
    """
    if profile.serving.backend == "tensorrt_llm":
        return _fitted(profile).named(names)
    return [config.load_configuration(name) for name in names]


def preliminary_configurations(profile: Profile) -> list[Configuration]:
    """Systems of paper 2's search for its baselines, likewise."""
    if profile.serving.backend == "tensorrt_llm":
        return _fitted(profile).preliminary
    return engines.preliminary_configurations(profile)


def all_configurations(profile: Profile) -> list[Configuration]:
    """Systems of all experiments of a profile."""
    named = dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config])
    return [*configurations(profile, list(named)), *preliminary_configurations(profile)]


def _fitted(profile: Profile) -> preflight.Fitted:
    from erlib import preflight  # and the clients of the hub, which only GPUs need

    if not (gpus := cluster.gpus(profile.serving.cluster)):
        raise ConfigError(
            f"profile {profile.name!r} needs GPUs, and nvidia-smi finds none; --profile laptop needs none"
        )
    return preflight.fitted(profile, gpus)


def context_tokens(profile: Profile, configuration: Configuration) -> int:
    """Tokens of the longest sequence, prompt and answer together, that a system takes.

    A laptop's is what the KV cache of one instance holds (by ``scale.tokens``), but no more than the model takes.
    """
    if profile.serving.backend == "tensorrt_llm":
        return tensorrt_llm.lengths(configuration, profile.workload)[1]
    return min(openvino.POSITIONS, engines.laptop_system(profile, configuration).kv_tokens)


def workload(profile: Profile, paper: prompts.Paper) -> Workload:
    """A paper's prompts, cut and counted with the tokenizer of its models; see :func:`erlib.prompts.build`."""
    router = clusterer.Clusterer.load(clusterer.build(profile))
    return prompts.build(profile, paper, tokenizer(profile, paper), router)


def server_plan(engine: Path, batch_size: int, kv_blocks: int, kv_cache: str, threads: int) -> ServerPlan:
    """How an OpenVINO engine is served; batch size, KV blocks and threads are per instance."""
    positions = json.loads((engine / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    parameters = {
        "engine": str(engine),
        "max_batch_size": str(batch_size),
        "kv_blocks": str(kv_blocks),
        wire.CONTEXT: str(min(positions, kv_blocks * config.KV_BLOCK_TOKENS)),
        "max_batched_tokens": str(MAX_BATCHED_TOKENS),
        "kv_cache": kv_cache,
        "threads": str(threads),
        "compute": json.dumps(openvino.COMPUTE),
    }
    # Engines take all the CPU that there is. Users, NGINX and gateways share it with them here, as they do not in the
    # papers, and must not wait for it: they would measure the scheduler.
    return ServerPlan("openvino", parameters, batch_size, niceness=10)


def tokenizer_file(profile: Profile, model: str) -> Path:
    """``tokenizer.json`` of what stands for `model`.

    Raises
    ------
    ConfigError
        If it has to be downloaded and cannot be.
    """
    if profile.serving.backend == "openvino":
        return openvino.checkpoint(profile.engines) / "tokenizer.json"
    return tensorrt_llm.fetch_tokenizer(model, tensorrt_llm.places(profile))


def tokenizer(profile: Profile, paper: prompts.Paper) -> Tokenizer:
    """Tokenizer of a paper's models, with which its prompts are cut and counted."""
    model = "llama-2-70b" if paper == "p1" else "llama-3-70b"
    return Tokenizer.from_file(str(tokenizer_file(profile, model)))


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


# --- measuring ----------------------------------------------------------------------------------------------------


def points(profile: Profile, series: Series) -> list[Point]:
    """All points of a series, in the order in which they are measured."""
    base = [
        series.system.description,
        series.client,
        _code_digest(series.system.backend, bool(profile.serving.cluster)),
        profile.seed,
        [profile.serving.gateways, profile.serving.user_processes],
        [profile.serving.users_on, bool(profile.serving.cluster), profile.serving.cluster_users],
        provenance()["host"],
        provenance()["versions"],
    ]
    folder = paths.run_dir(profile.name) / {"measured": "records", "emulated": "emulated"}[series.system.source]
    folder = folder / series.experiment / series.system.config
    if series.experiment == "ablation":
        folder = folder / f"{series.client}-{series.system.classifier}"
    if series.experiment == "overhead":
        folder = folder / series.system.relay
    result = []
    for repeat in range(series.repeats):
        for mix in series.mixes:
            for level in series.users:
                drawn = prompts.draw(series.workload, level, mix, profile.seed, repeat)
                name = config.digest(*base, mix, level, repeat, drawn)
                path = folder / f"{mix}-u{level:04d}-r{repeat}-{name}.parquet"
                result.append(Point(series.paper, series.experiment, series.system, mix, level, repeat, name, path))
    return result


def run(profile: Profile, sweep: list[Series]) -> pd.DataFrame:
    """Measure what is missing of `sweep` and return all its records.

    Raises
    ------
    PointFailed
        If a request of a point fails. The point is not written; all earlier ones are, and the next run goes on here.
    StartError
        If a process does not start or dies.
    """
    wanted = [points(profile, series) for series in sweep]
    todo = [[point for point in group if not records.found(point.path, "sweep")] for group in wanted]
    total, missing = sum(map(len, wanted)), sum(map(len, todo))
    print(f"sweep: {total - missing} of {total} points found by content hash, {missing} to measure")
    if missing:
        with Bar(total=sum(point.users for group in todo for point in group), unit="user") as progress:
            for part in _by_system(list(zip(sweep, todo, strict=True))):
                _measure(profile, part, progress)
            progress.set_description("sweep")
    return read(profile, sweep)


def read(profile: Profile, sweep: list[Series]) -> pd.DataFrame:
    """Records of a sweep that has been measured.

    Raises
    ------
    MissingRecords
        If points are missing.
    """
    wanted = [point.path for series in sweep for point in points(profile, series)]
    missing = [path for path in wanted if not path.exists() or records.damage(path)]
    if missing:
        notebooks = {
            "preliminary": "04_preliminary_sweep",
            "overhead": "06_routing_overhead",
            "replicas": "06_routing_overhead",
        }
        others = "05_load_sweep" if sweep[0].system.source == "measured" else "07_paper_scale"
        notebook = notebooks.get(sweep[0].experiment, others)
        raise MissingRecords(
            f"{len(missing)} of {len(wanted)} points have not been measured with this profile, or are damaged; "
            f"run ./run_all.sh --profile {profile.name} --only {notebook}"
        )
    return records.read_files(wanted)


def _by_system(todo: Sequence[tuple[Series, list[Point]]]) -> Iterator[list[tuple[Series, list[Point]]]]:
    """What is to be measured, in parts that one start of a system serves, whatever clients ask it."""
    left = [(series, group) for series, group in todo if group]
    while left:
        system = left[0][0].system
        yield [(series, group) for series, group in left if series.system == system]
        left = [(series, group) for series, group in left if series.system != system]


def _measure(profile: Profile, todo: list[tuple[Series, list[Point]]], progress: Bar) -> None:
    """Measure `todo`; where a cluster loses a node, go on with what is left of it at the point that it spoilt."""
    while todo:
        try:
            _measure_points(profile, todo, progress)
        except cluster.NodeLost as loss:
            progress.write(f"{todo[0][0].system.config}: {loss}; placed anew on the nodes that are left")
        left = [(series, [point for point in group if not point.path.exists()]) for series, group in todo]
        todo = [(series, group) for series, group in left if group]


def _log_dir(profile: Profile, system: System) -> Path:
    return paths.run_dir(profile.name) / "logs" / system.config


def _served(profile: Profile, system: System) -> stack.Stack | ClusterStack:
    """A system, here or in a cluster."""
    serving = profile.serving.model_copy(update={"relay": system.relay})
    log_dir = _log_dir(profile, system)
    what = (system.config, system.servers, system.routing, serving, system.router, log_dir, system.classifier)
    return ClusterStack(*what, system.replicas) if serving.cluster else stack.Stack(*what, replicas=system.replicas)


def _users(profile: Profile, series: Series, serving_stack: stack.Stack) -> users.UserSimulator | ClusterUsers:
    """Those who ask it, beside it."""
    serving, system = profile.serving, series.system
    n_processes = serving.user_processes if series.client == "asyncio" else 1
    who = (system.tokenizer, n_processes, _log_dir(profile, system) / "users.log", series.client)
    if isinstance(serving_stack, ClusterStack):
        return ClusterUsers(serving_stack, *who)
    return users.UserSimulator(
        *who,
        serving_stack.harness_niceness,
        serving.users_on,
        watch=lambda: serving_stack.require_alive(engines=False),
    )


def _measure_points(profile: Profile, todo: list[tuple[Series, list[Point]]], progress: Bar) -> None:
    """Measure points of one system; each kind of client starts once."""
    system = todo[0][0].system
    progress.set_description(f"{system.config}: starting")
    with _served(profile, system) as serving_stack:
        for series, group in todo:
            with _users(profile, series, serving_stack) as simulator:
                for point in group:
                    progress.set_description(f"{system.config} {point.mix} {point.users} users, repeat {point.repeat}")
                    _measure_point(profile, series, point, serving_stack, simulator)
                    progress.update(point.users)


def _measure_point(
    profile: Profile,
    series: Series,
    point: Point,
    serving_stack: stack.Stack,
    simulator: users.UserSimulator | ClusterUsers,
) -> None:
    serving_stack.require_alive()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    scripts = _scripts(profile, series, point, len(serving_stack.targets))
    timeout_s = profile.serving.request_timeout_s * max(1, series.system.slow_motion)
    before = serving_stack.counters()
    seen = simulator.run(scripts, serving_stack.targets, timeout_s)
    serving_stack.require_alive()
    counted = {name: value - before[name] for name, value in serving_stack.counters().items()}
    _verify(point, series, seen.answers, round(counted["expert_generated_tokens"]))
    where = _where(serving_stack)
    records.write(_rows(profile, series, point, seen, counted, started, where), point.path)


def _where(serving_stack: stack.Stack) -> dict[str, Any]:
    """Columns that say what the servers run on."""
    cores = serving_stack.cores()
    bound = Counter(map(hardware.ranges, cores))
    return {
        "host": serving_stack.machines,
        "server_cores": min(map(len, cores)) if all(cores) else None,
        "server_cpus": "; ".join(f"{which} x {n}" for which, n in bound.items()) if all(cores) else None,
    }


def _scripts(profile: Profile, series: Series, point: Point, n_targets: int) -> list[users.Script]:
    drawn = prompts.draw(series.workload, point.users, point.mix, profile.seed, point.repeat)
    return [
        users.Script(
            user=user,
            prompt=prompt.prompt,
            cluster=prompt.cluster,
            text=prompt.text,
            max_tokens=prompt.max_tokens,
            end_id=prompt.end_id,
            target=user % n_targets,
            continues=series.continues,
        )
        for user, prompt in enumerate(drawn)
    ]


def _verify(point: Point, series: Series, answers: list[users.Answer], counted: int) -> None:
    """A point is written only if every request succeeded and clients and servers agree on the tokens."""
    failures = [answer.status for answer in answers if answer.status != "ok"]
    what = f"{point.system.config}, {point.users} users, repeat {point.repeat}"
    if failures:
        raise users.PointFailed(f"{what}: {len(failures)} of {len(answers)} requests failed, the first: {failures[0]}")
    expected = point.users * (2 if series.continues else 1)
    received = sum(len(answer.token_ns) for answer in answers)
    if len(answers) != expected or received != counted:
        raise users.PointFailed(
            f"{what}: {len(answers)} answers with {received} tokens, expected {expected} answers with the {counted} "
            "tokens that the servers counted"
        )
    if any(later <= sooner for a in answers for sooner, later in zip(a.token_ns, a.token_ns[1:], strict=False)):
        raise users.PointFailed(f"{what}: token timestamps are not strictly increasing")


def _rows(
    profile: Profile,
    series: Series,
    point: Point,
    seen: users.Observation,
    counted: Mapping[str, float],
    started: str,
    where: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    system = series.system
    shared = {
        "source": system.source,
        "paper": series.paper,
        "experiment": series.experiment,
        "config": point.system.config,
        "mix": point.mix,
        "users": point.users,
        "repeat": point.repeat,
        "client": series.client,
        "classifier": system.classifier if system.routing == "expert_router" else None,
        "relay": system.relay if system.has_gateways else None,
        "client_lag_p99_ms": seen.lag_p99_ms,
        "client_lag_max_ms": seen.lag_max_ms,
        "client_cpu_cores": seen.cpu_cores,
        "network_us_mean": seen.network_us[0],
        "network_us_sd": seen.network_us[1],
        "server_tokens": round(counted["expert_generated_tokens"]),
        "point_hash": point.hash,
        "profile": profile.name,
        "profile_hash": profile.digest,
        "seed": profile.seed,
        "started": started,
        **provenance(),
        **where,
    }
    if system.source == "emulated":
        shared |= {
            "slow_motion": system.slow_motion,
            "steps": round(counted["expert_steps"]),
            "late_steps": round(counted["expert_late_steps"]),
            "lost_time": counted["expert_lost_seconds"] / counted["expert_step_seconds"],
        }

    def engine_ns(ns: int) -> int:
        """By the engines' clock, which is slower than ours in slow motion."""
        return round(ns / system.slow_motion)

    for answer in seen.answers:
        fields = asdict(answer)
        routing = {f"route_{span}_ns": engine_ns(ns) for span, ns in fields.pop("routing").items()}
        times: dict[str, Any] = {name: engine_ns(fields[name]) for name in ("t_send_ns", "t_first_ns", "t_last_ns")}
        times["token_ns"] = [engine_ns(ns) for ns in answer.token_ns]
        del fields["target"]
        yield {**shared, **fields, **times, **routing, "output_tokens": len(answer.token_ns)}


# --- provenance ---------------------------------------------------------------------------------------------------


@functools.cache
def provenance() -> dict[str, str]:
    """Columns of every record that say which code on which machine made it."""
    return {
        "git_commit": git_commit(),
        "host": hardware.machine(),
        "versions": json.dumps({name: importlib.metadata.version(name) for name in _PACKAGES}),
    }


def git_commit() -> str:
    """Short commit of the repository, ``-dirty`` if changed since; ``unknown`` outside git."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!figures")  # a run redraws figures
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def _code_digest(backend: str, in_cluster: bool) -> str:
    """Hash of the code on the measured path, blind to comments, docstrings and layout."""
    modules = [wire, processes, triton, routers, experts, limits, telemetry, service, handover, gateway]
    modules += [nginx, stack, users]
    if backend == repository.ENGINE_MODEL:
        modules += [containers, repository]
        files = [file for file in sorted(repository.TEMPLATES.rglob("*")) if file.is_file()]
    else:
        files = triton.model_code(backend)
    if in_cluster:
        modules += [cluster]
    if backend == "emulated":
        from erlib import stock  # and scikit-learn, which takes a second

        modules += [engines, steptimes, batching, stock, threaded_users]
    files += [*(Path(inspect.getfile(module)) for module in modules), nginx.TEMPLATE]
    parts: list[Any] = [_skeleton(file) if file.suffix == ".py" else file.read_text(encoding="utf-8") for file in files]
    return config.digest(*parts, inspect.getsource(_scripts))


def _skeleton(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return ast.dump(tree)
