"""Specification -> arithmetic: parameters, weights and KV cache of Llama models, Table I, and the laptop's systems."""

from __future__ import annotations

import functools
import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from erlib import config, paths
from erlib.config import ConfigError, Configuration, Dtype, LaptopSystem, Paper, PaperSystem, Profile, read_yaml

if TYPE_CHECKING:
    import pandas as pd

Size = Literal["large", "small", "quality"]
KvCache = Literal["f16", "u8"]

BYTES_PER_VALUE: dict[Dtype, float] = {"fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
AWQ_GROUP = 128
GATEWAYS_GB_PER_GPU = 2.276
"""Two routing gateways of 1,138 MB on each GPU (both papers, "Infrastructure Setup")."""
H100_BYTES, WORKSPACE_BYTES, KV_SHARE = 84.9e9, 4e9, 0.95
"""One GPU as TensorRT-LLM sees it: its memory, what activations take, and how much of the rest a KV cache is given."""
FOREIGN_CONTEXT_BYTES = 0.55e9
"""What the process of each other rank keeps of a GPU: a CUDA context, without which ranks could not reach each other's
memory. (That of the GPU's own rank is missing from what TensorRT-LLM sees.)"""
GPUS = 8
"""Of a DGX H100; on a laptop all cores stand for all of them."""
TABLE1_WEIGHTS_UNIT: dict[Paper, tuple[float, float]] = {"p1": (1e9, 1), "p2": (1000 * 2**20, 0.1)}
"""Bytes in what a paper's Table I calls a GB of weights, and the last digit that it prints. Paper 1's are decimal,
paper 2's the thousands of MiB that TensorRT-LLM logs when it loads an engine."""
MAX_STEP_TOKENS = 8192
"""Prompt and decoded tokens of one engine step, for which activations are sized."""
P2_MAX_INPUT_TOKENS = 1021
"""Longest prompt of the MLPerf Llama-2-70B lengths (paper 2, Fig. 2)."""
_BLOCK_TOKENS = {"llama-2": 128, "llama-3": 64}
_SLACK_TOKENS = 8


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
def shape(model: str) -> LlamaShape:
    """Shape of a model of ``data/llama_shapes.yaml``.

    Raises
    ------
    ConfigError
        If the model is not listed there.
    """
    shapes = read_yaml(paths.FACTS / "llama_shapes.yaml")
    if model not in shapes:
        raise ConfigError(f"no shape for {model!r} in data/llama_shapes.yaml; it lists {', '.join(shapes)}")
    return LlamaShape(**shapes[model])


def smollm2(layers: int) -> LlamaShape:
    """SmolLM2-135M cut to its first `layers` layers."""
    return replace(shape("smollm2-135m"), layers=layers)


def block_tokens(model: str) -> int:
    """Tokens per block of an engine's KV cache, as the papers' versions of TensorRT-LLM had it by default.

    0.7 to 0.9 for Llama 2, and 0.10, the first that converts Llama 3 without help. Later versions have smaller ones.
    """
    return _BLOCK_TOKENS[model.rpartition("-")[0]]


# --- the papers' systems ----------------------------------------------------------------------------------------


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

    Raises
    ------
    ConfigError
        If the GPUs have no room for a single token.
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


@dataclass(frozen=True)
class GpuMemory:
    """What one instance takes of each of its GPUs, in bytes."""

    weights: float
    activations: float
    contexts: float
    """Of the other ranks' processes."""
    kv_cache: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.contexts + self.kv_cache


def gpu_memory(system: PaperSystem) -> GpuMemory:
    """Memory of one instance per GPU: weights as loaded, activations, other ranks' contexts, KV cache as stated.

    Activations are those of the MLP, the widest part of a layer, with input, residual and output, in FP16: an estimate,
    since TensorRT decides which of them share memory.
    """
    width, model = system.tensor_parallel, shape(system.model)
    per_token = 2 * (2 * model.intermediate / width + 3 * model.hidden)
    return GpuMemory(
        weights=model.loaded_bytes(system.dtype, width) / width,
        activations=MAX_STEP_TOKENS * per_token,
        contexts=(width - 1) * FOREIGN_CONTEXT_BYTES,
        kv_cache=system.kv_cache_gb * 1e9 / width,
    )


def on_gpus(
    configuration: Configuration, n_gpus: int, gpu_bytes: float = H100_BYTES, has_fp8: bool = True
) -> tuple[Configuration, list[str]]:
    """As much of a paper's system as a smaller machine carries, and what is lost.

    Instances get GPUs of their own, experts one each, as in the papers. Where GPUs are too few, instances first become
    narrower (TP8, TP4, ...) as long as the weights fit, then fewer. The KV cache gets what is free beside weights and
    activations, but never more than the paper prints. The batch size shrinks with it, but not below the number of
    longest sequences that it holds.

    Parameters
    ----------
    configuration : Configuration
    n_gpus : int
    gpu_bytes : float
        What an engine can have of one GPU.
    has_fp8 : bool
        Whether the GPUs multiply FP8.

    Returns
    -------
    tuple of Configuration and list of str
        The very same configuration and no loss where everything fits. One expert alone has nothing to be routed to:
        its gateways do not classify.

    Raises
    ------
    ConfigError
        If the GPUs cannot carry it at all; says why.
    """
    name, printed = configuration.id, configuration.system
    if "fp8" in (printed.dtype, printed.kv_dtype) and not has_fp8:
        raise ConfigError(f"{name}: these GPUs have no FP8 (compute capability 8.9 or higher has), and it is in FP8")
    longest = _paper_sequence_tokens(config.paper_of(name))
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
    configuration: Configuration, narrow: PaperSystem, tokens: int, longest: int
) -> tuple[Configuration, list[str]]:
    name, printed, before = configuration.id, configuration.system, kv_tokens(configuration.system)
    routed = configuration.routing == "expert_router"
    losses: list[str] = []
    changed: dict[str, Any] = {}
    if narrow.instances < printed.instances:
        what = "experts" if routed else "instances"
        losses.append(f"{name}: {narrow.instances} instead of {printed.instances} {what}")
        if routed and narrow.instances == 1:
            losses.append(f"{name}: one expert has nothing to be routed to; its gateways do not classify")
            changed["routing"] = "replicas"
    if narrow.tensor_parallel < printed.tensor_parallel:
        losses.append(f"{name}: TP{narrow.tensor_parallel} instead of TP{printed.tensor_parallel}")
    batch_size = min(printed.batch_size, max(round(printed.batch_size * tokens / before), tokens // longest))
    if tokens < before:
        losses.append(f"{name}: KV cache of {tokens:,} instead of {before:,} tokens per instance")
    if batch_size < printed.batch_size:
        losses[-1] += f", batch size {batch_size} instead of {printed.batch_size}"
    if not losses:
        return configuration, []
    model = shape(printed.model)
    system = narrow.model_copy(
        update={
            "batch_size": batch_size,
            "weights_gb": model.loaded_bytes(printed.dtype, narrow.tensor_parallel) / 1e9,
            # half a token more, lest rounding takes one away
            "kv_cache_gb": (tokens + 0.5) * model.kv_bytes_per_token(printed.kv_dtype) / 1e9,
            "kv_tokens": None,
        }
    )
    title = configuration.title.replace(f"TP{printed.tensor_parallel}", f"TP{narrow.tensor_parallel}")
    title = title.replace(f"{printed.instances} x ", f"{narrow.instances} x ")
    changed |= {"paper": system, "stands_beside": None, "title": title}
    return configuration.model_copy(update=changed), losses


def table1(paper: Paper) -> pd.DataFrame:
    """Table I of a paper, printed and recomputed.

    Parameters
    ----------
    paper : {'p1', 'p2'}

    Returns
    -------
    pandas.DataFrame
        One row per configuration of the paper. ``*_printed`` as in the paper (GB, per instance); ``plain_gb``
        parameters times bytes; ``loaded_gb`` what TensorRT-LLM loads (:meth:`LlamaShape.loaded_bytes`), also as
        ``loaded_mib_1000`` (thousands of MiB); ``weights_agree`` whether that is the printed number within 1.5 % or its
        rounding, in the paper's unit (:data:`TABLE1_WEIGHTS_UNIT`); ``kv_bytes_per_token``; ``kv_tokens`` what the
        printed KV cache holds;
        ``full_sequences`` how many of the longest sequences fit; ``gpu_gb`` weights, KV cache and gateways on one GPU;
        ``discrepancy`` where print and arithmetic disagree, empty where they agree.
    """
    import pandas as pd  # not above: every emulated engine imports this

    rows = []
    for name in config.config_ids():
        configuration = config.load_configuration(name)
        if not name.startswith(paper) or configuration.paper is None:
            continue
        system = configuration.paper
        model = shape(system.model)
        loaded = model.loaded_bytes(system.dtype, system.tensor_parallel)
        gateways = GATEWAYS_GB_PER_GPU if configuration.routing == "expert_router" else 0
        unit, digit = TABLE1_WEIGHTS_UNIT[paper]
        rows.append(
            {
                "config": name,
                "title": configuration.title,
                "batch_size": system.batch_size,
                "weights_gb_printed": system.weights_gb,
                "plain_gb": model.parameters * BYTES_PER_VALUE[system.dtype] / 1e9,
                "loaded_gb": loaded / 1e9,
                "loaded_mib_1000": loaded / 2**20 / 1000,
                "weights_agree": abs(loaded / unit - system.weights_gb) <= max(0.015 * system.weights_gb, digit / 2),
                "kv_cache_gb_printed": system.kv_cache_gb,
                "kv_bytes_per_token": model.kv_bytes_per_token(system.kv_dtype),
                "kv_tokens_printed": system.kv_tokens,
                "kv_tokens": kv_tokens(system),
                "full_sequences": kv_tokens(system) // _paper_sequence_tokens(paper),
                "gpu_gb": (system.weights_gb + system.kv_cache_gb) / system.tensor_parallel + gateways,
                "discrepancy": "; ".join(_discrepancies(paper, system)),
            }
        )
    return pd.DataFrame(rows).astype({"kv_tokens_printed": "Int64"})


def _discrepancies(paper: Paper, system: PaperSystem) -> list[str]:
    model, found = shape(system.model), []
    plain_gb = model.parameters * BYTES_PER_VALUE[system.dtype] / 1e9
    loaded = model.loaded_bytes(system.dtype, system.tensor_parallel)
    deviation = system.weights_gb / plain_gb - 1
    if abs(deviation) > 0.015:
        readings = {
            "GB as loaded, with FP16 embeddings, scales and a copy of the embedding per GPU": loaded / 1e9,
            "thousands of MiB as loaded": loaded / 2**20 / 1000,
        }
        reading, value = min(readings.items(), key=lambda item: abs(item[1] - system.weights_gb))
        near = abs(system.weights_gb / value - 1) <= 0.015
        explanation = f"agrees with {value:.1f} {reading}" if near else "not explained by what is loaded"
        found.append(
            f"weights {deviation:+.1%} against parameters x bytes ({plain_gb:.1f} GB, "
            f"{plain_gb * 1e9 / 2**30:.1f} GiB): {explanation}"
        )
    tokens = kv_tokens(system)
    if system.kv_tokens and abs(system.kv_tokens / tokens - 1) > 0.03:
        needed_gb = system.kv_tokens * model.kv_bytes_per_token(system.kv_dtype) / 1e9
        found.append(
            f"text says {system.kv_tokens:,} KV tokens, which need {needed_gb:.0f} GB; "
            f"{system.kv_cache_gb:g} GB hold {tokens:,}"
        )
    longest = _paper_sequence_tokens(paper)
    if tokens // longest < system.batch_size:
        found.append(
            f"batch size {system.batch_size}, but {tokens // longest} sequences of {longest:,} tokens fit the KV cache"
        )
    return [*found, system.remark] if system.remark else found


def _paper_sequence_tokens(paper: Paper) -> int:
    """Longest sequence: paper 1's continuation prompt and its answer; paper 2's longest prompt and answer limit."""
    return 335 + 1200 + 1200 if paper == "p1" else P2_MAX_INPUT_TOKENS + 1000


# --- the laptop's systems ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaptopPlan:
    """What stands for one configuration on this machine; batch size, KV blocks and threads are per instance."""

    config: str
    size: Size
    dtype: Dtype
    kv_cache: KvCache
    """Precision of the KV cache. ``u8`` also stands for FP8, which a CPU does not have."""
    instances: int
    batch_size: int
    kv_blocks: int
    max_sequence_tokens: int
    threads: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that one instance's KV cache holds."""
        return self.kv_blocks * config.KV_BLOCK_TOKENS


def longest_sequence_tokens(profile: Profile, workload: Paper | Literal["preliminary"]) -> int:
    """Longest prompt and answer that a workload makes at this profile's scale, with a little slack.

    Paper 1: base prompt (mean + 4 sd), its answer, and the continuation's answer; preliminary: base prompt and its
    answer. Paper 2: longest prompt and answer.
    """
    settings = profile.workload
    if workload == "p2":
        longest: float = P2_MAX_INPUT_TOKENS + settings.p2_max_output_tokens
    else:
        answers = 2 * settings.p1_output_tokens if workload == "p1" else settings.preliminary_output_tokens
        longest = settings.p1_input_tokens + 4 * settings.p1_input_sd + answers
    return math.ceil(longest / profile.scale.tokens) + _SLACK_TOKENS


def laptop_system(profile: Profile, configuration: Configuration, max_sequence_tokens: int | None = None) -> LaptopPlan:
    """Scale a configuration to this machine, keeping the papers' ratios of users to slots and to KV tokens.

    Parameters
    ----------
    profile : Profile
        Its ``scale`` divides batch size (users) and KV tokens (users and tokens).
    configuration : Configuration
        ``laptop.batch_size`` and ``laptop.kv_blocks`` override the scaled values.
    max_sequence_tokens : int, optional
        Longest sequence to be served; by default :func:`longest_sequence_tokens`.

    Raises
    ------
    ConfigError
        If an overridden KV cache cannot hold one sequence; the message names the number that can. A scaled one is
        rounded up to hold one.
    """
    laptop, system = configuration.laptop, configuration.system
    if max_sequence_tokens is None:
        max_sequence_tokens = longest_sequence_tokens(profile, config.paper_of(configuration.id))
    one_sequence = math.ceil(max_sequence_tokens / config.KV_BLOCK_TOKENS)
    if laptop.kv_blocks is not None and laptop.kv_blocks < one_sequence:
        raise ConfigError(
            f"{configuration.id}: laptop.kv_blocks is {laptop.kv_blocks}, but one sequence of "
            f"{max_sequence_tokens} tokens needs {one_sequence} blocks of {config.KV_BLOCK_TOKENS}"
        )
    scaled_tokens = kv_tokens(system) / (profile.scale.users * profile.scale.tokens)
    scaled_blocks = max(one_sequence, math.ceil(scaled_tokens / config.KV_BLOCK_TOKENS))
    return LaptopPlan(
        config=configuration.id,
        size=laptop.size,
        dtype=laptop.dtype,
        kv_cache=laptop.kv_cache,
        instances=laptop.instances,
        batch_size=laptop.batch_size or profile.scaled_users(system.batch_size),
        kv_blocks=laptop.kv_blocks or scaled_blocks,
        max_sequence_tokens=max_sequence_tokens,
        threads=max(1, len(os.sched_getaffinity(0)) * system.tensor_parallel // GPUS),
    )


def preliminary_configurations(profile: Profile) -> list[Configuration]:
    """Systems of paper 2's search for its baselines (section IV-C): data types x TP8, TP4 x batch sizes, one instance.

    The paper states no KV caches. They hold the whole batch (and no less than an engine's longest sequence), so that
    the batch size alone limits what runs together, wherever that fits the memory that the weights leave.
    """
    settings, model = profile.preliminary, "llama-3-70b"
    sequence_blocks = -(-longest_sequence_tokens(profile, "preliminary") // config.KV_BLOCK_TOKENS)
    full = profile.model_copy(update={"scale": config.Scale(users=1, tokens=1)})
    drawn, longest = (
        block_tokens(model) * math.ceil(longest_sequence_tokens(full, workload) / block_tokens(model))
        for workload in ("preliminary", "p2")
    )
    found = []
    for dtype, tensor_parallel, batch_size in itertools.product(settings.dtypes, (8, 4), settings.batch_sizes):
        kv_dtype: Dtype = "fp8" if dtype == "fp8" else "fp16"
        weights = shape(model).loaded_bytes(dtype, tensor_parallel)
        taken = WORKSPACE_BYTES + (tensor_parallel - 1) * FOREIGN_CONTEXT_BYTES
        most = most_kv_tokens(model, dtype, kv_dtype, tensor_parallel, weights, taken)
        tokens = min(most, max(batch_size * drawn, longest))
        system = PaperSystem(
            model=model, dtype=dtype, kv_dtype=kv_dtype, tensor_parallel=tensor_parallel, instances=1,
            batch_size=batch_size, weights_gb=weights / 1e9,
            # half a token more, lest rounding takes one away
            kv_cache_gb=(tokens + 0.5) * shape(model).kv_bytes_per_token(kv_dtype) / 1e9,
        )  # fmt: skip
        slots = profile.scaled_users(batch_size)
        laptop = LaptopSystem(
            size="large", dtype=dtype, kv_cache="u8" if dtype == "fp8" else "f16", instances=1,
            batch_size=slots, kv_blocks=slots * sequence_blocks,
        )  # fmt: skip
        title = f"70B {dtype.upper()} TP{tensor_parallel}, batch size {batch_size}"
        name = f"p2.{dtype}-tp{tensor_parallel}-bs{batch_size}"
        found.append(Configuration(id=name, title=title, routing="direct", paper=system, laptop=laptop))
    return found


def needed(profile: Profile) -> list[tuple[Size, Dtype]]:
    """Engines that a profile's experiments use, and all formats at the depth at which quality is measured."""
    names = dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config])
    systems = [config.load_configuration(name).laptop for name in names]
    wanted: list[tuple[Size, Dtype]] = [(laptop.size, laptop.dtype) for laptop in systems]
    wanted += [("large", dtype) for dtype in profile.preliminary.dtypes]
    wanted += [("quality", dtype) for dtype in BYTES_PER_VALUE]
    return list(dict.fromkeys(wanted))
