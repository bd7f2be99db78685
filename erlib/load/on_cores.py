"""The laptop's backend: OpenVINO engines on the cores of this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from erlib import config
from erlib.config import ConfigError, Configuration, Profile
from erlib.engines import build, checkpoint, inference, laptop
from erlib.experts import arms
from erlib.load.backends import Workloads
from erlib.serving import wire
from erlib.serving.triton import ServerPlan

MAX_BATCHED_TOKENS = 1024


def configurations(profile: Profile, names: Sequence[str]) -> list[Configuration]:
    """See :class:`erlib.load.backends.Backend`, as for all that follows."""
    found = [config.load_configuration(name) for name in names]
    for one in found:
        if one.adapters:
            raise ConfigError(
                f"{one.id} needs an engine that batches requests of different adapters, which OpenVINO's does not: "
                "x1.T has the same experts, each in an engine of its own, and serving.backend=vllm serves this one"
            )
    return found


def preliminary_configurations(profile: Profile) -> list[Configuration]:
    """On a laptop TP8 stands for all cores, TP4 for half of them."""
    return laptop.preliminary_configurations(profile)


def served(profile: Profile, configurations: Sequence[Configuration], sized_for: Workloads) -> list[list[ServerPlan]]:
    """Servers of engines whose batch size and KV cache are the papers', scaled."""
    longest = laptop.longest_sequence_tokens(profile, "preliminary") if sized_for == "preliminary" else None
    plans = [laptop.laptop_system(profile, configuration, longest) for configuration in configurations]
    if profile.experts.checkpoint and any(plan.trained for plan in plans):
        raise ConfigError(
            "experts.checkpoint names a checkpoint of your own, but engines here are SmolLM2-135M's: its experts can "
            "be trained and judged, not served"
        )
    built = build.build_all(profile, [(plan.size, plan.dtype) for plan in plans])
    served = []
    for plan, engine in zip(plans, built, strict=True):
        one = server_plan(engine.path, plan.batch_size, plan.kv_blocks, plan.kv_cache, plan.threads)
        adapters = arms.adapters(profile, plan.instances) if plan.trained else [None] * plan.instances
        served.append([one if adapter is None else with_adapter(one, adapter) for adapter in adapters])
    return served


def with_adapter(plan: ServerPlan, adapter: Path) -> ServerPlan:
    """The same engine with an adapter of PEFT's on top; OpenVINO does not read by how much PEFT multiplies it."""
    facts = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    more = {"adapter": str(adapter), "adapter_alpha": str(facts["lora_alpha"] / facts["r"])}
    return dataclasses.replace(plan, parameters={**plan.parameters, **more})


def context_tokens(profile: Profile, configuration: Configuration) -> int:
    """What the KV cache of one instance holds (by ``scale.tokens``), but no more than the model takes."""
    return min(checkpoint.POSITIONS, laptop.laptop_system(profile, configuration).kv_tokens)


def tokenizer_file(profile: Profile, model: str) -> Path:
    """SmolLM2's, whatever it stands for."""
    return checkpoint.checkpoint(profile.engines) / "tokenizer.json"


def folders(profile: Profile) -> list[Path]:
    """None."""
    return []


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
        "compute": json.dumps(inference.COMPUTE),
    }
    # Engines take all the CPU that there is. Users, NGINX and gateways share it with them here, as they do not in the
    # papers, and must not wait for it: they would measure the scheduler.
    return ServerPlan("openvino", parameters, batch_size, niceness=10)
