"""The user simulator (papers, section IV): N concurrent closed-loop users who stream tokens and note when each arrives.

The papers run one thread per user in one process (:mod:`erlib.load.threaded_users`). Here a few processes run asyncio
loops over raw gRPC, because a client that falls behind measures itself; how late their loops ran and how much CPU they
took is part of the result.

A user sends a base prompt and, in paper 1, then a continuation prompt, as long as the base prompt and its answer. All
users of a point start together, unless a script says when its user comes. Times are ``CLOCK_MONOTONIC`` ns, one clock
for all processes of a host. The users may have a host of their own, as in paper 2 (section IV); how far it is to what
they ask is measured before every point.
"""

from __future__ import annotations

import asyncio
import gc
import json
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import grpc
import grpc.aio
import numpy as np
from tokenizers import Tokenizer

from erlib import paths
from erlib.machine import processes
from erlib.serving import spans, wire

LAG_PROBE_S = 0.01
CONNECT_TIMEOUT_S = 20
_START_DELAY_S = 0.25
_WATCH_S = 1.0
_CONNECTIONS = 50
_CHANNELS_PER_TARGET = 2

Client = Literal["asyncio", "threads"]
"""asyncio: a few processes with an event loop each. threads: one process with a thread and a stream per user."""

_MODULES: dict[Client, str] = {"asyncio": "erlib.load.users", "threads": "erlib.load.threaded_users"}


class PointFailed(RuntimeError):
    """Requests of a point failed; the message counts them and quotes the first reason."""


@dataclass(frozen=True)
class Script:
    """What one user does."""

    user: int
    prompt: int
    cluster: int
    text: str
    max_tokens: int
    end_id: int | None
    target: int
    follow_up: str | None
    """The continuation prompt, if one follows."""
    comes_s: float = 0.0
    """How long after the common start the user comes."""


@dataclass
class Answer:
    """One request as its user saw it; times in ns, ``routing`` holds the gateway's spans (ns)."""

    user: int
    prompt: int
    cluster: int
    turn: str
    target: int
    t_send_ns: int
    t_first_ns: int = 0
    t_last_ns: int = 0
    input_tokens: int = 0
    token_ns: list[int] = field(default_factory=list)
    status: str = "ok"
    expert: int = -1
    routing: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """All answers of a point and how the client kept up."""

    answers: list[Answer]
    lag_p99_ms: float
    lag_max_ms: float
    cpu_cores: float
    network_us: tuple[float, float]
    """Mean and standard deviation of what it takes to open a TCP connection to a target: one round trip."""


class UserSimulator:
    """User processes, started once and used for many points.

    Parameters
    ----------
    tokenizer : Path
        ``tokenizer.json`` of the model under test, to count input tokens.
    n_processes : int
        How many processes share the users.
    log : Path
        Where their errors go.
    client : {"asyncio", "threads"}
        What the processes run.
    niceness : int
        How far they stand back where cores are short.
    host : str, optional
        Another machine that runs them, as ``ssh`` knows it, with this repository and `tokenizer` at the same places.
    shares_clock : bool
        Whether gateways run on the host that this object is used on; otherwise what a request waits before a gateway
        reads it is not known. False where `host` is given.
    watch : callable, optional
        Asked about once a second while users are waited for; what it raises ends that.

    Raises
    ------
    ValueError
        If ``threads``, which the papers run in one process, are to share several.
    """

    def __init__(
        self, tokenizer: Path, n_processes: int, log: Path, client: Client = "asyncio", niceness: int = 0,
        host: str | None = None, shares_clock: bool = True, watch: Callable[[], object] = lambda: None,
    ):  # fmt: skip
        if client == "threads" and n_processes != 1:
            raise ValueError(f"the threaded client is one process, as in the papers, not {n_processes}")
        self._command = processes.python("-m", _MODULES[client], tokenizer)
        if host:
            there = shlex.join(["cd", str(paths.ROOT)]) + " && exec " + shlex.join(map(str, self._command))
            self._command = ["ssh", "-o", "BatchMode=yes", "--", host, there]
        self._shares_clock = shares_clock and not host
        self._n_processes = n_processes
        self._log = log
        self._niceness = niceness
        self._watch = watch
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for _ in range(self._n_processes):
            worker = processes.spawn(
                self._command, self._log, niceness=self._niceness, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._workers.append(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with processes.undisturbed():
            processes.stop(self._workers, grace_s=2)
        for worker in self._workers:
            for pipe in (worker.stdin, worker.stdout):
                if pipe:
                    pipe.close()

    def run(self, scripts: Sequence[Script], targets: Sequence[str], timeout_s: float) -> Observation:
        """Let all users of one point do their scripts; returns when the last one is done.

        Parameters
        ----------
        scripts : sequence of Script
            One per user.
        targets : sequence of str
            gRPC addresses; a script's ``target`` is an index into it.
        timeout_s : float
            Limit of one request.

        Raises
        ------
        StartError
            If a user process dies.
        """
        hellos = []
        for worker in self._workers:
            asked_ns = time.monotonic_ns()
            hellos.append(self._exchange(worker, {"command": "hello", "targets": list(targets)}))
        clock_ns = hellos[-1]["now_ns"] - asked_ns  # theirs minus ours, the same for all of them
        start_ns = time.monotonic_ns() + clock_ns + int(_START_DELAY_S * 1e9)
        shares = [list(scripts[i :: self._n_processes]) for i in range(self._n_processes)]
        for worker, share in zip(self._workers, shares, strict=True):
            job = {
                "command": "run",
                "scripts": [asdict(script) for script in share],
                "targets": list(targets),
                "timeout_s": timeout_s,
                "start_ns": start_ns,
                "shares_clock": self._shares_clock,
            }
            self._send(worker, job)
        results = [self._receive(worker) for worker in self._workers]
        trips_us = np.concatenate([hello["trips_us"] for hello in hellos])
        lags = np.concatenate([result["lags_ms"] for result in results])
        return Observation(
            answers=[Answer(**answer) for result in results for answer in result["answers"]],
            lag_p99_ms=float(np.percentile(lags, 99)),
            lag_max_ms=float(lags.max()),
            cpu_cores=sum(result["cpu_cores"] for result in results),
            network_us=(float(trips_us.mean()), float(trips_us.std())),
        )

    def _exchange(self, worker: subprocess.Popen[bytes], message: dict[str, Any]) -> dict[str, Any]:
        self._send(worker, message)
        return self._receive(worker)

    def _send(self, worker: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(message).encode() + b"\n")
            worker.stdin.flush()
        except BrokenPipeError:
            self._died()

    def _receive(self, worker: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert worker.stdout is not None
        answered = select.poll()
        answered.register(worker.stdout, select.POLLIN)
        while not answered.poll(_WATCH_S * 1e3):
            self._watch()
        line = worker.stdout.readline()
        if not line:
            self._died()
        return json.loads(line)

    def _died(self) -> None:
        self._watch()  # they end, too, if there is nobody to ask
        raise processes.StartError(f"a user process died; {self._log} ends:\n{processes.tail(self._log)}")


# --- inside a user process --------------------------------------------------------------------------------------


def turns(script: Script) -> list[tuple[str, str]]:
    """What a user asks, one after the other: which turn it is, and the prompt."""
    return [("base", script.text), *([("continuation", script.follow_up)] if script.follow_up else [])]


async def _user(
    script: Script, channel: grpc.aio.Channel, timeout_s: float, shares_clock: bool
) -> list[tuple[Answer, str]]:
    """One user's requests, each answer with the prompt that it answers."""
    if script.comes_s:
        await asyncio.sleep(script.comes_s)
    answers = []
    for turn, text in turns(script):
        answer = await _request(script, turn, text, channel, timeout_s, shares_clock)
        answers.append((answer, text))
        if answer.status != "ok":
            break
    return answers


async def _request(
    script: Script, turn: str, text: str, channel: grpc.aio.Channel, timeout_s: float, shares_clock: bool
) -> Answer:
    """Send one prompt and take a timestamp per message as it arrives; messages are decoded after the last one."""
    request = wire.encode_request(text, script.max_tokens, script.end_id, f"{script.user}-{turn}")
    answer = Answer(script.user, script.prompt, script.cluster, turn, script.target, t_send_ns=time.monotonic_ns())
    times: list[int] = []
    messages: list[bytes] = []
    sent = (wire.COMPLETE, *((("er-sent-ns", str(answer.t_send_ns)),) if shares_clock else ()))
    call = channel.unary_stream(wire.STREAM_INFER)(request, timeout=timeout_s, metadata=sent)
    try:
        async for message in call:
            times.append(time.monotonic_ns())
            messages.append(message)
        metadata = {**dict(await call.initial_metadata()), **dict(await call.trailing_metadata())}
    except grpc.aio.AioRpcError as error:
        answer.status = f"{error.code().name}: {error.details()}"
        return answer
    finally:
        call.cancel()
    note(answer, script, times, [wire.decode_response(message) for message in messages])
    answer.expert = int(metadata.get(wire.EXPERT, script.target))
    answer.routing = {span: int(metadata[spans.header(span)]) for span in spans.SPANS if spans.header(span) in metadata}
    return answer


def note(answer: Answer, script: Script, times: list[int], responses: Sequence[wire.Response]) -> None:
    """Write down what arrived when (ns), or what is wrong with it, in `answer`.

    A last response without a token, with which TensorRT-LLM may follow an end of sequence, is not one of them.
    """
    if len(responses) > 1 and not responses[-1].error and not responses[-1].token_ids:
        times, responses = times[:-1], responses[:-1]
    refusal = next((response.error for response in responses if response.error), "")
    counts = [len(response.token_ids) for response in responses]
    if refusal:
        answer.status = refusal
    elif not counts or any(count != 1 for count in counts):
        answer.status = f"expected one token per response, got {sorted(set(counts))}"
    elif script.end_id == wire.NEVER_STOP and len(times) != script.max_tokens:
        answer.status = f"expected exactly {script.max_tokens} tokens, got {len(times)}"
    if times:
        answer.t_first_ns, answer.t_last_ns, answer.token_ns = times[0], times[-1], times


async def _watch_lag(lags_ms: list[float]) -> None:
    """How late the event loop wakes up a task that asked for ``LAG_PROBE_S``."""
    while True:
        due = time.monotonic() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        lags_ms.append((time.monotonic() - due) * 1e3)


async def _run(job: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    scripts = [Script(**script) for script in job["scripts"]]
    channels = [
        [grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) for _ in range(_CHANNELS_PER_TARGET)]
        for url in job["targets"]
    ]
    used = {script.target for script in scripts}
    connecting = asyncio.gather(*(channel.channel_ready() for target in used for channel in channels[target]))
    try:
        await asyncio.wait_for(connecting, CONNECT_TIMEOUT_S)
    except TimeoutError:
        raise SystemExit(f"nobody answers at {', '.join(job['targets'][target] for target in used)}") from None
    lags_ms: list[float] = []
    await asyncio.sleep(max(0.0, job["start_ns"] / 1e9 - time.monotonic()))
    lag_watch = asyncio.create_task(_watch_lag(lags_ms))
    cpu, wall = time.process_time(), time.monotonic()
    per_user = await asyncio.gather(
        *(
            _user(script, channels[script.target][i % _CHANNELS_PER_TARGET], job["timeout_s"], job["shares_clock"])
            for i, script in enumerate(scripts)
        )
    )
    cpu_cores = (time.process_time() - cpu) / max(1e-9, time.monotonic() - wall)
    lag_watch.cancel()
    for channel in (channel for group in channels for channel in group):
        await channel.close()
    return report(per_user, lags_ms, cpu_cores if scripts else 0.0, tokenizer)


def report(
    per_user: Iterable[list[tuple[Answer, str]]], lags_ms: list[float], cpu_cores: float, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Result of a job, from each user's answers and the prompts that they answer."""
    answers = [pair for user in per_user for pair in user]
    for answer, text in answers:  # only now, when nobody waits for it
        answer.input_tokens = len(tokenizer.encode(text).ids)
    return {
        "answers": [asdict(answer) for answer, _ in answers],
        "lags_ms": lags_ms or [0.0],
        "cpu_cores": cpu_cores,
    }


def round_trips_us(target: str) -> list[float]:
    """What it takes to open a TCP connection to ``host:port``, several times: the kernels' answer, no program's.

    Raises
    ------
    OSError
        If nobody listens there.
    """
    host, _, port = target.rpartition(":")
    trips_us = []
    for _ in range(_CONNECTIONS):
        began = time.perf_counter()
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        trips_us.append((time.perf_counter() - began) * 1e6)
    return trips_us


def serve(run: Callable[[dict[str, Any], Tokenizer], dict[str, Any]]) -> None:
    """Be a user process: a JSON job per line in, what `run` makes of it as JSON per line out."""
    tokenizer = Tokenizer.from_file(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        if job["command"] == "hello":
            result: dict[str, Any] = {"now_ns": time.monotonic_ns(), "trips_us": _distances_us(job["targets"])}
        else:
            gc.collect()
            gc.disable()  # a collection during a run would look like lag of the servers
            result = run(job, tokenizer)
            gc.enable()
        print(json.dumps(result), flush=True)


def _distances_us(targets: Sequence[str]) -> list[float]:
    try:
        return [trip_us for target in targets for trip_us in round_trips_us(target)]
    except OSError as error:
        raise SystemExit(f"nobody answers at {', '.join(targets)} ({error})") from None


if __name__ == "__main__":
    serve(lambda job, tokenizer: asyncio.run(_run(job, tokenizer)))
