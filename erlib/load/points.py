"""Points: one file of records each, named by a hash of all that it was measured with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from erlib import cache, paths, provenance
from erlib.config import Mix, Paper, Profile
from erlib.load.experiments import Experiment, Series, System
from erlib.serving import triton
from erlib.workload import prompts


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


def points(profile: Profile, series: Series) -> list[Point]:
    """All points of a series, in the order in which they are measured."""
    base = [
        series.system.description,
        series.client,
        code_digest(series.system.backend, bool(profile.serving.cluster)),
        profile.seed,
        [profile.serving.gateways, profile.serving.user_processes],
        [profile.serving.users_on, bool(profile.serving.cluster), profile.serving.cluster_users],
        provenance.columns()["host"],
        provenance.columns()["versions"],
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
                name = cache.digest(*base, mix, level, repeat, drawn, series.window_s)
                path = folder / f"{mix}-u{level:04d}-r{repeat}-{name}.parquet"
                result.append(Point(series.paper, series.experiment, series.system, mix, level, repeat, name, path))
    return result


@functools.cache
def code_digest(backend: str, in_cluster: bool) -> str:
    """Hash of the code on the measured path, wherever it lies."""
    files = [*MEASURED, *_ALSO.get(backend, ()), *(["cluster"] if in_cluster else [])]
    engine = [triton.MODEL_CODE / backend, triton.MODEL_CODE / "inflight.py"]
    return provenance.code_digest(*files, *engine)


MEASURED = (
    "machine/processes.py", "machine/nursery.py", "serving", "gateway", "routing/clusterer.py", "routing/policies.py",
    "load/users.py", "load/scripts.py",
)  # fmt: skip
"""What every measured request passes, and what starts it."""
_ALSO = {
    "tensorrt_llm": ("dgx/containers.py", "dgx/repository.py"),
    "emulated": (
        "engines/llama.py", "paper_scale/steptimes.py", "paper_scale/batching.py", "routing/sklearn_pipeline.py",
        "load/threaded_users.py",
    ),
}  # fmt: skip
