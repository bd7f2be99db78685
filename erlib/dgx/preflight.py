"""Everything that would stop a run, found before it starts: nothing is started, and nothing is written.

A *problem* stops; a *warning* is said. Each is a sentence that says what to do. :func:`basics` serves every profile,
:func:`check` those that build and serve TensorRT-LLM engines, fitted to the GPUs that are there.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import httpx
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from erlib import config, paths
from erlib.cluster import on_ray
from erlib.config import ConfigError, Configuration, Passable, Profile, RunnerKind, Version
from erlib.dgx import builds, estimates, tensorrt_llm
from erlib.dgx.containers import Image, Runner, load_image
from erlib.dgx.tensorrt_llm import CALIBRATION, CHECKPOINTS, NEWEST, TEXTS, Plan
from erlib.engines import llama
from erlib.machine import hardware, processes, runfolder
from erlib.machine.hardware import Gpu
from erlib.machine.processes import StartError
from erlib.routing import pickles
from erlib.serving import nginx
from erlib.serving.stack import Gateway
from erlib.serving.triton import TritonServer
from erlib.workload import corpus

LEAST_FREE_BYTES = 4e9
"""Disk space that any run needs, whatever it builds."""
SHARED_MEMORY_BYTES = 2e9
IN_USE_BYTES = 1e9
"""Memory that somebody may have on a GPU (a display, a monitor) without being in the way."""
LICENCES = {"llama-2": "Llama 2 Community License", "llama-3": "Meta Llama 3 Community License"}
_ANSWER_S = 10


# --- every profile ------------------------------------------------------------------------------------------------


def basics(profile: Profile) -> list[str]:
    """Problems that any run on this machine would have: folders, disk space, input files, NGINX, ports."""
    found = [*_names(), *_folders(profile), *_inputs(profile)]
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


def _names_on_gpus(profile: Profile) -> Iterable[str]:
    """Folders that Triton, in its image or not, hands to a shell as they are, or a container is given with others."""
    places = tensorrt_llm.places(profile)
    for key, folder in {"checkpoints": places.checkpoints, "work": places.work}.items():
        if unsafe := runfolder.NOT_SAFE.search(str(folder)):
            yield (
                f"{str(folder)!r} holds {unsafe[0]!r}, which Triton cannot be given: "
                f"set tensorrt_llm.{key} to a folder named with letters, digits and _ . - + alone"
            )


def _folders(profile: Profile) -> Iterable[str]:
    """Folders that a run writes to but may not, each once."""
    wanted = [paths.CACHE, paths.ENGINE_BUILDS, paths.run_dir(profile.name), paths.FIGURES / profile.name]
    if profile.serving.backend == "tensorrt_llm":
        places = tensorrt_llm.places(profile)
        wanted += [places.checkpoints, places.work]
    for place in dict.fromkeys(map(hardware.existing, wanted)):
        if not place.is_dir():
            yield f"{place} is a file where a run needs a folder: remove it, or set ERLIB_HOME to a folder of yours"
        elif not os.access(place, os.W_OK | os.X_OK):
            yield f"{place} is not writable: set ERLIB_HOME to a folder of yours"


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


# --- fitted to the machine ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A profile on the GPUs that there are."""

    profile: Profile
    gpu: Gpu
    """What all GPUs are at least."""
    n_gpus: int
    load: list[Configuration]
    """Systems of the load experiments and of the overhead experiment, in order, each once."""
    preliminary: list[Configuration]
    losses: list[str]
    """What is not as in the papers, in words."""
    refused: list[str]
    """Systems that the GPUs or the flow cannot carry, each with the reason."""
    overrides: dict[str, Any]
    """What turns the profile as it was into :attr:`profile`, for :func:`erlib.config.load_profile`."""
    left_out: dict[str, str]
    """Notebooks that make no sense with fewer experts, with the reason."""

    @property
    def configurations(self) -> list[Configuration]:
        return [*self.load, *self.preliminary]

    def named(self, names: Sequence[str]) -> list[Configuration]:
        """Systems of the load and overhead experiments.

        Raises
        ------
        ConfigError
            If one of them cannot be carried; says why.
        """
        known = {one.id: one for one in self.load}
        for name in names:
            if name not in known:
                reasons = [reason for reason in [*self.refused, *self.losses] if reason.startswith(f"{name}: ")]
                raise ConfigError(reasons[0] if reasons else f"{name} is not among the profile's configurations")
        return [known[name] for name in names]

    @property
    def plans(self) -> list[Plan]:
        """How their engines come about, each once."""
        return tensorrt_llm.needed(self.profile, self.configurations)


def fitted(profile: Profile, gpus: Sequence[Gpu]) -> Fitted:
    """What of a profile's experiments `gpus` carry; see :func:`erlib.engines.llama.on_gpus`.

    With two to seven GPUs there are as many experts, and the clusterer makes as many clusters. On one GPU there is
    nothing to be routed: the clusterer stays, for the workloads, and the gateways pass everything to the one expert.
    Paper 2's preliminary experiment compares all GPUs with half of them.

    Parameters
    ----------
    profile : Profile
    gpus : sequence of Gpu
        At least one. ``tensorrt_llm.gpus`` says how many of them are used.
    """
    n_gpus = min(profile.tensorrt_llm.gpus or len(gpus), len(gpus))
    gpu = min(gpus[:n_gpus], key=lambda each: (each.has_fp8, each.memory_bytes))
    overrides: dict[str, Any] = {}
    if (version := _version(profile, gpu)) != (profile.tensorrt_llm.version or NEWEST):
        overrides["tensorrt_llm.version"] = version
        profile = _with(profile, overrides)
    losses: list[str] = []
    refused: list[str] = []

    def fit(configuration: Configuration, budget: int) -> Configuration | None:
        try:
            if budget < 1:
                raise ConfigError(f"{configuration.id}: half of one GPU is none")
            result, lost = llama.on_gpus(configuration, budget, gpu.usable_bytes, gpu.has_fp8)
            tensorrt_llm.plan(profile, result)
        except ConfigError as error:
            refused.append(str(error))
            return None
        losses.extend(lost)
        return result

    names = dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config])
    load = [one for name in names if (one := fit(config.load_configuration(name), n_gpus))]
    if n_gpus == 1:  # then a baseline in turn is the very system that it stands beside
        beside = {name: config.load_configuration(name).stands_beside for name in names}
        same = {one.id for one in load if beside[one.id] in {other.id for other in load}}
        losses += [f"{name}: on one GPU the same as {beside[name]}, left out" for name in sorted(same)]
        load = [one for one in load if one.id not in same]
    said = len(losses)
    preliminary = []
    for one in llama.preliminary_configurations(profile):
        whole = one.system.tensor_parallel == llama.GPUS
        if result := fit(one, n_gpus if whole else min(n_gpus // 2, one.system.tensor_parallel)):
            sizes = {"batch_size": one.system.batch_size}  # what the experiment varies
            preliminary.append(result.model_copy(update={"paper": result.system.model_copy(update=sizes)}))
    if losses[said:]:  # thirty systems say the same
        losses[said:] = [
            f"preliminary experiment: TP8 stands for all {n_gpus} GPUs and TP4 for half of them, "
            "with what fits of the KV cache"
        ]
    consequences, left_out = _consequences(profile, load, preliminary)
    overrides |= consequences
    if n_gpus < llama.GPUS:
        losses.append(
            f"load: the papers' user levels on {n_gpus} of {llama.GPUS} GPUs, so each carries up to "
            f"{llama.GPUS / n_gpus:.3g} times the papers' load"
        )
    if experts := overrides.get("clusterer.n_clusters"):
        losses.append(f"clusterer: {experts} clusters instead of {profile.clusterer.n_clusters}, one for each expert")
    return Fitted(_with(profile, overrides), gpu, n_gpus, load, preliminary, losses, refused, overrides, left_out)


def _version(profile: Profile, gpu: Gpu) -> Version:
    """Version of TensorRT-LLM: the profile's, or the newest whose image the driver is made for, or else the oldest."""
    settings = profile.tensorrt_llm
    if settings.version or settings.flow == "llmapi" or not gpu.driver:
        return settings.version or NEWEST
    versions = get_args(Version)
    return next((one for one in versions if load_image(one).is_made_for(gpu.driver)), versions[-1])


def _consequences(
    profile: Profile, load: Sequence[Configuration], preliminary: Sequence[Configuration]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Profile keys that change with what fits, and notebooks that are left out."""
    fits = {configuration.id for configuration in load}
    overrides: dict[str, Any] = {}
    for key, sweep in {"paper1.configs": profile.paper1, "paper2.configs": profile.paper2}.items():
        kept = [name for name in sweep.configs if name in fits]
        if kept != sweep.configs:
            overrides[key] = kept
    left_out = {}
    experts = max((one.system.instances for one in load if one.routing == "expert_router"), default=None)
    if experts and experts != profile.clusterer.n_clusters:
        overrides["clusterer.n_clusters"] = experts
    if experts and experts < llama.GPUS:
        left_out["07_paper_scale"] = "simulates and emulates the papers' eight experts, for which there are no clusters"
    if not preliminary:
        left_out["04_preliminary_sweep"] = "no system of the preliminary experiment fits"
    return overrides, left_out


def _with(profile: Profile, overrides: Mapping[str, Any]) -> Profile:
    sections: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in overrides.items():
        section, _, leaf = key.partition(".")
        sections[section][leaf] = value
    changed = {name: getattr(profile, name).model_copy(update=values) for name, values in sections.items()}
    return profile.model_copy(update=changed)


# --- TensorRT-LLM -------------------------------------------------------------------------------------------------


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
    kind, places = profile.tensorrt_llm.runner, tensorrt_llm.places(profile)
    return {version: Runner(kind, load_image(version), places) for version in versions}


def check(profile: Profile) -> Report:
    """Find everything that would stop `profile`'s TensorRT-LLM experiments on this machine, or make them other ones.

    Raises
    ------
    ConfigError
        If the profile wants a cluster and there is none.
    """
    try:
        here = on_ray.gpus(profile.serving.cluster)
    except StartError as error:
        raise ConfigError(str(error)) from None
    assumed = here or [hardware.H100] * (profile.tensorrt_llm.gpus or llama.GPUS)
    fit = fitted(profile, assumed)
    report = Report(profile, fit, here)
    plans = fit.plans
    checks: dict[str, Callable[[], Iterable[str]]] = {
        "gpus": lambda: _gpus(profile, here),
        "driver": lambda: _driver(fit, here),
        "gpus_in_use": lambda: _gpus_in_use(fit, here),
        "calibration": lambda: _calibration(plans, here),
        "fit": lambda: _fit(fit),
        "runner": lambda: _runner(profile, plans),
        "checkpoints": lambda: _checkpoints(profile, plans),
        "host_memory": lambda: _host_memory(plans),
        "shared_memory": lambda: _shared_memory(profile),
        "disk": lambda: _disk(profile, plans),
        "options": lambda: _options(fit, plans),
        "hub": lambda: _hub(profile, plans),
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


def _calibration(plans: Sequence[Plan], gpus: Sequence[Gpu]) -> Iterable[str]:
    fp8 = [plan for plan, step in builds.missing(plans) if step.purpose == "quantise" and plan.system.dtype == "fp8"]
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
            yield f"none of {key} fits the GPUs or the flow (reasons above): choose others, or larger GPUs"
    if fit.profile.clusterer.pickles and (experts := fit.overrides.get("clusterer.n_clusters")):
        yield (
            f"there are {experts} experts, for which the clusterer of clusterer.pickles has no {experts} clusters: "
            "--set clusterer.pickles=null fits one"
        )
    if fit.profile.tensorrt_llm.flow != "engine":
        for reason in fit.refused:
            if "cannot express" in reason:
                yield f"{reason}, or leave it out with --set paper1.configs=[...]"


def _runner(profile: Profile, plans: Sequence[Plan]) -> Iterable[str]:
    kind = profile.tensorrt_llm.runner
    programs: list[str] = ["trtllm-build", "tritonserver", "mpirun"] if kind == "bare" else [kind]
    if any(step.purpose == "fetch" for _, step in builds.missing(plans)):
        programs.append("hf")
    for program in programs:
        if not shutil.which(program):
            yield f"{program} is not installed: {_remedy(program, kind)}"
    if kind == "docker" and shutil.which("docker"):
        reply = _ask("docker", "info")
        if reply.returncode:
            yield (
                f"docker does not answer {getpass.getuser()} ({_last_line(reply.stderr)}): start its service, or add "
                f"the user to its group (sudo usermod -aG docker {getpass.getuser()}) and log in again"
            )


def _remedy(program: str, kind: str) -> str:
    if program == "hf":
        return "it comes with huggingface_hub: start with ./run_all.sh, which puts this environment on PATH"
    if kind == "bare":
        return "runner bare needs TensorRT-LLM and Triton installed here; choose docker, apptainer or enroot"
    others = " or ".join(f"--set tensorrt_llm.runner={other}" for other in get_args(RunnerKind)[1:] if other != kind)
    return f"install it, or choose {others}"


def _checkpoints(profile: Profile, plans: Sequence[Plan]) -> Iterable[str]:
    """Paths for which TensorRT-LLM's scripts take a Llama for another model: they look for its name in all of it."""
    home = str(tensorrt_llm.places(profile).checkpoints)
    reads = any(step.purpose in ("convert", "quantise") for _, step in builds.missing(plans))
    for word in ("mpt", "vila"):
        if reads and word in home.lower():
            yield (
                f"tensorrt_llm.checkpoints is {home}: TensorRT-LLM's scripts take a checkpoint with {word!r} anywhere "
                "in its path for a model of that name; choose another directory (a link to this one does not help)"
            )


def _host_memory(plans: Sequence[Plan]) -> Iterable[str]:
    steps = builds.missing(plans)
    convert = [estimates.host_memory_bytes(plan) for plan, step in steps if step.purpose in ("convert", "quantise")]
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
    places = tensorrt_llm.places(profile)
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
        used = dict.fromkeys(command.tool for plan in mine for command in plan.commands if command.tool)
        is_here = runner.is_ready and (runner.kind != "bare" or shutil.which("trtllm-build"))
        tools = [tool for tool in used if is_here and runner.image.comes_with(tool, runner.places.work)]
        yield from tensorrt_llm.inspect(mine, tools, runner)[1]


# --- the hub ------------------------------------------------------------------------------------------------------


def _hub(profile: Profile, plans: Sequence[Plan]) -> Iterable[str]:
    """Checkpoints and texts that are neither here nor to be had."""
    places = tensorrt_llm.places(profile)
    wanted: dict[str, Path | None] = {}
    for _, step in builds.missing(plans):
        if step.purpose == "fetch" and step.program[0] == "hf":
            wanted[step.options[0]] = step.makes
    models = {plan.system.model for plan in plans}
    wanted |= {
        CHECKPOINTS[model]: tensorrt_llm.source(model, places)
        for model in models
        if not (tensorrt_llm.source(model, places) / "tokenizer.json").exists()
    }
    if profile.corpus.name == "c4" and not corpus.c4_is_cached(profile.corpus):
        wanted["allenai/c4"] = None
    if any(step.tool == "hf_ptq.py" for _, step in builds.missing(plans)):
        wanted[TEXTS] = None
    if not wanted:
        return
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = dict(zip(wanted, pool.map(_reach, wanted), strict=True))
    unreachable = [(name, error) for name, error in answers.items() if isinstance(error, (OSError, httpx.HTTPError))
                   and not isinstance(error, HfHubHTTPError)]  # fmt: skip
    if unreachable:
        yield (
            f"the Hugging Face hub is out of reach ({_last_line(str(unreachable[0][1]))}): give this machine access, "
            f"or put there from elsewhere: {', '.join(_where(name, wanted[name]) for name, _ in unreachable)}"
        )
    for name, error in answers.items():
        if isinstance(error, (GatedRepoError, RepositoryNotFoundError)) or _is_denied(error):
            yield (
                f"no access to {name}, which is gated: accept the {_licence(name)} on https://huggingface.co/{name} "
                "and set HF_TOKEN to a token of that account"
            )
        elif isinstance(error, HfHubHTTPError):
            yield f"{name}: the hub answers {_last_line(str(error))}: try again, or put it into {wanted[name]}"


def _reach(name: str) -> Exception | None:
    """Why a repository cannot be had from the hub; None if it can."""
    try:
        if name in CHECKPOINTS.values():  # a gated repository shows what it is, but not its files
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_ANSWER_S)
        else:
            HfApi().dataset_info(name, timeout=_ANSWER_S)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return error
    return None


def _is_denied(error: Exception | None) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403)


def _licence(name: str) -> str:
    model = next(model for model, repository in CHECKPOINTS.items() if repository == name)
    return next(licence for family, licence in LICENCES.items() if model.startswith(family))


def _where(name: str, directory: Path | None) -> str:
    if name == TEXTS and directory is None:
        return f"{name} (which hf_ptq.py fetches itself: quantise elsewhere, and copy tensorrt_llm.work here)"
    if directory is None:
        return f"{name} (or choose a corpus of your own: corpus.name=jsonl)"
    texts = " (calibration texts)" if directory.name == CALIBRATION else ""
    return f"{name}{texts} into {directory}"


# --- warnings -----------------------------------------------------------------------------------------------------


def _warnings(report: Report) -> Iterable[str]:
    fit, gpus = report.fitted, report.gpus
    if (image := _image(fit)) and gpus and not image.is_made_for(fit.gpu.driver) and _is_covered(fit):
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
    for runner in runners(report.fitted.plans, report.fitted.profile).values():
        if runner.kind != "bare" and not runner.image.digest:
            yield (
                f"{runner.image.tag} is not pinned: write the digest that docker buildx imagetools inspect "
                f"{runner.image.reference} prints into data/tensorrt_llm_images.yaml"
            )
        if runner.kind == "enroot" and runner.image.digest:
            yield f"enroot takes tags only: {runner.image.tag} is not held to its digest"
    yield from (f"not run: {reason}" for reason in report.fitted.refused if reason not in " ".join(report.problems))
    gpu = report.fitted.gpu
    if report.gpus and "H100" not in gpu.name:
        yield f"the papers had H100s, these are {gpu.name}: times are not the papers'"


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_S)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"
