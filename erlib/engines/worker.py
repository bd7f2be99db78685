"""Jobs in a process of their own, whose libraries are large and whose memory comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from erlib import paths
from erlib.machine import processes

_RESULT = b"@result "


def in_own_process(module: str, jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Let ``python -m module`` do `jobs`, yielding each result as it comes; the child dies with the generator."""
    paths.ENGINE_BUILDS.mkdir(parents=True, exist_ok=True)
    log = paths.ENGINE_BUILDS / f"{module}.log"
    log.unlink(missing_ok=True)
    environment = {
        "NNCF_CI": "1",  # no telemetry
        "CI": "true",
        "HF_HUB_OFFLINE": "1",  # the child reads local files only
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = processes.python("-m", module)
    child = processes.spawn(command, log, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with child.stdin as pipe, child.stdout as results:
            pipe.write(json.dumps(jobs).encode())
            pipe.close()
            for line in results:
                if line.startswith(_RESULT):
                    yield json.loads(line.removeprefix(_RESULT))
        child.wait()
    finally:
        processes.stop([child], grace_s=0)
    if child.returncode:
        raise RuntimeError(f"{module} failed with exit code {child.returncode}; {log} ends:\n{processes.tail(log, 20)}")


def do_jobs(worker: Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]) -> None:
    """The child's side of :func:`in_own_process`."""
    for result in worker(json.load(sys.stdin)):
        sys.stdout.buffer.write(_RESULT + json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()
