"""Reading YAML, and what to say of what is wrong in it, in one line that names the place."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from erlib import paths
from erlib.config import strict_yaml


class ConfigError(ValueError):
    """A profile, an override or an engine specification is wrong; the message says what to do."""


class Strict(BaseModel):
    """Takes the keys that it has, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Settings(Strict):
    """Written by hand, where nothing is true or false."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any) -> Any:
        if any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise ValueError("true and false mean nothing here; put text in quotes")  # else, true would be 1
        return value


def read_yaml(path: Path) -> Any:
    """Content of a YAML file; see :mod:`erlib.config.strict_yaml`.

    Raises
    ------
    ConfigError
        If there is no such file, it cannot be read or it is not such YAML; names the file and the line.
    """
    try:
        if not path.exists():
            raise ConfigError(f"no file {shown(path)}")
        if not path.is_file():
            raise ConfigError(f"{shown(path)} is no file")
        return strict_yaml.read(path.read_bytes())
    except OSError as error:  # not ours to read, a name that is too long
        raise ConfigError(f"{shown(path)} cannot be read: {error.strerror}") from None
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{shown(path)} is not readable YAML: {error}") from None


def read_mapping(path: Path) -> dict[Any, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{shown(path)} must hold a mapping of keys to values")
    return data


def shown(path: Path) -> str:
    text = str(path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path)
    return text if text.isprintable() else repr(text)


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean ...?)`` for an error message about an unknown `name`, or nothing."""
    folded = {each.casefold(): each for each in known}  # `p2.e` is as near to `p2.R` as to `p2.E`, letter by letter
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def explain(error: ValidationError, path: Path, known: list[str], overrides: Sequence[str] = ()) -> str:
    """One line for each of the first errors: where it stands, in the file or on the command line, and what it is."""
    lines = []
    for item in error.errors(include_url=False, include_input=False)[:_MOST_LINES]:
        loc = [str(part) for part in item["loc"]]
        key = ".".join(loc)
        set_here = [name for name in overrides if all(a == b for a, b in zip(name.split("."), loc, strict=False))]
        if any(len(name.split(".")) <= len(loc) for name in set_here):
            where = "--set "
        else:  # of the whole section, or profile: whatever is set in it may be at fault
            where = shown(path) + (f" with --set {', '.join(set_here)}" if set_here else "") + ": "
        hint = nearest(key, known) if item["type"] == "extra_forbidden" else ""
        what = "unknown key" if hint or item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        key = key if key.isprintable() else repr(key)
        lines.append(f"{where}{key}{': ' if key else ''}{what}{hint}")
    return "\n".join(lines)


_MOST_LINES = 5
