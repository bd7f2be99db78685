"""Gateways, what stands before and behind them, and what is asked of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio

from erlib.machine import processes
from erlib.serving import wire
from erlib.serving.nginx import Nginx
from tests.support.standin_expert import Front, front


async def request(channel: grpc.aio.Channel, prompt: str, **arguments) -> Outcome:
    """Send one prompt on a stream of its own, complete with that, and see how it ends."""
    outcome = Outcome(int(prompt.split(maxsplit=1)[0]))
    began_s = last_s = time.monotonic()
    metadata = (wire.COMPLETE, *arguments.pop("metadata", ()))
    call = channel.unary_stream(wire.STREAM_INFER)(wire.encode_request(prompt, 1), metadata=metadata, **arguments)
    try:
        async for message in call:
            outcome.longest_gap_s = max(outcome.longest_gap_s, time.monotonic() - last_s)
            last_s = time.monotonic()
            response = wire.decode_response(message)
            if response.error:
                outcome.ends.append(response.error)
            else:
                outcome.responses += 1
    except grpc.aio.AioRpcError as error:
        outcome.ends.append(f"{error.code().name}: {error.details()}")
    outcome.took_s = time.monotonic() - began_s
    return outcome


def start(channel: grpc.aio.Channel, *prompts: str, **arguments) -> list[asyncio.Task[Outcome]]:
    """Send all prompts now."""
    return [asyncio.create_task(request(channel, prompt, **arguments)) for prompt in prompts]


def ends(outcomes: list[Outcome], expert: int | None = None) -> dict[str, int]:
    """How many requests (of one expert) ended how."""
    return dict(Counter(one.end for one in outcomes if expert in (None, one.expert)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Line:
    """A way to a server on which answers may be made to trickle, and which may be cut."""

    def __init__(self, url: str):
        self.url = ""
        self.bytes_per_s = 1e9
        self._to = url.split(":")
        self._connections: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Line:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Reset all connections."""
        for connection in self._connections:
            connection.transport.abort()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        there = socket.socket()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else megabytes wait here
        there.setblocking(False)
        await asyncio.get_running_loop().sock_connect(there, (self._to[0], int(self._to[1])))
        server, to_server = await asyncio.open_connection(sock=there, limit=4096)
        self._connections += [to_server, to_client]
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(self._pass(client, to_server, False), self._pass(server, to_client, True))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, slowly: bool) -> None:
        while data := await source.read(1 if slowly and self.bytes_per_s < 1000 else 65536):
            sink.write(data)
            if slowly:
                await asyncio.sleep(len(data) / self.bytes_per_s)


@asynccontextmanager
async def relay_before(work: Path, *addresses: str) -> AsyncIterator[tuple[Front, Nginx, grpc.aio.Channel]]:
    """A gateway in this process, an NGINX that relays in front of it and of its experts, and a channel to NGINX."""
    async with front(",".join(addresses), hands_over=True) as door:
        built = Nginx(free_port(), [door.url], work, experts=addresses, questions=[door.asked_at])
        built.start()
        try:
            async with grpc.aio.insecure_channel(built.url, options=wire.CHANNEL_OPTIONS) as channel:
                yield door, built, channel
        finally:
            processes.stop([built.process], grace_s=2)


@dataclasses.dataclass
class Outcome:
    """One request as its client saw it."""

    expert: int
    responses: int = 0
    ends: list[str] = dataclasses.field(default_factory=list)
    """What told the client that the request is over: in-stream errors and the call's status, if not OK."""
    took_s: float = 0.0
    longest_gap_s: float = 0.0

    @property
    def end(self) -> str:
        """The one terminal status; ``OK`` is a call that ends well behind all its responses."""
        assert len(self.ends) <= 1, f"more than one end: {self.ends}"
        return self.ends[0].partition(":")[0] if self.ends else "OK"
