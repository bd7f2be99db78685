"""The client's side of a call to a gateway: who it is, what it asked for, one writer at a time, and how the call ends.

gRPC's asyncio server never ends a call in which a task was cancelled while it sent something: the status that should
follow is not sent. So nobody but gRPC, which does it when the client has gone, cancels a task that is sending.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator, Mapping

import grpc
import grpc.aio
from grpc import StatusCode

from erlib.gateway.limits import Limits, peer_of
from erlib.serving import wire

_NOT_FORWARDED = ("er-", "grpc-", "user-agent", "x-real-ip", wire.STATUS_ON_ERROR)
"""What metadata that concern one hop alone begin with."""

_DETAILS_CHARS = 500
"""A status travels as metadata, of which gRPC takes 8 KB, and every byte that is not ASCII takes three."""


class Failure(Exception):
    """Why a request ends, other than well."""

    def __init__(self, code: StatusCode, details: str):
        details = details if len(details) <= _DETAILS_CHARS else details[:_DETAILS_CHARS] + " ..."
        super().__init__(f"{code.name}: {details}")
        self.code, self.details = code, details


class NobodyListens(Exception):
    """gRPC is about to cancel the call, because its client has gone, or the call is ending."""


class Caller:
    """One call, and all requests that came with it.

    Parameters
    ----------
    context : ServicerContext
    behind_proxy : bool
        Whether ``x-real-ip`` can be believed.
    limits : Limits
    """

    def __init__(self, context: grpc.aio.ServicerContext, behind_proxy: bool, limits: Limits):
        self.context = context
        sent = tuple(context.invocation_metadata() or ())
        self.metadata: dict[str, str | bytes] = dict(sent)
        self.peer = peer_of(context.peer(), self.metadata, behind_proxy)
        self.forwarded = forwarded(context)
        self.explain = "er-explain" in self.metadata
        self.ends_on_error = self.metadata.get(wire.STATUS_ON_ERROR) == "true"
        self.in_flight = 0
        self.failure: Failure | None = None
        """What the call is about to end with."""
        self.tasks: set[asyncio.Task[None]] = set()
        """All that work on it."""
        self._waiting_per_expert = limits.waiting_per_stream
        self._turns: dict[int, asyncio.Semaphore] = {}
        self._has_begun = False
        self._one_writer = asyncio.Lock()  # gRPC takes one write at a time; requests of one stream interleave
        self._sender: asyncio.Task[None] | None = None

    def turns(self, expert: int) -> asyncio.Semaphore:
        """What a request has while it waits for the first response of `expert`."""
        if expert not in self._turns:
            self._turns[expert] = asyncio.Semaphore(self._waiting_per_expert)
        return self._turns[expert]

    async def begin(self, metadata: Mapping[str, object]) -> None:
        """Send initial metadata, if nothing has been sent yet.

        Raises
        ------
        NobodyListens
        """
        async with self._one_writer:
            if not self._has_begun:
                self._has_begun = True
                await self._send(self.context.send_initial_metadata(pairs(metadata)))

    async def write(self, message: bytes) -> None:
        """Send a response.

        Raises
        ------
        NobodyListens
        """
        async with self._one_writer:
            self._has_begun = True
            await self._send(self.context.write(message))

    async def _send(self, sending: Awaitable[None]) -> None:
        self._sender = asyncio.current_task()
        try:
            await sending
        except grpc.aio.BaseError as error:
            raise NobodyListens from error
        finally:
            self._sender = None
        if self.failure is not None:
            raise NobodyListens

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Until :meth:`end` is called: then what the current task waits for here is given up."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.failure is None or task.uncancel():  # by gRPC, too
                raise
        finally:
            self.tasks.remove(task)

    def end(self, failure: Failure) -> None:
        """Let the call end with `failure`: all other :attr:`tasks` are cancelled, but for the one that sends.

        That one may take as long as the client takes to make room for what is on its way to it. So would the status,
        which cannot overtake it.
        """
        if self.failure is None:
            self.failure = failure
            for task in self.tasks - {self._sender, asyncio.current_task()}:
                task.cancel()


def forwarded(context: grpc.aio.ServicerContext) -> tuple[tuple[str, str | bytes], ...]:
    """The client's metadata, less what concerns its own connection."""
    return tuple(pair for pair in context.invocation_metadata() or () if not pair[0].startswith(_NOT_FORWARDED))


def pairs(metadata: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """As gRPC takes them."""
    return tuple((name, str(value)) for name, value in metadata.items())
