"""Profiles from files and overrides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from erlib import paths
from erlib.config import strict_yaml
from erlib.config.keys import names_of
from erlib.config.profile import Profile
from erlib.config.reading import ConfigError, explain, nearest, read_mapping


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read ``profiles/<name>.yaml`` (or the YAML file `name`) and apply dotted overrides.

    Parameters
    ----------
    name : str
        A profile's name or the path of a YAML file of the same shape.
    overrides : mapping, optional
        Dotted keys to values, e.g. ``{"paper1.repeats": 1, "clusterer.normalizer": "standard"}``.

    Raises
    ------
    ConfigError
        If the profile or a key is unknown (the nearest known one is named) or a value does not fit.
    """
    known = sorted(p.stem for p in paths.PROFILES.glob("*.yaml"))
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in known:
        path = paths.PROFILES / f"{name}.yaml"
    else:
        raise ConfigError(f"no profile {name!r}{nearest(name, known)}; profiles are {', '.join(known)} or a YAML file")
    data = {"name": path.stem, **read_mapping(path)}
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, path, names_of(Profile), list(overrides or ()))) from None


def read_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Overrides for :func:`load_profile` from what ``--set`` was given: ``KEY=VALUE`` each, the value in YAML.

    Raises
    ------
    ConfigError
        If one is not of that form, or a key is given twice.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, not {item!r}")
        if key in overrides:
            raise ConfigError(f"--set {key} is given twice")
        try:
            overrides[key] = strict_yaml.read(text)
        except strict_yaml.YamlError as error:
            raise ConfigError(f"--set {key}: {text!r} is not YAML ({error}); write text as {key}='\"TEXT\"'") from None
    return overrides


def _override(data: dict[Any, Any], key: str, value: Any) -> None:
    known = names_of(Profile)
    if key not in known:
        raise ConfigError(f"--set: unknown key {key!r}{nearest(key, known)}; --help lists all keys")
    *parents, leaf = key.split(".")
    for parent in parents:
        if data.get(parent) is None:  # a section left out, or left empty
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {key}: the profile's {parent!r} must hold keys and values")
    data[leaf] = value


def at_paper_scale(profile: Profile) -> Profile:
    """The papers' own scale (``dgx-h100``), with the seed, user levels and repeats that `profile` has for it.

    Of the preliminary sweep no more than the paper's: levels up to its 500 users, at most its five repeats.
    """
    users, repeats = profile.paper_scale.users, profile.paper_scale.repeats
    full = load_profile("dgx-h100")
    most = max(full.preliminary.users)
    fewer = {"users": sorted({min(n, most) for n in users}), "repeats": min(repeats, full.preliminary.repeats)}
    changed = {
        "paper1": full.paper1.model_copy(update={"users": users, "repeats": repeats}),
        "paper2": full.paper2.model_copy(update={"users": users, "repeats": repeats}),
        "preliminary": full.preliminary.model_copy(update=fewer),
    }
    return full.model_copy(update={"name": profile.name, "seed": profile.seed, **changed})
