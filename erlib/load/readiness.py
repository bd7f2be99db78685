"""What would stop a run of any profile, before it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from erlib import paths
from erlib.config import ConfigError, Profile
from erlib.engines import laptop, llama, vllm
from erlib.load import backends
from erlib.machine import hardware, processes
from erlib.machine.processes import StartError
from erlib.routing import pickles
from erlib.serving import nginx
from erlib.serving.share import Gateway
from erlib.serving.triton import TritonServer
from erlib.workload import corpus

LEAST_FREE_BYTES = 4e9
"""Disk space that any run needs, whatever it builds."""


def basics(profile: Profile) -> list[str]:
    """Problems that any run on this machine would have: folders, disk space, input files, NGINX, ports."""
    found = [*_names(), *_folders(profile), *_inputs(profile), *_scale(profile), *_vllm(profile)]
    free = hardware.free_disk_bytes(paths.run_dir(profile.name))
    if free < LEAST_FREE_BYTES:
        found.append(
            f"{free / 1e9:.1f} GB free at {paths.run_dir(profile.name)}; a run needs {LEAST_FREE_BYTES / 1e9:g} GB. "
            "Make room, or set ERLIB_HOME to another disk"
        )
    checks: list[Callable[[], object]] = [
        nginx.find,
        lambda: processes.require_free_ports(ports(profile), profile.serving.host),
    ]
    if profile.records == "published":  # nothing will be started
        checks = []
    for check in checks:
        try:
            check()
        except StartError as error:
            found.append(str(error))
    return found


def _names() -> Iterable[str]:
    """Folders that cannot be named where several are, between colons."""
    for folder in dict.fromkeys([paths.ROOT, Path(sys.prefix)]):
        if ":" in str(folder):
            yield f"{str(folder)!r} holds ':', which ends a folder's name in PATH and PYTHONPATH: move or rename it"


def _folders(profile: Profile) -> Iterable[str]:
    """Folders that a run writes to but may not, each once."""
    wanted = [paths.CACHE, paths.ENGINE_BUILDS, paths.run_dir(profile.name), paths.FIGURES / profile.name]
    wanted += backends.of(profile).folders(profile)
    for place in dict.fromkeys(map(hardware.existing, wanted)):
        if not place.is_dir():
            yield f"{place} is a file where a run needs a folder: remove it, or set ERLIB_HOME to a folder of yours"
        elif not os.access(place, os.W_OK | os.X_OK):
            yield f"{place} is not writable: set ERLIB_HOME to a folder of yours"


def _scale(profile: Profile) -> Iterable[str]:
    """What is too small to behave as the papers' systems do."""
    if profile.serving.backend != "tensorrt_llm" and profile.scale.distortion == "refuse":
        for why in laptop.distortions(profile):
            yield f"{why}, or set scale.distortion=accept"


def _vllm(profile: Profile) -> Iterable[str]:
    """What vLLM lacks, where it is to serve: an environment, a checkpoint."""
    if profile.serving.backend != "vllm":
        return
    checks: list[Callable[[], object]] = [lambda: vllm.environment(profile.vllm, len(hardware.gpus()))]
    if own := profile.vllm.checkpoint:
        checks.append(lambda: vllm.read(Path(own)))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield str(error)


def _inputs(profile: Profile) -> Iterable[str]:
    """Files that the profile names but that are not there."""
    try:
        corpus.check(profile.corpus)
    except corpus.CorpusError as error:
        yield str(error)
    source = profile.clusterer.pickles
    if source and "://" not in source:
        missing = [name for name in pickles.FILES if not (Path(source) / name).is_file()]
        if missing:
            yield f"clusterer.pickles: no {' nor '.join(missing)} in {source}"


def ports(profile: Profile) -> range:
    """All ports that a stack of eight servers takes: NGINX, two for each gateway, three for each server."""
    first = profile.serving.base_port
    return range(first, first + 1 + profile.serving.gateways * Gateway.PORTS + llama.GPUS * TritonServer.PORTS)
