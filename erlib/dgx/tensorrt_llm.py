"""Configuration -> TensorRT-LLM engine: what it is, and where it and what leads to it lie.

:mod:`erlib.dgx.recipes` has the commands that make it, :mod:`erlib.dgx.outcome` looks at what they have made. Two
*flows* lead to a served model:

``engine``
    Checkpoint conversion or quantisation, then ``trtllm-build``. The only one that can express all nine configurations;
    TensorRT-LLM 1.2.1 is the last stable version that has engines, 0.21.0 one for older drivers.
``llmapi``
    TensorRT-LLM's PyTorch backend: no engine, but a Hugging Face checkpoint (quantised by ModelOpt) and arguments.

``python -m erlib.dgx --help`` shows a plan, checks what was built, and refreshes the tables of known options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from erlib import cache, config
from erlib.config import ConfigError, Configuration, Flow, PaperSystem, Profile, Version, WorkloadSettings
from erlib.dgx import adapters
from erlib.dgx.adapters import Adapters
from erlib.dgx.checkpoints import places, source
from erlib.dgx.containers import Places
from erlib.engines import laptop, llama

NEWEST: Version = get_args(Version)[0]

# (weights, KV cache) -> quantisation as TensorRT-LLM and ModelOpt name it in the config.json that they write
ALGORITHMS: dict[tuple[str, str], tuple[str | None, str | None]] = {
    ("fp16", "fp16"): (None, None),
    ("int8", "int8"): ("W8A16", "INT8"),
    ("fp8", "fp8"): ("FP8", "FP8"),
    ("int4", "fp16"): ("W4A16_AWQ", None),
}

QFORMAT = {"fp8": "fp8", "int4": "int4_awq"}


def lengths(configuration: Configuration, workload: WorkloadSettings) -> tuple[int, int]:
    """Longest prompt and longest sequence (prompt and answer), in tokens, rounded up to multiples of 64.

    Paper 1's longest prompt is a continuation: base prompt (mean + 4 sd, as the workload draws them) and its answer. A
    system that serves both papers' workloads takes the longer.
    """
    continuation = workload.p1_input_tokens + 4 * workload.p1_input_sd + workload.p1_output_tokens
    of = {
        "p1": (continuation, continuation + workload.p1_output_tokens),
        "p2": (llama.P2_MAX_INPUT_TOKENS, llama.P2_MAX_INPUT_TOKENS + workload.p2_max_output_tokens),
    }
    prompt, sequence = np.max([of[paper] for paper in configuration.papers], axis=0)
    return 64 * math.ceil(prompt / 64), 64 * math.ceil(sequence / 64)


def plan(profile: Profile, configuration: Configuration) -> Plan:
    """How a configuration's engine comes about with the profile's settings; see :class:`Plan`."""
    settings, longest, where = profile.tensorrt_llm, lengths(configuration, profile.workload), places(profile)
    its = adapters.of(profile, configuration, where)
    return Plan(configuration, longest, where, settings.flow, settings.version or NEWEST, its)


def needed(profile: Profile, configurations: Sequence[Configuration] | None = None) -> list[Plan]:
    """Plans of the engines that `configurations` (by default, the profile's as printed) load, each once."""
    if configurations is None:
        names = [*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config]
        configurations = [*map(config.load_configuration, names), *laptop.preliminary_configurations(profile)]
    found: dict[Path, Plan] = {}
    for configuration in configurations:
        made = plan(profile, configuration)
        found.setdefault(made.served, made)
    return list(found.values())


@dataclass(frozen=True)
class Plan:
    """How one configuration comes from a downloaded checkpoint to something that a server loads.

    A baseline of our own shares the engine of the system that it stands beside; instances of one configuration share
    theirs. ConfigError if the flow cannot express the system.

    Pinned, whatever a version's defaults are: float16, formats of weights and KV cache, lengths, tokens per step, and
    what the papers' versions did: blocks of their size, an MLP whose two multiplications are not fused, and no
    paged-context attention, without which an engine has neither KV block reuse nor chunked context (and which
    ``trtllm-build`` does not build for an INT8 KV cache). The server pins the scheduler (guaranteed no evict) and how
    attention is split.
    """

    configuration: Configuration
    lengths: tuple[int, int]
    places: Places
    flow: Flow = "engine"
    version: Version = NEWEST
    adapters: Adapters | None = None
    """Experts on top of the one model, if that is what the configuration is."""

    def __post_init__(self) -> None:
        name, system = self.configuration.id, self.system
        if self.configuration.adapters and self.adapters is None:
            raise ConfigError(f"{name}: its experts are adapters: name their folder (experts.adapters, or --adapters)")
        if (system.dtype, system.kv_dtype) not in ALGORITHMS:
            known = ", ".join("/".join(pair) for pair in ALGORITHMS)
            raise ConfigError(
                f"{name}: no recipe for {system.dtype} weights with {system.kv_dtype} KV cache, only {known}"
            )
        if llama.shape(system.model).kv_heads % system.tensor_parallel:
            raise ConfigError(f"{name}: {system.tensor_parallel} GPUs do not divide the KV heads of {system.model}")
        if self.flow == "llmapi" and self.version != NEWEST:
            raise ConfigError(f"{name}: flow llmapi is for TensorRT-LLM {NEWEST}; set tensorrt_llm.version to that")
        if self.flow == "llmapi" and system.dtype == "int8":
            raise ConfigError(
                f"{name}: flow llmapi cannot express it: TensorRT-LLM's PyTorch backend has no INT8 KV cache, and "
                "ModelOpt exports no weight-only INT8 checkpoint for it. Use flow engine"
            )

    @property
    def system(self) -> PaperSystem:
        return self.configuration.system

    @property
    def step_tokens(self) -> int:
        """Tokens per step. Where it was not set, the papers' versions sized activations for batch size times longest
        prompt."""
        return llama.step_tokens(self.configuration.per_gpu)

    @property
    def source(self) -> Path:
        """Checkpoint as downloaded, with its tokenizer."""
        return source(self.system.model, self.places)

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint, converted or quantised, that is served or built from."""
        if self.flow == "llmapi" and self.system.dtype == "fp16":
            return self.source  # as it was downloaded
        return self._home / "checkpoints" / self._weights

    @property
    def served(self) -> Path:
        """Directory that a server loads: an engine, or the checkpoint of the ``llmapi`` flow."""
        if self.flow == "llmapi":
            return self.checkpoint
        prompt, sequence = self.lengths
        name = f"{self._weights}-bs{self.system.batch_size}-in{prompt}-seq{sequence}"
        if self.configuration.per_gpu > 1:
            name += f"-step{self.step_tokens}"
        if self.adapters:  # for any of that rank, that change these matrices
            name += f"-lora{self.adapters.rank}-{cache.digest(self.adapters.modules)[:6]}"
        return self._home / "engines" / name

    @property
    def prefetched(self) -> Path:
        """Directory of the adapters as an engine takes them, below it one for each, named by its number."""
        assert self.adapters is not None
        return self._home / "adapters" / self.adapters.key

    @property
    def _home(self) -> Path:
        return self.places.work / f"{self.flow}-{self.version}"  # no version loads another one's engines

    @property
    def _weights(self) -> str:
        # Named by what they are: systems that differ in batch size alone share a checkpoint, equal ones an engine.
        system = self.system
        formats = f"{system.model}-{system.dtype}-kv_{system.kv_dtype}"
        return formats if self.flow == "llmapi" else f"{formats}-tp{system.tensor_parallel}"
