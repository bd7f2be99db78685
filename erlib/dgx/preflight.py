"""Everything that would stop a run, found before it starts: nothing is started, and nothing is written.

A *problem* stops; a *warning* is said. Each is a sentence that says what to do. :func:`basics` serves every profile,
:func:`check` those that build and serve TensorRT-LLM engines, fitted to the GPUs that are there.
"""

from __future__ import annotations

import getpass
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from erlib import paths
from erlib.cluster import placement
from erlib.config import ConfigError, Passable, Profile, RunnerKind
from erlib.dgx import builds, checkpoints, estimates, recipes
from erlib.dgx.adapters import ADAPTERS_SHARE
from erlib.dgx.builds import PlannedSteps
from erlib.dgx.containers import Image, Runner, load_image
from erlib.dgx.fit import Fitted, fitted
from erlib.dgx.hub import ANSWER_S, last_line, problems_with_the_hub
from erlib.dgx.tensorrt_llm import NEWEST, Plan
from erlib.dgx.tools import inspect
from erlib.engines import llama
from erlib.load.readiness import basics
from erlib.machine import hardware, runfolder
from erlib.machine.hardware import Gpu
from erlib.machine.processes import StartError

SHARED_MEMORY_BYTES = 2e9

IN_USE_BYTES = 1e9
"""Memory that somebody may have on a GPU (a display, a monitor) without being in the way."""


def _names_on_gpus(profile: Profile) -> Iterable[str]:
    """Folders that Triton, in its image or not, hands to a shell as they are, or a container is given with others."""
    places = checkpoints.places(profile)
    for key, folder in {"checkpoints": places.checkpoints, "work": places.work}.items():
        if unsafe := runfolder.NOT_SAFE.search(str(folder)):
            yield (
                f"{str(folder)!r} holds {unsafe[0]!r}, which Triton cannot be given: "
                f"set tensorrt_llm.{key} to a folder named with letters, digits and _ . - + alone"
            )


@dataclass(frozen=True)
class Report:
    """What was found."""

    asked: Profile
    """The profile as it was given."""
    fitted: Fitted
    gpus: list[Gpu]
    """Of this machine; none: everything is laid out for eight H100s."""
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def runners(plans: Sequence[Plan], profile: Profile) -> dict[str, Runner]:
    """One for each version of TensorRT-LLM that plans need."""
    versions = dict.fromkeys(plan.version for plan in plans)
    kind, places = profile.tensorrt_llm.runner, checkpoints.places(profile)
    return {version: Runner(kind, load_image(version), places) for version in versions}


def check(profile: Profile) -> Report:
    """Find everything that would stop `profile`'s TensorRT-LLM experiments on this machine, or make them other ones.

    Raises
    ------
    ConfigError
        If the profile wants a cluster and there is none.
    """
    try:
        here = placement.gpus(profile.serving.cluster)
    except StartError as error:
        raise ConfigError(str(error)) from None
    assumed = here or [hardware.H100] * (profile.tensorrt_llm.gpus or llama.GPUS)
    fit = fitted(profile, assumed)
    report = Report(profile, fit, here)
    plans = fit.plans
    todo = builds.missing(plans)
    checks: dict[str, Callable[[], Iterable[str]]] = {
        "gpus": lambda: _gpus(profile, here),
        "driver": lambda: _driver(fit, here),
        "gpus_in_use": lambda: _gpus_in_use(fit, here),
        "calibration": lambda: _calibration(todo, here),
        "fit": lambda: _fit(fit),
        "adapters": lambda: _adapters(fit, plans),
        "runner": lambda: _runner(profile, todo),
        "checkpoints": lambda: _checkpoints(profile, todo),
        "host_memory": lambda: _host_memory(todo),
        "shared_memory": lambda: _shared_memory(profile),
        "disk": lambda: _disk(profile, plans),
        "options": lambda: _options(fit, plans),
        "hub": lambda: problems_with_the_hub(profile, plans, todo),
        "names": lambda: _names_on_gpus(profile),
        "basics": lambda: basics(profile),
    }
    with ThreadPoolExecutor(len(checks)) as pool:  # several wait for somebody's answer
        for name, found in zip(checks, pool.map(lambda one: list(one()), checks.values()), strict=True):
            if name in profile.tensorrt_llm.go_past:
                report.warnings.extend(found)
            elif name in get_args(Passable):
                past = f" (to go on all the same: --set tensorrt_llm.go_past='[{name}]')"
                report.problems.extend(problem + past for problem in found)
            else:
                report.problems.extend(found)
    report.warnings.extend(_warnings(report))
    return report


def _adapters(fit: Fitted, plans: Sequence[Plan]) -> Iterable[str]:
    """An engine that cannot hold all adapters at a time would let requests wait for one another's."""
    for plan in plans:
        if plan.adapters is None:
            continue
        left = fit.gpu.usable_bytes - llama.gpu_memory(plan.system, plan.configuration.per_gpu).total
        needed = plan.adapters.bytes / plan.system.tensor_parallel
        if needed > ADAPTERS_SHARE * left:
            yield (
                f"{plan.configuration.id}: its adapters take {needed / 1e9:.2f} GB of a GPU, of which weights and KV "
                f"cache leave {left / 1e9:.2f} GB, {ADAPTERS_SHARE:.0%} of that for adapters: take some of a lower rank"
            )


def _gpus(profile: Profile, gpus: Sequence[Gpu]) -> Iterable[str]:
    wanted = profile.tensorrt_llm.gpus
    if not gpus:
        yield (
            "no GPU: nvidia-smi is missing or finds none. Run this on a machine with NVIDIA GPUs and their driver; "
            "without any, --profile laptop measures small engines, and its notebook 07 simulates H100s"
        )
        return
    if wanted and wanted > len(gpus):
        yield f"tensorrt_llm.gpus asks for {wanted} GPUs, there are {len(gpus)}: --set tensorrt_llm.gpus={len(gpus)}"
    if len({(gpu.name, gpu.memory_bytes) for gpu in gpus[:wanted]}) > 1:
        yield "the GPUs differ, so experts would not be comparable: choose equal ones with tensorrt_llm.gpus"


def _driver(fit: Fitted, gpus: Sequence[Gpu]) -> Iterable[str]:
    image = _image(fit)
    if gpus and not image.is_made_for(fit.gpu.driver) and not _is_covered(fit):
        branches = ", ".join(f"R{first.partition('.')[0]} from {first}" for first in image.compatible)
        yield (
            f"driver {fit.gpu.driver} is older than {image.driver}, which {image.tag} is made for; its compatibility "
            f"package covers {branches}, on data-centre GPUs, and these are {fit.gpu.name}: update the driver"
        )


def _is_covered(fit: Fitted) -> bool:
    """Whether an older driver will do, because the image brings what it lacks."""
    return fit.gpu.is_for_data_centres and _image(fit).is_compatible_with(fit.gpu.driver)


def _image(fit: Fitted) -> Image:
    return load_image(fit.profile.tensorrt_llm.version or NEWEST)


def _gpus_in_use(fit: Fitted, gpus: Sequence[Gpu]) -> Iterable[str]:
    for index, used in enumerate(hardware.gpu_bytes_in_use()[: fit.n_gpus if gpus else 0]):
        if used > IN_USE_BYTES:
            yield f"somebody uses {used / 1e9:.1f} GB of GPU {index}: nvidia-smi shows who; wait, or end it"


def _calibration(todo: PlannedSteps, gpus: Sequence[Gpu]) -> Iterable[str]:
    fp8 = [plan for plan, step in todo if step.purpose == "quantise" and plan.system.dtype == "fp8"]
    room = sum(gpu.usable_bytes for gpu in gpus)
    if gpus and fp8 and room < (needed_bytes := max(map(estimates.calibration_bytes, fp8))):
        names = ", ".join(dict.fromkeys(plan.configuration.id for plan in fp8))
        yield (
            f"calibrating the largest FP8 checkpoint takes about {needed_bytes / 1e9:.0f} GB of GPU memory, there are "
            f"{room / 1e9:.0f} GB (for {names}): quantise on a larger machine and copy tensorrt_llm.work here, or "
            "leave those out (paper1.configs, paper2.configs, preliminary.dtypes)"
        )


def _fit(fit: Fitted) -> Iterable[str]:
    for key, sweep in {"paper1.configs": fit.profile.paper1, "paper2.configs": fit.profile.paper2}.items():
        if not sweep.configs:
            yield (
                f"none of {key} fits the GPUs or the flow (reasons above): choose others (x1.S and x1.F are made to "
                "share GPUs, see --profile one-gpu), or larger GPUs"
            )
    if fit.profile.clusterer.pickles and (experts := fit.overrides.get("clusterer.n_clusters")):
        yield (
            f"there are {experts} experts, for which the clusterer of clusterer.pickles has no {experts} clusters: "
            "--set clusterer.pickles=null fits one"
        )
    if fit.profile.tensorrt_llm.flow != "engine":
        for reason in fit.refused:
            if "cannot express" in reason:
                yield f"{reason}, or leave it out with --set paper1.configs=[...]"


def _runner(profile: Profile, todo: PlannedSteps) -> Iterable[str]:
    kind = profile.tensorrt_llm.runner
    programs: list[str] = ["trtllm-build", "tritonserver", "mpirun"] if kind == "bare" else [kind]
    if any(step.purpose == "fetch" for _, step in todo):
        programs.append("hf")
    for program in programs:
        if not shutil.which(program):
            yield f"{program} is not installed: {_remedy(program, kind)}"
    if kind == "docker" and shutil.which("docker"):
        reply = _ask("docker", "info")
        if reply.returncode:
            yield (
                f"docker does not answer {getpass.getuser()} ({last_line(reply.stderr)}): start its service, or add "
                f"the user to its group (sudo usermod -aG docker {getpass.getuser()}) and log in again"
            )


def _remedy(program: str, kind: str) -> str:
    if program == "hf":
        return "it comes with huggingface_hub: start with ./run_all.sh, which puts this environment on PATH"
    if kind == "bare":
        return "runner bare needs TensorRT-LLM and Triton installed here; choose docker, apptainer or enroot"
    others = " or ".join(f"--set tensorrt_llm.runner={other}" for other in get_args(RunnerKind)[1:] if other != kind)
    return f"install it, or choose {others}"


def _checkpoints(profile: Profile, todo: PlannedSteps) -> Iterable[str]:
    """Paths for which TensorRT-LLM's scripts take a Llama for another model: they look for its name in all of it."""
    home = str(checkpoints.places(profile).checkpoints)
    reads = any(step.purpose in ("convert", "quantise") for _, step in todo)
    for word in ("mpt", "vila"):
        if reads and word in home.lower():
            yield (
                f"tensorrt_llm.checkpoints is {home}: TensorRT-LLM's scripts take a checkpoint with {word!r} anywhere "
                "in its path for a model of that name; choose another directory (a link to this one does not help)"
            )


def _host_memory(todo: PlannedSteps) -> Iterable[str]:
    convert = [estimates.host_memory_bytes(plan) for plan, step in todo if step.purpose in ("convert", "quantise")]
    free = hardware.free_memory_bytes()
    if convert and free < max(convert):
        yield (
            f"{free / 1e9:.0f} GB of host memory are free, converting the largest checkpoint takes about "
            f"{max(convert) / 1e9:.0f} GB: convert on a larger machine and copy tensorrt_llm.work here"
        )


def _shared_memory(profile: Profile) -> Iterable[str]:
    if profile.tensorrt_llm.runner != "docker":  # which gives each container its own
        free = shutil.disk_usage("/dev/shm").free
        if free < SHARED_MEMORY_BYTES:
            yield (
                f"{free / 1e9:.1f} GB free in /dev/shm, Triton's servers need {SHARED_MEMORY_BYTES / 1e9:g} GB: "
                "mount -o remount,size=8G /dev/shm"
            )


def disk_needs(profile: Profile, plans: Sequence[Plan]) -> dict[Path, float]:
    """Bytes that are still to be written, by directory."""
    places = checkpoints.places(profile)
    needs: defaultdict[Path, float] = defaultdict(float)
    for plan, step in builds.missing(plans):
        where = places.checkpoints if step.makes.is_relative_to(places.checkpoints) else places.work
        needs[where] += estimates.of_step(plan, step).disk_bytes
    for runner in runners(plans, profile).values():
        if runner.kind == "docker" and not runner.is_ready:
            root = Path(_ask("docker", "info", "--format", "{{.DockerRootDir}}").stdout.strip() or "/var/lib/docker")
            needs[root] += estimates.IMAGE_ON_DISK * runner.image.size_gb * 1e9
        elif runner.kind != "bare" and not runner.is_ready:
            needs[places.work] += runner.image.size_gb * 1e9
    needs[paths.run_dir(profile.name)] += estimates.records_bytes(profile)
    return dict(needs)


def _disk(profile: Profile, plans: Sequence[Plan]) -> Iterable[str]:
    together: defaultdict[int, dict[Path, float]] = defaultdict(dict)
    for where, size in disk_needs(profile, plans).items():
        together[hardware.file_system(where)][where] = size
    for needs in together.values():
        free, needed = hardware.free_disk_bytes(next(iter(needs))), sum(needs.values())
        if free < needed:
            wanted = ", ".join(f"{size / 1e9:,.0f} GB at {where}" for where, size in needs.items())
            yield (
                f"{free / 1e9:,.0f} GB of disk are free, {needed / 1e9:,.0f} GB are needed ({wanted}): make room, or "
                "set tensorrt_llm.checkpoints and tensorrt_llm.work to larger disks"
            )


def _options(fit: Fitted, plans: Sequence[Plan]) -> Iterable[str]:
    """Options that the tools refuse: by their tables, and by their own word where their image is here.

    What is to be fetched yet is asked when it is here; see :func:`erlib.dgx.builds.build`.
    """
    for version, runner in runners(plans, fit.profile).items():
        mine = [plan for plan in plans if plan.version == version]
        used = dict.fromkeys(command.tool for plan in mine for command in recipes.commands(plan) if command.tool)
        is_here = runner.is_ready and (runner.kind != "bare" or shutil.which("trtllm-build"))
        tools = [tool for tool in used if is_here and runner.image.comes_with(tool, runner.places.work)]
        yield from inspect(mine, tools, runner)[1]


def _warnings(report: Report) -> Iterable[str]:
    fit, gpus, image = report.fitted, report.gpus, _image(report.fitted)
    if gpus and not image.is_made_for(fit.gpu.driver) and _is_covered(fit):
        yield (
            f"driver {fit.gpu.driver} is older than {image.driver}, which {image.tag} is made for; the image's "
            "compatibility package covers its branch on these GPUs"
        )
    if version := fit.overrides.get("tensorrt_llm.version"):
        newest = load_image(NEWEST)
        yield (
            f"driver {fit.gpu.driver} is older than {newest.driver}, which {newest.tag} is made for, so this takes "
            f"{image.tag} with TensorRT-LLM {version}; --set tensorrt_llm.version={NEWEST} insists on the other"
        )
    for runner in runners(fit.plans, fit.profile).values():
        if runner.kind != "bare" and not runner.image.digest:
            yield (
                f"{runner.image.tag} is not pinned: write the digest that docker buildx imagetools inspect "
                f"{runner.image.reference} prints into data/tensorrt_llm_images.yaml"
            )
        if runner.kind == "enroot" and runner.image.digest:
            yield f"enroot takes tags only: {runner.image.tag} is not held to its digest"
    yield from (f"not run: {reason}" for reason in fit.refused if reason not in " ".join(report.problems))
    if gpus and "H100" not in fit.gpu.name:
        yield f"the papers had H100s, these are {fit.gpu.name}: times are not the papers'"


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
