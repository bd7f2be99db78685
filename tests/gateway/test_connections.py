"""Connections: made before they are needed, slow ones awaited, idle ones kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from erlib.gateway import experts
from erlib.serving import wire
from tests.support.fronts import FRONTS, way
from tests.support.gateways import free_port
from tests.support.standin_expert import eventually, front, standin


@asynccontextmanager
async def slow_to_connect(url: str, delay_s: float) -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """A way to `url` on which the server's first word comes `delay_s` late; its address and its connections."""
    connections: list[asyncio.StreamWriter] = []

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, wait_s: float = 0.0) -> None:
        await asyncio.sleep(wait_s)
        while part := await source.read(1 << 16):
            target.write(part)
        target.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        there, back = await asyncio.open_connection(*url.split(":"))
        await asyncio.gather(copy(reader, back), copy(there, writer, delay_s), return_exceptions=True)

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
        for writer in connections:
            writer.close()


def test_a_gateway_listens_only_when_its_connections_stand():
    async def run():
        async with standin() as expert, slow_to_connect(expert.url, 1.5) as (url, connections):
            began_s = asyncio.get_running_loop().time()
            async with front(url) as door:
                listened_s = asyncio.get_running_loop().time()
                return listened_s - began_s, len(connections), await door.ask("0"), len(connections)

    waited_s, before, answer, after = asyncio.run(run())
    assert waited_s > 1
    assert before == after == 1
    assert [one.error for one in answer] == [""] * 3


def test_a_request_waits_for_a_connection_that_is_merely_slow():
    async def run():
        async with standin() as expert, slow_to_connect(expert.url, 2.0) as (url, connections), front(url) as door:
            connections[0].transport.abort()
            await eventually(lambda: len(connections) == 2)  # without any request
            return await door.ask("0")

    assert [one.error for one in asyncio.run(run())] == [""] * 3


def test_a_deadline_that_passes_before_there_is_a_connection_says_so(monkeypatch):
    monkeypatch.setattr(experts, "SLOW_CONNECT_S", 0.1)

    async def run():
        async with standin() as expert, slow_to_connect(expert.url, 5.0) as (url, _), front(url) as door:
            (replica,) = door.gateway.experts[0].replicas
            ask = replica.stream_infer
            # The gateway's clock has to be the first to notice, because the client's would end the call without a word.
            replica.stream_infer = lambda message, timeout, metadata: ask(message, timeout=0.5, metadata=metadata)
            return await door.ask("0")

    (answer,) = asyncio.run(run())
    assert answer.error.startswith("DEADLINE_EXCEEDED: expert 0 failed: no connection to 127.0.0.1:")


def test_a_gateway_waits_for_experts_that_refuse_connections_as_long_as_it_is_told():
    async def run(insist_s):
        port = free_port()
        async with front(f"127.0.0.1:{port}", insist_s=0.0):
            pass  # at once
        expert = None

        async def later():
            nonlocal expert
            await asyncio.sleep(0.5)
            expert = standin(address=f"127.0.0.1:{port}")
            return await expert.__aenter__()

        task = asyncio.create_task(later())
        async with front(f"127.0.0.1:{port}", insist_s=insist_s) as door:
            answer = await door.ask("0")
        await task
        await expert.__aexit__(None, None, None)
        return answer

    assert [one.error for one in asyncio.run(run(20.0))] == [""] * 3


@pytest.mark.parametrize("kind", FRONTS)
def test_a_queued_request_outlives_its_clients_pings(kind, tmp_path):
    pings = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]

    async def run():
        async with (
            way(kind, tmp_path) as (_, expert, url),
            grpc.aio.insecure_channel(url, options=[*wire.CHANNEL_OPTIONS, *pings]) as channel,
        ):
            call = channel.unary_stream(wire.STREAM_INFER)(wire.encode_request("0 first=4", 1), timeout=20)
            return [wire.decode_response(message).error async for message in call], expert

    assert asyncio.run(run())[0] == [""] * 3
