"""A profile, fitted to the GPUs that there are."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from erlib import config
from erlib.config import ConfigError, Configuration, PaperSystem, Profile, Version
from erlib.config.system import EXPERTS_ON_GPUS
from erlib.dgx import tensorrt_llm
from erlib.dgx.containers import load_image
from erlib.dgx.tensorrt_llm import NEWEST, Plan
from erlib.engines import laptop, llama
from erlib.engines.llama import (
    H100_BYTES,
    KV_SHARE,
    WORKSPACE_BYTES,
    gpu_memory,
    kv_tokens,
    most_kv_tokens,
    shape,
    step_tokens,
)
from erlib.engines.table1 import paper_sequence_tokens
from erlib.machine.hardware import Gpu

MADE_TO_SHARE = ("x1.F", "x1.S")
"""Systems of our own, small enough that GPUs carry several of their experts."""


def on_gpus(
    configuration: Configuration,
    n_gpus: int,
    gpu_bytes: float = H100_BYTES,
    has_fp8: bool = True,
    experts_per_gpu: int = 1,
) -> tuple[Configuration, list[str]]:
    """As much of a paper's system as a smaller machine carries, and what is lost; ConfigError if it carries none.

    Instances get GPUs of their own, experts one each, as in the papers. Where GPUs are too few, instances first become
    narrower (TP8, TP4, ...) as long as the weights fit, then fewer. The KV cache gets what is free beside weights and
    activations, but never more than the paper prints. The batch size shrinks with it, but not below the number of
    longest sequences that it holds. One expert alone has nothing to be routed to: its gateways do not classify. Where
    everything fits, it is the very same configuration.

    With `experts_per_gpu`, instances that are one GPU wide share GPUs, so many at most and no more than they have to.
    All of them have KV caches of one size. Where so many do not fit, fewer are not taken instead, because the router
    has as many clusters as there are experts. What would fit is said.
    """
    name, printed = configuration.id, configuration.system
    if "fp8" in (printed.dtype, printed.kv_dtype) and not has_fp8:
        raise ConfigError(f"{name}: these GPUs have no FP8 (compute capability 8.9 or higher has), and it is in FP8")
    longest = max(map(paper_sequence_tokens, configuration.papers))
    if (per_gpu := sharing(configuration, n_gpus, experts_per_gpu)) > 1:
        if not (tokens := kv_tokens_shared(configuration, per_gpu, gpu_bytes)):
            raise ConfigError(_too_many(configuration, n_gpus, per_gpu, gpu_bytes))
        instances = min(printed.instances, n_gpus * per_gpu)
        return _fitted(configuration, printed.model_copy(update={"instances": instances}), tokens, longest, per_gpu)
    for instances, width in _narrower(printed, n_gpus):
        narrow = printed.model_copy(update={"instances": instances, "tensor_parallel": width})
        tokens = _kv_tokens_beside(narrow, gpu_bytes)
        if tokens >= longest:
            return _fitted(configuration, narrow, tokens, longest)
    weights_gb = shape(printed.model).loaded_bytes(printed.dtype) / 1e9
    together = "" if printed.tensor_parallel == 1 else f", together {n_gpus} of them," * (n_gpus > 1)
    raise ConfigError(
        f"{name}: {weights_gb:.0f} GB of weights, activations and one sequence of {longest:,} tokens do not fit a GPU "
        f"of {gpu_bytes / 1e9:.0f} GB{together or (', and the papers give each expert one GPU' if n_gpus > 1 else '')}"
    )


def sharing(configuration: Configuration, n_gpus: int, experts_per_gpu: int) -> int:
    """How many instances share a GPU; 1 where each has its own, or several, or has all experts as adapters."""
    printed = configuration.system
    if printed.tensor_parallel > 1 or configuration.adapters:
        return 1
    return min(experts_per_gpu, math.ceil(printed.instances / n_gpus))


def kv_tokens_shared(configuration: Configuration, per_gpu: int, gpu_bytes: float) -> int:
    """KV tokens of each of the instances on a GPU; 0 if one of their longest sequences, or one step, has no room.

    TensorRT-LLM takes the smaller of a number of tokens, which is the same for all of them, and a share of what is free
    when its turn comes. That share of the last one's is at least as many, because those before it have not taken more
    than the same share of what was there for all.
    """
    if per_gpu == 1:
        tokens = _kv_tokens_beside(configuration.system.model_copy(update={"tensor_parallel": 1}), gpu_bytes)
        return tokens if tokens >= max(map(paper_sequence_tokens, configuration.papers)) else 0
    system = configuration.system
    memory = gpu_memory(system, per_gpu)
    free = gpu_bytes - memory.weights - memory.activations - memory.contexts
    tokens = int(KV_SHARE * free / per_gpu / shape(system.model).kv_bytes_per_token(system.kv_dtype))
    # The LLM API tries a step of the most tokens before it sizes the cache, in a cache of its own for that.
    least = max(*map(paper_sequence_tokens, configuration.papers), step_tokens(per_gpu))
    return min(kv_tokens(system), tokens) if tokens >= least else 0


def _too_many(configuration: Configuration, n_gpus: int, per_gpu: int, gpu_bytes: float) -> str:
    name, system = configuration.id, configuration.system
    memory = gpu_memory(system, per_gpu)
    needed = memory.total - memory.kv_cache
    fits = next((n for n in range(per_gpu - 1, 0, -1) if kv_tokens_shared(configuration, n, gpu_bytes)), 0)
    instead = "not even one fits"
    if fits:
        experts = min(system.instances, n_gpus * fits)
        instead = f"{fits} would do (--set tensorrt_llm.experts_per_gpu={fits}), {experts} in all"
    return (
        f"{name}: {per_gpu} engines on a GPU of {gpu_bytes / 1e9:.0f} GB need {needed / 1e9:.0f} GB beside their KV "
        f"caches, {memory.weights / 1e9:.0f} GB of it for weights; {instead}"
    )


def _kv_tokens_beside(system: PaperSystem, gpu_bytes: float) -> int:
    """KV tokens of an instance: as printed if they fit beside the estimated activations, else what is safely free.

    Safely, because a server whose KV cache comes out smaller than asked for does not start.
    """
    memory, printed = gpu_memory(system), kv_tokens(system)

    def room(workspace_bytes: float) -> int:
        try:
            return most_kv_tokens(
                system.model, system.dtype, system.kv_dtype, system.tensor_parallel,
                memory.weights * system.tensor_parallel, workspace_bytes + memory.contexts, gpu_bytes,
            )  # fmt: skip
        except ConfigError:
            return 0

    return printed if room(memory.activations) >= printed else min(printed, room(WORKSPACE_BYTES))


def _narrower(printed: PaperSystem, n_gpus: int) -> list[tuple[int, int]]:
    """Instances and their GPUs, the best first: as many instances as can be, each as wide as can be."""
    widths = [printed.tensor_parallel >> halvings for halvings in range(printed.tensor_parallel.bit_length())]
    pairs = itertools.product(range(printed.instances, 0, -1), widths)
    return [(instances, width) for instances, width in pairs if instances * width <= n_gpus]


def _fitted(
    configuration: Configuration, narrow: PaperSystem, tokens: int, longest: int, per_gpu: int = 1
) -> tuple[Configuration, list[str]]:
    name, printed, before = configuration.id, configuration.system, kv_tokens(configuration.system)
    routed = configuration.routing == "expert_router" and not configuration.adapters
    losses: list[str] = []
    changed: dict[str, Any] = {}
    if narrow.instances < printed.instances:
        what = "experts" if routed else "instances"
        losses.append(f"{name}: {narrow.instances} instead of {printed.instances} {what}")
        if routed and narrow.instances == 1:
            losses.append(f"{name}: one expert has nothing to be routed to; its gateways do not classify")
            changed["routing"] = "replicas"
    if per_gpu > 1:
        changed["per_gpu"] = per_gpu
        losses.append(f"{name}: {per_gpu} engines share a GPU, and take turns at it")
    if narrow.tensor_parallel < printed.tensor_parallel:
        losses.append(f"{name}: TP{narrow.tensor_parallel} instead of TP{printed.tensor_parallel}")
    batch_size = min(printed.batch_size, max(round(printed.batch_size * tokens / before), tokens // longest))
    if tokens < before:
        losses.append(f"{name}: KV cache of {tokens:,} instead of {before:,} tokens per instance")
    if batch_size < printed.batch_size:
        losses[-1] += f", batch size {batch_size} instead of {printed.batch_size}"
    if not losses:
        return configuration, []
    system = narrow.model_copy(
        update={
            "batch_size": batch_size,
            "weights_gb": shape(printed.model).loaded_bytes(printed.dtype, narrow.tensor_parallel) / 1e9,
            "kv_cache_gb": laptop.cache_gb(printed.model, printed.kv_dtype, tokens),
            "kv_tokens": None,
        }
    )
    title = configuration.title.replace(f"TP{printed.tensor_parallel}", f"TP{narrow.tensor_parallel}")
    title = title.replace(f"{printed.instances} x ", f"{narrow.instances} x ")
    changed |= {"paper": system, "stands_beside": None, "title": title}
    return configuration.model_copy(update=changed), losses


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
        """Systems of the load and overhead experiments; ConfigError says why one of them cannot be carried."""
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
    """What of a profile's experiments `gpus` carry; see :func:`erlib.dgx.fit.on_gpus`.

    With two to seven GPUs there are as many experts, and the clusterer makes as many clusters. On one GPU there is
    nothing to be routed: the clusterer stays, for the workloads, and the gateways pass everything to the one expert.
    ``tensorrt_llm.experts_per_gpu`` lets experts share GPUs: then there are so many times as many.
    Paper 2's preliminary experiment compares all GPUs with half of them.

    `gpus`: at least one. ``tensorrt_llm.gpus`` says how many of them are used.
    """
    n_gpus = min(profile.tensorrt_llm.gpus or len(gpus), len(gpus))
    gpu = min(gpus[:n_gpus], key=lambda each: (each.has_fp8, each.memory_bytes))
    overrides: dict[str, Any] = {}
    if (version := _version(profile, gpu)) != (profile.tensorrt_llm.version or NEWEST):
        overrides["tensorrt_llm.version"] = version
        profile = _with(profile, overrides)
    losses: list[str] = []
    refused: list[str] = []
    settings = profile.tensorrt_llm

    def fit(configuration: Configuration, budget: int) -> Configuration | None:
        try:
            result, lost = on_gpus(configuration, budget, gpu.usable_bytes, gpu.has_fp8, settings.experts_per_gpu)
            tensorrt_llm.plan(profile, result)
        except ConfigError as error:
            refused.append(str(error))
            return None
        losses.extend(lost)
        return result

    own = EXPERTS_ON_GPUS if profile.experts.adapters else ()
    names = dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config, *own])
    load = [one for name in names if (one := fit(config.load_configuration(name), n_gpus))]
    if n_gpus == settings.experts_per_gpu == 1:  # then a baseline in turn is the very system that it stands beside
        beside = {name: config.load_configuration(name).stands_beside for name in names}
        served = {other.id for other in load}
        same = {one.id for one in load if beside[one.id] in served and not one.adapters}
        losses += [f"{name}: on one GPU the same as {beside[name]}, left out" for name in sorted(same)]
        load = [one for one in load if one.id not in same]
    said = len(losses)
    preliminary = []
    for one in laptop.preliminary_configurations(profile) if n_gpus > 1 else ():
        whole = one.system.tensor_parallel == llama.GPUS
        if result := fit(one, n_gpus if whole else min(n_gpus // 2, one.system.tensor_parallel)):
            sizes = {"batch_size": one.system.batch_size}  # what the experiment varies
            preliminary.append(result.model_copy(update={"paper": result.system.model_copy(update=sizes)}))
    if losses[said:]:  # thirty systems say the same
        losses[said:] = [
            f"preliminary experiment: TP8 stands for all {n_gpus} GPUs and TP4 for half of them, "
            "with what fits of the KV cache"
        ]
    consequences, left_out = _consequences(profile, n_gpus, load, preliminary)
    overrides |= consequences
    if n_gpus < llama.GPUS:
        losses.append(
            f"load: the papers' user levels on {n_gpus} of {llama.GPUS} GPUs, so each carries up to "
            f"{llama.GPUS / n_gpus:.3g} times the papers' load"
        )
    if experts := overrides.get("clusterer.n_clusters"):
        losses.append(f"clusterer: {experts} clusters instead of {profile.clusterer.n_clusters}, one for each expert")
        refused += [
            f"{one.id}: its adapters are of {profile.clusterer.n_clusters} clusters, of which this run makes {experts}"
            for one in load
            if one.adapters
        ]
        load = [one for one in load if not one.adapters]
    return Fitted(_with(profile, overrides), gpu, n_gpus, load, preliminary, losses, refused, overrides, left_out)


def _version(profile: Profile, gpu: Gpu) -> Version:
    """Version of TensorRT-LLM: the profile's, or the newest whose image the driver is made for, or else the oldest."""
    settings = profile.tensorrt_llm
    if settings.version or settings.flow == "llmapi" or not gpu.driver:
        return settings.version or NEWEST
    versions = get_args(Version)
    return next((one for one in versions if load_image(one).is_made_for(gpu.driver)), versions[-1])


def _consequences(
    profile: Profile, n_gpus: int, load: Sequence[Configuration], preliminary: Sequence[Configuration]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Profile keys that change with what fits, and notebooks that are left out."""
    fits = {configuration.id for configuration in load}
    overrides: dict[str, Any] = {}
    for key, sweep in {"paper1.configs": profile.paper1, "paper2.configs": profile.paper2}.items():
        kept = [name for name in sweep.configs if name in fits]
        if kept != sweep.configs:
            overrides[key] = kept
    left_out = {}
    routed = [one for one in load if one.routing == "expert_router" and not one.adapters]
    experts = max((one.system.instances for one in routed), default=None)
    if experts and experts != profile.clusterer.n_clusters:
        overrides["clusterer.n_clusters"] = experts
    if experts and experts < llama.GPUS:
        left_out["07_paper_scale"] = (
            "simulates and emulates the papers' eight experts, for which there are no clusters; with "
            "tensorrt_llm.experts_per_gpu there may be eight experts here, too"
        )
    if not preliminary:
        left_out["04_preliminary_sweep"] = (
            "no system of the preliminary experiment fits"
            if n_gpus > 1
            else "the preliminary experiment compares all GPUs with half of them, and of one there is no half"
        )
    return overrides, left_out


def _with(profile: Profile, overrides: Mapping[str, Any]) -> Profile:
    sections: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in overrides.items():
        section, _, leaf = key.partition(".")
        sections[section][leaf] = value
    changed = {name: getattr(profile, name).model_copy(update=values) for name, values in sections.items()}
    return profile.model_copy(update=changed)
