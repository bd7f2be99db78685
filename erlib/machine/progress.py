"""What a run says while it works: bars, which leave one line in an executed notebook, and lines, once each."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_said: set[tuple[int, str]] = set()


class Bar(tqdm):
    """tqdm, that writes to standard output in a notebook: an error stream would be shown on red.

    There every state is a message that begins with a carriage return: who shows them as they come sees each, and of
    those that are kept the last is left. They are as wide on all machines, and fit a terminal of 80 columns.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if _cell():
            options = {"file": sys.stdout, "mininterval": 0.5, "ncols": 76, "nrows": 20, **options}
        super().__init__(*arguments, **options)


def say(line: str) -> None:
    """Print `line`, but only once per cell of a notebook: what several steps find in a cache is found for all."""
    cell = _cell()
    if cell and (cell, line) in _said:
        return
    _said.add((cell, line))
    print(line)


def _cell() -> int:
    """Number of the cell that is being executed; 0 outside of notebooks."""
    if "ipykernel" not in sys.modules:
        return 0
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell.execution_count if shell else 0
