"""What is made once is kept under the hash of its content."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar


def digest(*parts: Any) -> str:
    """Short sha256 of JSON-serialisable `parts`; files are hashed by content when given as :class:`Path`."""
    sha = hashlib.sha256()
    for part in parts:
        blob = part.read_bytes() if isinstance(part, Path) else json.dumps(part, sort_keys=True).encode()
        sha.update(len(blob).to_bytes(8, "big") + blob)
    return sha.hexdigest()[:16]


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
