"""What sections of a profile choose from, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, model_validator

from erlib.config.reading import Settings, nearest
from erlib.config.system import HAVE_GATEWAYS, Paper, Routing, config_ids, load_configuration

Mix = Literal["uniform", "normal"]
Preset = Literal["hardware", "harness", "pinned-host", "thread-client"]
LeftOpen = Literal[
    "sigma",
    "answers",
    "weight_only",
    "tensor_parallel",
    "allreduce",
    "slots",
    "server_us",
    "shared_us",
    "arrivals_s",
    "moved",
]
"""What both papers leave open: fields of :class:`erlib.paper_scale.setups.Setup`."""

Relay = Literal["front", "gateway"]
"""Who relays a routed system's tokens. gateway: as in the papers. front: NGINX, which has asked a gateway whereto."""

Passable = Literal["driver", "gpus_in_use", "calibration", "host_memory", "shared_memory", "disk", "hub"]
"""Checks of :mod:`erlib.dgx.preflight` that somebody who knows better may go past: they estimate, or ask others."""


class Section(Settings):
    @model_validator(mode="before")
    @classmethod
    def _may_be_left_empty(cls, value: Any) -> Any:
        """Also a key, by the word that ``--help`` has for it, and not by YAML's alone."""
        if not isinstance(value, dict):
            return {} if value is None else value
        return {key: None if its == "none" and cls._takes_none(key) else its for key, its in value.items()}

    @classmethod
    def _takes_none(cls, key: Any) -> bool:
        return key in cls.model_fields and type(None) in get_args(cls.model_fields[key].annotation)


def _is_system(value: str) -> str:
    if value not in (known := config_ids()):
        raise ValueError(f"unknown configuration {value!r}{nearest(value, known)}; see engines/*.yaml")
    return value


def _is_routed(*routings: Routing) -> Callable[[str], str]:
    def check(value: str) -> str:
        if load_configuration(value).routing not in routings:
            needs = "does not classify prompts" if len(routings) == 1 else "has no gateways"
            raise ValueError(f"{value} {needs}; use one that does")
        return value

    return check


def is_of(paper: Paper) -> Callable[[str], str]:
    def check(value: str) -> str:
        if paper not in load_configuration(value).papers:
            raise ValueError(f"{value} is a configuration of the other paper")
        if load_configuration(value).laptop.weights == "trained":
            raise ValueError(f"{value} has experts of a corpus of their own: notebook 11 measures it")
        return value

    return check


System = Annotated[str, AfterValidator(_is_system)]

Classifying = Annotated[System, AfterValidator(_is_routed("expert_router"))]

Gated = Annotated[System, AfterValidator(_is_routed(*HAVE_GATEWAYS))]

SYSTEMS = "systems to measure, of engines/*.yaml"

USERS = "levels of concurrent users"

REPEATS = "how often each level is measured, each time with prompts of its own"
