"""Which expert a request is for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from grpc import StatusCode

from erlib.gateway.callers import Failure
from erlib.gateway.limits import Limits, Peers, Refused
from erlib.gateway.telemetry import Request
from erlib.routing.policies import Route
from erlib.serving import wire

_TIME_DIGITS = 20
"""More than this host's clock can show."""


class Decision:
    """Reads a request's prompt and routes it.

    Parameters
    ----------
    route : Route
    limits : Limits
    peers : Peers
        Who has asked for how much.
    thread : Executor, optional
        Where `route` is called if it takes so long that others' tokens would have to wait; by default in the event
        loop, because to hand a prompt to a thread costs about as much as c-BTM's decision itself.
    """

    def __init__(self, route: Route, limits: Limits, peers: Peers, thread: Executor | None):
        self._route = route
        self._limits = limits
        self._peers = peers
        self._thread = thread

    async def classify(self, message: bytes, request: Request, sent: str) -> None:
        """Note in `request` which expert it is for; `sent`: the client's ``er-sent-ns``.

        Raises
        ------
        Failure
        """
        try:
            self._peers.charge(request.peer)
            request.id, request.prompt = wire.prompt_of(message, self._limits.prompt_bytes)
        except Refused as refusal:
            raise Failure(StatusCode.RESOURCE_EXHAUSTED, str(refusal)) from None
        except wire.UnknownModel as error:
            raise Failure(StatusCode.NOT_FOUND, str(error)) from None
        except wire.BadRequest as error:
            raise Failure(StatusCode.INVALID_ARGUMENT, str(error)) from None
        # Whatever else stands there, a time to come included, is no time of this host's clock.
        if sent.isdecimal() and len(sent) < _TIME_DIGITS and int(sent) <= request.t_read_ns:
            request.spans_ns["queue"] = request.t_read_ns - int(sent)
        request.expert, spans_ns = await self._decide(request.prompt)
        request.t_routed_ns = time.monotonic_ns()
        request.spans_ns |= zip(("vectorise", "svd", "kmeans"), spans_ns, strict=True)

    async def _decide(self, prompt: str) -> tuple[int, Sequence[int]]:
        if self._thread is None:
            return self._route(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._route, prompt)
