"""Option tables of the TensorRT-LLM tools, and reading them off ``--help``."""

import pytest

from erlib.config import ConfigError
from erlib.dgx import option_tables
from erlib.dgx.option_tables import Contract, Option, OptionError, Tool

VERSIONS = ["0.21.0", "1.2.1"]

HELP = """\
[TensorRT-LLM] TensorRT-LLM version: 1.2.1
usage: trtllm-build [-h] [--checkpoint_dir CHECKPOINT_DIR]
                    [--max_seq_len MAX_SEQ_LEN] [--strip_plan]
                    [--profiling_verbosity {layer_names_only,detailed,none}]
                    [--lora_dir LORA_DIR [LORA_DIR ...]]
                    [--weight_only_precision [{int8,int4}]]

options:
  -h, --help            show this help message and exit
  --checkpoint_dir CHECKPOINT_DIR
                        The directory path that contains TensorRT LLM
                        checkpoint. (default: None)
  --max_seq_len MAX_SEQ_LEN, --max_decoder_seq_len MAX_SEQ_LEN
                        Maximum total length of one request, including prompt
                        and outputs. (default: None)
  --max_num_tokens MAX_NUM_TOKENS
                        Maximum number of batched input tokens; see
                        ``--remove_input_padding disable``. (default: 8192)
  --strip_plan          Enable stripping weights from the final engine.
                        (default: False)
  --profiling_verbosity {layer_names_only,detailed,none}
                        The profiling verbosity. (default: layer_names_only)
  --smoothquant SMOOTHQUANT, -sq SMOOTHQUANT
                        Set the parameter; must be in [0, 1]

LoRA arguments:
  --lora_dir LORA_DIR [LORA_DIR ...]
                        The directory of LoRA weights. (default: None)
  --weight_only_precision [{int8,int4}]
                        Define the precision.
  --kv_cache_dtype {int8,fp8,None}
                        KV Cache dtype.
"""


@pytest.fixture
def contract():
    """A table that is right about `HELP`."""
    options = {
        "--checkpoint_dir": Option(),
        "--max_seq_len": Option(type="int", aliases=("--max_decoder_seq_len",)),
        "--max_num_tokens": Option(type="int", default=8192),
        "--strip_plan": Option(type="flag"),
        "--profiling_verbosity": Option(choices=("layer_names_only", "detailed", "none"), default="layer_names_only"),
        "--smoothquant": Option(type="float", aliases=("-sq",)),
        "--lora_dir": Option(nargs="+"),
        "--weight_only_precision": Option(choices=("int8", "int4"), nargs="?", default="int8"),
        "--kv_cache_dtype": Option(choices=("int8", "fp8")),
    }
    return Contract(version="1.2.1", tools={"trtllm-build": Tool(evidence="here", complete=True, options=options)})


def changed(contract, complete=True, **options):
    tool = contract.tools["trtllm-build"]
    merged = {flag: option for flag, option in (tool.options | options).items() if option is not None}
    tool = tool.model_copy(update={"options": merged, "complete": complete})
    return contract.model_copy(update={"tools": {"trtllm-build": tool}})


@pytest.mark.parametrize("version", VERSIONS)
def test_tables_are_kept_as_they_are_written(version):
    contract = option_tables.load_contract(version)
    assert (option_tables.TABLES / f"{version}.json").read_text() == contract.dumps()
    assert contract.version == version


def test_a_version_without_tables_names_those_that_have_some():
    with pytest.raises(ConfigError, match=r"0\.7\.1; there are some for 0\.21\.0, 1\.2\.1"):
        option_tables.load_contract("0.7.1")


@pytest.mark.parametrize(
    ("option", "default"),
    [("tokens_per_block", 32), ("use_paged_context_fmha", "enable"), ("use_fused_mlp", "enable")],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_defaults_that_plans_must_not_rely_on(version, option, default):
    assert option_tables.parse("trtllm-build", [], option_tables.load_contract(version))[option] == default


def test_a_help_text_that_the_table_is_right_about_makes_no_difference(contract):
    after, differences = option_tables.refreshed(contract, {"trtllm-build": HELP}, "an image")
    assert differences == []
    assert after.tools["trtllm-build"].options == contract.tools["trtllm-build"].options
    assert after.tools["trtllm-build"].evidence == "an image"


@pytest.mark.parametrize("version", VERSIONS)
def test_reading_help_undoes_argparse(version):
    contract = option_tables.load_contract(version)
    helps = {tool: option_tables.parser(tool, contract).format_help() for tool in contract.tools}
    assert option_tables.refreshed(contract, helps, "argparse")[1] == []


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"--gone": Option()}, "--gone is gone"),
        ({"--lora_dir": None}, "--lora_dir is new"),
        ({"--max_num_tokens": Option(type="int", default=4096)}, "--max_num_tokens: default was 4096, is 8192"),
        ({"--kv_cache_dtype": Option(choices=("fp8",))}, "--kv_cache_dtype: choices was ('fp8',), is ('int8', 'fp8'"),
        ({"--strip_plan": Option()}, "--strip_plan: type was 'str', is 'flag'"),
        ({"--max_seq_len": Option(type="int")}, "--max_seq_len: aliases was (), is ('--max_decoder_seq_len'"),
    ],
)
def test_every_difference_is_told(contract, options, difference):
    _, differences = option_tables.refreshed(changed(contract, **options), {"trtllm-build": HELP}, "an image")
    (line,) = differences
    assert line.startswith(f"trtllm-build: {difference}")


def test_options_that_plans_do_not_use_are_no_difference(contract):
    partial = changed(contract, complete=False, **{"--lora_dir": None})
    after, differences = option_tables.refreshed(partial, {"trtllm-build": HELP}, "an image")
    assert differences == []
    assert after.tools["trtllm-build"].complete
    assert after.tools["trtllm-build"].options["--lora_dir"] == Option(nargs="+")


def test_a_text_without_options_is_refused(contract):
    with pytest.raises(OptionError, match="lists no options; it begins: 'Segmentation fault'"):
        option_tables.refreshed(contract, {"trtllm-build": "Segmentation fault"}, "an image")
