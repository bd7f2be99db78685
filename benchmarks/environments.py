"""Other programs' environments, beside the workbench's own: made when they are first used."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from erlib import cache, paths
from erlib.machine.processes import StartError


def environment(*locks: str) -> Path:
    """The Python of an environment with what ``locks/NAME.txt`` list, from the cache or new.

    Parameters
    ----------
    *locks : str
        As ``scripts/install.py`` takes them; the last is the environment's name.

    Raises
    ------
    StartError
        If something cannot be installed.
    """
    name = locks[-1]
    files = sorted(path for lock in locks for path in (paths.ROOT / "locks").glob(f"{lock}*.txt"))
    directory = paths.CACHE / "environments" / f"{name}-{cache.digest(*files, sys.version)}"
    if not directory.exists():
        print(f"{name}: installing into {directory}")
        with cache.building(directory) as partial:
            venv.create(partial, with_pip=True)
            command: list[str | Path] = [partial / "bin" / "python", paths.ROOT / "scripts" / "install.py", *locks]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise StartError(f"{name} cannot be installed: {done.stderr.strip().removeprefix('error: ')}")
    return directory / "bin" / "python"


def from_pypi(name: str, version: str) -> Path:
    """The Python of an environment with one program of PyPI's, and whatever it needs as of the day that it is made.

    Parameters
    ----------
    name, version : str

    Raises
    ------
    StartError
        If it cannot be installed.
    """
    directory = paths.CACHE / "environments" / f"{name}-{cache.digest(name, version, sys.version)}"
    if not directory.exists():
        print(f"{name}: installing into {directory}")
        with cache.building(directory) as partial:
            venv.create(partial, with_pip=True)
            command: list[str | Path] = [partial / "bin" / "python", "-m", "pip", "install", "-q", f"{name}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise StartError(f"{name} {version} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return directory / "bin" / "python"
