"""What a predicate finds, and how predicates are known by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from erlib.claims.evidence import LABELS, name_users
from erlib.claims.uncertainty import Decision

UNITS = {"_tokens_per_s": " tokens/s", "_tokens_per_s_mean": " tokens/s", "_s": " s", "_ms": " ms"}


def unit_of(metric: str) -> str:
    return next((unit for ending, unit in UNITS.items() if metric.endswith(ending)), "")


class Finding(NamedTuple):
    """Whether a predicate holds (None: cannot be told), the numbers that say so, and what it hangs on, if on one."""

    holds: bool | None
    numbers: str
    decision: Decision | None = None


@dataclass(frozen=True)
class Predicate:
    function: Callable[..., Finding]
    template: str
    arithmetic: bool

    def bind(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, defaults included; TypeError where they do not fit."""
        signature = inspect.signature(self.function)
        bound = signature.bind(*(() if self.arithmetic else (None,)), **parameters)
        bound.apply_defaults()
        return bound.arguments

    def words(self, parameters: Mapping[str, Any]) -> str:
        bound = self.bind(parameters)
        given = {name: _word(name, value) for name, value in bound.items()}
        given["bounds"] = bounds(bound.get("low", 0), bound.get("high", math.inf))
        return " ".join(self.template.format(**given).split())


PREDICATES: dict[str, Predicate] = {}


def predicate(template: str, arithmetic: bool = False) -> Callable[[Callable[..., Finding]], Callable[..., Finding]]:
    def register(function: Callable[..., Finding]) -> Callable[..., Finding]:
        PREDICATES[function.__name__] = Predicate(function, template, arithmetic)
        return function

    return register


def _word(name: str, value: Any) -> str:
    if name in WORDS:
        return WORDS[name](value)
    if isinstance(value, Mapping):
        return ", ".join(f"{number:,g}" + f" ({key})" * (key != "all") for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(item for item in map(str, value) if item != "all")
    return f"{value:g}" if isinstance(value, float) else str(value)


WORDS: dict[str, Callable[[Any], str]] = {
    "metric": lambda name: LABELS[name],
    "users": lambda users: f"at {name_users(users)} user{'s' * (users != 1)}",
    "factor": lambda value: "" if value == 1 else f"times {value:g}",
    "turn": lambda turn: f"({turn} prompt)" if turn else "",
    "share": lambda value: "" if value == 1 else f"in {value:.0%} of the cases",
    "tolerance": lambda value: f"{value:.1%}".replace(".0%", "%"),
    "over": lambda name: f"relative to {name}" if name else "",
    "median": lambda value: f"and median {value}" if value else "",
    "experiment": lambda name: "" if name in ("load", "preliminary") else f"({name.replace('-', ' ')})",
    "than": lambda name: name.replace("-", " "),
    "systems": lambda value: f"of {value} systems" if value else "",
}
"""How parameters are said; an empty one is not."""


def bounds(low: float, high: float) -> str:
    if math.isinf(high):
        return f"≥ {low:,g}"
    return f"≤ {high:,g}" if not low else f"= {low:,g}" if low == high else f"from {low:,g} to {high:,g}"


def number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
