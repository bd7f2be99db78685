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
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from aiohttp import web

from erlib.gateway.experts import SERVER_AT_FAULT, Replica
from erlib.gateway.telemetry import Request
from erlib.machine.processes import StartError

PLACE = "X-Accel-Redirect"

THROUGH_GATEWAYS = {PLACE: "@gateways"}

TICKET = "er-ticket"

_HEADER_BYTES, _HEADERS = 128 << 10, 10_000
"""What NGINX takes of metadata; more than gRPC does, which then says so."""

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


@asynccontextmanager
async def hearing(
    decide: Callable[[bytes, Mapping[str, str]], Awaitable[Mapping[str, str]]], handovers: Handovers, address: str
) -> AsyncIterator[str]:
    """Answer NGINX's questions at an address (TCP), and hear there how requests end (UDP).

    Parameters
    ----------
    decide : callable
        Takes the body and the headers of a question and gives the headers of its answer.
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

    async def answer(question: web.BaseRequest) -> web.Response:
        return web.Response(headers=await decide(await question.content.read(), question.headers))

    server = web.Server(
        answer, access_log=None, auto_decompress=False, max_field_size=_HEADER_BYTES, max_headers=_HEADERS
    )
    try:
        listening = await loop.create_server(server, host.strip("[]"), int(port), backlog=4096)
        at = listening.sockets[0].getsockname()[:2]
        ends, _ = await loop.create_datagram_endpoint(lambda: handovers, local_addr=at)
    except OSError as error:
        raise StartError(f"cannot answer questions at {address}: {error}") from None
    try:
        yield f"{host}:{at[1]}"
    finally:
        listening.close()
        await server.shutdown(1.0)
        ends.close()
