"""What serves configurations: a profile's ``serving.backend`` names a module, imported when it is asked for.

Only this table, and scripts, know :mod:`erlib.dgx` and :mod:`erlib.cluster`: nobody without GPUs waits for their
imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from erlib.config import Configuration, Profile
from erlib.machine.processes import StartError
from erlib.serving.triton import ServerPlan

NO_RAY = "serving.cluster needs Ray, which is not installed: .venv/bin/python scripts/install.py cluster"

Workloads = Literal["load", "preliminary"]
"""Which of the workloads a system is sized for."""

_BACKENDS = {
    "openvino": "erlib.load.on_cores",
    "tensorrt_llm": "erlib.dgx.backend",
    "vllm": "erlib.load.on_vllm",
}


class Backend(Protocol):
    """What such a module holds."""

    def configurations(self, profile: Profile, names: Sequence[str]) -> list[Configuration]:
        """Configurations by name, as this machine can carry them.

        Raises
        ------
        ConfigError
            If it cannot carry one of them; says why.
        """

    def preliminary_configurations(self, profile: Profile) -> list[Configuration]:
        """Systems of paper 2's search for its baselines, likewise."""

    def served(
        self, profile: Profile, configurations: Sequence[Configuration], sized_for: Workloads
    ) -> list[list[ServerPlan]]:
        """The servers of each configuration, with their engines built if need be.

        Raises
        ------
        ConfigError
            If a KV cache cannot hold one sequence, or GPUs are too few.
        """

    def context_tokens(self, profile: Profile, configuration: Configuration) -> int:
        """Tokens of the longest sequence, prompt and answer together, that a system takes."""

    def tokenizer_file(self, profile: Profile, model: str) -> Path:
        """``tokenizer.json`` of what stands for `model`.

        Raises
        ------
        ConfigError
            If it has to be downloaded and cannot be.
        """

    def folders(self, profile: Profile) -> list[Path]:
        """Where it writes to, beside what every run does."""


def of(profile: Profile) -> Backend:
    """The backend of a profile."""
    return cast(Backend, import_module(_BACKENDS[profile.serving.backend]))


def on_ray() -> Any:
    """What serves and asks where ``serving.cluster`` names a Ray cluster: :mod:`erlib.cluster.on_ray`.

    Raises
    ------
    StartError
        If Ray is not installed.
    """
    try:
        return import_module("erlib.cluster.on_ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise StartError(NO_RAY) from None
