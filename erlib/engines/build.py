"""Laptop engines: SmolLM2-135M and its depth-truncated siblings as OpenVINO engines in FP16, FP8, INT8 and INT4.

A CPU stores these formats but computes in those that it has (FP8 becomes float32 or bfloat16), so an engine's size and
accuracy are the format's own and its speed is not. The heavy libraries (torch, optimum, nncf) run in a process of their
own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from erlib import cache, paths, provenance
from erlib.config import ConfigError, Dtype, Profile
from erlib.engines import llama
from erlib.engines.checkpoint import checkpoint, depth, tokenizer
from erlib.engines.llama import Size
from erlib.engines.worker import in_own_process
from erlib.machine.progress import Bar, say
from erlib.workload import corpus

CALIBRATION_TOKENS = 128
_CODE = ("engines/export.py", "engines/inference.py")
"""On which the content of an engine depends."""


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


def build_all(profile: Profile, wanted: Sequence[tuple[Size, Dtype]], source: Path | None = None) -> list[BuiltEngine]:
    """Build those of the wanted engines that are not in ``paths.ENGINE_BUILDS`` yet; all of them, in the order of
    `wanted`.

    FP16 is optimum-intel's stateful export; INT8 (symmetric) and FP8 (E4M3) are weight-only with one scale per output
    channel; INT4 is weight-only in groups of 64 with AWQ and scale estimation on ``engines.calibration_samples``
    documents of the corpus's training split. `source` is another checkpoint of the same shape, in a directory that is
    named by the hash of its content.
    """
    source = source or checkpoint(profile.engines)
    keys = [(_layers(profile, size, source), dtype) for size, dtype in wanted]
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
    with cache.scratch(paths.ENGINE_BUILDS) as scratch:
        jobs = [
            {
                "checkpoint": str(source),
                "fp16": str(_target(profile, layers, "fp16", source)),
                "target": str(target),
                "scratch": str(scratch),
                "calibration": calibration,
                "facts": {
                    "name": target.name.rpartition("-")[0],
                    "dtype": dtype,
                    "layers": layers,
                    "of_layers": depth(source),
                    "parameters": llama.smollm2(layers).parameters,
                },
            }
            for (layers, dtype), target in targets.items()
        ]
        for _ in Bar(in_own_process("erlib.engines.export", jobs), "building engines", len(jobs)):
            pass  # the child puts each engine in its place when it is complete


def _layers(profile: Profile, size: Size, source: Path) -> int:
    of_size = {
        "whole": depth(source),
        "large": profile.engines.large_layers,
        "small": profile.engines.small_layers,
        "quality": profile.engines.quality_layers,
    }
    return of_size[size]


def _target(profile: Profile, layers: int, dtype: Dtype, source: Path) -> Path:
    available = depth(source)
    if layers > available:
        raise ConfigError(f"an engine of {layers} layers was asked for, but the checkpoint has {available}")
    parts = [source.name, layers, dtype, provenance.code_digest(*_CODE), version("nncf"), version("optimum-intel")]
    if dtype == "int4":
        parts += [corpus.fingerprint(profile.corpus), profile.seed, profile.engines.calibration_samples]
    part = "" if layers == available else f"-{layers}of{available}"
    return paths.ENGINE_BUILDS / f"smollm2-135m{part}-{dtype}-{cache.digest(*parts)}"


def _calibration(profile: Profile) -> list[list[int]]:
    """Token ids of training documents: never of the held-out ones, on which perplexity is measured."""
    bpe = tokenizer(profile)
    samples: list[list[int]] = []
    for text in corpus.load_corpus(profile.corpus, profile.seed, split="train").texts:
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
