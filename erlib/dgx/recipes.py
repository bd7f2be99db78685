"""The commands that make what a plan serves, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erlib.dgx import option_tables
from erlib.dgx.checkpoints import CALIBRATION, CHECKPOINTS, TEXTS
from erlib.dgx.containers import Command, Purpose, load_image
from erlib.dgx.option_tables import Contract, OptionError
from erlib.dgx.tensorrt_llm import QFORMAT, Plan
from erlib.engines import llama

AWQ_SAMPLES = 32
"""Calibration texts of AWQ, which searches: to more, ``quantize.py`` caps itself; ``hf_ptq.py`` would take them all."""

MODELOPT = "0.37.0"
"""The version that TensorRT-LLM 1.2.1 pins."""


def commands(plan: Plan) -> list[Command]:
    """The steps, in order; the last one checks what the others have made."""
    if plan.flow == "llmapi":
        steps = _for_llm_api(plan) if plan.system.dtype in QFORMAT else []
    else:
        steps = [_quantise(plan) if plan.system.dtype in QFORMAT else _convert(plan), _build(plan), *_adapters(plan)]
    options: dict[str, Any] = {"--flow": plan.flow, "--version": plan.version, **plan.places.options}
    if plan.adapters:
        options |= {"--adapters": plan.adapters.folders[0].parent, "--experts": len(plan.adapters.folders)}
    check = ("python", "-m", "erlib.dgx", "check", plan.configuration.id, "--lengths")
    steps = [*_fetch(plan), *steps]
    return [*steps, Command("check", check, (*map(str, plan.lengths), *_words(options)), plan.served)]


def misfits(plan: Plan, contract: Contract) -> list[str]:
    """Why commands would be refused by tools with these options; empty if none would be."""
    found = []
    for command in commands(plan):
        try:
            if command.tool:
                option_tables.parse(command.tool, command.options, contract)
        except OptionError as error:
            found.append(f"{plan.configuration.id}, flow {plan.flow}: {error}")
    return found


def _fetch(plan: Plan) -> list[Command]:
    """Downloads: without the second copies of the weights that the repositories hold (``*.bin``, ``original/``)."""
    name = CHECKPOINTS[plan.system.model]
    # One pattern per option: a second one would be taken for the name of a file, which switches patterns off.
    wanted = [word for pattern in ("*.safetensors", "*.json", "tokenizer*") for word in ("--include", pattern)]
    options = (name, *wanted, "--exclude", "original/*", "--local-dir", str(plan.source))
    found = [Command("fetch", ("hf", "download"), options, plan.source)]
    if plan.flow == "engine" and plan.system.dtype != "fp16":
        texts = plan.places.checkpoints / CALIBRATION
        options = (TEXTS, "--repo-type", "dataset", "--local-dir", str(texts))
        found.append(Command("fetch", ("hf", "download"), options, texts))
    return found


def _convert(plan: Plan) -> Command:
    options = _from_checkpoint(plan) | {"--workers": plan.system.tensor_parallel}
    if plan.system.dtype == "int8":
        options |= {"--use_weight_only": True, "--weight_only_precision": "int8", "--int8_kv_cache": True}
        options |= _calibration(plan)
    return _run(plan, "convert", "convert_checkpoint.py", options, plan.checkpoint)


def _quantise(plan: Plan) -> Command:
    options = _from_checkpoint(plan) | {"--qformat": QFORMAT[plan.system.dtype]} | _calibration(plan)
    if plan.system.dtype == "int4":
        options |= {"--awq_block_size": llama.AWQ_GROUP, "--calib_size": AWQ_SAMPLES}
    else:
        options |= {"--kv_cache_dtype": "fp8", "--calib_size": 512}
    return _run(plan, "quantise", "quantize.py", options, plan.checkpoint)


def _from_checkpoint(plan: Plan) -> dict[str, Any]:
    return {
        "--model_dir": plan.source,
        "--output_dir": plan.checkpoint,
        "--dtype": "float16",  # Llama 3 would otherwise stay in bfloat16
        "--tp_size": plan.system.tensor_parallel,
    }


def _calibration(plan: Plan) -> dict[str, Any]:
    return {"--calib_dataset": plan.places.checkpoints / CALIBRATION, "--calib_size": 512}


def _build(plan: Plan) -> Command:
    system, fp8 = plan.system, plan.system.dtype == "fp8"
    prompt, sequence = plan.lengths
    options: dict[str, Any] = {
        "--checkpoint_dir": plan.checkpoint,
        "--output_dir": plan.served,
        "--gpt_attention_plugin": "float16",
        # the FP8 plugin is for batches of up to four; without it TensorRT's own kernels multiply
        "--gemm_plugin": "disable" if fp8 else "float16",
        "--remove_input_padding": "enable",
        "--context_fmha": "enable",
        "--use_paged_context_fmha": "disable",
        "--use_fp8_context_fmha": "enable" if fp8 else "disable",
        "--use_fused_mlp": "disable",
        "--kv_cache_type": "paged",
        "--tokens_per_block": llama.block_tokens(plan.system.model),
        "--max_beam_width": 1,
        "--max_batch_size": system.batch_size,
        "--max_input_len": prompt,
        "--max_seq_len": sequence,
        "--max_num_tokens": plan.step_tokens,
        "--workers": system.tensor_parallel,
    }
    if plan.adapters:
        options |= {"--lora_plugin": "float16", "--lora_target_modules": plan.adapters.modules}
        options |= {"--max_lora_rank": plan.adapters.rank}
    return _run(plan, "build", "trtllm-build", options, plan.served)


def _adapters(plan: Plan) -> list[Command]:
    """Adapters, each as the engine reads it when it starts."""
    return [
        _run(
            *(plan, "convert", "hf_lora_convert.py"),
            {"--in-file": folder, "--out-dir": plan.prefetched / str(number), "--storage-type": "float16"},
            plan.prefetched / str(number),
        )
        for number, folder in (plan.adapters.numbered() if plan.adapters else [])
    ]


def _for_llm_api(plan: Plan) -> list[Command]:
    toolkit = plan.places.work / "Model-Optimizer"
    options = {
        "--pyt_ckpt_path": plan.source,
        "--qformat": QFORMAT[plan.system.dtype],
        "--kv_cache_qformat": "fp8" if plan.system.kv_dtype == "fp8" else "none",  # left out, it would be fp8
        "--dataset": CALIBRATION,
        "--calib_size": AWQ_SAMPLES if plan.system.dtype == "int4" else 512,
        "--export_path": plan.served,
    }
    clone = ("git", "clone", "--depth", "1", "--branch", MODELOPT)
    fetch = Command("fetch", clone, ("https://github.com/NVIDIA/Model-Optimizer", str(toolkit)), toolkit)
    # It takes texts by name alone, and fetches them from where it runs: into a directory that outlives a container.
    cache = (f"HF_HOME={plan.places.work / 'huggingface'}",)
    quantise = _run(plan, "quantise", "hf_ptq.py", options, plan.served)
    return [fetch, dataclasses.replace(quantise, environment=cache)]


def _run(plan: Plan, purpose: Purpose, tool: str, options: Mapping[str, Any], makes: Path) -> Command:
    program, *_ = load_image(plan.version).programs(tool, plan.places.work)
    return Command(purpose, program, tuple(_words(options)), makes, tool)


def _words(options: Mapping[str, Any]) -> list[str]:
    """Command-line words; True is an option without a value, a tuple one with several."""
    words: list[str] = []
    for name, value in options.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        words += [name, *map(str, values)]
    return words
