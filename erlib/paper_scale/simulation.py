"""The papers' experiments in virtual time: discrete-event simulation of engines, gateway and client at full scale.

All sequences of an engine step (:mod:`erlib.paper_scale.steptimes` says how long it lasts) get their tokens together,
so an answer's timestamps are a slice of its server's steps. Which requests share a step,
:mod:`erlib.paper_scale.batching` decides. Steps between which nobody joins or leaves are one event; a request that
arrives meanwhile cuts them short after the step that runs, so that all is as it were with one event per step.

What stands around the engines, :mod:`erlib.paper_scale.presets` has by name.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from erlib import cache, config, provenance
from erlib.config import ConfigError, Mix, Paper, Profile
from erlib.config.choices import Preset
from erlib.config.system import HAVE_GATEWAYS
from erlib.engines import checkpoint
from erlib.load import experiments, records
from erlib.machine import processes
from erlib.machine.progress import Bar
from erlib.paper_scale import batching, steptimes
from erlib.paper_scale.batching import System
from erlib.paper_scale.clock import HARDWARE, Harness, Trace, trace, without_collections
from erlib.paper_scale.presets import preset
from erlib.routing import building
from erlib.routing.clusterer import Clusterer
from erlib.workload import lengths, prompts
from erlib.workload.prompts import Prompt, Workload

_CLUSTERS = 8


def at_paper_scale(workload: Workload, profile: Profile, paper: lengths.Paper) -> Workload:
    """A workload that was cut for this machine, with the papers' lengths: the router's decisions stay.

    Paper 2's answers get MLPerf's lengths, whatever ``workload.p2_answers`` is: nobody generates them here.
    """
    forced = {"workload": profile.workload.model_copy(update={"p2_answers": "mlperf"}), "scale": _FULL_SCALE}
    rng = np.random.default_rng([profile.seed, *paper.encode()])
    nth = workload.frame.groupby("cluster").cumcount().to_numpy()
    answers, _ = lengths.answer_tokens(paper, profile.model_copy(update=forced), nth.max() + 1, rng)
    tokens = workload.frame["paper_input_tokens"]
    frame = workload.frame.assign(input_tokens=tokens, max_tokens=answers[nth], end_id=lengths.FORCED)
    return replace(workload, frame=frame)


def full_scale_workloads(profile: Profile) -> dict[lengths.Paper, Workload]:
    """The workloads of all experiments at full scale, routed by the profile's own clusterer."""
    router, tokenizer = Clusterer.load(building.build_clusterer(profile)), checkpoint.tokenizer(profile)
    many = profile.paper_scale.prompts
    pool: dict[lengths.Paper, int | None] = {"p1": many, "p2": many, "preliminary": None}
    return {
        name: at_paper_scale(prompts.build(profile, name, tokenizer, router, n), profile, name)
        for name, n in pool.items()
    }


def textless_workload(
    profile: Profile, paper: lengths.Paper, n_clusters: int = _CLUSTERS, per_cluster: int = 1024
) -> Workload:
    """A pool of the papers' lengths without texts, equally many prompts per cluster, where no clusterer is at hand."""
    n = n_clusters * per_cluster
    rng = np.random.default_rng([profile.seed, *paper.encode()])
    inputs = np.repeat(rng.permutation(lengths.input_tokens(paper, profile.workload, per_cluster)), n_clusters)
    columns = {"prompt": np.arange(n), "paper": paper, "cluster": np.arange(n) % n_clusters, "text": ""}
    frame = pd.DataFrame(columns | {"paper_input_tokens": inputs}).assign(follow_up=None)
    return at_paper_scale(Workload(frame, n_clusters, profile.workload.sigma), profile, paper)


_FULL_SCALE = config.Scale(users=1, tokens=1)


def simulate(
    system: System,
    drawn: Sequence[Prompt],
    *,
    paper: Paper,
    mix: Mix = "uniform",
    repeat: int = 0,
    around: Harness = HARDWARE,
    seed: int = 0,
    routing_s: Sequence[float] | None = None,
    columns: Mapping[str, Any] | None = None,
    continues: bool | Sequence[Prompt] | None = None,
) -> pa.Table:
    """Records of one point (:data:`erlib.load.records.SCHEMA`), one row per request, ``source`` "simulated".

    What happens is what :func:`trace` makes of the same arguments; unless `continues` is given, paper 1's users send a
    continuation prompt, as in its load experiment. Mix and repeat are columns only, for the draw has them already;
    `columns` has further ones, or others than these, e.g. ``profile`` or ``source``.

    ``host`` names the preset. Of the gateway's spans only ``queue`` (wait for a stream) and ``forward`` (the routing
    latency as a whole) are modelled. Columns about the client's own lag are missing.
    """
    happened = trace(system, drawn, paper == "p1" if continues is None else continues, around, seed, routing_s)
    about = {
        "source": "simulated",
        "paper": paper,
        "experiment": "load",
        "config": system.config,
        "mix": mix,
        "users": len(drawn),
        "repeat": repeat,
        "server_tokens": sum(sum(server.sequences) for server in happened.servers),
        "host": f"8 x H100 in virtual time, preset {around.name}",
        **_provenance(),
        "seed": seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "ok",
        **(columns or {}),
    }
    return records.of_columns(len(happened.requests), about | _requests(happened, system))


def _requests(happened: Trace, system: System) -> dict[str, Any]:
    """What records say of each request, by column."""
    requests = happened.requests
    tokens = np.array([request.output_tokens for request in requests])
    ends = np.concatenate([[0], tokens.cumsum()])
    token_ns = np.concatenate(happened.token_ns())
    columns = {
        "user": [request.user for request in requests],
        "turn": [request.turn for request in requests],
        "cluster": [request.prompt.cluster for request in requests],
        "expert": [request.expert for request in requests],
        "prompt": [request.prompt.prompt for request in requests],
        "input_tokens": [request.input_tokens for request in requests],
        "output_tokens": tokens,
        "t_send_ns": _ns([request.sent_s for request in requests]),
        "t_first_ns": token_ns[ends[:-1]],
        "t_last_ns": token_ns[ends[1:] - 1],
        "token_ns": pa.ListArray.from_arrays(ends.astype(np.int32), token_ns),
    }
    if system.routing in HAVE_GATEWAYS:
        columns["route_queue_ns"] = _ns([request.queued_s for request in requests])
        columns["route_forward_ns"] = _ns([request.routed_s for request in requests])
    return columns


def _ns(seconds: Sequence[float]) -> npt.NDArray[np.int64]:
    return np.rint(np.array(seconds) * 1e9).astype(np.int64)


@functools.cache
def _provenance() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("numpy",)}
    versions["step_times"] = cache.digest(steptimes.TABLE)
    return {"git_commit": provenance.git_commit(), "versions": json.dumps(versions)}


@dataclass(frozen=True)
class Point:
    """One file of records."""

    workload: lengths.Paper
    system: System
    around: Harness
    mix: Mix
    users: int
    repeat: int
    path: Path

    @property
    def paper(self) -> Paper:
        return _paper(self.workload)

    @property
    def experiment(self) -> experiments.Experiment:
        return "preliminary" if self.workload == "preliminary" else "load"


def _paper(workload: lengths.Paper) -> Paper:
    """Whose it is: the preliminary experiment is paper 2's."""
    return "p1" if workload == "p1" else "p2"


CODE = (
    *(f"paper_scale/{name}.py" for name in ("simulation", "clock", "instances", "batching", "steptimes")),
    *("engines/llama.py", "workload/prompts.py", "workload/lengths.py"),
)
"""What simulated records are computed with."""


def points(
    profile: Profile,
    around: Mapping[Paper, Harness],
    directory: Path,
    workloads: Mapping[lengths.Paper, Workload],
) -> list[Point]:
    """All points of the experiments that `workloads` name; paths carry a hash of what they are computed from.

    ``p1`` and ``p2`` are the papers' load experiments, ``preliminary`` is paper 2's search for its baselines (section
    IV-C). Its users reach the one instance directly, so that what paper 2's harness limits, the gateways, is not there.
    """
    code = provenance.code_digest(*CODE)
    levels: dict[lengths.Paper, config.SweepSettings | config.PreliminarySettings] = {
        "p1": profile.paper1,
        "p2": profile.paper2,
        "preliminary": profile.preliminary,
    }
    result = []
    for name, workload in workloads.items():
        frame = workload.frame[["prompt", "cluster", "input_tokens", "max_tokens"]]
        inputs = [frame.to_json(), workload.sigma, profile.seed, code, steptimes.TABLE]
        for system, mixes in _systems(profile, name):
            outside = around[_paper(name)].around(system)
            described = {f.name: str(getattr(system, f.name)) for f in fields(system)}
            base = cache.digest(*inputs, asdict(outside), described)
            folder = directory / outside.name / system.config
            for mix, users, repeat in itertools.product(mixes, levels[name].users, range(levels[name].repeats)):
                path = folder / f"{mix}-u{users:04d}-r{repeat}-{cache.digest(base, mix, users, repeat)}.parquet"
                result.append(Point(name, system, outside, mix, users, repeat, path))
    return result


def _systems(profile: Profile, workload: lengths.Paper) -> Iterator[tuple[System, list[Mix]]]:
    """The systems of an experiment, and the mixes under which each is run."""
    if workload == "preliminary":
        grid = profile.preliminary
        for dtype, tensor_parallel, batch_size in itertools.product(grid.dtypes, (8, 4), grid.batch_sizes):
            yield batching.preliminary_system(dtype, tensor_parallel, batch_size), ["uniform"]
        return
    settings = profile.paper1 if workload == "p1" else profile.paper2
    answer_limit = profile.workload.p2_max_output_tokens if workload == "p2" else None
    for name in settings.configs:
        system = batching.paper_system(name, answer_limit=answer_limit)
        yield system, settings.mixes if system.routing == "expert_router" else settings.mixes[:1]


def simulate_papers(
    profile: Profile,
    around: Preset | Mapping[Paper, Harness],
    directory: Path,
    workloads: Mapping[lengths.Paper, Workload] | None = None,
    workers: int = 2,
    columns: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Simulate what is missing of both papers' experiments; returns the files of all points.

    Parameters
    ----------
    profile : Profile
        At full scale (e.g. ``dgx-h100``): configurations, user levels, repeats, mixes, seed.
    around : str or mapping
        The name of one of :mod:`erlib.paper_scale.presets`, or what is around the engines in each paper, under a name
        of your own.
    directory : Path
        Records go to ``<directory>/<name of the preset>/<config>/``.
    workloads : mapping, optional
        Of the experiments to simulate (:func:`points`), at full scale (:func:`at_paper_scale`). By default of all
        three, without texts.
    workers : int
        Processes.
    columns : mapping, optional
        See :func:`simulate`.

    Raises
    ------
    ConfigError
        If the profile is not at full scale.
    """
    if (profile.scale.users, profile.scale.tokens) != (1, 1):
        raise ConfigError(
            f"the simulation has the papers' own scale, but profile {profile.name!r} divides users by "
            f"{profile.scale.users:g} and tokens by {profile.scale.tokens:g}; use dgx-h100"
        )
    everything: tuple[lengths.Paper, ...] = ("p1", "p2", "preliminary")
    workloads = workloads or {name: textless_workload(profile, name) for name in everything}
    papers = list(dict.fromkeys(map(_paper, workloads)))
    outside = {paper: preset(around, paper) for paper in papers} if isinstance(around, str) else around
    label = "simulation " + " and ".join(dict.fromkeys(outside[paper].name for paper in papers))
    wanted = points(profile, outside, directory, workloads)
    todo = [point for point in wanted if not records.found(point.path, "simulation")]
    print(f"{label}: {len(wanted) - len(todo)} of {len(wanted)} points found by content hash")
    _simulate_in_parallel(profile, todo, workloads, workers, columns, label)
    return [point.path for point in wanted]


def _simulate_in_parallel(
    profile: Profile,
    todo: Sequence[Point],
    workloads: Mapping[lengths.Paper, Workload],
    workers: int,
    columns: Mapping[str, Any] | None,
    label: str,
) -> None:
    together = defaultdict(list)
    for point in todo:
        together[point.workload, point.mix, point.users, point.repeat].append(point)
    # the longest first, so that no worker is left alone with one
    parts = sorted(together.values(), key=lambda part: -part[0].users * len(part))
    with (
        processes.pool(workers) as pool,
        Bar(total=sum(point.users for point in todo), unit="user", desc=label) as progress,
    ):
        jobs = {pool.submit(_write, profile, workloads[part[0].workload], part, columns): part for part in parts}
        try:
            for job in as_completed(jobs):
                job.result()
                progress.update(sum(point.users for point in jobs[job]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@without_collections()
def _write(profile: Profile, workload: Workload, part: Sequence[Point], columns: Mapping[str, Any] | None) -> None:
    """Simulate points that have the same draw."""
    drawn = prompts.draw(workload, part[0].users, part[0].mix, profile.seed, part[0].repeat)
    for point in part:
        about = {
            "experiment": point.experiment,
            "profile": profile.name,
            "profile_hash": profile.digest,
            "point_hash": point.path.stem[-16:],
        }
        answered = simulate(
            point.system,
            drawn,
            paper=point.paper,
            mix=point.mix,
            repeat=point.repeat,
            around=point.around,
            seed=_seed(profile.seed, point),
            columns=about | dict(columns or {}),
        )
        records.write(answered, point.path)


def _seed(seed: int, point: Point) -> int:
    """A seed of the point's own, so that routing latencies of repeats differ."""
    return int(cache.digest(seed, point.system.config, point.mix, point.users, point.repeat)[:8], 16)
