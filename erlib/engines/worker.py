"""Jobs in processes of their own, whose libraries are large and whose memory comes back."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from erlib import paths
from erlib.machine import processes

_RESULT = b"@result "


def in_own_process(module: str, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Let ``python -m module`` do `jobs`, yielding each result as it comes; the child dies with the generator."""
    return in_own_processes(module, [jobs])


def in_own_processes(
    module: str, shares: Sequence[list[dict[str, Any]]], threads: int | None = None
) -> Iterator[dict[str, Any]]:
    """As :func:`in_own_process`, with a child for each share of the jobs, and so many threads in each (None: as it is).

    Raises
    ------
    RuntimeError
        As soon as one of them has failed; the message has the end of its log.
    """
    paths.ENGINE_BUILDS.mkdir(parents=True, exist_ok=True)
    children: list[subprocess.Popen[bytes]] = []
    logs = [paths.ENGINE_BUILDS / f"{module}{f'-{i}' if i else ''}.log" for i in range(len(shares))]
    environment = {
        "NNCF_CI": "1",  # no telemetry
        "CI": "true",
        "HF_HUB_OFFLINE": "1",  # the child reads local files only
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads:  # which do not wait actively: threads of two processes would keep each other waiting
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = processes.python("-m", module)
    try:
        for jobs, log in zip(shares, logs, strict=True):
            log.unlink(missing_ok=True)
            child = processes.spawn(command, log, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            children.append(child)
            assert child.stdin is not None
            with child.stdin as pipe:
                pipe.write(json.dumps(jobs).encode())
        with selectors.DefaultSelector() as ready:
            for child, log in zip(children, logs, strict=True):
                assert child.stdout is not None
                ready.register(child.stdout, selectors.EVENT_READ, (child, log, bytearray()))
            yield from _results(ready, module)
    finally:
        processes.stop(children, grace_s=0)
        for child in children:
            if child.stdout is not None:
                child.stdout.close()


def _results(ready: selectors.BaseSelector, module: str) -> Iterator[dict[str, Any]]:
    """What the children print as results, until the last has ended."""
    while ready.get_map():
        for key, _ in ready.select():
            child, log, unfinished = key.data
            chunk = os.read(key.fd, 65536)
            if not chunk:
                ready.unregister(key.fileobj)
                if child.wait():
                    end = f"{log} ends:\n{processes.tail(log, 20)}"
                    raise RuntimeError(f"{module} failed with exit code {child.returncode}; {end}")
            *lines, unfinished[:] = (bytes(unfinished) + chunk).split(b"\n")
            yield from (json.loads(line.removeprefix(_RESULT)) for line in lines if line.startswith(_RESULT))


def do_jobs(worker: Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]) -> None:
    """The child's side of :func:`in_own_process`."""
    for result in worker(json.load(sys.stdin)):
        sys.stdout.buffer.write(_RESULT + json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()
