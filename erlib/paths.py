"""The only module that knows where things are."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

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


# --- what is kept under the hash of its content -------------------------------------------------------------------


_SIZES = "sizes.json"
"""Written last into what is kept: the name and size of every file."""
_Content = TypeVar("_Content")


@contextmanager
def building(target: Path, *, kept: bool = True) -> Iterator[Path]:
    """A temporary directory that becomes `target` if the block succeeds: what exists under `target` is complete.

    `kept`: it will be looked for with :func:`found`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        partial = Path(scratch) / target.name
        partial.mkdir()
        yield partial
        put(partial, target, kept=kept)


def put(partial: Path, target: Path, *, kept: bool = True) -> None:
    """Give a complete directory its final name; see :func:`building`."""
    if kept:
        (partial / _SIZES).write_text(json.dumps(_sizes(partial)), encoding="utf-8")
    try:
        partial.rename(target)
    except OSError:
        if not target.exists():  # where it does, another process was faster with the same content
            raise


def found(target: Path, what: str) -> bool:
    """Whether `target` is there as :func:`put` left it; what has been damaged since is said and removed.

    Parameters
    ----------
    target : Path
        A directory whose name is the hash of what it was made from.
    what : str
        What the line begins with, e.g. ``engines``.
    """
    if not target.exists():
        return False
    if not (damage := _damage(target)):
        return True
    print(f"{what}: {target.name} is made again: {damage}")
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink()
    return False


def recalled(file: Path, read: Callable[[Path], _Content], what: str) -> _Content | None:
    """What `read` makes of a cached file; None, and a line that says so, if it cannot: then it is made again."""
    if not file.exists():
        return None
    try:
        return read(file)
    except Exception as error:  # of whatever kind: cut off, empty, another format
        reason = (str(error).splitlines() or [""])[0]
        print(f"{what}: {file.name} is made again: it cannot be read ({type(error).__name__}: {reason:.100})")
        return None


def _damage(directory: Path) -> str:
    try:
        expected, actual = dict(json.loads((directory / _SIZES).read_text(encoding="utf-8"))), _sizes(directory)
    except (OSError, ValueError, TypeError):
        return f"no {_SIZES} says how large its files are"
    changed = [name for name, size in expected.items() if actual.get(name) != size]
    return f"{changed[0]} is missing, cut or changed" if changed else ""


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != _SIZES)
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}
