"""How a stream ends, whatever is on its way to its client at that moment: with a status, at once, and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from contextlib import AsyncExitStack

import grpc
import grpc.aio
import pytest

from erlib.gateway.limits import Limits
from erlib.gateway.telemetry import Request
from erlib.serving import wire
from tests.support.gateways import Line, relay_before
from tests.support.processes import gateway_process
from tests.support.standin_expert import Front, eventually, front, setting, standin

AS_STATUS = (("triton_grpc_error", "true"),)
NOT_AS_STATUS = (("triton_grpc_error", "false"), wire.COMPLETE)
FLOWS = wire.encode_request("0 n=100000", 1)
"""Something is on its way to the client all the time."""
STUFFS = wire.encode_request("0 n=2000 bytes=100000", 1)
"""To a client that does not read, something is on its way for ever."""
WAITS = wire.encode_request("1 first=60", 1)
BAD = wire.encode_request(" ", 1)


async def opened(channel: grpc.aio.Channel, *messages: bytes, **arguments) -> grpc.aio.StreamStreamCall:
    """A stream that its client keeps open."""
    call = channel.stream_stream(wire.STREAM_INFER)(**{"timeout": 20} | arguments)
    for message in messages:
        await call.write(message)
    return call


async def end_of(call: grpc.aio.StreamStreamCall) -> str:
    """The status with which `call` ends; it is read to its end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    return (await call.code()).name


async def left(door: Front) -> None:
    """Wait until no stream is open and no expert owes anything."""
    counted = door.gateway.telemetry.registry.get_sample_value
    replicas = [replica for expert in door.gateway.experts for replica in expert.replicas]
    await eventually(lambda: not counted("er_streams") and not any(replica.calls for replica in replicas), 20)


FAILURES = {
    "a bad request": (BAD, "INVALID_ARGUMENT"),
    "an expert's status": (wire.encode_request("1 fail_after=0 code=ABORTED", 1), "ABORTED"),
    "an expert's error": (wire.encode_request("1 error=INVALID_ARGUMENT:~no", 1), "INVALID_ARGUMENT"),
    "an expert's odd error": (wire.encode_request("1 error=no", 1), "UNKNOWN"),
    "an expert's status amid its answer": (wire.encode_request("1 n=9 fail_after=3", 1), "UNAVAILABLE"),
    "a limit": (FLOWS, "RESOURCE_EXHAUSTED"),
    "a router that fails": (wire.encode_request("no number", 1), "INTERNAL"),
}


@pytest.mark.parametrize(("message", "code"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("amid", [False, True], ids=["at once", "amid another answer"])
def test_the_first_failure_ends_a_stream_that_is_being_written_to(message, code, amid):
    limits = Limits(requests_per_s=1 if code == "RESOURCE_EXHAUSTED" else 1e9)

    async def run() -> None:
        async with setting(1, 1, limits=limits, behind_proxy=True) as (door, _):
            for i in range(20 if amid else 50):
                call = await opened(door.channel, FLOWS, metadata=(*AS_STATUS, ("x-real-ip", str(i))))
                for _ in range(i % 5 + 1 if amid else 0):
                    await call.read()
                await call.write(message)
                assert await end_of(call) == code
            await left(door)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["gateway", "NGINX that relays"])
def test_experts_are_not_asked_to_end_streams_with_a_status_themselves(kind, tmp_path):
    """Triton dies of it when clients cancel. The gateway reads it off the expert's text."""

    async def run() -> tuple[str, str, set[str]]:
        async with standin() as expert, AsyncExitStack() as exits:
            if kind == "NGINX that relays":
                _, _, channel = await exits.enter_async_context(relay_before(tmp_path, expert.url))
            else:
                channel = (await exits.enter_async_context(front(expert.url))).channel
            failing = wire.encode_request("0 error=INVALID_ARGUMENT:~too~long", 1)
            infer = channel.unary_stream(wire.STREAM_INFER)
            async for _ in infer(wire.encode_request("0 n=1", 1), metadata=NOT_AS_STATUS, timeout=20):
                pass
            call = infer(failing, metadata=(*AS_STATUS, wire.COMPLETE), timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                [message async for message in call]
            return (
                error.value.code().name,
                error.value.details(),
                {key for request in expert.requests for key, _ in request.metadata},
            )

    code, details, seen = asyncio.run(run())
    assert (code, details) == ("INVALID_ARGUMENT", "too long")
    assert "triton_grpc_error" not in seen


def test_our_own_fault_ends_the_stream_and_is_said(monkeypatch, caplog):
    """Whatever fails here beside a request: the others are not cancelled while they send."""

    async def run() -> None:
        async with setting(1) as (door, _):

            def note(request: Request) -> None:
                raise ValueError

            monkeypatch.setattr(door.gateway.telemetry, "note", note)
            for _ in range(20):
                call = await opened(door.channel, FLOWS, wire.encode_request("0 n=1", 1))
                assert await end_of(call) == "INTERNAL"
            await left(door)

    asyncio.run(run())
    assert "ValueError" in caplog.text


@pytest.mark.parametrize("as_status", [True, False])
def test_an_expert_that_is_given_up_ends_only_what_it_owes(as_status):
    """At that moment, its responses are on their way to clients."""

    async def run() -> None:
        async with setting(1) as (door, _):
            for i in range(20):
                call = await opened(door.channel, *[FLOWS] * 3, metadata=AS_STATUS if as_status else ())
                for _ in range(i % 7 + 1):
                    await call.read()
                for owed in list(door.gateway.experts[0].replicas[0].calls):
                    owed.cancel()
                await call.done_writing()
                assert await end_of(call) == ("UNAVAILABLE" if as_status else "OK")
            await left(door)

    asyncio.run(run())


@pytest.mark.parametrize("metadata", [AS_STATUS, ()], ids=["as status", "in the stream"])
def test_a_deadline_ends_a_stream_that_is_being_written_to(metadata):
    async def run() -> Counter[str]:
        async with setting(1) as (door, _):
            calls = [door.stream(FLOWS, FLOWS, metadata=metadata, timeout=0.5) for _ in range(10)]
            ends = Counter(await asyncio.gather(*map(end_of, calls)))
            await left(door)
        return ends

    assert asyncio.run(run()) == {"DEADLINE_EXCEEDED": 10}


@pytest.mark.parametrize("then", ["reads on", "leaves"])
def test_what_is_on_its_way_to_a_client_that_does_not_read_keeps_no_expert_busy(then):
    """Its stream is to end: what it asked of others ends at once, the rest when it reads on or leaves."""

    async def run() -> str:
        async with setting(1, 1) as (door, stand_ins):
            call = await opened(door.channel, STUFFS, WAITS, metadata=AS_STATUS)
            await eventually(lambda: all(one.requests for one in stand_ins))
            sent = -1
            while sent != (sent := stand_ins[0].requests[0].sent):  # until nothing moves any more
                await asyncio.sleep(0.2)
            await call.write(BAD)
            await eventually(lambda: stand_ins[1].requests[0].end == "cancelled")
            assert not call.done()
            if then == "leaves":
                call.cancel()
            end = "" if then == "leaves" else await end_of(call)
            await left(door)
            return end

    assert asyncio.run(run()) == {"reads on": "INVALID_ARGUMENT", "leaves": ""}[then]


def test_a_gateway_that_is_told_to_end_waits_for_no_slow_client_longer_than_for_others(tmp_path):
    """Whose connection is as full as it can be."""

    async def run() -> None:
        async with standin() as expert:
            with gateway_process(tmp_path / "log", expert.url, "--drain-s", "0.5") as (url, process):
                async with Line(url) as line, grpc.aio.insecure_channel(line.url) as channel:
                    await channel.channel_ready()
                    line.bytes_per_s = 1
                    await opened(channel, STUFFS)
                    await eventually(lambda: bool(expert.requests and expert.requests[0].sent > 20))
                    process.terminate()
                    await asyncio.to_thread(process.wait, 8)

    asyncio.run(run())
    assert "Traceback" not in (tmp_path / "log").read_text()
