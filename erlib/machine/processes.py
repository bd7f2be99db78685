"""Child processes that never outlive us: started with a log, stopped for certain, with all that they have started.

If we die, however we die, the kernel tells them to end, and a guard (:mod:`erlib.machine.leftovers`) sees to it that
they do.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil

from erlib.machine import leftovers

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_AUTOGROUP = Path("/proc/self/autogroup")


class StartError(RuntimeError):
    """A process did not come up; the message says why and where its log is."""


class Process(Protocol):
    """What a child of ours (:class:`subprocess.Popen`) and of a nursery's (:mod:`erlib.machine.nursery`) offer."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | Any: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


def spawn(
    command: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    niceness: int = 0,
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start `command` with standard error (and output, unless piped) appended to `log`, `niceness` below our priority.

    The kernel sends the child SIGTERM when this process dies, however it dies (``kill -9`` included), and what then is
    left of its session is killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()

    _GUARD.stand()  # if it cannot, nothing is started
    with log.open("ab") as file:
        child = subprocess.Popen(
            [str(part) for part in command],
            stderr=file,
            env={**os.environ, **(env or {})},
            # Ctrl-C goes to the foreground process group: we stop our children ourselves, in order.
            start_new_session=True,
            preexec_fn=lambda: follow(parent, niceness),  # noqa: PLW1509  (no lock, and nothing else sets its signal)
            **{"stdin": subprocess.DEVNULL, "stdout": file, **popen},
        )
    _GUARD.watch(child.pid)
    return child


def guard(session: int) -> None:
    """Let what is left of a session that somebody else started for us be killed when this process is gone."""
    _GUARD.stand()
    _GUARD.watch(session)


def follow(parent: int, niceness: int) -> None:
    """In a new child: hear all signals, end when `parent` does, stand back by `niceness`."""
    _hear_all_signals()
    _die_with(parent, signal.SIGTERM)
    _stand_back(niceness)


def _hear_all_signals() -> None:
    """Undo what a child would inherit: signals that we block, or that whoever started us ignores (nohup, ``&``)."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _die_with(parent: int, number: signal.Signals) -> None:
    """Let the kernel send us `number` when `parent` dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before
        os._exit(1)


class _Guard:
    """The process that ends what we have started if we cannot; see :mod:`erlib.machine.leftovers`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: set[int] = set()

    def stand(self) -> None:
        """Be there, before anything is started."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()

    def watch(self, session: int) -> None:
        with self._lock:
            self._sessions.add(session)
            self._say(f"+{session}")

    def forget(self, session: int) -> None:
        with self._lock:
            if session in self._sessions:
                self._sessions.remove(session)
                self._say(f"-{session}")

    def _say(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # somebody has killed it
            self._start()

    def _start(self) -> None:
        # Isolated and without site-packages: it has to be there at once, whatever the environment says.
        command, quiet = [sys.executable, "-I", "-S", leftovers.__file__], subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True
        )
        for session in self._sessions:
            self._say(f"+{session}")


_GUARD = _Guard()


def _stand_back(niceness: int) -> None:
    """Lower this process' priority, and that of its session, by `niceness`.

    Where the kernel schedules sessions as groups (``kernel.sched_autogroup_enabled``), a process' own niceness counts
    among its session alone, which here is the process and its children.
    """
    os.nice(niceness)
    deadline = time.monotonic() + 2
    while niceness and time.monotonic() < deadline:
        try:
            _AUTOGROUP.write_text(str(niceness), encoding="utf-8")
        except BlockingIOError:  # only root may change several within a tenth of a second
            time.sleep(0.05)
        except OSError:  # a kernel without groups, or a container that hides them
            return
        else:
            return


def python(*arguments: str | Path) -> list[str | Path]:
    """Command line that runs a module of this package in this environment."""
    return [sys.executable, *arguments]


def pool(workers: int) -> ProcessPoolExecutor:
    """Forked processes that compute, and die with us."""
    return ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(os.getpid(),))


def _begin_worker(parent: int) -> None:
    _die_with(parent, signal.SIGKILL)
    # What it inherits is never collected here: looking through it takes time, and a finaliser that joins a thread would
    # not return, because threads are not inherited.
    gc.freeze()


def end_on_signals(*more: signal.Signals) -> None:
    """Let SIGTERM, SIGHUP (the terminal is closed) and `more` raise SystemExit, so that what is started is stopped.

    The first does, with the status 128 + its number; those behind it must not disturb the clean-up. What is ignored
    (SIGHUP under nohup) stays so, and what has a handler keeps it. Only the main thread can set this.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    numbers = [signal.SIGTERM, signal.SIGHUP, *more]

    def leave(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            if signal.getsignal(each) is leave:
                signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, leave)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put off what a signal would do to us until the block is through: half a clean-up is none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    handlers = {number: signal.signal(number, lambda got, _: late.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if late:
            signal.raise_signal(late[0])


def stop(processes: Iterable[Process], grace_s: float = 10.0) -> None:
    """SIGTERM all `processes`, wait up to `grace_s` seconds, SIGKILL what is left of their sessions; reap them.

    That is their children, also those of a process that has died before.
    """
    ours = list(processes)
    running = {process.pid for process in ours if process.poll() is None}
    crashed = leftovers.still_those_of({process.pid: None for process in ours if process.pid not in running})
    for process in ours:
        process.send_signal(signal.SIGTERM)
    _kill(crashed)  # whose children nobody tells to end
    _wait_for_the_end(running, grace_s)
    _kill(running)
    for process in ours:
        process.wait()
    _wait_for_the_end(running | crashed, 3)
    for process in ours:
        _GUARD.forget(process.pid)


def _kill(sessions: Collection[int]) -> None:
    for pid in leftovers.members(sessions):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _wait_for_the_end(sessions: Collection[int], timeout_s: float) -> None:
    """Wait until nobody of `sessions` runs. A zombie does not, which init may take seconds to reap."""
    deadline = time.monotonic() + timeout_s
    while leftovers.members(sessions) and time.monotonic() < deadline:
        time.sleep(0.01)


def wait_until(ready: Callable[[], bool], process: Process, what: str, log: Path, timeout_s: float) -> None:
    """Poll `ready` until it is true; StartError if `process` exits, or `timeout_s` passes, first."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None:
            raise StartError(f"{what} exited with code {process.returncode} while starting; {log} ends:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise StartError(f"{what} was not ready after {timeout_s:.0f} s; {log} ends:\n{tail(log)}")
        time.sleep(0.05)


def tail(log: Path, lines: int = 8) -> str:
    """The last `lines` of a log."""
    return (
        "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        if log.exists()
        else "(no log)"
    )


def require_free_ports(ports: Iterable[int], host: str = "127.0.0.1") -> None:
    """StartError if some of `ports` cannot be bound: says who has them, where that can be seen, and what to set."""
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


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f" (pid {connection.pid}, {psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def keep_last_words(log: Path) -> Path:
    """Set the log of a process that died aside, because the next one begins its own; returns where it lies now."""
    aside = log.with_suffix(".died.log")
    log.replace(aside)
    return aside
