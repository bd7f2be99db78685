"""Experts as adapters of one engine: what TensorRT-LLM has to be told of them.

It batches requests of different adapters together. Each has a number there, one more than its expert's, because 0 would
be no adapter for some of its parts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from erlib import cache
from erlib.config import ConfigError, Configuration, Profile
from erlib.dgx.containers import Places
from erlib.engines import llama, lora

MODULES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h", "down_proj": "mlp_4h_to_h", "up_proj": "mlp_gate",
}  # fmt: skip
"""TensorRT-LLM's names of the matrices that an adapter may change."""
ADAPTERS_SHARE = 0.5
"""Of the GPU memory that weights and KV cache leave, what adapters may take; by default it would be 0.05."""


@dataclass(frozen=True)
class Adapters:
    """The adapters that every server of a configuration has."""

    folders: tuple[Path, ...]
    """As PEFT wrote them, in the order of the experts."""
    rank: int
    """The highest."""
    modules: tuple[str, ...]
    """All that one of them changes, by TensorRT-LLM's names."""
    bytes: int
    """Of all of them in FP16."""
    key: str
    """Hash of their content."""

    def numbered(self) -> list[tuple[int, Path]]:
        """Each with its number."""
        return list(enumerate(self.folders, 1))


OF_ALL_MATRICES = Adapters((Path("expert-0"),), 8, tuple(MODULES.values()), 0, "none")
"""What a plan can be shown with where no adapter is at hand."""


def of(profile: Profile, configuration: Configuration, places: Places) -> Adapters | None:
    """A profile's adapters for a configuration, one per cluster; None if it has none.

    Raises
    ------
    ConfigError
        If ``experts.adapters`` names none, one is missing or of another model, or containers would not see them.
    """
    if not configuration.adapters:
        return None
    name, folder, model = configuration.id, profile.experts.adapters, configuration.system.model
    if folder is None:
        raise ConfigError(
            f"{name}: experts.adapters must name a folder with expert-0, expert-1 and so on, adapters of {model}: "
            "notebook 11 trains some (experts.checkpoint)"
        )
    return read(name, Path(folder).resolve(), profile.clusterer.n_clusters, model, places)


def read(name: str, folder: Path, n: int, model: str, places: Places) -> Adapters:
    """The adapters of `n` experts of a model in a folder.

    Raises
    ------
    ConfigError
    """
    if not any(folder.is_relative_to(place) for place in (places.checkpoints, places.work)):
        raise ConfigError(
            f"{name}: a container does not see experts.adapters={folder}; put the folder below {places.checkpoints}"
        )
    return _read(name, tuple(lora.own(folder, n)), model)


@functools.cache
def _read(name: str, folders: tuple[Path, ...], model: str) -> Adapters:
    shape = llama.shape(model)
    found = [lora.read(folder, shape.layers, shape.hidden, shape.intermediate) for folder in folders]
    changed = sorted({module for one in found for module in one.modules})
    if unknown := [module for module in changed if module not in MODULES]:
        raise ConfigError(
            f"{name}: TensorRT-LLM adds adapters to attention and MLP of a Llama, not to {', '.join(unknown)}"
        )
    return Adapters(
        folders=folders,
        rank=max(one.rank for one in found),
        modules=tuple(MODULES[module] for module in changed),
        bytes=2 * sum(one.values for one in found),
        key=cache.digest(*(folder / file for folder in folders for file in (lora.CONFIG, lora.WEIGHTS))),
    )
