"""Adapters (LoRA) as PEFT keeps them: what one changes, and whether it fits a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from erlib.config import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNUSUAL = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""What makes PEFT add an adapter by another rule than A and B, times alpha over rank."""


class Lora(NamedTuple):
    """What is known of an adapter without its weights."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Names of the matrices that it changes, as Hugging Face's Llama has them, sorted."""
    values: int
    """Numbers of all its matrices together."""


def own(folder: Path, n: int) -> list[Path]:
    """The folders of `n` experts' adapters below one of the user's own.

    Raises
    ------
    ConfigError
        If there are more (they were trained on other clusters), or one is no plain adapter of PEFT's.
    """
    if (folder / f"expert-{n}").exists():
        raise ConfigError(
            f"experts.adapters: {folder} has expert-{n}, too, but there are {n} clusters (clusterer.n_clusters): "
            "adapters belong to the clusters that they were trained on"
        )
    found = [folder / f"expert-{cluster}" for cluster in range(n)]
    for directory in found:
        _files(directory)
    return found


def read(directory: Path, layers: int, hidden: int, intermediate: int) -> Lora:
    """An adapter, every matrix of which fits a Llama with so many layers, that is so wide and has such an MLP.

    Raises
    ------
    ConfigError
        If it is none, is of another model, or PEFT would add it by a rule of its own.
    """
    settings, shapes = _files(directory)
    changed = {int(name.partition(".layers.")[2].partition(".")[0]) for name in shapes if ".layers." in name}
    if not changed or max(changed) >= layers:
        raise ConfigError(
            f"experts.adapters: {directory} is of another base model: it changes layers up to "
            f"{max(changed, default=0)}, but the checkpoint has {layers}"
        )
    for name, shape in shapes.items():
        wide = intermediate if "down_proj" in name else hidden
        if name.endswith("lora_A.weight") and "o_proj" not in name and shape != (settings["r"], wide):
            raise ConfigError(
                f"experts.adapters: {directory} is of another base model or rank: {name} has shape {shape}, expected "
                f"{(settings['r'], wide)}"
            )
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in shapes if ".lora_" in name}
    values = sum(rows * columns for rows, columns in shapes.values())
    return Lora(settings["r"], settings["lora_alpha"], tuple(sorted(modules)), values)


def _files(directory: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Settings, and the shape of every matrix."""
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        _ = settings["r"], settings["lora_alpha"]
        with safe_open(directory / WEIGHTS, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"experts.adapters: {directory} holds no adapter of PEFT's: {error}") from None
    if unusual := [name for name in _UNUSUAL if settings.get(name)]:
        raise ConfigError(f"experts.adapters: {directory} is no plain LoRA adapter: it sets {', '.join(unusual)}")
    return settings, shapes
