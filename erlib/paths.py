"""The only module that knows where things are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "profiles"
ENGINE_SPECS = ROOT / "engines"
FACTS = ROOT / "data"
STYLE = Path(__file__).with_name("style.mplstyle")


def from_root(path: str | Path) -> Path:
    """An absolute path: ``~`` is the user's home, and what is relative is so to the repository.

    Not to the current directory, because notebooks run in a directory of their own.
    """
    return ROOT / os.path.expanduser(path)


# Everything below is made by a run. Setting ERLIB_HOME moves it off the repository (another disk, a test).
_HOME = Path(os.path.realpath(from_root(home))) if (home := os.environ.get("ERLIB_HOME")) else None

CACHE = (_HOME or ROOT / "data") / "cache"
"""Downloads, corpora, checkpoints and clusterers, shared by all profiles."""
ENGINE_BUILDS = (_HOME or ROOT) / "engines" / "build"
RUNS = (_HOME or ROOT / "data") / "runs"
FIGURES = (_HOME or ROOT) / "figures"


def run_dir(profile: str) -> Path:
    """Directory of one profile's records, logs and executed notebooks."""
    return RUNS / profile


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` if the block succeeds: what exists under `target` is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        partial = Path(scratch) / target.name
        partial.mkdir()
        yield partial
        put(partial, target)


def put(partial: Path, target: Path) -> None:
    """Give a complete directory its final name."""
    try:
        partial.rename(target)
    except OSError:
        if not target.exists():  # where it does, another process was faster with the same content
            raise
