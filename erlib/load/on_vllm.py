"""The backend of vLLM: on the GPUs of this machine, several engines on each if need be; without any, on its cores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from erlib import config
from erlib.config import ConfigError, Configuration, Profile
from erlib.engines import checkpoint, laptop, vllm
from erlib.engines.laptop import LaptopPlan
from erlib.engines.vllm import Checkpoint
from erlib.experts import arms
from erlib.load.backends import Workloads
from erlib.machine import hardware
from erlib.serving import wire
from erlib.serving.triton import ServerPlan

ENGINE_BYTES = {"cuda": 2.5e9, "cpu": 1.2e9}
"""What an engine takes beside weights and KV cache: an estimate for a GPU, measured on a CPU."""
MEMORY_SHARE = 0.95
"""Of a GPU's memory, what its engines may have together."""


def configurations(profile: Profile, names: Sequence[str]) -> list[Configuration]:
    """See :class:`erlib.load.backends.Backend`, as for all that follows.

    Where every server has all experts, there is one for each GPU.
    """
    found = []
    for one in map(config.load_configuration, names):
        if one.adapters:
            instances = max(1, min(one.laptop.instances, len(hardware.gpus())))
            laptop_system = one.laptop.model_copy(update={"instances": instances})
            one = one.model_copy(update={"laptop": laptop_system})  # noqa: PLW2901
        found.append(one)
    return found


def preliminary_configurations(profile: Profile) -> list[Configuration]:
    """As on a laptop."""
    return laptop.preliminary_configurations(profile)


def served(profile: Profile, configurations: Sequence[Configuration], sized_for: Workloads) -> list[list[ServerPlan]]:
    """Servers of engines whose batch size and KV cache are the papers', scaled; of a GPU's memory, each has a part."""
    planned = [_Planned(profile, configuration, sized_for) for configuration in configurations]
    return [each.servers() for each in planned]


class _Planned:
    """One configuration's engines.

    Raises
    ------
    ConfigError
        If this machine cannot carry them, or the checkpoint is none for them.
    """

    def __init__(self, profile: Profile, configuration: Configuration, sized_for: Workloads = "load"):
        self.profile, self.configuration = profile, configuration
        gpus = hardware.gpus()
        self.environment = vllm.environment(profile.vllm, len(gpus))
        self.device = "cuda" if self.environment.on_gpus else "cpu"
        self.gpus = gpus if self.environment.on_gpus else []
        longest = laptop.longest_sequence_tokens(profile, "preliminary") if sized_for == "preliminary" else None
        self.plan = laptop.laptop_system(profile, configuration, longest)
        self.checkpoint = vllm.read(_checkpoint(profile, self.plan))
        self._check()
        self.kv_blocks = min(self.plan.kv_blocks, self._most_kv_blocks())
        self.context_tokens = min(self.checkpoint.positions, self.kv_blocks * config.KV_BLOCK_TOKENS)

    def _check(self) -> None:
        name, plan, found = self.configuration.id, self.plan, self.checkpoint
        if found.dtype != plan.dtype:
            raise ConfigError(
                f"{name} has weights in {plan.dtype}, but {found.directory} in {found.dtype}: name another checkpoint "
                "(vllm.checkpoint), or leave it out of the profile"
            )
        if self.device == "cpu" and (found.dtype != "fp16" or plan.kv_cache != "f16"):
            raise ConfigError(
                f"{name}: vLLM on a CPU is tried with FP16 alone; serving.backend=openvino has the others"
            )
        if self.device == "cuda" and (width := self.configuration.system.tensor_parallel) > 1:
            raise ConfigError(
                f"{name} needs {width} GPUs for an engine, and vLLM's engines have one each here: "
                "serving.backend=tensorrt_llm"
            )
        if plan.max_sequence_tokens > found.positions:
            raise ConfigError(
                f"{name}: sequences of {plan.max_sequence_tokens} tokens, but {found.directory} is made for "
                f"{found.positions}: raise scale.tokens"
            )

    def _most_kv_blocks(self) -> int:
        """That fit beside the weights of all engines of the fullest GPU, or of the host: enough for one sequence."""
        widened = 2 if self.device == "cpu" else 1  # float32
        engines = -(-self.plan.instances // len(self.gpus)) if self.gpus else self.plan.instances
        memory = min((gpu.usable_bytes for gpu in self.gpus), default=hardware.free_memory_bytes()) * MEMORY_SHARE
        fixed = widened * self.checkpoint.weights_bytes + ENGINE_BYTES[self.device]
        block = self.checkpoint.block_bytes(vllm.value_bytes(self.device, self.plan.kv_cache))
        most = int((memory / engines - fixed) // block)
        needed = -(-self.plan.max_sequence_tokens // config.KV_BLOCK_TOKENS)
        if most < needed:
            wanted = engines * (fixed + needed * block) / 1e9
            raise ConfigError(
                f"{self.configuration.id}: {engines} engines of {self.checkpoint.directory} need {wanted:.1f} GB "
                f"{'of a GPU' if self.gpus else 'of memory'}, which has {memory / 1e9:.1f}: fewer experts "
                "(clusterer.n_clusters), adapters (x1.L), or a smaller checkpoint"
            )
        return most

    def servers(self) -> list[ServerPlan]:
        plan, profile = self.plan, self.profile
        folders: list[Path] = []
        if plan.trained:
            n = profile.clusterer.n_clusters if self.configuration.adapters else plan.instances
            folders = _adapters(profile, n, self.checkpoint)
        servers = []
        for i in range(plan.instances):
            own = folders if self.configuration.adapters else folders[i : i + 1]
            args = vllm.engine_args(
                self.checkpoint, self.device, plan.batch_size, self.kv_blocks, plan.kv_cache, self.context_tokens,
                profile.vllm.chunked_prefill, own,
            )  # fmt: skip
            parameters = {
                "engine": str(self.checkpoint.directory),
                "environment": str(self.environment.directory),
                "content": self.checkpoint.key,
                "build": f"{self.environment.build} {vllm.VERSION}",
                "engine_args": json.dumps(args),
                "variables": json.dumps(self._variables(i)),
                "max_batch_size": str(plan.batch_size),
                "kv_blocks": str(self.kv_blocks),
                "kv_block_tokens": str(config.KV_BLOCK_TOKENS),
                wire.CONTEXT: str(self.context_tokens),
                "threads": str(plan.threads),
            }
            names = [f"adapter-{j}" for j in range(len(own))] if self.configuration.adapters else ["adapter"]
            parameters |= {name: str(folder) for name, folder in zip(names, own, strict=False)}
            # On cores, as OpenVINO's engines: what is around them must not wait.
            servers.append(ServerPlan("vllm", parameters, plan.batch_size, niceness=0 if self.gpus else 10))
        return servers

    def _variables(self, instance: int) -> dict[str, str]:
        """Of the environment of an engine's process."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": str(instance % len(self.gpus))}
        # Threads of several engines that wait actively would keep each other waiting.
        return {"OMP_NUM_THREADS": str(self.plan.threads), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def _adapters(profile: Profile, n: int, served: Checkpoint) -> list[Path]:
    if profile.vllm.checkpoint and not profile.experts.adapters:
        raise ConfigError(
            "vllm.checkpoint names a checkpoint of your own: experts.adapters must name a folder with adapters of it, "
            "expert-0, expert-1 and so on"
        )
    return arms.adapters(profile, n, served.directory)


def _checkpoint(profile: Profile, plan: LaptopPlan) -> Path:
    """What an engine loads: the user's own, or SmolLM2-135M, cut as for the laptop's engines."""
    if profile.vllm.checkpoint:
        return Path(profile.vllm.checkpoint)
    whole = checkpoint.checkpoint(profile.engines)
    settings, depth = profile.engines, checkpoint.depth(whole)
    return checkpoint.cut(whole, {"large": settings.large_layers, "small": settings.small_layers}.get(plan.size, depth))


def context_tokens(profile: Profile, configuration: Configuration) -> int:
    """What the KV cache of one instance holds, but no more than the model takes."""
    return _Planned(profile, configuration).context_tokens


def tokenizer_file(profile: Profile, model: str) -> Path:
    """The checkpoint's, whatever it stands for."""
    directory = profile.vllm.checkpoint or checkpoint.checkpoint(profile.engines)
    return Path(directory) / "tokenizer.json"


def folders(profile: Profile) -> list[Path]:
    """None."""
    return []
