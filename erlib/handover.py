"""Requests that NGINX takes to their expert itself, once a gateway has said which: their tokens cost no Python.

A client whose stream ends with its one request says so by the metadata ``er-complete: 1``. NGINX, started with the
experts' addresses, reads such a request to its end and puts it to the next gateway, as it is, with ``er-front: 1``.
The gateway either *hands the request over*: the call ends at once with ``x-accel-redirect``, which names the place in
NGINX's configuration that leads to the replica, and with what the client is told. Or it *takes it*, and relays the
answer, or says what is wrong with it, as ever; NGINX passes that on.

When a request that was handed over has ended, NGINX tells the gateway by one datagram: which, and how. So the
breakers and the count of what each replica owes know of these requests, too. If the expert fails before its first
response, NGINX gives the request, which it still holds, to a gateway to relay, with ``er-failed: REPLICA``.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from erlib.experts import SERVER_AT_FAULT, Replica
from erlib.telemetry import Request

ASKED = "er-front"
TICKET = "er-ticket"
"""NGINX's own, random name for a request."""
FAILED = "er-failed"
TOLD = ["er-gateway", "er-expert", *(f"er-{span}-ns" for span in ("queue", "vectorise", "svd", "kmeans", "forward"))]
"""What NGINX tells a client about a request that it was handed."""
BODY_BYTES = 1 << 20
"""Of a complete request; a gateway's own limit on prompts is half of it."""

_RECEIVE_BUFFER_BYTES = 4 << 20
_FORGET_AFTER_S = 2 * 3600.0
"""NGINX gives a silent expert up after one hour; what it has not reported long after that, it never will."""
_GONE = 10_000
_ERROR_BYTES = 512
"""An answer that is no longer may be nothing but an error in the stream, which NGINX does not read."""
_CODES = {str(code.value[0]): code for code in grpc.StatusCode}
_CLIENT_GONE = "499"


class HandedOver(Exception):
    """The end of a call whose request NGINX takes to its expert; `metadata` tell it where."""

    def __init__(self, metadata: Mapping[str, object]):
        super().__init__()
        self.metadata = metadata


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
        self._hears = False

    def begin(
        self, ticket: str, request: Request, replica: Replica, number: int, told: Mapping[str, object]
    ) -> HandedOver | None:
        """Count `request` as one that `replica` owes, the one with this `number` of its expert's.

        None: it cannot be handed over, because nothing would be heard of its end, or that has been heard already.

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
        if not self._hears or not ticket or ticket in self._held or ticket in self._gone:
            return None
        now_s = time.monotonic()
        while self._held and now_s - next(iter(self._held.values())).t_s > _FORGET_AFTER_S:
            self._end(next(iter(self._held)))
        held = self._held[ticket] = _Elsewhere(request, replica, now_s)
        replica.calls[held] = None
        place = f"@expert-{request.expert}-{number}"
        return HandedOver({"x-accel-redirect": place, **told})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._hears = True
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
