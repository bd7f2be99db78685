"""Processes forked from one that has loaded what they need: they start at once, and share the memory of what is loaded.

A nursery is a program that calls :func:`forked` once it has loaded what its children have in common, and before it has
started a thread. It forks a child for each line that we write to it, and tells us how a child ended when we ask.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erlib.machine import processes


class Forked:
    """A child of a nursery's, with what :class:`subprocess.Popen` offers of a child of ours."""

    def __init__(self, nursery: Nursery, pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        """As ``Popen.poll``."""
        if self.returncode is None:
            self.returncode = self._nursery.how_ended(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As ``Popen.wait``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """As ``Popen.send_signal``; nobody else has this process id, because whoever polls reaps."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As ``Popen.kill``."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """A running program that forks; its children get SIGTERM when it ends, as it does when we end.

    Parameters
    ----------
    command : sequence of str or Path
        The program, which calls :func:`forked`.
    log : Path
        Of the program itself.
    env : mapping, optional
        More of its environment.

    Raises
    ------
    StartError
        On the first :meth:`fork`, if it has ended; quotes the end of `log`.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None):
        self.process = processes.spawn(command, log, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._log = log
        self._lock = threading.Lock()

    def fork(self, arguments: Sequence[str | Path], log: Path, niceness: int = 0) -> Forked:
        """A child with these `arguments`, in a session of its own, that appends what it prints to `log`."""
        log.touch()  # what cannot be written is an error here
        pid = self._ask({"arguments": [str(one) for one in arguments], "log": str(log), "niceness": niceness})
        if pid is None:
            code, tail = self.process.wait(), processes.tail(self._log)
            raise processes.StartError(f"{self._log.stem} exited with code {code}; {self._log} ends:\n{tail}")
        processes.guard(pid)
        return Forked(self, pid)

    def how_ended(self, pid: int) -> int | None:
        """Return code of a child, None while it runs; with a nursery that has ended, its children have."""
        answer = self._ask({"ended": pid})
        return self.process.wait() if answer is None else None if answer == _RUNNING else answer

    def _ask(self, what: Mapping[str, Any]) -> int | None:
        """Its answer; None: it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self._lock:
            try:
                self.process.stdin.write(json.dumps(what).encode() + b"\n")
                self.process.stdin.flush()
            except (BrokenPipeError, ValueError):  # ValueError: closed
                return None
            answer = self.process.stdout.readline()
        return int(answer) if answer.endswith(b"\n") else None


_RUNNING = 1 << 16
"""No return code."""


def forked() -> list[str]:
    """In a nursery: fork what is asked for, until nobody is left to ask. Returns in each child, with its arguments."""
    gc.freeze()  # a collection would write to what is shared
    ended: dict[int, int] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "ended" in asked:
            answer = _how_ended(asked["ended"], ended)
        else:
            parent, answer = os.getpid(), os.fork()
            ended.pop(answer, None)  # a process id may come again
            if not answer:
                _begin(parent, Path(asked["log"]), asked["niceness"])
                return list(asked["arguments"])
        sys.stdout.buffer.write(b"%d\n" % answer)
        sys.stdout.buffer.flush()
    raise SystemExit


def _begin(parent: int, log: Path, niceness: int) -> None:
    os.setsid()
    with open(os.devnull, "rb") as nothing, log.open("ab") as file:
        for number, of in ((0, nothing), (1, file), (2, file)):
            os.dup2(of.fileno(), number)
    processes.follow(parent, niceness)


def _how_ended(pid: int, ended: dict[int, int]) -> int:
    """Return code of a child, also if two threads of whoever asks want to know."""
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return _RUNNING
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]
