"""What some notebooks would refuse, said before the first one runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from erlib.config import ConfigError, Profile
from erlib.experts import base
from erlib.paper_scale import emulation, questions, your_gpu

_CHECKS: dict[str, Callable[[Profile], object]] = {
    "07_paper_scale": emulation.check,
    "11_experts": base.check,
    "12_your_gpu": your_gpu.check,
    "13_what_if": lambda profile: questions.ways(questions.asked_in(profile), profile),
}


def problems(profile: Profile, notebooks: Iterable[str]) -> list[str]:
    """A line for each notebook, by name, whose settings ask for what cannot be."""
    found = []
    for notebook in notebooks:
        try:
            _CHECKS.get(notebook, lambda _: None)(profile)
        except ConfigError as error:
            found.append(f"{notebook}: {error}")
    return found
