"""What a gateway must outlive: broken messages, clients that come and go, a thousand streams and a killed expert."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from erlib import config
from erlib.load import users
from erlib.machine import processes
from erlib.paper_scale import emulation
from erlib.serving import stack, wire
from erlib.serving.nginx import Nginx
from erlib.workload import prompts
from tests.support.gateways import free_port
from tests.support.ports import BASE_PORT
from tests.support.processes import gateway_process, metrics
from tests.support.standin_expert import front, response, standin

# --- broken messages --------------------------------------------------------------------------------------------

REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
ANSWER = response(b"ok", 1)


async def refusals(channel: grpc.aio.Channel, messages: list[bytes]) -> Counter[str]:
    """Send `messages`, half of them on one stream and half as unary requests; how each was answered.

    The expert behind the gateway answers whatever reaches it with one response.
    """
    stream, unary = messages[::2], messages[1::2]
    replies = [reply async for reply in channel.stream_stream(wire.STREAM_INFER)(iter(stream), timeout=60)]
    assert len(replies) == len(stream)
    answers = Counter("OK" if reply == ANSWER else wire.decode_response(reply).error.split(":")[0] for reply in replies)
    infer = channel.unary_unary(wire.INFER)
    for reply in await asyncio.gather(*(infer(one, timeout=60) for one in unary), return_exceptions=True):
        answers[reply.code().name if isinstance(reply, grpc.aio.AioRpcError) else "OK"] += 1
    return answers


inputs = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["text_input", "max_tokens", ""]) | st.text(max_size=5),
    datatype=st.sampled_from(["BYTES", "INT32", "", "FP64"]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    contents=st.none() | st.builds(pb.InferTensorContents, bytes_contents=st.lists(st.binary(max_size=9), max_size=2)),
)
requests = st.builds(
    pb.ModelInferRequest,
    model_name=st.sampled_from(["ensemble", "", "other"]),
    model_version=st.text(max_size=3),
    id=st.text(max_size=9),
    inputs=st.lists(inputs, max_size=4),
    raw_input_contents=st.lists(st.binary(max_size=30) | st.binary(max_size=30).map(
        lambda data: struct.pack("<I", len(data)) + data), max_size=4),
).map(pb.ModelInferRequest.SerializeToString)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.lists(requests | st.binary(max_size=200), min_size=40, max_size=60))
def test_whatever_is_sent_is_answered(messages):
    async def run() -> Counter[str]:
        route = lambda prompt: (0, (0, 0, 0))  # noqa: E731
        async with standin(lambda _: [ANSWER]) as expert, front(expert.url, route=route) as door:
            return await refusals(door.channel, messages)

    answers = asyncio.run(run())
    assert sum(answers.values()) == len(messages)
    assert set(answers) <= REFUSALS | {"OK"}


def mutated(rng: random.Random) -> bytes:
    """A good request with something wrong: bits, bytes, ends, parts of it twice, or nothing good at all."""
    message = bytearray(wire.encode_request("0 " + "héllo 🦁 " * rng.randrange(40), rng.randrange(99), request_id="7"))
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(message) + 1)
        match rng.randrange(5):
            case 0 if at < len(message):
                message[at] ^= 1 << rng.randrange(8)
            case 1:
                message[at:at] = rng.randbytes(rng.randrange(1, 30))
            case 2:
                del message[at:]
            case 3:
                message[at:at] = message[rng.randrange(len(message) + 1) :][:200]
            case _:
                message[at : at + rng.randrange(20)] = b""
    return bytes(message) if rng.random() < 0.9 else rng.randbytes(rng.randrange(2000))


def babble(url: str, rng: random.Random) -> None:
    """Connect and send what is no gRPC, or no HTTP/2."""
    host, port = url.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        frame = struct.pack(">I", rng.randrange(64))[1:] + rng.randbytes(6) + rng.randbytes(rng.randrange(200))
        try:
            connection.sendall(rng.choice([rng.randbytes(500), preface, preface + frame, b"GET / HTTP/1.1\r\n\r\n"]))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
        except OSError:
            pass


async def relayed(channel: grpc.aio.Channel, messages: list[bytes]) -> Counter[str]:
    """As :func:`refusals`, of messages that are said to be all of their streams."""
    answers: Counter[str] = Counter()
    infer = channel.unary_stream(wire.STREAM_INFER)

    async def one(message: bytes) -> None:
        try:
            (reply,) = [reply async for reply in infer(message, metadata=(wire.COMPLETE,), timeout=60)]
        except grpc.aio.AioRpcError as error:
            answers[error.code().name] += 1
        else:
            answers["OK" if reply == ANSWER else wire.decode_response(reply).error.split(":")[0]] += 1

    await asyncio.gather(*map(one, messages))
    return answers


@contextlib.contextmanager
def relaying(log: Path, expert: str, *options: str) -> Iterator[tuple[str, list[psutil.Process]]]:
    """A gateway process behind an NGINX that relays, its address and all processes."""
    port = free_port()
    with gateway_process(log, expert, "--hands-over", str(port), *options) as (url, process):
        nginx = Nginx(free_port(), [url], log.parent, experts=[expert], questions=[f"127.0.0.1:{port}"])
        nginx.start()
        try:
            yield nginx.url, [process, *psutil.Process(nginx.process.pid).children()]
        finally:
            processes.stop([nginx.process], grace_s=2)
            nginx.clean_up()


def _fuzz(n: int, log: Path, relay: str) -> tuple[Counter[str], float]:
    """`n` mutated messages to a gateway process, or to an NGINX that relays and asks it; they must live on.

    How each was answered, and memory taken (MB).
    """
    ask, started = (refusals, gateway_process) if relay == "gateway" else (relayed, relaying)
    rng = random.Random(0)
    n_connections = n // 100

    async def run(url: str) -> Counter[str]:
        answers: Counter[str] = Counter()
        async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
            while (left := n - sum(answers.values())) > 0:
                answers += await ask(channel, [mutated(rng) for _ in range(min(500, left))])
        return answers

    async def all_of_it() -> tuple[Counter[str], float]:
        async with standin(lambda _: [ANSWER]) as expert:
            with started(log, expert.url) as (url, running):
                those = running if isinstance(running, list) else [running]
                before = sum(each.memory_info().rss for each in those)
                await asyncio.to_thread(lambda: [babble(url, rng) for _ in range(n_connections)])
                answers = await run(url)
                grown = (sum(each.memory_info().rss for each in those) - before) / 1e6
                async with grpc.aio.insecure_channel(url) as channel:  # it lives, and serves
                    stream = channel.unary_stream(wire.STREAM_INFER)(wire.encode_request("0", 1), timeout=10)
                    assert [one async for one in stream] == [ANSWER]
                assert all(each.is_running() for each in those)
                return answers, grown

    return asyncio.run(all_of_it())


@pytest.mark.parametrize("relay", ["front", "gateway"])
@pytest.mark.parametrize("n", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_fuzzed_messages_are_all_answered_and_the_gateway_lives(n, relay, tmp_path):
    answers, grown_mb = _fuzz(n, tmp_path / "log", relay)
    print(f"{n} fuzzed messages: {dict(answers)}, memory {grown_mb:+.1f} MB")
    assert sum(answers.values()) == n
    assert set(answers) <= REFUSALS | {"OK"}
    assert min(answers["OK"], answers["INVALID_ARGUMENT"]) > n / 20
    assert grown_mb < 60
    assert "Traceback" not in (tmp_path / "log").read_text()


# --- clients that come and go -----------------------------------------------------------------------------------


@pytest.mark.parametrize("relay", ["front", "gateway"])
@pytest.mark.parametrize("cycles", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_clients_that_come_and_go_leave_nothing_behind(cycles, relay, tmp_path):
    """Each connects, asks, and leaves at some moment, by cancelling or by closing its connection."""
    rng = random.Random(0)
    port = free_port()

    async def one(url: str) -> None:
        channel = grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS)
        call = channel.unary_stream(wire.STREAM_INFER)(
            wire.encode_request("0 n=1000 gap=0.002", 1), metadata=(wire.COMPLETE,)
        )
        await asyncio.sleep(rng.random() * 0.02)
        if rng.random() < 0.5:
            call.cancel()
        await channel.close()

    async def many(url: str, n: int) -> None:
        for _ in range(n // 20):
            await asyncio.gather(*(one(url) for _ in range(20)))

    async def settled() -> dict[str, float]:
        gc.collect()  # the client keeps connections whose channels are garbage
        files = -1.0
        for _ in range(50):
            await asyncio.sleep(0.2)
            seen = await metrics(port)
            is_idle = not seen["er_streams",] and not seen["er_outstanding", "0", expert_url]
            if is_idle and seen["process_open_fds",] == files:
                break
            files = seen["process_open_fds",]
        names = ["process_open_fds", "process_resident_memory_bytes", "er_tasks", "er_streams"]
        return {name: seen[name,] for name in names}

    async def run() -> list[dict[str, float]]:
        nonlocal expert_url
        async with standin() as expert:
            expert_url = expert.url
            started = gateway_process if relay == "gateway" else relaying
            with started(tmp_path / "log", expert.url, "--metrics-port", str(port)) as (url, _):
                seen = []
                for _ in range(5):
                    await many(url, cycles // 5)
                    seen.append(await settled())
                assert {one.end for one in expert.requests} <= {"cancelled", "done"}
                return seen

    expert_url = ""
    first, *_, last = fifths = asyncio.run(run())
    memory_mb = [round(seen["process_resident_memory_bytes"] / 1e6, 1) for seen in fifths]
    print(f"{cycles} cycles: {first} at first, {last} in the end, memory {memory_mb} MB")
    assert last["er_streams"] == 0
    kept = 20 if relay == "front" else 0  # NGINX's connections, each of which is a task: as many as have asked at once
    assert last["er_tasks"] <= first["er_tasks"] + kept
    assert last["process_open_fds"] <= first["process_open_fds"] + 2 + kept
    assert memory_mb[-1] - memory_mb[0] < 10
    assert "Traceback" not in (tmp_path / "log").read_text()


# --- a thousand streams -----------------------------------------------------------------------------------------

USERS, TOKENS, SLOW_MOTION = 1000, 50, 10.0


@pytest.mark.slow
@pytest.mark.parametrize("relay", ["front", "gateway"])
def test_a_thousand_streams_outlive_an_expert_that_is_killed_at_half_time(relay, profile, tokenizer, tmp_path):
    """Eight emulated experts in Triton, 16 gateways and what is in front: all requests of other clusters complete.

    Its own end UNAVAILABLE; if NGINX relays, those of which a token has come are reset, which gRPC calls INTERNAL.
    """
    serving = profile.serving.model_copy(update={"base_port": BASE_PORT + 500, "gateways": 16, "relay": relay})
    profile = profile.model_copy(update={"serving": config.ServingSettings(**serving.model_dump())})
    system = emulation.system(profile, "p2.D", SLOW_MOTION)
    drawn = prompts.draw(emulation.workload(profile, "p2"), USERS, "uniform", 0, 0)
    scripts = [
        users.Script(user, prompt.prompt, prompt.cluster, prompt.text, TOKENS, wire.NEVER_STOP, 0, None)
        for user, prompt in enumerate(drawn)
    ]
    victim = 3
    started = time.monotonic()

    with (
        stack.Stack("thousand", system.servers, system.routing, serving, system.router, tmp_path) as running,
        users.UserSimulator(tokenizer, 2, tmp_path / "users.log") as simulator,
    ):
        counted = [server.counters()["expert_generated_tokens"] for server in running.servers]

        def kill_at_half_time() -> None:
            while running.counters()["expert_generated_tokens"] - sum(counted) < USERS * TOKENS / 2:
                time.sleep(0.2)
            server = psutil.Process(running.servers[victim].process.pid)
            for process in (server, *server.children()):  # the engine's process may outlive its server's
                process.kill()

        killer = threading.Thread(target=kill_at_half_time)
        killer.start()
        answers = simulator.run(scripts, running.targets, 300).answers
        killer.join()
        made = [
            round(server.counters()["expert_generated_tokens"] - before)
            for number, (server, before) in enumerate(zip(running.servers, counted, strict=True))
            if number != victim
        ]

    assert len(answers) == USERS
    ended = Counter((one.cluster == victim, one.status.partition(":")[0]) for one in answers)
    print(f"{dict(ended)} after {time.monotonic() - started:.0f} s; {sum(made)} tokens made by the others")
    print(
        Counter(
            (one.cluster, one.expert, len(one.token_ns), one.status)
            for one in answers
            if one.status != "ok" and one.cluster != victim
        )
    )
    of_victim = sum(script.cluster == victim for script in scripts)
    assert ended.pop((False, "ok")) == USERS - of_victim
    assert sum(ended.values()) == of_victim
    assert set(ended) <= {(True, "UNAVAILABLE"), *([(True, "INTERNAL")] if relay == "front" else [])}
    assert all(one.expert == one.cluster and len(one.routing) == 6 for one in answers if one.status == "ok")
    received = [len(one.token_ns) for one in answers if one.cluster != victim]
    assert received == [TOKENS] * (USERS - of_victim)
    assert sum(made) == sum(received)
