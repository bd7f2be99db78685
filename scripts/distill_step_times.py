"""Distil H100 step times from NVIDIA's kernel measurements into ``data/h100_step_times.parquet``.

Beside it ``data/h100_beside_step_times.parquet`` holds what the papers left out: 13B models on eight GPUs, and of every
system on several GPUs the time that all-reduce takes of its dense part.

Runs in an environment of its own (its numpy is newer than the workbench's), never during a reproduction::

    python -m venv /tmp/distil && /tmp/distil/bin/python scripts/install.py steptables
    /tmp/distil/bin/pip download --no-deps -d /tmp/distil aiconfigurator==0.4.0
    /tmp/distil/bin/python scripts/distill_step_times.py /tmp/distil/aiconfigurator-0.4.0-py3-none-any.whl

aiconfigurator-core 0.12.0 sums measured kernels (GEMM, attention, all-reduce) over a model's layers. It has none for
weight-only INT8 and INT4 under TensorRT-LLM; those rows come from the older wheel, which cannot be installed beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import pandas as pd
    import yaml
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; this script's first lines say which environment it needs")

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "data" / "h100_step_times.parquet"
BESIDE = ROOT / "data" / "h100_beside_step_times.parquet"
SYSTEM, BACKEND, VERSION = "h100_sxm", "trtllm", "1.3.0rc20"
WEIGHT_ONLY = "aiconfigurator/systems/data/h100_sxm/trtllm/1.0.0rc3/gemm_perf.txt"
GEMM = {"fp16": "bfloat16", "fp8": "fp8", "int8": "int8_wo", "int4": "int4_wo"}
CACHE = {"fp16": "bfloat16", "fp8": "fp8", "int8": "fp8"}
"""INT8 KV caches were not measured; FP8 moves as many bytes."""

BEYOND_THE_PAPERS = [
    ("llama-3-70b", "fp16", "fp16", 4),  # paper 2's preliminary sweep
    ("llama-3-70b", "int4", "fp16", 4),
    ("llama-3-70b", "int4", "fp16", 8),
    ("llama-3-8b", "fp8", "fp8", 1),  # published throughputs to compare with
    ("llama-3-70b", "fp8", "fp8", 1),
    ("llama-3-70b", "fp8", "fp8", 2),
]
LEFT_OUT = [("llama-2-13b", "fp16", "fp16", 8), ("llama-2-13b", "fp8", "fp8", 8)]
# Where the kernels were measured, and points between where their times are not straight lines.
TOKENS = [*range(1, 17), *range(17, 33, 3)]
TOKENS += sorted({t + d for t in (*range(32, 257, 16), *range(256, 8193, 128)) for d in (0, 1)} | {8192})
TOKENS = sorted({t for t in TOKENS if t <= 8192})
BATCHES = sorted({round(2**e) for e in np.arange(0, 12.01, 0.25)})
CONTEXTS = sorted({round(2**e) for e in np.arange(0, 14.01, 0.25)})
PROMPTS = sorted({round(2**e) for e in np.arange(0, 8.01, 0.5)})
LENGTHS = sorted({round(2**e) for e in np.arange(4, 13.01, 0.25)} | {1})


def systems() -> list[tuple[str, str, str, int]]:
    """(model, dtype, kv_dtype, tensor parallelism) of the papers' configurations and the ones beside them."""
    specs = [
        yaml.safe_load(path.read_text(encoding="utf-8")).get("paper")
        for path in sorted((ROOT / "engines").glob("*.yaml"))
    ]
    papers = [(s["model"], s["dtype"], s["kv_dtype"], s["tensor_parallel"]) for s in specs if s]
    return list(dict.fromkeys([*papers, *BEYOND_THE_PAPERS]))


def merged_database(target: Path, wheel: Path) -> Path:
    """A copy of the core's H100 data with the older wheel's weight-only GEMM rows added."""
    import aiconfigurator_core

    source = Path(aiconfigurator_core.__file__).parent / "systems"
    for path in source.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    shutil.copytree(source / "data" / SYSTEM, target / "data" / SYSTEM)
    table = target / "data" / SYSTEM / "gemm" / BACKEND / VERSION / "gemm_perf.parquet"
    rows = pd.read_parquet(table)
    with zipfile.ZipFile(wheel).open(WEIGHT_ONLY) as file:
        old = pd.read_csv(file)
    old = old[old["gemm_dtype"].isin(["int8_wo", "int4_wo"])]
    old = old.groupby(["gemm_dtype", "m", "n", "k"], as_index=False)["latency"].mean()
    same = {name: rows[name].iloc[0] for name in rows.columns if name not in old.columns}
    pd.concat([rows, old.assign(**same)[rows.columns]]).to_parquet(table)
    return target


def checkpoint(directory: Path, shape: dict[str, Any]) -> str:
    """A directory whose config.json is all that the engine model reads."""
    directory.mkdir(exist_ok=True)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape["layers"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["hidden"] // shape["heads"],
        "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 16384,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return str(directory)


def distil(handle: Any) -> Iterator[tuple[str, int, int, float]]:
    """(part, x, y, milliseconds); a step's parts add up: see :class:`erlib.paper_scale.steptimes.Table`."""
    for tokens in TOKENS:
        shared, _, _ = handle.mixed_step_breakdown_per_op(0, tokens, 1, 2)
        yield "dense", tokens, 0, sum(op[1] for op in shared if op[0] != "context_logits_gemm")
    for sequences in BATCHES:
        yield "output", sequences, 0, _named("generation_logits_gemm", handle.decode_step_per_op(sequences, 1, 2))
    for batch in BATCHES:
        for context in CONTEXTS:
            # a step in the middle of a two-token answer: one token more than the prompt is read
            ops = handle.decode_step_per_op(batch, max(1, context - 1), 2)
            yield "decode", batch, context, _named("generation_attention", ops)
    n_ops = len(handle.run_static_per_op(batch_size=1, isl=1, osl=1, mode="static_ctx")[0])
    for prompts in PROMPTS:
        for length in LENGTHS:
            ops = handle.evaluate_context_ops(list(range(n_ops)), batch_size=prompts, s=length)
            yield "prefill", prompts, length, _named("context_attention", ops)


def allreduce(handle: Any) -> Iterator[tuple[str, int, int, float]]:
    """How much of the dense part is all-reduce."""
    for tokens in TOKENS:
        shared, _, _ = handle.mixed_step_breakdown_per_op(0, tokens, 1, 2)
        yield "allreduce", tokens, 0, sum(op[1] for op in shared if "_ar" in op[0])


def _named(name: str, ops: Iterable[Any]) -> float:
    return sum(op[1] for op in ops if op[0] == name)


def main() -> None:
    """Write both tables; takes about a minute."""
    from aiconfigurator_core.sdk import EngineHandle

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="aiconfigurator-0.4.0-py3-none-any.whl")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--beside", type=Path, default=BESIDE)
    arguments = parser.parse_args()
    shapes = yaml.safe_load((ROOT / "data" / "llama_shapes.yaml").read_text(encoding="utf-8"))
    tables: dict[Path, list[pd.DataFrame]] = {arguments.output: [], arguments.beside: []}
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / "systems"
        database.mkdir()
        merged_database(database, arguments.wheel)
        for model, dtype, kv_dtype, tensor_parallel in [*systems(), *LEFT_OUT]:
            handle = EngineHandle.compile(
                checkpoint(Path(scratch) / model, shapes[model]),
                SYSTEM,
                BACKEND,
                tp_size=tensor_parallel,
                gemm_quant_mode=GEMM[dtype],
                kvcache_quant_mode=CACHE[kv_dtype],
                fmha_quant_mode="bfloat16",
                systems_path=str(database),
            )
            key = {"model": model, "dtype": dtype, "kv_dtype": kv_dtype, "tensor_parallel": np.int8(tensor_parallel)}
            left_out = (model, dtype, kv_dtype, tensor_parallel) in LEFT_OUT
            parts = [(arguments.beside if left_out else arguments.output, distil)]
            parts += [(arguments.beside, allreduce)] * (tensor_parallel > 1)
            for path, part in parts:
                frame = pd.DataFrame(part(handle), columns=["part", "x", "y", "ms"])
                tables[path].append(frame.assign(**key))
                print(model, dtype, kv_dtype, tensor_parallel, len(frame))
    for path, frames in tables.items():
        write(pd.concat(frames, ignore_index=True), path)


def write(table: pd.DataFrame, path: Path) -> None:
    """Small enough for a repository."""
    table = table.astype(
        {"x": "int16", "y": "int16", "ms": "float32"}
        | dict.fromkeys(["model", "dtype", "kv_dtype", "part"], "category")
    )
    table.to_parquet(path, compression="zstd", index=False)
    print(f"{path}: {len(table)} rows, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
