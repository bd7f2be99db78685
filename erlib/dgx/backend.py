"""The backend for GPUs: TensorRT-LLM engines, planned, built and served; see :class:`erlib.load.backends.Backend`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from erlib.cluster import placement
from erlib.config import ConfigError, Configuration, Profile, load_configuration
from erlib.dgx import builds, checkpoints, fit, repository, tensorrt_llm
from erlib.load.backends import Workloads
from erlib.serving.triton import ServerPlan


def configurations(profile: Profile, names: Sequence[str]) -> list[Configuration]:
    """As :func:`erlib.dgx.fit.fitted` gives them to those GPUs that there are."""
    for name in names:
        named = load_configuration(name)
        if named.laptop.weights == "trained" and not named.adapters:
            raise ConfigError(f"{name} is served on CPUs only; x1.L has its experts as adapters of one engine")
    return _fitted(profile).named(names)


def preliminary_configurations(profile: Profile) -> list[Configuration]:
    """Likewise."""
    return _fitted(profile).preliminary


def served(profile: Profile, configurations: Sequence[Configuration], sized_for: Workloads) -> list[list[ServerPlan]]:
    """Servers of Table I's engines; of what they are sized for, their plans know by themselves."""
    fitted, settings = _fitted(profile), profile.tensorrt_llm
    plans = [tensorrt_llm.plan(fitted.profile, configuration) for configuration in configurations]
    served = [repository.server_plans(plan, settings.runner, fitted.n_gpus) for plan in plans]
    builds.build(plans, settings.runner)
    for plan, (first, *_) in zip(plans, served, strict=True):
        repository.render(plan, plan.source, first.repository)
    return [list[ServerPlan](each) for each in served]


def context_tokens(profile: Profile, configuration: Configuration) -> int:
    """What the engine is built for."""
    return tensorrt_llm.lengths(configuration, profile.workload)[1]


def tokenizer_file(profile: Profile, model: str) -> Path:
    """The checkpoint's own, downloaded if need be."""
    return checkpoints.fetch_tokenizer(model, checkpoints.places(profile))


def folders(profile: Profile) -> list[Path]:
    """Of checkpoints, and of what is made of them."""
    places = checkpoints.places(profile)
    return [places.checkpoints, places.work]


def _fitted(profile: Profile) -> fit.Fitted:
    if not (gpus := placement.gpus(profile.serving.cluster)):
        raise ConfigError(
            f"profile {profile.name!r} needs GPUs, and nvidia-smi finds none; --profile laptop needs none"
        )
    return fit.fitted(profile, gpus)
