"""The only module that knows where things are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NOTEBOOKS = ROOT / "notebooks"

PROFILES = ROOT / "profiles"

ENGINE_SPECS = ROOT / "engines"

FACTS = ROOT / "data"

REFERENCE = ROOT / "figures"
"""The figures that the repository holds, each profile's with the records that they were drawn from."""

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
