"""Specification -> arithmetic: parameters, weights and KV cache of Llama models, Table I, and the laptop's systems."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

from erlib import paths
from erlib.config import ConfigError, Dtype, Paper, PaperSystem, read_yaml

Size = Literal["large", "small", "quality", "whole"]

BYTES_PER_VALUE: dict[Dtype, float] = {"fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5}

AWQ_GROUP = 128

GATEWAYS_GB_PER_GPU = 2.276
"""Two routing gateways of 1,138 MB on each GPU (both papers, "Infrastructure Setup")."""

H100_BYTES, WORKSPACE_BYTES, KV_SHARE = 84.9e9, 4e9, 0.95
"""One GPU as TensorRT-LLM sees it: its memory, what activations take, and how much of the rest a KV cache is given."""

FOREIGN_CONTEXT_BYTES = 0.55e9
"""What each other process keeps of a GPU: a CUDA context. A rank's process has one on every GPU of its engine, without
which ranks could not reach each other's memory. (That of the GPU's own rank is missing from what TensorRT-LLM sees.)"""

GPUS = 8
"""Of a DGX H100; on a laptop all cores stand for all of them."""

TABLE1_WEIGHTS_UNIT: dict[Paper, tuple[float, float]] = {"p1": (1e9, 1), "p2": (1000 * 2**20, 0.1)}
"""Bytes in what a paper's Table I calls a GB of weights, and the last digit that it prints. Paper 1's are decimal,
paper 2's the thousands of MiB that TensorRT-LLM logs when it loads an engine."""

MAX_STEP_TOKENS = 8192
"""Prompt and decoded tokens of one engine step, for which activations are sized."""

LEAST_STEP_TOKENS = 2048
"""The same of engines that share a GPU: room for the longest prompt, and for what is decoded beside it."""

P2_MAX_INPUT_TOKENS = 1021
"""Longest prompt of the MLPerf Llama-2-70B lengths (paper 2, Fig. 2)."""

OWN_BUFFERS_BYTES = 0.2e9
"""Beside activations, what an engine that shares a GPU is given: of the runtime, of sampling, of libraries."""

_BLOCK_TOKENS = {"llama-2": 128, "llama-3": 64, "llama-3.2": 64}


@dataclass(frozen=True)
class LlamaShape:
    """The numbers of a Llama-architecture ``config.json`` that decide its size."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    """The output layer is the embedding."""

    @property
    def linear(self) -> int:
        """Parameters of all attention and MLP matrices: L (2 h^2 + 2 h n_kv d + 3 h f)."""
        kv = self.kv_heads * self.hidden // self.heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output layer where that is not tied to it."""
        return self.vocabulary * self.hidden

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear + (1 if self.tied else 2) * self.embedding + self.norms

    def kv_bytes_per_token(self, dtype: Dtype) -> int:
        """Keys and values of one token in all layers: 2 L n_kv d bytes per value (scales not counted)."""
        return int(2 * self.layers * self.kv_heads * (self.hidden // self.heads) * BYTES_PER_VALUE[dtype])

    def loaded_bytes(self, dtype: Dtype, tensor_parallel: int = 1) -> float:
        """Weights that a TensorRT-LLM engine loads, summed over its GPUs.

        Quantised engines keep embedding and output layer in FP16. ``convert_checkpoint`` (FP16, INT8) copies the
        embedding to every GPU; the quantisation toolkit's export (FP8, INT4) shards it. INT8 has an FP16 scale per
        output channel, INT4-AWQ one per group of 128 weights.
        """
        kv = self.kv_heads * self.hidden // self.heads
        channels = self.layers * (2 * self.hidden + 2 * kv + 2 * self.intermediate + self.hidden)
        scales = {"int8": channels, "int4": self.linear / AWQ_GROUP}.get(dtype, 0)
        copies = tensor_parallel if dtype in ("fp16", "int8") else 1
        return self.linear * BYTES_PER_VALUE[dtype] + 2 * (scales + (1 + copies) * self.embedding + self.norms)


@functools.cache
def shapes() -> dict[str, LlamaShape]:
    """Shapes of all models of ``data/llama_shapes.yaml``."""
    return {model: LlamaShape(**its) for model, its in read_yaml(paths.FACTS / "llama_shapes.yaml").items()}


def shape(model: str) -> LlamaShape:
    """Shape of a model of ``data/llama_shapes.yaml``."""
    if model not in shapes():
        raise ConfigError(f"no shape for {model!r} in data/llama_shapes.yaml; it lists {', '.join(shapes())}")
    return shapes()[model]


def smollm2(layers: int) -> LlamaShape:
    """SmolLM2-135M cut to its first `layers` layers."""
    return replace(shape("smollm2-135m"), layers=layers)


def block_tokens(model: str) -> int:
    """Tokens per block of an engine's KV cache, as the papers' versions of TensorRT-LLM had it by default.

    0.7 to 0.9 for Llama 2, and 0.10, the first that converts Llama 3 without help. Later versions have smaller ones.
    """
    return _BLOCK_TOKENS[model.rpartition("-")[0]]


def kv_tokens(system: PaperSystem) -> int:
    """Tokens that the printed KV cache of one instance holds, GB read as 10^9 bytes."""
    return int(system.kv_cache_gb * 1e9 / shape(system.model).kv_bytes_per_token(system.kv_dtype))


def most_kv_tokens(
    model: str,
    dtype: Dtype,
    kv_dtype: Dtype,
    tensor_parallel: int,
    weight_bytes: float | None = None,
    workspace_bytes: float = WORKSPACE_BYTES,
    gpu_bytes: float = H100_BYTES,
) -> int:
    """Tokens that fit beside an instance's weights (by default parameters times bytes) on its GPUs, by default H100s.

    For systems whose KV cache is not stated. Those that paper 2 prints for its baselines are 8 to 28 % smaller.
    """
    weights = shape(model).parameters * BYTES_PER_VALUE[dtype] if weight_bytes is None else weight_bytes
    free = KV_SHARE * (tensor_parallel * (gpu_bytes - workspace_bytes) - weights)
    tokens = math.floor(free / shape(model).kv_bytes_per_token(kv_dtype))
    if tokens < 1:
        raise ConfigError(
            f"{model} in {dtype} has {weights / 1e9:.0f} GB of weights, which leave no memory of "
            f"{tensor_parallel} x {'H100' if gpu_bytes == H100_BYTES else f'{gpu_bytes / 1e9:.0f} GB'} to a KV cache"
        )
    return tokens


def step_tokens(per_gpu: int = 1) -> int:
    """Tokens of one step of an engine that shares its GPU with so many, itself among them.

    Activations come once for each engine: the more there are, the smaller their steps.
    """
    return MAX_STEP_TOKENS if per_gpu == 1 else max(LEAST_STEP_TOKENS, MAX_STEP_TOKENS // per_gpu)


@dataclass(frozen=True)
class GpuMemory:
    """What a system takes of each of its GPUs, in bytes."""

    weights: float
    activations: float
    contexts: float
    """Of other ranks' processes, and of other engines'."""
    kv_cache: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.contexts + self.kv_cache


def gpu_memory(system: PaperSystem, per_gpu: int = 1) -> GpuMemory:
    """Memory of a GPU with `per_gpu` instances: weights as loaded, activations, contexts, KV caches as stated.

    Activations are those of the MLP, the widest part of a layer, with input, residual and output, in FP16: an estimate,
    since TensorRT decides which of them share memory. Instances that share a GPU are given twice that, and
    :data:`OWN_BUFFERS_BYTES`: what the estimate misses would be missing as often as there are instances.
    """
    width, model = system.tensor_parallel, shape(system.model)
    per_token = 2 * (2 * model.intermediate / width + 3 * model.hidden)
    activations = step_tokens(per_gpu) * per_token
    return GpuMemory(
        weights=per_gpu * model.loaded_bytes(system.dtype, width) / width,
        activations=activations if per_gpu == 1 else per_gpu * (2 * activations + OWN_BUFFERS_BYTES),
        contexts=(width * per_gpu - 1) * FOREIGN_CONTEXT_BYTES,
        kv_cache=per_gpu * system.kv_cache_gb * 1e9 / width,
    )
