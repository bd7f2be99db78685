"""Where a figure comes from: who drew it when, and what its profile's systems were made of."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from erlib import config
from erlib.engines import checkpoint
from erlib.machine import hardware
from erlib.workload import corpus


def drawn() -> dict[str, str]:
    """When and on which machine the figure itself was drawn; records say their own."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": hardware.machine(),
        "system": hardware.system(),
    }


def inputs(profile: config.Profile) -> dict[str, Any]:
    """Seed, corpus and checkpoint, the latter two by the hash or commit that is checked when they are fetched."""
    return {
        "seed": profile.seed,
        "profile_hash": profile.digest,
        "corpus": corpus.origin(profile.corpus),
        "checkpoint": _checkpoint(profile),
    }


def _checkpoint(profile: config.Profile) -> str:
    if profile.serving.backend == "tensorrt_llm":
        return "the papers' own, see the engines' records"
    if profile.serving.backend == "vllm" and profile.vllm.checkpoint:
        return f"{Path(profile.vllm.checkpoint).name}, the user's own"
    return checkpoint.origin(profile.engines)
