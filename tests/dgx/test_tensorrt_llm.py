"""Plans of TensorRT-LLM engines: held against the option tables of their version, and checks of what they make."""

import json
import re
from pathlib import Path

import pytest

from erlib import config
from erlib.config import ConfigError, WorkloadSettings
from erlib.dgx import __main__, adapters, containers, option_tables, outcome, recipes, repository, tensorrt_llm
from erlib.dgx.containers import Places
from erlib.dgx.option_tables import OptionError
from erlib.engines import llama
from erlib.workload import lengths

PLACES = Places(Path("/data/checkpoints"), Path("/data/built"))
PAPERS = [name for name in config.config_ids() if config.load_configuration(name).paper]
VERSIONS = ["1.2.1", "0.21.0"]
EVERY_PLAN = [(name, "engine", version) for name in config.config_ids() for version in VERSIONS]
EVERY_PLAN += [(name, "llmapi", "1.2.1") for name in config.config_ids() if name != "p1.B"]


def plan(name, flow="engine", places=PLACES, version="1.2.1"):
    configuration = config.load_configuration(name)
    longest = tensorrt_llm.lengths(configuration, WorkloadSettings())
    its = adapters.OF_ALL_MATRICES if configuration.adapters else None
    return tensorrt_llm.Plan(configuration, longest, places, flow, version, its)


def step(made, purpose):
    return next(command for command in recipes.commands(made) if command.purpose == purpose)


def parsed(command, version):
    return option_tables.parse(command.tool, command.options, option_tables.load_contract(version))


@pytest.mark.parametrize(("name", "flow", "version"), EVERY_PLAN)
def test_every_command_fits_the_tools_of_its_version(name, flow, version):
    made = plan(name, flow, version=version)
    for command in recipes.commands(made):
        if command.tool:
            parsed(command, version)
    assert recipes.commands(made)[-1].purpose == "check"


def test_no_version_takes_another_ones_engines():
    newest, older = plan("p1.B"), plan("p1.B", version="0.21.0")
    assert {newest.served, newest.checkpoint}.isdisjoint({older.served, older.checkpoint})
    assert newest.source == older.source


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--max_output_len", "1200"], "unrecognized arguments: --max_output_len"),
        (["--enable_xqa", "enable"], "unrecognized arguments: --enable_xqa"),
        (["--max_batch", "8"], "unrecognized arguments: --max_batch"),  # an abbreviation
        (["--max_batch_size", "many"], "invalid int value: 'many'"),
        (["--kv_cache_type", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_wrong_option_is_found(version, wrong, message):
    build = step(plan("p1.A", version=version), "build")
    with pytest.raises(OptionError, match=message):
        option_tables.parse(build.tool, [*build.options, *wrong], option_tables.load_contract(version))


def test_a_tool_that_a_version_lacks_is_named():
    with pytest.raises(OptionError, match=r"0\.21\.0 has no option table for hf_ptq\.py"):
        parsed(step(plan("p1.D", "llmapi"), "quantise"), "0.21.0")


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_builds_pin_what_versions_default_differently(name, version):
    made, system = plan(name, version=version), config.load_configuration(name).system
    build = parsed(step(made, "build"), version)
    assert build["use_paged_context_fmha"] == "disable"  # so neither KV block reuse nor chunked context
    assert build["use_fused_mlp"] == "disable"
    assert build["tokens_per_block"] == (128 if name.startswith("p1") else 64)
    assert build["max_num_tokens"] == 8192
    assert build["max_batch_size"] == system.batch_size
    assert build["gpt_attention_plugin"] == "float16"
    # x1.F and x1.S serve both papers' users
    assert (build["max_input_len"], build["max_seq_len"]) == ((1024, 2048) if name.startswith("p2") else (1664, 2880))
    first = parsed(next(command for command in recipes.commands(made) if command.tool), version)
    assert first["dtype"] == "float16"
    assert first["tp_size"] == system.tensor_parallel
    assert first["output_dir"] == build["checkpoint_dir"]


def test_formats_of_weights_and_kv_cache_are_explicit():
    int8 = parsed(step(plan("p1.B"), "convert"), "1.2.1")
    assert (int8["use_weight_only"], int8["weight_only_precision"], int8["int8_kv_cache"]) == (True, "int8", True)
    fp8 = parsed(step(plan("p2.B"), "quantise"), "1.2.1")
    assert (fp8["qformat"], fp8["kv_cache_dtype"]) == ("fp8", "fp8")
    int4 = parsed(step(plan("p2.D"), "quantise"), "1.2.1")
    assert (int4["qformat"], int4["kv_cache_dtype"], int4["awq_block_size"]) == ("int4_awq", None, 128)
    hub = parsed(step(plan("p2.D", "llmapi"), "quantise"), "1.2.1")
    assert (hub["kv_cache_qformat"], int(hub["calib_size"])) == ("none", int4["calib_size"])  # alike in both flows
    fp16 = parsed(step(plan("p1.A"), "convert"), "1.2.1")
    assert not fp16["use_weight_only"]
    assert not fp16["int8_kv_cache"]


@pytest.mark.parametrize("paper", ["p1", "p2"])
def test_engines_take_the_longest_prompts_that_the_workload_draws(paper):
    settings = WorkloadSettings()
    longest, sequence = tensorrt_llm.lengths(config.load_configuration(f"{paper}.A"), settings)
    drawn = lengths.input_tokens(paper, settings, 8192).max()
    answer = settings.p1_output_tokens if paper == "p1" else settings.p2_max_output_tokens
    prompt = drawn + (answer if paper == "p1" else 0)  # a continuation prompt holds its base prompt's answer
    assert prompt <= longest
    assert prompt + answer <= sequence
    # without chunked context a prompt must fit into one step
    assert longest <= min(llama.step_tokens(engines) for engines in range(1, 65))


def test_what_the_llm_api_cannot_express_says_why():
    with pytest.raises(ConfigError, match=r"p1\.B: flow llmapi .* no INT8 KV cache.* Use flow engine"):
        plan("p1.B", "llmapi")
    with pytest.raises(ConfigError, match=r"p1\.A: flow llmapi is for TensorRT-LLM 1\.2\.1"):
        plan("p1.A", "llmapi", version="0.21.0")
    odd = config.load_configuration("p2.D")
    paper = odd.system.model_copy(update={"kv_dtype": "int8"})
    with pytest.raises(ConfigError, match=r"p2\.D: no recipe for int4 weights with int8 KV cache"):
        tensorrt_llm.Plan(odd.model_copy(update={"paper": paper}), (1024, 2048), PLACES)
    paper = odd.system.model_copy(update={"tensor_parallel": 3})
    with pytest.raises(ConfigError, match="3 GPUs do not divide the KV heads of llama-3-70b"):
        tensorrt_llm.Plan(odd.model_copy(update={"paper": paper}), (1024, 2048), PLACES)


def test_the_llm_api_serves_fp16_checkpoints_as_downloaded_and_pins_its_defaults_off():
    made = plan("p1.A", "llmapi")
    assert [command.purpose for command in recipes.commands(made)] == ["fetch", "check"]
    arguments = repository.llm_args(made)
    assert arguments["model"] == "/data/checkpoints/Llama-2-70b-hf"
    assert arguments["kv_cache_config"]["enable_block_reuse"] is False
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["scheduler_config"]["capacity_scheduler_policy"] == "GUARANTEED_NO_EVICT"
    assert arguments["kv_cache_config"]["max_tokens"] == 1_116_943
    quantised = recipes.commands(plan("p2.B", "llmapi"))
    assert [command.purpose for command in quantised] == ["fetch", "fetch", "quantise", "check"]
    assert quantised[2].argv[:3] == ("env", "HF_HOME=/data/built/huggingface", "python3")  # it fetches texts itself


def test_a_baseline_of_our_own_shares_the_engine_that_it_stands_beside():
    assert (
        plan("p1.R").served
        == plan("p1.C").served
        == Path("/data/built/engine-1.2.1/engines/llama-2-13b-fp16-kv_fp16-tp1-bs40-in1664-seq2880")
    )


# --- checks after a plan ----------------------------------------------------------------------------------------


def written(made, **changed):
    """What TensorRT-LLM leaves in an engine's directory (its weights as holes in files)."""
    system, shape = made.system, llama.shape(made.system.model)
    algorithm = {"fp16": None, "int8": "W8A16", "fp8": "FP8", "int4": "W4A16_AWQ"}[system.dtype]
    kv_algorithm = {"fp16": None, "int8": "INT8", "fp8": "FP8"}[system.kv_dtype]
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": kv_algorithm, "group_size": 128}
    content = {
        "pretrained_config": {
            "dtype": "float16",
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "vocab_size": shape.vocabulary,
            "quantization": quantization,
            "mapping": {"world_size": system.tensor_parallel, "tp_size": system.tensor_parallel},
        },
        "build_config": {
            "max_input_len": made.lengths[0],
            "max_seq_len": made.lengths[1],
            "max_batch_size": system.batch_size,
            "max_num_tokens": 8192,
            "plugin_config": {
                "use_paged_context_fmha": False,
                "use_fused_mlp": False,
                "tokens_per_block": 128 if system.model.startswith("llama-2") else 64,
            },
        },
    }
    content["pretrained_config"] |= changed
    made.served.mkdir(parents=True)
    (made.served / "config.json").write_text(json.dumps(content))
    size = shape.loaded_bytes(system.dtype, system.tensor_parallel) / system.tensor_parallel
    for rank in range(system.tensor_parallel):
        with (made.served / f"rank{rank}.engine").open("wb") as file:
            file.truncate(int(1.01 * size))


@pytest.fixture
def places(tmp_path):
    return Places(tmp_path / "checkpoints", tmp_path / "work")


def run_check(made, *more):
    """Run the plan's own last command, in this process."""
    command = recipes.commands(made)[-1]
    return __main__.main([*command.argv[command.argv.index("check") :], *more])


@pytest.mark.parametrize(("name", "version"), [("p1.B", "1.2.1"), ("p1.D", "0.21.0"), ("p2.C", "1.2.1")])
def test_the_check_accepts_what_was_asked_for(places, name, version, capsys):
    made = plan(name, places=places, version=version)
    written(made)
    assert run_check(made) == 0, capsys.readouterr().out


def test_the_check_names_everything_that_is_wrong(places, capsys):
    made = plan("p2.C", places=places)
    written(made, dtype="bfloat16", quantization={"quant_algo": "FP8", "kv_cache_quant_algo": None})
    (made.served / "rank3.engine").unlink()
    described = json.loads((made.served / "config.json").read_text())
    described["build_config"]["plugin_config"] |= {"tokens_per_block": 32, "use_fused_mlp": True}  # as by default
    (made.served / "config.json").write_text(json.dumps(described))
    assert run_check(made) == 1
    out = capsys.readouterr().out
    assert "pretrained_config.dtype is 'bfloat16', not 'float16'" in out
    assert "kv_cache_quant_algo is None, not 'FP8'" in out
    assert "3 files rank*.engine, not 4" in out
    assert "tokens_per_block is 32, not 64" in out
    assert "use_fused_mlp is True, not False" in out


def test_the_check_finds_weights_of_another_format(places):
    made = plan("p1.C", places=places)
    written(made)
    with (made.served / "rank0.engine").open("wb") as file:
        file.truncate(13 * 10**9)
    assert outcome.problems(made) == [f"{made.served}: 13.0 GB in rank*.engine, but 26.0 GB of weights"]


def test_the_check_of_a_quantised_checkpoint_reads_what_modelopt_wrote(places):
    made = plan("p2.D", "llmapi", places)
    model, formats, weights = outcome.problems(made)
    assert "config.json: not readable" in model
    assert "hf_quant_config.json: not readable" in formats
    assert "0.0 GB in *.safetensors" in weights
    made.served.mkdir(parents=True)
    model = {"num_hidden_layers": 80, "hidden_size": 8192, "vocab_size": 128256}
    (made.served / "config.json").write_text(json.dumps(model))
    formats = {"quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "FP8", "group_size": 64}}
    (made.served / "hf_quant_config.json").write_text(json.dumps(formats))
    with (made.served / "model-00001-of-00002.safetensors").open("wb") as file:
        file.truncate(20 * 10**9)
    kv, group, size = outcome.problems(made)
    assert "kv_cache_quant_algo is 'FP8', not None" in kv
    assert "group_size is 64, not 128" in group
    assert "20.0 GB in *.safetensors, but 39.5 GB of weights" in size


def test_a_checkpoint_is_checked_before_an_engine_is_built_from_it(places, capsys):
    made = plan("p2.C", places=places)
    made.checkpoint.mkdir(parents=True)
    model = {"num_hidden_layers": 80, "hidden_size": 8192, "vocab_size": 128256, "dtype": "float16"}
    formats = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "mapping": {"tp_size": 4}}
    (made.checkpoint / "config.json").write_text(json.dumps(model | formats))
    for rank in range(4):
        with (made.checkpoint / f"rank{rank}.safetensors").open("wb") as file:
            file.truncate(18_170_000_000)
    assert run_check(made, "--checkpoint") == 0, capsys.readouterr().out
    assert run_check(made) == 1  # there is no engine yet
    (made.checkpoint / "config.json").write_text(json.dumps(model | formats | {"dtype": "bfloat16"}))
    (made.checkpoint / "rank0.safetensors").unlink()
    capsys.readouterr()
    assert run_check(made, "--checkpoint") == 1
    out = capsys.readouterr().out
    assert "dtype is 'bfloat16', not 'float16'" in out
    assert "3 files rank*.safetensors, not 4" in out


# --- command line -----------------------------------------------------------------------------------------------


def test_show_prints_the_plan_as_the_runner_starts_it(capsys):
    assert __main__.main(["show", "p2.B", "--runner", "bare", "--work", "/w", "--checkpoints", "/c"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["hf", "hf", "python3", "trtllm-build", "python"]
    assert lines[0].startswith("hf download meta-llama/Meta-Llama-3-70B --include '*.safetensors' --include '*.json' ")
    assert lines[2].startswith("python3 /app/examples/quantization/quantize.py --model_dir /c/Meta-Llama-3-70B")
    assert lines[3].startswith("trtllm-build --checkpoint_dir /w/engine-1.2.1/checkpoints/llama-3-70b-fp8-kv_fp8-tp8 ")
    assert __main__.main(["show", "p1.B", "--flow", "llmapi"]) == 2
    assert "no INT8 KV cache" in capsys.readouterr().err
    assert __main__.main(["show", "p2.B", "--version", "0.21.0"]) == 0
    assert "25.08-trtllm-python-py3" in capsys.readouterr().out


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Tools that answer ``--help`` as the table says, but for three options; or do not start."""
    build = tmp_path / "bin" / "trtllm-build"
    build.parent.mkdir()
    contract = option_tables.load_contract("1.2.1")
    text = option_tables.parser("trtllm-build", contract).format_help()
    text = text.replace("--pp_reduce_scatter {enable,disable}", "--new_thing THING")
    text = text.replace("--kv_cache_type {continuous,paged,disabled}", "--kv_cache_type {linear}")
    build.write_text(f"#!/bin/sh\ncat <<'END'\n[TensorRT-LLM] TensorRT-LLM version: 1.2.1\n{text}\nEND\n")
    build.chmod(0o755)
    monkeypatch.setenv("PATH", str(build.parent), prepend=":")
    scripts = dict.fromkeys(contract.tools, ("absent.py", "neither.py"))
    image = containers.load_image("1.2.1").model_copy(update={"scripts": scripts})
    image.scripts.pop("trtllm-build")
    for module in (recipes, __main__):
        monkeypatch.setattr(module, "load_image", lambda version: image)
    monkeypatch.setattr(option_tables, "TABLES", tmp_path / "tables")
    option_tables.TABLES.mkdir()
    (option_tables.TABLES / "1.2.1.json").write_text(contract.dumps())


def test_refresh_shows_differences_and_writes_only_when_asked(installed, tmp_path, capsys):
    before = option_tables.load_contract("1.2.1")
    command = ["refresh", "1.2.1", "--runner", "bare", "--work", str(tmp_path)]
    assert __main__.main(command) == 1  # three tools did not answer
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "trtllm-build: --pp_reduce_scatter is gone"
    assert lines[1].startswith("trtllm-build: --kv_cache_type: choices was ('continuous', ")
    assert lines[2] == "trtllm-build: --new_thing is new"
    assert lines[3].startswith(
        "p1.A, flow engine: trtllm-build (1.2.1): argument --kv_cache_type: invalid choice: 'paged'"
    )
    assert len(lines) == 3 + len(config.config_ids())  # each has one engine plan of this version
    assert re.search(r"quantize.py: not asked: .*absent.py --help: .*; .*neither.py --help: ", err)
    assert option_tables.load_contract("1.2.1") == before
    __main__.main([*command, "--write"])
    after = option_tables.load_contract("1.2.1")
    assert "--new_thing" in after.tools["trtllm-build"].options
    assert after.tools["trtllm-build"].evidence == "--help of the installed tools"
    assert after.tools["quantize.py"] == before.tools["quantize.py"]


def test_refresh_without_any_tool_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(option_tables.Contract, "dumps", lambda self: pytest.fail("wrote"))
    assert __main__.main(["refresh", "1.2.1", "--runner", "enroot", "--write"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "trtllm-build: not asked" in err
