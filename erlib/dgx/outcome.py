"""Whether what a plan's commands have made is what was asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from erlib.dgx.tensorrt_llm import ALGORITHMS, QFORMAT, Plan
from erlib.engines import llama


def problems(plan: Plan) -> list[str]:
    """What is wrong with what the commands have made; empty if it is what was asked for.

    Compares the JSON that TensorRT-LLM and ModelOpt write beside their files with the configuration, counts an
    engine's files (one per GPU) and compares their size with :mod:`erlib.engines.llama`. Coarsely: one that differs
    by more than 10 % holds other weights, or weights of another format.
    """
    if plan.flow == "llmapi":
        return checkpoint_problems(plan)
    prompt, sequence = plan.lengths
    build: dict[str, Any] = {
        "max_input_len": prompt,
        "max_seq_len": sequence,
        "max_batch_size": plan.system.batch_size,
        "max_num_tokens": plan.step_tokens,
        "plugin_config.use_paged_context_fmha": False,
        "plugin_config.use_fused_mlp": False,
        "plugin_config.tokens_per_block": llama.block_tokens(plan.system.model),
    }
    expected = {f"pretrained_config.{key}": value for key, value in _converted(plan).items()}
    if plan.adapters:
        build |= {"plugin_config.lora_plugin": "float16", "lora_config.max_lora_rank": plan.adapters.rank}
    expected |= {f"build_config.{key}": value for key, value in build.items()}
    found = _differences(plan.served / "config.json", expected) + _wrong_files(plan, plan.served, "rank*.engine")
    return found + _wrong_adapters(plan)


def checkpoint_problems(plan: Plan) -> list[str]:
    """The same for the checkpoint, which is what an engine is built from: best asked before that takes hours."""
    if plan.flow != "llmapi":
        found = _differences(plan.checkpoint / "config.json", _converted(plan))
        return found + _wrong_files(plan, plan.checkpoint, "rank*.safetensors")
    found = _differences(plan.checkpoint / "config.json", _sizes(plan))
    if plan.system.dtype in QFORMAT:
        found += _differences(plan.checkpoint / "hf_quant_config.json", _formats(plan))
    return found + _wrong_files(plan, plan.checkpoint, "*.safetensors")


def _sizes(plan: Plan) -> dict[str, Any]:
    shape = llama.shape(plan.system.model)
    return {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "vocab_size": shape.vocabulary}


def _formats(plan: Plan) -> dict[str, Any]:
    algorithm, kv_algorithm = ALGORITHMS[plan.system.dtype, plan.system.kv_dtype]
    formats = {"quantization.quant_algo": algorithm, "quantization.kv_cache_quant_algo": kv_algorithm}
    return formats | ({"quantization.group_size": llama.AWQ_GROUP} if plan.system.dtype == "int4" else {})


def _converted(plan: Plan) -> dict[str, Any]:
    """What TensorRT-LLM's own checkpoints say of themselves, and the engines that are built from them."""
    return _sizes(plan) | _formats(plan) | {"dtype": "float16", "mapping.tp_size": plan.system.tensor_parallel}


def _wrong_files(plan: Plan, directory: Path, pattern: str) -> list[str]:
    # A checkpoint for the LLM API is split as it is loaded, and has as many files as its writer liked.
    ranks = 1 if plan.flow == "llmapi" else plan.system.tensor_parallel
    files = list(directory.glob(pattern))
    if plan.flow != "llmapi" and len(files) != ranks:
        return [f"{directory}: {len(files)} files {pattern}, not {ranks}"]
    size, shape = sum(file.stat().st_size for file in files), llama.shape(plan.system.model)
    due = shape.loaded_bytes(plan.system.dtype, ranks)
    if plan.flow == "llmapi" and shape.tied:  # as it is loaded, a checkpoint has the one matrix once
        due -= 2 * shape.embedding
    if abs(size / due - 1) <= 0.1:
        return []
    return [f"{directory}: {size / 1e9:.1f} GB in {pattern}, but {due / 1e9:.1f} GB of weights"]


def _wrong_adapters(plan: Plan) -> list[str]:
    """Of those that the engine reads when it starts: a row (matrix, layer, rank) for each matrix of an adapter."""
    found: list[str] = []
    if plan.adapters is None:
        return found
    for number, _ in plan.adapters.numbered():
        file = plan.prefetched / str(number) / "model.lora_config.npy"
        try:
            rows = np.load(file).reshape(-1, 3)
            weights = np.load(file.with_name("model.lora_weights.npy"), mmap_mode="r")
        except (OSError, ValueError) as error:
            found.append(f"{file}: not readable ({error})")
            continue
        rank = rows[:, 2].max(initial=0)
        if len(rows) != weights.shape[-2] or rank > plan.adapters.rank:
            found.append(f"{file.parent}: {len(rows)} matrices up to rank {rank}, of another adapter")
    return found


def _differences(file: Path, expected: Mapping[str, Any]) -> list[str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{file}: not readable ({error})"]
    found = []
    for key, value in expected.items():
        got = functools.reduce(lambda level, name: (level or {}).get(name), key.split("."), content)
        if got != value:
            found.append(f"{file}: {key} is {got!r}, not {value!r}")
    return found
