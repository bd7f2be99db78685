"""What is left when a process is gone that had started others: found beyond doubt, and removed.

Run as a program, this file is a guard. :mod:`erlib.machine.processes` starts one beside itself and tells it of every
session that it starts; when it is gone, however it went, the guard ends what has not ended by itself and sweeps up. So
it has the standard library alone, and is there in some hundredths of a second.

What belongs to somebody who lives is locked by him: a *claim*. A lock ends with its holder, whatever kills him, so what
can be locked is left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = Path("/dev/shm")
FOLDER_PREFIX = "expert-router-run-"
"""Of a run folder, whose name ends in eight characters that :mod:`tempfile` chooses."""
_FOLDER = re.compile(FOLDER_PREFIX + r"[a-z0-9_]{8}")
_CLAIM = re.compile(r"er\d+-lock")
_GRACE_S = 2.0
"""For what a dead process had started to end by itself; the kernel tells it to."""
_LAST_S = 60.0
_CLOCK_S = 2.0
"""By which two clocks of the kernel may differ."""


# --- processes ----------------------------------------------------------------------------------------------------


def members(sessions: Collection[int]) -> list[int]:
    """Processes of `sessions` that run, whether or not their leaders do."""
    return [pid for pid in _processes() if _session(pid) in sessions and _status(pid).state not in ("Z", "X", "")]


def started(pid: int) -> int | None:
    """When a process started, in the kernel's ticks: with its number, this names it for ever. None: there is none."""
    return _status(pid).ticks


def still_those_of(leaders: Mapping[int, int | None]) -> set[int]:
    """Sessions that still are those which `leaders` began, who started at these times or (None) are gone since.

    The kernel gives nobody the number of a session that has members: where somebody else has it, that one is over.
    """
    return {session for session, start in leaders.items() if started(session) in (start, None)}


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has just ended
        return None


class _Status(NamedTuple):
    """What ``/proc/PID/stat`` says; empty if there is no such process."""

    name: str = ""
    state: str = ""
    parent: int = 0
    ticks: int | None = None
    """When it started."""


def _status(pid: int) -> _Status:
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    except OSError:
        return _Status()
    fields = after.split()
    return _Status(before.partition("(")[2], fields[0], int(fields[1]), int(fields[19]))


# --- claims -------------------------------------------------------------------------------------------------------


def claim(path: Path, make: bool = False) -> int | None:
    """Lock a file or folder (made first if `make`) until the descriptor is closed; None if somebody who lives has."""
    while True:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.lstat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:  # swept up between the two calls
            pass
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


def claim_of(prefix: str) -> Path:
    """The file whose lock says that shared memory whose names begin with `prefix` (``er8004-``) is somebody's."""
    return SHARED_MEMORY / f"{prefix}lock"


def remove_shared_memory(prefix: str, but: Path | None = None) -> None:
    """Remove all regions whose names begin with `prefix`; the claim last, or, if it is excepted, not."""
    for region in sorted(SHARED_MEMORY.glob(f"{prefix}*"), key=lambda region: region == claim_of(prefix)):
        if region != but:
            with contextlib.suppress(OSError):  # gone, or somebody else's
                region.unlink()


def temporary_folders() -> list[Path]:
    """Where run folders may lie, the user's choice first."""
    with contextlib.suppress(FileNotFoundError):  # none in which a file can be written
        return list(dict.fromkeys([Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]))
    return []


def sweep() -> None:
    """Remove folders and shared memory that nobody claims who lives. Only what is this user's."""
    for path in _claimable():
        try:
            mine = path.lstat().st_uid == os.geteuid() and not path.is_symlink()
            lock = claim(path) if mine else None
        except OSError:  # gone, or on a file system without locks
            continue
        if lock is None:
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                remove_shared_memory(path.name.removesuffix("lock"))
        finally:
            os.close(lock)
    _sweep_empty_folders_of_triton()


def _claimable() -> Iterator[Path]:
    for folder, pattern in [(SHARED_MEMORY, _CLAIM), *((folder, _FOLDER) for folder in temporary_folders())]:
        with contextlib.suppress(OSError):
            yield from (path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _sweep_empty_folders_of_triton() -> None:
    """Remove what Triton's Python backend makes in /tmp when it starts, and leaves unless it is given seconds to end.

    Nothing says whose such a folder is but the time: a server makes it after its own start and before that of its
    first child. Whatever may be a living server's, even one that is no concern of ours, stays.
    """
    empty = []
    for folder in Path("/tmp").glob("python_env_??????"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.geteuid() and not any(folder.iterdir()):
                empty.append((folder, folder.stat().st_mtime))
    if not empty:
        return
    spans = list(_starts_of_living_servers())
    for folder, made in empty:
        if not any(begin - _CLOCK_S <= made <= end + _CLOCK_S for begin, end in spans):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _starts_of_living_servers() -> Iterator[tuple[float, float]]:
    """When each Triton server on this machine started, and when its first child did (s since the epoch)."""
    boot = time.time() - float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    processes = {pid: _status(pid) for pid in _processes()}

    def began(pid: int) -> float:
        return boot + (processes[pid].ticks or 0) / os.sysconf("SC_CLK_TCK")

    for pid, server in processes.items():
        if server.name == "tritonserver":
            children = (began(child) for child, status in processes.items() if status.parent == pid)
            yield began(pid), min(children, default=float("inf"))


# --- the guard ----------------------------------------------------------------------------------------------------


def guard() -> None:
    """Read ``+SESSION`` and ``-SESSION`` lines until the writer is gone; then end those sessions and sweep up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the one that it guards
    leaders: dict[int, int | None] = {}
    for line in sys.stdin:
        session = int(line[1:])
        if line.startswith("+"):
            leaders[session] = started(session)
        else:
            leaders.pop(session, None)
    began = time.monotonic()
    while running := members(still_those_of(leaders)):
        waited_s = time.monotonic() - began
        if waited_s > _LAST_S:  # something that even the kernel cannot end
            break
        if waited_s > _GRACE_S:
            for pid in running:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    sweep()


if __name__ == "__main__":
    guard()
