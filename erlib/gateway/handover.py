"""Requests that NGINX takes to their expert itself, once a gateway has said which: their tokens cost no Python.

A client whose stream ends with its first request says so by the metadata ``er-complete: 1``. NGINX, started with the
experts' addresses, reads such a request to its end and asks the next gateway about it, over HTTP/1.1, which takes
Python less time than gRPC: the request's metadata are headers, its message is the body, ``er-ticket`` is a name of
NGINX's for it. The answer has no body and names in ``X-Accel-Redirect`` the place in NGINX's configuration where the
request goes on: a replica of its expert, together with what the client is to be told, or the gateways, which relay it,
or say what is wrong with it, as ever.

When a request that went to an expert has ended, NGINX tells the gateway by one datagram: which, and how. So breakers
and the count of what each replica owes know of these requests, too. If the expert fails before its first response,
NGINX gives the request, which it still holds, to a gateway to relay, with ``er-failed: REPLICA``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import httptools

from erlib.gateway.experts import SERVER_AT_FAULT, Replica
from erlib.gateway.telemetry import Request
from erlib.machine.processes import StartError
from erlib.serving import wire

_LOG = logging.getLogger(__name__)

PLACE = "X-Accel-Redirect"

THROUGH_GATEWAYS = {PLACE: "@gateways"}

TICKET = "er-ticket"

_HEADER_BYTES = 1 << 20
"""What NGINX takes of metadata, eight buffers of 128 KB; more than gRPC does, which then says so."""

_RECEIVE_BUFFER_BYTES = 4 << 20

_FORGET_AFTER_S = 25 * 3600.0
"""NGINX gives a silent expert up after a day; what it has not reported by then, it never will."""

_GONE = 10_000

_ERROR_BYTES = 512
"""An answer that is no longer may be nothing but an error in the stream, which NGINX does not read."""

_CODES = {str(code.value[0]): code for code in grpc.StatusCode}

_CLIENT_GONE = "499"


@dataclass(eq=False, slots=True)
class _Elsewhere:
    """A request that a replica owes to somebody else."""

    request: Request
    replica: Replica
    t_s: float

    def cancel(self) -> bool:
        """Nothing: whoever holds it ends it."""
        return False


class Handovers(asyncio.DatagramProtocol):
    """The requests that one gateway has handed over and whose end it has not heard of yet.

    Parameters
    ----------
    note : callable
        Takes each request when it has ended.
    """

    def __init__(self, note: Callable[[Request], None]):
        self._note = note
        self._held: dict[str, _Elsewhere] = {}
        self._gone: dict[str, None] = {}

    def begin(
        self, ticket: str, request: Request, replica: Replica, number: int, told: Mapping[str, object]
    ) -> dict[str, str] | None:
        """Count `request` as one that `replica` owes, the one with this `number` of its expert's.

        Gives the headers that tell NGINX where it is; None: its end has been heard of already.

        Parameters
        ----------
        ticket : str
            NGINX's.
        request : Request
        replica : Replica
        number : int
        told : mapping
            What its client is to be told.
        """
        if not ticket or ticket in self._held or ticket in self._gone:
            return None
        now_s = time.monotonic()
        while self._held and now_s - next(iter(self._held.values())).t_s > _FORGET_AFTER_S:
            self._end(next(iter(self._held)))
        held = self._held[ticket] = _Elsewhere(request, replica, now_s)
        replica.calls[held] = None
        place = f"@expert-{request.expert}-{number}"
        return {PLACE: place, **{name: str(value) for name, value in told.items()}}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A burst of requests ends as a burst of datagrams.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)

    def datagram_received(self, data: bytes, addr: object) -> None:
        """One line of NGINX's log, as syslog sends it: ``... er: TICKET RELAYED STATUS BYTES TRAILER HEADER``."""
        words = data.rpartition(b"er: ")[2].decode("ascii", "replace").split()
        if len(words) != 6 or not words[3].isdecimal():
            return
        if words[0] not in self._held:  # its client has gone, and this overtakes what says so to the call
            self._gone[words[0]] = None
            if len(self._gone) > _GONE:
                del self._gone[next(iter(self._gone))]
            return
        ticket, relayed, status, size, *grpc_status = words
        held = self._end(ticket)
        request, replica = held.request, held.replica
        if relayed == "1":  # the gateway that relayed it counts it
            replica.suspect()
            return
        code = next((_CODES[one] for one in grpc_status if one in _CODES), None)
        if code is not None:
            request.code = code.name
        elif status == _CLIENT_GONE:
            request.code = grpc.StatusCode.CANCELLED.name
        else:  # cut off behind its first response: either the client has gone or the server
            request.code = grpc.StatusCode.UNKNOWN.name
        if code is not grpc.StatusCode.OK:
            if request.code in SERVER_AT_FAULT:
                replica.suspect(infer=code is not None)
        elif int(size) > _ERROR_BYTES:
            replica.responses += 1
        else:
            replica.doubt()
        self._note(request)

    def _end(self, ticket: str) -> _Elsewhere:
        held = self._held.pop(ticket)
        del held.replica.calls[held]
        return held


Decide = Callable[[bytes, Mapping[str, str]], Awaitable[Mapping[str, str]]]
"""Takes the body and the headers of a question and gives the headers of its answer."""


class _Questions(asyncio.Protocol):
    """A connection on which NGINX asks, one question after the other.

    An HTTP server's own code would be most of what a question costs in sixteen processes, none of which is asked so
    often that its code stays in a core's cache. So there is none: a parser, and the one kind of answer.
    """

    def __init__(self, decide: Decide, running: set[asyncio.Task[None]]):
        self._decide, self._running = decide, running
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0
        self._unread = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        try:
            if self._unread > 2 * (_HEADER_BYTES + wire.BODY_BYTES):  # the parser would collect one header without end
                raise httptools.HttpParserError
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # what callbacks raise is among the former
            self._send(b"400 Bad Request", {}, last=True)  # NGINX then leaves the request to the gateways' own words

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def close(self) -> None:
        """Leave the connection."""
        if self._transport is not None:
            self._transport.close()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._headers, self._body, self._size = {}, [], 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._grow(len(name) + len(value), _HEADER_BYTES)
        self._headers.setdefault(name.decode("latin-1").lower(), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        self._size = 0

    def on_body(self, body: bytes) -> None:
        self._grow(len(body), wire.BODY_BYTES)
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        last = not self._parser.should_keep_alive()
        task = asyncio.get_running_loop().create_task(self._answer(b"".join(self._body), self._headers, last))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _grow(self, size: int, limit: int) -> None:
        self._size += size
        if self._size > limit:
            raise httptools.HttpParserError

    async def _answer(self, body: bytes, headers: Mapping[str, str], last: bool) -> None:
        try:
            self._send(b"200 OK", await self._decide(body, headers), last)
        except BaseException as error:  # also if this process ends: NGINX asks another one then
            if isinstance(error, Exception):
                _LOG.exception("a question of NGINX's could not be answered")
            self._send(b"500 Internal Server Error", {}, last=True)
            if not isinstance(error, Exception):
                raise

    def _send(self, status: bytes, headers: Mapping[str, str], last: bool = False) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        lines = [b"HTTP/1.1 " + status, b"content-length: 0", *([b"connection: close"] if last else [])]
        lines += [f"{name}: {value}".encode() for name, value in headers.items()]
        self._transport.write(b"\r\n".join([*lines, b"", b""]))
        if last:
            self._transport.close()


@asynccontextmanager
async def hearing(decide: Decide, handovers: Handovers, address: str) -> AsyncIterator[str]:
    """Answer NGINX's questions at an address (TCP), and hear there how requests end (UDP).

    Parameters
    ----------
    decide : callable
        See :data:`Decide`.
    handovers : Handovers
    address : str
        ``host:port``; port 0 takes a free one.

    Yields
    ------
    str
        The address.

    Raises
    ------
    StartError
        If nothing can be served there.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()
    open_: weakref.WeakSet[_Questions] = weakref.WeakSet()

    def connection() -> _Questions:
        open_.add(asked := _Questions(decide, running))
        return asked

    try:
        listening = await loop.create_server(connection, host.strip("[]"), int(port), backlog=4096)
        at = listening.sockets[0].getsockname()[:2]
        ends, _ = await loop.create_datagram_endpoint(lambda: handovers, local_addr=at)
    except OSError as error:
        raise StartError(f"cannot answer questions at {address}: {error}") from None
    try:
        yield f"{host}:{at[1]}"
    finally:
        listening.close()
        if running:
            _, late = await asyncio.wait(running, timeout=1.0)
            for task in late:
                task.cancel()
        for asked in list(open_):
            asked.close()
        ends.close()
