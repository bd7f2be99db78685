"""Jobs in processes of their own, whose libraries are large and whose memory comes back."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from erlib import paths
from erlib.machine import processes

Job = dict[str, Any]

_RESULT, _DONE = b"@result ", b"@done"


def in_own_process(module: str, jobs: Sequence[Job]) -> Iterator[Job]:
    """Let ``python -m module`` do `jobs`, yielding each result as it comes; the child dies with the generator."""
    with Workers(module) as worker:
        yield from worker.do(jobs)


class Workers:
    """Up to `n` children that run ``python -m module``; each is given its next job when it has done one.

    They are started when there is work for them, keep between jobs what they have loaded, and die with the block.

    Parameters
    ----------
    module : str
        What it does, it tells :func:`do_jobs`.
    n : int
    threads : int, optional
        Of each child's libraries (none: as they are).
    """

    def __init__(self, module: str, n: int = 1, threads: int | None = None) -> None:
        self._module, self._n = module, n
        self._children: list[_Child] = []
        self._ready = selectors.DefaultSelector()
        self._environment = {
            "NNCF_CI": "1",  # no telemetry
            "CI": "true",
            "HF_HUB_OFFLINE": "1",  # the child reads local files only
            "TOKENIZERS_PARALLELISM": "false",
        }
        if threads:  # which do not wait actively: threads of two processes would keep each other waiting
            self._environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        processes.stop([child.process for child in self._children], grace_s=0)
        self._ready.close()
        for child in self._children:
            child.close()

    def do(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Yield the results of all jobs as they come; jobs are begun in their order.

        Raises
        ------
        RuntimeError
            As soon as a child has failed; the message has the end of its log.
        """
        waiting = deque(jobs)
        while len(self._children) < min(self._n, len(waiting)):
            self._start()
        busy = self._children[: len(waiting)]
        for child in busy:
            child.give(waiting.popleft())
        while busy:
            for key, _ in self._ready.select():
                for line in key.data.said():
                    if line.startswith(_RESULT):
                        yield json.loads(line.removeprefix(_RESULT))
                    elif line == _DONE and waiting:
                        key.data.give(waiting.popleft())
                    elif line == _DONE:
                        busy.remove(key.data)

    def _start(self) -> None:
        paths.ENGINE_BUILDS.mkdir(parents=True, exist_ok=True)
        number = len(self._children)
        log = paths.ENGINE_BUILDS / f"{self._module}{f'-{number}' if number else ''}.log"
        log.unlink(missing_ok=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started = processes.spawn(processes.python("-m", self._module), log, env=self._environment, **pipes)
        self._children.append(_Child(self._module, started, log))
        self._ready.register(self._children[-1].out, selectors.EVENT_READ, self._children[-1])


class _Child:
    """One of them, from its parent's side."""

    def __init__(self, module: str, process: subprocess.Popen[bytes], log: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self._in, self.out = process, process.stdin, process.stdout
        self._module, self._log = module, log
        self._unfinished = b""

    def give(self, job: Job) -> None:
        with contextlib.suppress(BrokenPipeError):  # its output has ended, too, which says more
            self._in.write(json.dumps(job).encode() + b"\n")
            self._in.flush()

    def said(self) -> list[bytes]:
        """Whole lines that have come; RuntimeError if it has ended, since it had more to do."""
        chunk = os.read(self.out.fileno(), 65536)
        if not chunk:
            code = self.process.wait()
            end = f"{self._log} ends:\n{processes.tail(self._log, 20)}"
            raise RuntimeError(f"{self._module} failed with exit code {code}; {end}")
        *lines, self._unfinished = (self._unfinished + chunk).split(b"\n")
        return lines

    def close(self) -> None:
        self.out.close()
        with contextlib.suppress(BrokenPipeError):
            self._in.close()


def do_jobs(worker: Callable[[Iterable[Job]], Iterator[Job]]) -> None:
    """The child's side of :class:`Workers`: `worker` yields the results of the jobs that it is given."""
    for result in worker(_given()):
        _say(_RESULT + json.dumps(result).encode())


def _given() -> Iterator[Job]:
    for line in sys.stdin:
        yield json.loads(line)
        _say(_DONE)


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()
