"""The keys of a profile as a reader sees them: dotted names, what each takes, what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

Schema = Mapping[str, Any]
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True)
class Key:
    """One settable key."""

    name: str
    """Dotted, as ``--set`` takes it."""
    takes: str
    """Its type in words, e.g. ``list of integer > 0``."""
    default: str
    """As ``--set`` would be given it; empty where there is none."""
    meaning: str

    @property
    def text(self) -> str:
        """Meaning, type and default in one sentence."""
        return f"{self.meaning} ({self.takes}; {f'default {self.default}' if self.default else 'no default'})"


def of(model: type[BaseModel]) -> list[Key]:
    """All keys of a model and of those within it, by name."""
    schema = model.model_json_schema()
    return sorted(_below(schema, schema["$defs"], ""), key=lambda key: key.name)


def names_of(model: type[BaseModel]) -> list[str]:
    """Dotted names of all settable (leaf) fields."""
    return [key.name for key in of(model)]


def _below(schema: Schema, models: Schema, prefix: str) -> Iterator[Key]:
    needed = schema.get("required", [])
    for name, field in schema["properties"].items():
        inner = next((one["$ref"] for one in [field, *field.get("anyOf", [])] if "$ref" in one), None)
        if inner:
            yield from _below(models[inner.rpartition("/")[2]], models, f"{prefix}{name}.")
        else:
            default = "" if name in needed else _default(field["default"])
            yield Key(prefix + name, _takes(field), default, field.get("description", ""))


def _default(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _takes(field: Schema) -> str:
    """A type in words; what no value means, a key's description says."""
    if "anyOf" in field:
        return " or ".join(_takes(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return "|".join(map(str, field["enum"]))
    if field.get("type") == "array":
        each = field.get("items") or field["prefixItems"][0]
        return f"list of {_takes(each)}"
    bounds = [f"{sign} {field[name]:.12g}" for name, sign in _BOUNDS.items() if name in field]
    kind = field["type"].replace("string", "text")
    return f"{kind} {' and '.join(bounds)}" if bounds else kind
