"""YAML that says one thing: no key twice, nothing that only YAML 1.1 takes for a number, nothing that never ends.

Profiles, configurations, facts and the values of ``--set`` are all read here.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

MOST_LEVELS, MOST_ALIASES = 50, 20
"""What is nested deeper crashes the parser; with more aliases, a few hundred bytes can stand for more than memory."""


class YamlError(ValueError):
    """Text that is not such YAML; the message is one line and says where it is wrong."""


class _Loader(yaml.CSafeLoader):  # ten times as fast as the one in Python
    """Plain scalars as YAML 1.2 reads them: ``on``, ``1:30`` and dates are text, and 010 is ten."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a tag that does not fit, a number of thousands of digits
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(loader.construct_scalar(node).replace("_", ""), 16 if "x" in node.value else 10),
)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read(text: str | bytes) -> Any:
    """What `text` stands for.

    Raises
    ------
    YamlError
        If it is not YAML, gives a key twice in one mapping, or is nested or aliased beyond all reason.
    """
    try:
        _check_size(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _check_keys(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise YamlError(f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise YamlError(" ".join(str(error).split())) from None


def _check_size(text: str | bytes) -> None:
    """By events: what comes after them is a parser that calls itself for every level, in C, until the stack ends."""
    levels = aliases = 0
    for event in yaml.parse(text, _Loader):
        levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if levels > MOST_LEVELS or aliases > MOST_ALIASES:
            problem = f"more than {MOST_LEVELS} levels or {MOST_ALIASES} aliases; write it out, and flatter"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _check_keys(root: yaml.Node | None) -> None:
    """Before aliases are merged, after which a key may well be given anew."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        keys = set()
        for key, value in node.value:
            nodes += [key, value]
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
