"""The quantisation commands of plans, run with the real ModelOpt on tiny Llamas, and what plans check of its files.

Not TensorRT-LLM: where that is installed, ModelOpt lets it write some more fields into the engine flow's config.json.
"""

import dataclasses
import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.environments import environment
from erlib import config, paths
from erlib.config import WorkloadSettings
from erlib.dgx import outcome, recipes, tensorrt_llm
from erlib.dgx.containers import Places
from erlib.engines import llama
from erlib.machine.processes import StartError

pytestmark = pytest.mark.slow

STANDIN = paths.ROOT / "tests" / "support" / "quantise_tiny_llama.py"
STORED = {"llama-2-13b": "float16", "llama-3-70b": "bfloat16"}
"""What the checkpoints on the hub are stored in."""
ENGINE_MATRICES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
HUB_MATRICES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)

full_shape = llama.shape


def tiny(model):
    """Two layers with the heads of the papers' model, eight values each."""
    shape = full_shape(model)
    return dataclasses.replace(shape, layers=2, hidden=8 * shape.heads, intermediate=1024, vocabulary=512)


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(llama, "shape", tiny)


@pytest.fixture(scope="module")
def modelopt():
    """Runs the stand-in in an environment with ModelOpt, which is made once per set of pins."""
    try:
        python = environment("torch", "modelopt")
    except StartError as error:
        pytest.skip(str(error))

    def run(*words):
        alone = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [python, "-I", STANDIN, *words]
        ended = subprocess.run(command, env=alone, capture_output=True, text=True, check=False, timeout=900)
        assert ended.returncode == 0, ended.stderr[-2000:]

    return run


@pytest.fixture(scope="module")
def downloaded(modelopt, tmp_path_factory):
    """Directory of tiny checkpoints, named and stored as those on the hub are."""
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    for model, dtype in STORED.items():
        shape = tiny(model)
        settings = {
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocabulary,
        }
        target = checkpoints.source(model, Places(checkpoints, checkpoints))
        modelopt("make", target, dtype, *(f"{name}={number}" for name, number in settings.items()))
    return checkpoints


@pytest.fixture
def quantised(modelopt, downloaded, tmp_path):
    """Makes a plan and runs its quantisation, optionally without one of its options."""

    def run(name, flow, without=None):
        configuration = config.load_configuration(name)
        longest = tensorrt_llm.lengths(configuration, WorkloadSettings())
        made = tensorrt_llm.Plan(configuration, longest, Places(downloaded, tmp_path), flow)
        command = next(command for command in recipes.commands(made) if command.purpose == "quantise")
        options = list(command.options)
        if without:
            at = options.index(without)
            del options[at : at + 2]
        modelopt(command.tool, *options)
        return made

    return run


def ranks(made):
    """Tensors of each of a checkpoint's files."""
    return [load_file(file) for file in sorted(made.checkpoint.glob("*.safetensors"))]


def original(made):
    return load_file(made.source / "model.safetensors")


def assert_size_is_what_table_1_is_computed_from(made, tensors):
    """AWQ's scales have 32 bits in a checkpoint, and 16 in an engine, which is what `loaded_bytes` counts."""
    size = sum(tensor.nbytes for rank in tensors for tensor in rank.values())
    due = tiny(made.system.model).loaded_bytes(made.system.dtype, len(tensors))
    if made.system.dtype == "int4":
        due += 2 * tiny(made.system.model).linear / llama.AWQ_GROUP
    assert size == pytest.approx(due, rel=0.01)


@pytest.mark.parametrize("name", ["p1.D", "p2.B", "p2.C"])
def test_fp8_for_an_engine(quantised, name):
    made = quantised(name, "engine")
    assert outcome.checkpoint_problems(made) == []
    written = json.loads((made.checkpoint / "config.json").read_text())
    parallel, shape = made.system.tensor_parallel, tiny(made.system.model)
    assert written["use_parallel_embedding"] is True
    assert written["num_key_value_heads"] == shape.kv_heads
    tensors = ranks(made)
    assert len(tensors) == parallel
    for rank in tensors:
        for layer in ("transformer.layers.0", "transformer.layers.1"):
            assert {rank[f"{layer}.{matrix}.weight"].dtype for matrix in ENGINE_MATRICES} == {torch.float8_e4m3fn}
            assert rank[f"{layer}.attention.kv_cache_scaling_factor"].dtype == torch.float32
        for table in ("transformer.vocab_embedding.weight", "lm_head.weight"):
            assert rank[table].dtype == torch.float16
            assert rank[table].shape == (shape.vocabulary // parallel, shape.hidden)
    # three bits of mantissa: within a sixteenth of the original, all ranks' columns side by side
    dense = torch.cat([rank["transformer.layers.1.attention.dense.weight"].float() for rank in tensors], dim=1)
    scale = tensors[0]["transformer.layers.1.attention.dense.weights_scaling_factor"]
    weight = original(made)["model.layers.1.self_attn.o_proj.weight"].float()
    torch.testing.assert_close(dense * scale, weight, rtol=1 / 16, atol=scale.item() / 64)
    assert_size_is_what_table_1_is_computed_from(made, tensors)


def test_int4_awq_for_an_engine(quantised):
    made = quantised("p2.D", "engine")
    assert outcome.checkpoint_problems(made) == []
    written = json.loads((made.checkpoint / "config.json").read_text())
    assert written["quantization"]["has_zero_point"] is False
    assert written["quantization"]["pre_quant_scale"] is True
    (rank,) = tensors = ranks(made)
    shape = tiny(made.system.model)
    for matrix in ENGINE_MATRICES:
        packed = rank[f"transformer.layers.0.{matrix}.weight"]
        scales = rank[f"transformer.layers.0.{matrix}.weights_scaling_factor"]
        assert packed.dtype == torch.int8  # two weights each
        assert scales.shape == (2 * packed.shape[0], packed.shape[1] // llama.AWQ_GROUP)
    assert rank["transformer.layers.0.mlp.proj.weight"].shape == (shape.hidden // 2, shape.intermediate)
    assert rank["lm_head.weight"].dtype == torch.float16
    assert not [key for key in rank if "cache" in key]
    assert_size_is_what_table_1_is_computed_from(made, tensors)


@pytest.mark.parametrize("name", ["p1.D", "p2.B"])
def test_fp8_for_the_llm_api(quantised, name):
    made = quantised(name, "llmapi")
    assert outcome.problems(made) == []
    (weights,) = tensors = ranks(made)
    for matrix in HUB_MATRICES:
        assert weights[f"model.layers.0.{matrix}.weight"].dtype == torch.float8_e4m3fn
        assert {f"model.layers.0.{matrix}.{scale}" for scale in ("weight_scale", "input_scale")} <= weights.keys()
    assert {"model.layers.1.self_attn.k_proj.k_scale", "model.layers.1.self_attn.v_proj.v_scale"} <= weights.keys()
    assert weights["lm_head.weight"].dtype == getattr(torch, STORED[made.system.model])
    weight = original(made)["model.layers.1.mlp.down_proj.weight"].float()
    scale = weights["model.layers.1.mlp.down_proj.weight_scale"]
    stored = weights["model.layers.1.mlp.down_proj.weight"].float() * scale
    torch.testing.assert_close(stored, weight, rtol=1 / 16, atol=scale.item() / 64)
    assert_size_is_what_table_1_is_computed_from(made, tensors)


def test_int4_awq_for_the_llm_api(quantised):
    made = quantised("p2.D", "llmapi")
    assert outcome.problems(made) == []
    (weights,) = tensors = ranks(made)
    for matrix in HUB_MATRICES:
        packed, scales = (weights[f"model.layers.0.{matrix}.{part}"] for part in ("weight", "weight_scale"))
        assert packed.dtype == torch.uint8
        assert scales.shape == (2 * packed.shape[0], packed.shape[1] // llama.AWQ_GROUP)
    assert not [key for key in weights if key.endswith(("k_scale", "v_scale"))]
    assert_size_is_what_table_1_is_computed_from(made, tensors)


def test_int4_awq_for_the_llm_api_would_get_an_fp8_kv_cache_if_the_plan_did_not_forbid_it(quantised):
    made = quantised("p2.D", "llmapi", without="--kv_cache_qformat")
    (problem,) = outcome.problems(made)
    assert "kv_cache_quant_algo is 'FP8', not None" in problem
