"""Configuration -> TensorRT-LLM engine: the commands that make one, and what must have come out of them.

A :class:`Plan` says what to run and runs nothing. Two *flows* lead to a served model:

``engine``
    Checkpoint conversion or quantisation, then ``trtllm-build``. The only one that can express all nine configurations;
    TensorRT-LLM 1.2.1 is the last stable version that has engines, 0.21.0 one for older drivers.
``llmapi``
    TensorRT-LLM's PyTorch backend: no engine, but a Hugging Face checkpoint (quantised by ModelOpt) and arguments.

``python -m erlib.dgx --help`` shows a plan, checks what was built, and refreshes the tables of known
options.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from erlib import config
from erlib.config import ConfigError, Configuration, Flow, PaperSystem, Profile, Version, WorkloadSettings
from erlib.dgx import option_tables
from erlib.dgx.checkpoints import CALIBRATION, CHECKPOINTS, TEXTS, places, source
from erlib.dgx.containers import Command, Places, Purpose, load_image
from erlib.dgx.option_tables import Contract, OptionError
from erlib.engines import laptop, llama

AWQ_SAMPLES = 32
"""Calibration texts of AWQ, which searches: to more, ``quantize.py`` caps itself; ``hf_ptq.py`` would take them all."""

MAX_NUM_TOKENS = llama.MAX_STEP_TOKENS
"""Tokens per step. Where it was not set, the papers' versions sized activations for batch size times longest prompt."""

NEWEST: Version = get_args(Version)[0]

MODELOPT = "0.37.0"
"""The version that TensorRT-LLM 1.2.1 pins."""

# (weights, KV cache) -> quantisation as TensorRT-LLM and ModelOpt name it in the config.json that they write
_ALGORITHMS: dict[tuple[str, str], tuple[str | None, str | None]] = {
    ("fp16", "fp16"): (None, None),
    ("int8", "int8"): ("W8A16", "INT8"),
    ("fp8", "fp8"): ("FP8", "FP8"),
    ("int4", "fp16"): ("W4A16_AWQ", None),
}

_QFORMAT = {"fp8": "fp8", "int4": "int4_awq"}


def lengths(configuration: Configuration, workload: WorkloadSettings) -> tuple[int, int]:
    """Longest prompt and longest sequence (prompt and answer), in tokens, rounded up to multiples of 64.

    Paper 1's longest prompt is a continuation: base prompt (mean + 4 sd, as the workload draws them) and its answer.
    """
    if config.paper_of(configuration.id) == "p1":
        answer = workload.p1_output_tokens
        prompt: float = workload.p1_input_tokens + 4 * workload.p1_input_sd + answer
    else:
        answer, prompt = workload.p2_max_output_tokens, llama.P2_MAX_INPUT_TOKENS
    return 64 * math.ceil(prompt / 64), 64 * math.ceil((prompt + answer) / 64)


def plan(profile: Profile, configuration: Configuration) -> Plan:
    """How a configuration's engine comes about with the profile's settings; see :class:`Plan`."""
    settings, longest = profile.tensorrt_llm, lengths(configuration, profile.workload)
    return Plan(configuration, longest, places(profile), settings.flow, settings.version or NEWEST)


def needed(profile: Profile, configurations: Sequence[Configuration] | None = None) -> list[Plan]:
    """Plans of the engines that `configurations` (by default, the profile's as printed) load, each once."""
    if configurations is None:
        names = [*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config]
        configurations = [*map(config.load_configuration, names), *laptop.preliminary_configurations(profile)]
    found: dict[Path, Plan] = {}
    for configuration in configurations:
        made = plan(profile, configuration)
        found.setdefault(made.served, made)
    return list(found.values())


@dataclass(frozen=True)
class Plan:
    """How one configuration comes from a downloaded checkpoint to something that a server loads.

    Pinned, whatever a version's defaults are: float16, formats of weights and KV cache, lengths, tokens per step, and
    what the papers' versions did: blocks of their size, an MLP whose two multiplications are not fused, and no
    paged-context attention, without which an engine has neither KV block reuse nor chunked context (and which
    ``trtllm-build`` does not build for an INT8 KV cache). The server pins the scheduler (guaranteed no evict) and how
    attention is split.

    Parameters
    ----------
    configuration : Configuration
        Its ``system`` says model, formats, tensor parallelism and batch size. A baseline of our own shares the engine
        of the system that it stands beside; instances of one configuration share theirs.
    lengths : tuple of int
        Longest prompt and longest sequence, in tokens: :func:`lengths`.
    places : Places
    flow : {"engine", "llmapi"}
    version : {"1.2.1", "0.21.0"}
        Of TensorRT-LLM.

    Raises
    ------
    ConfigError
        If the flow cannot express the system; the message says why.
    """

    configuration: Configuration
    lengths: tuple[int, int]
    places: Places
    flow: Flow = "engine"
    version: Version = NEWEST

    def __post_init__(self) -> None:
        name, system = self.configuration.id, self.system
        if (system.dtype, system.kv_dtype) not in _ALGORITHMS:
            known = ", ".join("/".join(pair) for pair in _ALGORITHMS)
            raise ConfigError(
                f"{name}: no recipe for {system.dtype} weights with {system.kv_dtype} KV cache, only {known}"
            )
        if llama.shape(system.model).kv_heads % system.tensor_parallel:
            raise ConfigError(f"{name}: {system.tensor_parallel} GPUs do not divide the KV heads of {system.model}")
        if self.flow == "llmapi" and self.version != NEWEST:
            raise ConfigError(f"{name}: flow llmapi is for TensorRT-LLM {NEWEST}; set tensorrt_llm.version to that")
        if self.flow == "llmapi" and system.dtype == "int8":
            raise ConfigError(
                f"{name}: flow llmapi cannot express it: TensorRT-LLM's PyTorch backend has no INT8 KV cache, and "
                "ModelOpt exports no weight-only INT8 checkpoint for it. Use flow engine"
            )

    @property
    def system(self) -> PaperSystem:
        return self.configuration.system

    @property
    def source(self) -> Path:
        """Checkpoint as downloaded, with its tokenizer."""
        return source(self.system.model, self.places)

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint, converted or quantised, that is served or built from."""
        if self.flow == "llmapi" and self.system.dtype == "fp16":
            return self.source  # as it was downloaded
        return self._home / "checkpoints" / self._weights

    @property
    def served(self) -> Path:
        """Directory that a server loads: an engine, or the checkpoint of the ``llmapi`` flow."""
        if self.flow == "llmapi":
            return self.checkpoint
        prompt, sequence = self.lengths
        return self._home / "engines" / f"{self._weights}-bs{self.system.batch_size}-in{prompt}-seq{sequence}"

    @property
    def commands(self) -> list[Command]:
        """The steps, in order; the last one checks what the others have made."""
        if self.flow == "llmapi":
            steps = self._for_llm_api() if self.system.dtype in _QFORMAT else []
        else:
            steps = [self._quantise() if self.system.dtype in _QFORMAT else self._convert(), self._build()]
        options = {"--flow": self.flow, "--version": self.version, **self.places.options}
        check = ("python", "-m", "erlib.dgx", "check", self.configuration.id, "--lengths")
        steps = [*self._fetch(), *steps]
        return [*steps, Command("check", check, (*map(str, self.lengths), *_words(options)), self.served)]

    def misfits(self, contract: Contract) -> list[str]:
        """Why commands would be refused by tools with these options; empty if none would be."""
        found = []
        for command in self.commands:
            try:
                if command.tool:
                    option_tables.parse(command.tool, command.options, contract)
            except OptionError as error:
                found.append(f"{self.configuration.id}, flow {self.flow}: {error}")
        return found

    def _fetch(self) -> list[Command]:
        """Downloads: without the second copies of the weights that the repositories hold (``*.bin``, ``original/``)."""
        name = CHECKPOINTS[self.system.model]
        # One pattern per option: a second one would be taken for the name of a file, which switches patterns off.
        wanted = [word for pattern in ("*.safetensors", "*.json", "tokenizer*") for word in ("--include", pattern)]
        options = (name, *wanted, "--exclude", "original/*", "--local-dir", str(self.source))
        found = [Command("fetch", ("hf", "download"), options, self.source)]
        if self.flow == "engine" and self.system.dtype != "fp16":
            texts = self.places.checkpoints / CALIBRATION
            options = (TEXTS, "--repo-type", "dataset", "--local-dir", str(texts))
            found.append(Command("fetch", ("hf", "download"), options, texts))
        return found

    def _convert(self) -> Command:
        options = self._from_checkpoint | {"--workers": self.system.tensor_parallel}
        if self.system.dtype == "int8":
            options |= {"--use_weight_only": True, "--weight_only_precision": "int8", "--int8_kv_cache": True}
            options |= self._calibration
        return self._run("convert", "convert_checkpoint.py", options, self.checkpoint)

    def _quantise(self) -> Command:
        options = self._from_checkpoint | {"--qformat": _QFORMAT[self.system.dtype]} | self._calibration
        if self.system.dtype == "int4":
            options |= {"--awq_block_size": llama.AWQ_GROUP, "--calib_size": AWQ_SAMPLES}
        else:
            options |= {"--kv_cache_dtype": "fp8", "--calib_size": 512}
        return self._run("quantise", "quantize.py", options, self.checkpoint)

    @property
    def _from_checkpoint(self) -> dict[str, Any]:
        return {
            "--model_dir": self.source,
            "--output_dir": self.checkpoint,
            "--dtype": "float16",  # Llama 3 would otherwise stay in bfloat16
            "--tp_size": self.system.tensor_parallel,
        }

    @property
    def _calibration(self) -> dict[str, Any]:
        return {"--calib_dataset": self.places.checkpoints / CALIBRATION, "--calib_size": 512}

    def _build(self) -> Command:
        system, fp8 = self.system, self.system.dtype == "fp8"
        prompt, sequence = self.lengths
        options: dict[str, Any] = {
            "--checkpoint_dir": self.checkpoint,
            "--output_dir": self.served,
            "--gpt_attention_plugin": "float16",
            # the FP8 plugin is for batches of up to four; without it TensorRT's own kernels multiply
            "--gemm_plugin": "disable" if fp8 else "float16",
            "--remove_input_padding": "enable",
            "--context_fmha": "enable",
            "--use_paged_context_fmha": "disable",
            "--use_fp8_context_fmha": "enable" if fp8 else "disable",
            "--use_fused_mlp": "disable",
            "--kv_cache_type": "paged",
            "--tokens_per_block": llama.block_tokens(self.system.model),
            "--max_beam_width": 1,
            "--max_batch_size": system.batch_size,
            "--max_input_len": prompt,
            "--max_seq_len": sequence,
            "--max_num_tokens": MAX_NUM_TOKENS,
            "--workers": system.tensor_parallel,
        }
        return self._run("build", "trtllm-build", options, self.served)

    def _for_llm_api(self) -> list[Command]:
        toolkit = self.places.work / "Model-Optimizer"
        options = {
            "--pyt_ckpt_path": self.source,
            "--qformat": _QFORMAT[self.system.dtype],
            "--kv_cache_qformat": "fp8" if self.system.kv_dtype == "fp8" else "none",  # left out, it would be fp8
            "--dataset": CALIBRATION,
            "--calib_size": AWQ_SAMPLES if self.system.dtype == "int4" else 512,
            "--export_path": self.served,
        }
        clone = ("git", "clone", "--depth", "1", "--branch", MODELOPT)
        fetch = Command("fetch", clone, ("https://github.com/NVIDIA/Model-Optimizer", str(toolkit)), toolkit)
        # It takes texts by name alone, and fetches them from where it runs: into a directory that outlives a container.
        cache = (f"HF_HOME={self.places.work / 'huggingface'}",)
        quantise = self._run("quantise", "hf_ptq.py", options, self.served)
        return [fetch, dataclasses.replace(quantise, environment=cache)]

    @property
    def llm_args(self) -> dict[str, Any]:
        """Arguments of TensorRT-LLM's ``LLM`` class, for the ``llmapi`` flow.

        The KV cache is pinned to the tokens that the printed one holds; the share of free memory is only a limit. The
        PyTorch backend computes in what the checkpoint's ``config.json`` names, whatever `dtype` says; for Llama 3 that
        is bfloat16, which has float16's size and is what ModelOpt leaves there too. The flow ``engine`` converts.
        """
        return {
            "model": str(self.served),
            "backend": "pytorch",
            "dtype": "float16",
            "tensor_parallel_size": self.system.tensor_parallel,
            "max_batch_size": self.system.batch_size,
            "max_input_len": self.lengths[0],
            "max_seq_len": self.lengths[1],
            "max_num_tokens": MAX_NUM_TOKENS,
            "enable_chunked_prefill": False,
            "kv_cache_config": {
                "enable_block_reuse": False,
                "dtype": "fp8" if self.system.kv_dtype == "fp8" else "auto",
                "max_tokens": llama.kv_tokens(self.system),
                "free_gpu_memory_fraction": llama.KV_SHARE,
            },
            "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        }

    def problems(self) -> list[str]:
        """What is wrong with what the commands have made; empty if it is what was asked for.

        Compares the JSON that TensorRT-LLM and ModelOpt write beside their files with the configuration, counts an
        engine's files (one per GPU) and compares their size with :mod:`erlib.engines.llama`. Coarsely: one that differs
        by more than 10 % holds other weights, or weights of another format.
        """
        if self.flow == "llmapi":
            return self.checkpoint_problems()
        prompt, sequence = self.lengths
        build = {
            "max_input_len": prompt,
            "max_seq_len": sequence,
            "max_batch_size": self.system.batch_size,
            "max_num_tokens": MAX_NUM_TOKENS,
            "plugin_config.use_paged_context_fmha": False,
            "plugin_config.use_fused_mlp": False,
            "plugin_config.tokens_per_block": llama.block_tokens(self.system.model),
        }
        expected = {f"pretrained_config.{key}": value for key, value in self._converted.items()}
        expected |= {f"build_config.{key}": value for key, value in build.items()}
        return _differences(self.served / "config.json", expected) + self._wrong_files(self.served, "rank*.engine")

    def checkpoint_problems(self) -> list[str]:
        """The same for the checkpoint, which is what an engine is built from: best asked before that takes hours."""
        if self.flow != "llmapi":
            found = _differences(self.checkpoint / "config.json", self._converted)
            return found + self._wrong_files(self.checkpoint, "rank*.safetensors")
        found = _differences(self.checkpoint / "config.json", self._sizes)
        if self.system.dtype in _QFORMAT:
            found += _differences(self.checkpoint / "hf_quant_config.json", self._formats)
        return found + self._wrong_files(self.checkpoint, "*.safetensors")

    @property
    def _sizes(self) -> dict[str, Any]:
        shape = llama.shape(self.system.model)
        return {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "vocab_size": shape.vocabulary}

    @property
    def _formats(self) -> dict[str, Any]:
        algorithm, kv_algorithm = _ALGORITHMS[self.system.dtype, self.system.kv_dtype]
        formats = {"quantization.quant_algo": algorithm, "quantization.kv_cache_quant_algo": kv_algorithm}
        return formats | ({"quantization.group_size": llama.AWQ_GROUP} if self.system.dtype == "int4" else {})

    @property
    def _converted(self) -> dict[str, Any]:
        """What TensorRT-LLM's own checkpoints say of themselves, and the engines that are built from them."""
        return self._sizes | self._formats | {"dtype": "float16", "mapping.tp_size": self.system.tensor_parallel}

    def _wrong_files(self, directory: Path, pattern: str) -> list[str]:
        # A checkpoint for the LLM API is split as it is loaded, and has as many files as its writer liked.
        ranks = 1 if self.flow == "llmapi" else self.system.tensor_parallel
        files = list(directory.glob(pattern))
        if self.flow != "llmapi" and len(files) != ranks:
            return [f"{directory}: {len(files)} files {pattern}, not {ranks}"]
        size = sum(file.stat().st_size for file in files)
        due = llama.shape(self.system.model).loaded_bytes(self.system.dtype, ranks)
        if abs(size / due - 1) <= 0.1:
            return []
        return [f"{directory}: {size / 1e9:.1f} GB in {pattern}, but {due / 1e9:.1f} GB of weights"]

    @property
    def _home(self) -> Path:
        return self.places.work / f"{self.flow}-{self.version}"  # no version loads another one's engines

    @property
    def _weights(self) -> str:
        # Named by what they are: systems that differ in batch size alone share a checkpoint, equal ones an engine.
        system = self.system
        formats = f"{system.model}-{system.dtype}-kv_{system.kv_dtype}"
        return formats if self.flow == "llmapi" else f"{formats}-tp{system.tensor_parallel}"

    def _run(self, purpose: Purpose, tool: str, options: Mapping[str, Any], makes: Path) -> Command:
        program, *_ = load_image(self.version).programs(tool, self.places.work)
        return Command(purpose, program, tuple(_words(options)), makes, tool)


def _words(options: Mapping[str, Any]) -> list[str]:
    """Command-line words; True is an option without a value."""
    return [word for name, value in options.items() for word in ((name,) if value is True else (name, str(value)))]


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
