"""What the command-line tools of each TensorRT-LLM version accept, so that a wrong option is found without a GPU.

The tables are facts (names, types, choices, defaults) in ``data/trtllm_options``; the NOTICE there says where they were
read, and each table how.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from erlib import paths
from erlib.config import ConfigError
from erlib.config.reading import Strict

TABLES = paths.FACTS / "trtllm_options"


class OptionError(ConfigError):
    """A command does not fit the option table of its version."""


class Option(Strict):
    """What one option takes."""

    type: Literal["str", "int", "float", "flag"] = "str"
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    nargs: Literal["?", "+"] | None = None
    default: int | float | str | None = None


class Tool(Strict):
    """Options of one command-line tool."""

    evidence: str
    """How they were found out."""
    complete: bool
    """Whether these are known to be all options; those that plans use are always among them."""
    options: dict[str, Option]


class Contract(Strict):
    """Options of the tools of one version: ``data/trtllm_options/<version>.json``."""

    version: str
    tools: dict[str, Tool]

    def dumps(self) -> str:
        """As JSON, one option a line."""
        tools = []
        for name, tool in self.tools.items():
            head = json.dumps(tool.model_dump(exclude={"options"}))[:-1]
            lines = [
                f"   {json.dumps(flag)}: {json.dumps(option.model_dump(exclude_defaults=True))}"
                for flag, option in tool.options.items()
            ]
            tools.append(f'  {json.dumps(name)}: {head}, "options": {{\n' + ",\n".join(lines) + "\n  }}")
        return f'{{"version": {json.dumps(self.version)}, "tools": {{\n' + ",\n".join(tools) + "\n}}\n"


def load_contract(version: str) -> Contract:
    """Read the option tables of a version."""
    file = TABLES / f"{version}.json"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in TABLES.glob("*.json")))
        raise ConfigError(f"no option tables for TensorRT-LLM {version}; there are some for {known}")
    return Contract.model_validate_json(file.read_text(encoding="utf-8"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{self.prog}: {message}")


def parser(tool: str, contract: Contract) -> argparse.ArgumentParser:
    """A parser that accepts what the tool accepts, but no abbreviations; :class:`OptionError` for the rest."""
    if tool not in contract.tools:
        raise OptionError(f"TensorRT-LLM {contract.version} has no option table for {tool}")
    result = _Parser(f"{tool} ({contract.version})", add_help=False, allow_abbrev=False)
    kinds = {"str": str, "int": int, "float": float}
    for flag, option in contract.tools[tool].options.items():
        takes: dict[str, Any] = {"action": "store_true"}
        if option.type != "flag":
            takes = {"type": kinds[option.type]} | option.model_dump(include={"choices", "nargs", "default"})
        result.add_argument(flag, *option.aliases, **takes)
    return result


def parse(tool: str, words: Sequence[str], contract: Contract) -> dict[str, Any]:
    """Every option of a tool (without its dashes) with the value that a command gives it, or its default."""
    return vars(parser(tool, contract).parse_args(words))


# --- refreshing -------------------------------------------------------------------------------------------------

_NAME = re.compile(r"(--?[\w-]+)(?: (\{[^}]*\}|[^\s,\[{]+))?(?: (\[.*?\]))?(?:, |$)")


def read_help(text: str) -> dict[str, Option]:
    """Options that a ``--help`` text of ``argparse`` lists.

    Such a text shows names, choices and, where its author asked for that, defaults. Types it does not show.
    """
    options: dict[str, Option] = {}
    for entry in re.split(r"\n(?=  -)", text)[1:]:
        head, _, rest = entry.strip().partition("\n")
        invocation, _, first = head.partition("  ")
        names = _NAME.findall(invocation)
        flags = [name for name, *_ in names if name.startswith("--")]
        if not flags or flags[0] == "--help":
            continue
        value, more = (next(filter(None, column), "") for column in list(zip(*names, strict=True))[1:])
        listed = re.search(r"\{(.*?)\}", value or more)
        shown = re.search(r"\(default: (.*?)\)", " ".join(f"{first} {rest}".split()))
        options[flags[0]] = Option(
            type="str" if value or more else "flag",
            aliases=tuple(name for name, *_ in names if name != flags[0]),
            # None among Python's choices can be left out but not given
            choices=tuple(choice for choice in listed[1].split(",") if choice != "None") if listed else None,
            nargs=None if not more else "+" if value else "?",
            default=shown[1] if shown and (value or more) and shown[1] != "None" else None,
        )
    return options


def refreshed(contract: Contract, helps: Mapping[str, str], evidence: str) -> tuple[Contract, list[str]]:
    """Bring option tables up to the ``--help`` texts of the tools; also one line per difference.

    Types, and defaults that a text does not show, are kept. Options that a table left out because plans do not use them
    are no difference.
    """
    tools, differences = dict(contract.tools), []
    for name, text in helps.items():
        before, now = contract.tools[name], read_help(text)
        if not now:
            raise OptionError(f"{name} --help lists no options; it begins: {text[:200]!r}")
        differences += [f"{name}: {flag} is gone" for flag in before.options if flag not in now]
        for flag, option in now.items():
            if flag in before.options:
                now[flag] = _typed(option, before.options[flag])
                differences += [f"{name}: {flag}: {change}" for change in _changes(before.options[flag], now[flag])]
            elif before.complete:
                differences.append(f"{name}: {flag} is new")
        tools[name] = Tool(evidence=evidence, complete=True, options=now)
    return contract.model_copy(update={"tools": tools}), differences


def _typed(option: Option, before: Option) -> Option:
    """An option as read from a help text, with what such a text does not show."""
    if (option.type == "flag") != (before.type == "flag"):
        return option
    default: Any = before.default
    if option.default is not None:
        number = {"int": int, "float": float}.get(before.type, str)
        try:
            default = number(option.default)
        except ValueError:
            default = option.default
    return option.model_copy(update={"type": before.type, "default": default})


def _changes(before: Option, now: Option) -> list[str]:
    fields = ("type", "aliases", "choices", "nargs", "default")
    pairs = [(field, getattr(before, field), getattr(now, field)) for field in fields]
    return [f"{field} was {old!r}, is {new!r}" for field, old, new in pairs if old != new]
