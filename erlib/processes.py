"""Child processes that never outlive us: started with a log, stopped for certain, killed by the kernel if we die."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_AUTOGROUP = Path("/proc/self/autogroup")


class StartError(RuntimeError):
    """A process did not come up; the message says why and where its log is."""


def spawn(
    command: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    niceness: int = 0,
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start `command` with standard error (and output, unless piped) appended to `log`, `niceness` below our priority.

    The kernel sends the child SIGTERM when this process dies, however it dies (``kill -9`` included).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()

    def follow_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        _stand_back(niceness)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    with log.open("ab") as file:
        return subprocess.Popen(
            [str(part) for part in command],
            stderr=file,
            env={**os.environ, **(env or {})},
            # Ctrl-C goes to the foreground process group: we stop our children ourselves, in order.
            start_new_session=True,
            preexec_fn=follow_parent,  # noqa: PLW1509  (touches no lock, and nothing else sets a death signal)
            **{"stdin": subprocess.DEVNULL, "stdout": file, **popen},
        )


def _stand_back(niceness: int) -> None:
    """Lower this process' priority, and that of its session, by `niceness`.

    Where the kernel schedules sessions as groups (``kernel.sched_autogroup_enabled``), a process' own niceness counts
    among its session alone, which here is the process and its children.
    """
    os.nice(niceness)
    deadline = time.monotonic() + 2
    while niceness and time.monotonic() < deadline:
        try:
            _AUTOGROUP.write_text(str(niceness))
        except BlockingIOError:  # only root may change several within a tenth of a second
            time.sleep(0.05)
        except OSError:  # a kernel without groups, or a container that hides them
            return
        else:
            return


def python(*arguments: str | Path) -> list[str | Path]:
    """Command line that runs a module of this package in this environment."""
    return [sys.executable, *arguments]


def leave_inheritance() -> None:
    """Begin a forked worker: what it inherits is never collected here.

    Looking through it takes time, and a finaliser that joins a thread would not return: threads are not inherited.
    """
    gc.freeze()


def stop(processes: Iterable[subprocess.Popen[bytes]], grace_s: float = 10.0) -> None:
    """SIGTERM all `processes`, wait up to `grace_s` seconds, SIGKILL what is left with its children; reap them."""
    running = [process for process in processes if process.poll() is None]
    families = [psutil.Process(process.pid) for process in running]
    families += [child for parent in list(families) for child in _children(parent)]
    for process in running:
        process.send_signal(signal.SIGTERM)
    alive = _still_running(families, grace_s)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for process in running:
        process.wait()
    _still_running(alive, 3)


def _still_running(members: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run after `timeout_s`; returns as soon as there are none.

    A zombie runs no more. An orphan stays one until init reaps it, which some take seconds to do.
    """
    deadline = time.monotonic() + timeout_s
    while members := [member for member in members if _runs(member)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return members


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], what: str, log: Path, timeout_s: float
) -> None:
    """Poll `ready` until it is true.

    Raises
    ------
    StartError
        If `process` exits or `timeout_s` passes first; quotes the end of `log`.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None:
            raise StartError(f"{what} exited with code {process.returncode} while starting; {log} ends:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise StartError(f"{what} was not ready after {timeout_s:.0f} s; {log} ends:\n{tail(log)}")
        time.sleep(0.05)


def tail(log: Path, lines: int = 8) -> str:
    """The last `lines` of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"


def require_free_ports(ports: Iterable[int], host: str = "127.0.0.1") -> None:
    """Check that all `ports` can be bound.

    Raises
    ------
    StartError
        Naming the ports in use, by whom where that can be seen, and what to set instead.
    """
    taken = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                taken.append(f"{port}{_owner(port)}")
    if taken:
        raise StartError(
            f"port{'s' * (len(taken) > 1)} in use: {', '.join(taken)}. "
            "Stop what uses them or choose others with --set serving.base_port=PORT"
        )


def listening(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something accepts connections on `port`."""
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((host, port)) == 0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" (pid {connection.pid}, {psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""
