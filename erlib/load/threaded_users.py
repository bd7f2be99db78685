"""The papers' user simulator (paper 1, section IV): one process, in which each user is a thread of its own.

Every user has a ``tritonclient.grpc`` client and one stream for all of its prompts, and notes the time of each message
in the stream's callback, as in Triton's own examples. How the papers' users learn that an answer is complete is not
said; here Triton's ``triton_final_response`` tells them, and messages are decoded after the last one.

Run as ``python -m erlib.load.threaded_users TOKENIZER``: jobs and results are those of :mod:`erlib.load.users`. The
gateway's metadata is hidden by ``tritonclient``: an answer names no expert and no routing times.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException

from erlib.load import users
from erlib.load.users import Answer, Script
from erlib.serving import wire

_START_TIMEOUT_S = 120
"""By when all users' streams are open, so that one that cannot be opened does not keep the others waiting for ever."""


class _Inbox:
    """Callback of one user's stream: each message of the current answer, with the time at which it came."""

    def __init__(self) -> None:
        self.expect_answer()

    def expect_answer(self) -> None:
        self.times: list[int] = []
        self.results: list[InferResult] = []
        self.error: InferenceServerException | None = None
        self.complete = threading.Event()

    def __call__(self, result: InferResult | None, error: InferenceServerException | None) -> None:
        now = time.monotonic_ns()
        if result is None:
            self.error = error
            self.complete.set()
            return
        self.times.append(now)
        self.results.append(result)
        if result.get_response().parameters["triton_final_response"].bool_param:
            self.complete.set()


def _user(
    script: Script, client: InferenceServerClient, timeout_s: float, together: threading.Barrier
) -> list[tuple[Answer, str]]:
    """One user's thread: its requests, each answer with the prompt that it answers."""
    inbox = _Inbox()
    client.start_stream(inbox)
    together.wait()  # all streams are open
    together.wait()  # the common start
    time.sleep(script.comes_s)
    answers = []
    for turn, text in users.turns(script):
        answer = _request(script, turn, text, client, inbox, timeout_s)
        answers.append((answer, text))
        if answer.status != "ok":
            break
    client.stop_stream(cancel_requests=answer.status != "ok")
    return answers


def _request(
    script: Script, turn: str, text: str, client: InferenceServerClient, inbox: _Inbox, timeout_s: float
) -> Answer:
    inputs = _inputs(script, text)
    inbox.expect_answer()
    answer = Answer(script.user, script.prompt, script.cluster, turn, script.target, t_send_ns=time.monotonic_ns())
    try:
        client.async_stream_infer(wire.MODEL_NAME, inputs, request_id=f"{script.user}-{turn}")
        if not inbox.complete.wait(timeout_s):
            answer.status = f"DEADLINE_EXCEEDED: no complete answer within {timeout_s:g} s"
            return answer
        if inbox.error is not None:
            raise inbox.error
    except InferenceServerException as error:
        code = (error.status() or "").removeprefix("StatusCode.")
        answer.status = f"{code}: {error.message()}" if code else error.message()
        return answer
    responses = [
        wire.Response("", result.as_numpy("text_output").item(), tuple(result.as_numpy("output_ids").ravel()))
        for result in inbox.results
    ]
    users.note(answer, script, inbox.times, responses)
    return answer


def _inputs(script: Script, text: str) -> list[InferInput]:
    values = [
        ("text_input", "BYTES", np.array([[text.encode()]], dtype=np.object_)),
        ("max_tokens", "INT32", np.array([[script.max_tokens]], dtype=np.int32)),
        ("stream", "BOOL", np.array([[True]])),
    ]
    if script.end_id is not None:
        values.append(("end_id", "INT32", np.array([[script.end_id]], dtype=np.int32)))
    inputs = []
    for name, datatype, value in values:
        inputs.append(InferInput(name, value.shape, datatype))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def _watch_lag(over: threading.Event) -> list[float]:
    """How late (ms) a thread wakes up that asked for ``LAG_PROBE_S``, until `over`."""
    lags_ms = []
    while not over.is_set():
        due = time.monotonic() + users.LAG_PROBE_S
        time.sleep(users.LAG_PROBE_S)
        lags_ms.append((time.monotonic() - due) * 1e3)
    return lags_ms


def _run(job: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    scripts = [Script(**script) for script in job["scripts"]]
    together = threading.Barrier(len(scripts) + 1, timeout=_START_TIMEOUT_S)
    over = threading.Event()
    # A client that is not closed keeps its threads, and Python, from ending.
    with contextlib.ExitStack() as exits, ThreadPoolExecutor(len(scripts) + 1) as pool:
        clients = [exits.enter_context(InferenceServerClient(job["targets"][script.target])) for script in scripts]
        # All connect before the first stream is opened: NGINX counts calls, and takes gateways in turn.
        for client, script in zip(clients, scripts, strict=True):
            try:
                client.is_server_ready(client_timeout=users.CONNECT_TIMEOUT_S)
            except InferenceServerException:
                raise SystemExit(f"nobody answers at {job['targets'][script.target]}") from None
        threads = [
            pool.submit(_user, script, client, job["timeout_s"], together)
            for script, client in zip(scripts, clients, strict=True)
        ]
        together.wait()
        time.sleep(max(0.0, job["start_ns"] / 1e9 - time.monotonic()))
        lag_watch = pool.submit(_watch_lag, over)
        cpu, wall = time.process_time(), time.monotonic()
        together.wait()
        wait(threads)
        cpu_cores = (time.process_time() - cpu) / max(1e-9, time.monotonic() - wall)
        over.set()
        return users.report([thread.result() for thread in threads], lag_watch.result(), cpu_cores, tokenizer)


if __name__ == "__main__":
    users.serve(_run)
