"""Text in columns and paragraphs: what ``runbook.txt.j2`` has for filters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

WIDTH = 118


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str], numbers: bool = False) -> str:
    aligned = ["left", *(["right"] * (len(headers) - 1))] if numbers else None
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)


def columns(rows: Sequence[Sequence[Any]]) -> str:
    return tabulate(rows, tablefmt="plain")


def wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph.strip(), WIDTH)


def indented(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, initial_indent="  ", subsequent_indent="    ")


def listed(lines: Sequence[str], heading: str) -> str:
    """A numbered list; nothing if it is empty."""
    if not lines:
        return ""
    digits = int(math.log10(len(lines))) + 1
    items = [
        textwrap.fill(
            line, WIDTH, initial_indent=f"  {number:>{digits}}. ", subsequent_indent=" " * (digits + 4),
            break_on_hyphens=False, break_long_words=False,
        )
        for number, line in enumerate(lines, 1)
    ]  # fmt: skip
    return "\n".join([heading, *items])
