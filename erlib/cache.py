"""What is made once is kept under the hash of its content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

_JUST_MADE_S = 60
"""A temporary directory that is younger may not have been locked yet."""

_Content = TypeVar("_Content")


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A temporary directory below `directory`, from which what is complete can be renamed to its place.

    What killed processes of this machine have left there goes first: nobody holds a lock on it any more.
    """
    directory.mkdir(parents=True, exist_ok=True)
    prefix = f".partial-{platform.node()}-"  # others may share the disk, and not know of this machine's locks
    for left in directory.glob(f"{prefix}*"):
        with suppress(OSError):  # it has just gone
            if time.time() - left.stat().st_mtime > _JUST_MADE_S:
                with _locked(left) as nobody_else:
                    if nobody_else:
                        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=prefix) as made, _locked(Path(made)):
        yield Path(made)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether this process has a directory to itself, until the block ends or the process does.

    False where another process has locked it, or the file system knows no locks.
    """
    opened = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(opened)


@contextmanager
def building(target: Path, *, kept: bool = True) -> Iterator[Path]:
    """A temporary directory that becomes `target` if the block succeeds: what exists under `target` is complete.

    `kept`: it will be looked for with :func:`found`.
    """
    with scratch(target.parent) as made:
        partial = made / target.name
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


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """A temporary file that becomes `file` if the block succeeds, once it is on disk: what exists is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


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


def sha256(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def wheel(requirement: str, expected: str, directory: Path) -> Path:
    """The wheel of ``name==version``, fetched from PyPI unless `directory` has it; OSError if it is another or none."""
    name, _, version = requirement.partition("==")
    file = next(directory.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)
    if file is None:
        with scratch(directory) as fetched_to:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary", ":all:", "--retries", "2", "--timeout", "20"]
            command += ["--dest", str(fetched_to), requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise OSError(f"cannot download {requirement} from PyPI: {why}")
            (fetched,) = fetched_to.glob("*.whl")
            file = fetched.rename(directory / fetched.name)
    if (actual := sha256(file)) != expected:
        file.unlink()
        raise OSError(f"{file.name} has sha256 {actual}, expected {expected}; it is not used")
    return file


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
