"""Sweeps: every configuration, user level, repeat and mix of a profile, measured point by point and resumable.

A point's file name carries a hash of all that it was measured with: the workload, the system (engine, batch size, KV
cache, routing), the router's model and the code on the measured path. A point whose file exists is not measured again;
one whose inputs have changed gets another name, and the old file is left alone.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from erlib import paths, provenance
from erlib.config import Profile
from erlib.load import backends, records, users
from erlib.load.experiments import Series, System
from erlib.load.points import Point, points
from erlib.load.scripts import scripts_of
from erlib.machine import hardware
from erlib.machine.progress import Bar
from erlib.provenance import MissingRecords
from erlib.serving import nginx, stack


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
            "experts": "11_experts",
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
        except stack.NodeLost as loss:
            progress.write(f"{todo[0][0].system.config}: {loss}; placed anew on the nodes that are left")
        left = [(series, [point for point in group if not point.path.exists()]) for series, group in todo]
        todo = [(series, group) for series, group in left if group]


def _log_dir(profile: Profile, system: System) -> Path:
    return paths.run_dir(profile.name) / "logs" / system.config


def _served(profile: Profile, system: System) -> stack.Stack:
    """A system, here or in a cluster."""
    serving = profile.serving.model_copy(update={"relay": system.relay})
    log_dir = _log_dir(profile, system)
    what = (system.config, system.servers, system.routing, serving, system.router, log_dir, system.classifier)
    if serving.cluster:
        clustered: stack.Stack = backends.on_ray().ClusterStack(*what, system.replicas, system.adapters)
        return clustered
    return stack.Stack(*what, replicas=system.replicas, adapters=system.adapters)


def _users(profile: Profile, series: Series, serving_stack: stack.Stack) -> users.UserSimulator:
    """Those who ask it, beside it."""
    serving, system = profile.serving, series.system
    n_processes = serving.user_processes if series.client == "asyncio" else 1
    who = (system.tokenizer, n_processes, _log_dir(profile, system) / "users.log", series.client)
    if serving.cluster:
        there: users.UserSimulator = backends.on_ray().ClusterUsers(serving_stack, *who)
        return there
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
    simulator: users.UserSimulator,
) -> None:
    serving_stack.require_alive()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    scripts = scripts_of(profile, series, point, len(serving_stack.targets))
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


@functools.cache
def _versions(build: str = "") -> str:
    """What a record says of the software that made it: the packages' versions, NGINX', the operating system's.

    `build`: what else the engines are made by, name and version.
    """
    said = subprocess.run([nginx.find(), "-v"], capture_output=True, text=True, check=False).stderr
    about = {"nginx": said.strip().rpartition("/")[2], "system": hardware.system()}
    if build:
        name, version = build.split()
        about[name] = version
    return json.dumps(json.loads(provenance.columns()["versions"]) | about)


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
        **provenance.columns(),
        "versions": _versions(system.servers[0].parameters.get("build", "")),
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
