"""A short private folder for what a server needs while it runs, under a name that every program takes.

Triton hands paths to a shell unquoted and NGINX gives meaning to some characters of them. Neither ever sees a name that
somebody else chose: what lies elsewhere is linked here.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from erlib.machine import leftovers
from erlib.machine.processes import StartError

NOT_SAFE = re.compile(r"[^A-Za-z0-9_./+-]")
"""What a shell, a configuration file or a list of folders may read as more than a character of a name."""


class RunFolder:
    """Made at once, its user's alone, locked as long as we live; see :func:`erlib.machine.leftovers.sweep`."""

    def __init__(self) -> None:
        reasons = []
        for place in leftovers.temporary_folders():
            try:
                self.path, self._lock = _made_in(place)
            except OSError as error:
                reasons.append(f"{place!s:.200}: {error.strerror or error}")
            else:
                return
        raise StartError(f"no place for what servers need while they run; set TMPDIR ({'; '.join(reasons)})")

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _made_in(place: Path) -> tuple[Path, int]:
    if unsafe := NOT_SAFE.search(str(place)):
        raise OSError(f"Triton cannot be given the character {unsafe[0]!r}")
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        raise OSError("no program can be started there")
    while True:
        path = Path(tempfile.mkdtemp(prefix=leftovers.FOLDER_PREFIX, dir=place))
        try:
            lock = leftovers.claim(path)
        except FileNotFoundError:  # swept up before it was locked
            continue
        except OSError:
            path.rmdir()
            raise
        if lock is not None:
            return path, lock
