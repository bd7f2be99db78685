"""The routing gateway's service: it classifies each prompt and relays the answer.

It speaks the same gRPC service as the experts, reads nothing of a request but its prompt and nothing of a response:
messages pass through as raw bytes, with the client's metadata and what is left of its deadline.

Metadata, all times in ns: a client may send ``er-sent-ns`` (its CLOCK_MONOTONIC, meaningful on one host). When it has
forwarded the prompt, the gateway answers with ``er-gateway`` (which instance), ``er-expert`` and the spans
``er-queue-ns`` (client's send to prompt read), ``er-vectorise-ns``, ``er-svd-ns``, ``er-kmeans-ns`` and
``er-forward-ns`` (classified to handed to gRPC for the expert); at the end follows ``er-first-byte-ns`` (from there to
the expert's first response). On a stream that carries several requests they describe the first one.

A client that sends ``er-explain`` gets all that, with ``er-replica`` and ``er-distances`` (to the clusters' centres),
as parameters of each request's first response and once more as trailing metadata.

A request that fails gets one in-stream error, as Triton sends it, which begins with the status code's name; or, as
with Triton, the stream ends with that status where the client's metadata have ``triton_grpc_error: true``. A request
whose server fails before the first response is tried once more on another replica; after it, never.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import grpc
import grpc.aio
from grpc import StatusCode

from erlib.gateway import handover
from erlib.gateway.callers import Caller, Failure, NobodyListens
from erlib.gateway.decision import Decision
from erlib.gateway.experts import Expert, Replica
from erlib.gateway.handover import Handovers
from erlib.gateway.limits import Limits, Peers, Refused
from erlib.gateway.questions import Questions
from erlib.gateway.relay import Try, collect, relay
from erlib.gateway.telemetry import Request, Telemetry, logger
from erlib.gateway.told import Distances, Told
from erlib.routing.policies import Route
from erlib.serving import wire

_METADATA_BYTES = 8 << 10
"""What any gRPC server takes; NGINX would not notice that it does not."""

_Done = TypeVar("_Done")


class Gateway(grpc.GenericRpcHandler):
    """All methods of the inference service that ask: inference is routed, the rest goes to any live server.

    Parameters
    ----------
    route : Route
    experts : sequence of Expert
        In the order of the clusters.
    index : int
        Which of the instances this is.
    distances : Distances, optional
        For clients that ask for an explanation.
    limits : Limits
    telemetry : Telemetry, optional
    behind_proxy : bool
        Whether ``x-real-ip`` can be believed.
    thread : Executor, optional
        See :class:`erlib.gateway.decision.Decision`.
    """

    def __init__(
        self,
        route: Route,
        experts: Sequence[Expert],
        index: int = 0,
        distances: Distances | None = None,
        limits: Limits = Limits(),  # noqa: B008  (immutable)
        telemetry: Telemetry | None = None,
        behind_proxy: bool = False,
        thread: Executor | None = None,
    ):
        self.experts = list(experts)
        self.limits = limits
        self.telemetry = telemetry or Telemetry(experts)
        self._told = Told(index, distances)
        self._peers = Peers(limits)
        self._decision = Decision(route, limits, self._peers, thread)
        self._questions = Questions(self.experts, lambda: self._is_draining)
        self._behind_proxy = behind_proxy
        self.handovers = Handovers(self.telemetry.note)
        self._is_draining = False
        self._callers: set[Caller] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method == wire.STREAM_INFER:
            return grpc.stream_stream_rpc_method_handler(self._stream_infer)
        service, _, name = method.removeprefix("/").partition("/")
        answer = self._infer if name == "ModelInfer" else self._questions.method(name)
        return grpc.unary_unary_rpc_method_handler(answer) if service == wire.SERVICE and answer else None

    def drain(self) -> None:
        """From now on do what streams that are already open have asked for, and no more."""
        self._is_draining = True

    @property
    def is_busy(self) -> bool:
        """Whether any stream waits for something; one that its client merely keeps open does not."""
        return any(caller.in_flight for caller in self._callers)

    # --- inference ---

    async def _stream_infer(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        caller = Caller(context, self._behind_proxy, self.limits)
        try:
            with self._admitted(caller, "stream"):
                await self._read_requests(caller)
        except Failure as failure:
            await context.abort(failure.code, failure.details)

    async def decide(self, body: bytes, metadata: Mapping[str, str]) -> Mapping[str, str]:
        """Where NGINX is to take a complete request with this body; see :mod:`erlib.gateway.handover`.

        Through the gateways goes what is to be refused, and every request whose answer is to be explained, whose errors
        are to end it, or of which a peer may not have as many as it likes.
        """
        message = wire.message_of(body)
        if (
            message is None
            or "er-explain" in metadata
            or metadata.get(wire.STATUS_ON_ERROR) == "true"  # NGINX does not see errors in the stream
            or sum(len(name) + len(value) + 32 for name, value in metadata.items()) > _METADATA_BYTES
            or self.limits.are_per_peer
            or self._is_draining
        ):
            return handover.THROUGH_GATEWAYS
        request = Request("stream", metadata.get("x-real-ip", ""))
        try:
            await self._decision.classify(message, request, metadata.get("er-sent-ns", ""))
        except Exception:  # it will come again on its way through here, and then be told, counted and logged
            return handover.THROUGH_GATEWAYS
        expert = self.experts[request.expert]
        replica = expert.choose()
        if replica is None:
            return handover.THROUGH_GATEWAYS
        request.spans_ns["forward"] = time.monotonic_ns() - request.t_routed_ns
        ticket, number = metadata.get(handover.TICKET, ""), expert.replicas.index(replica)
        told = self.handovers.begin(ticket, request, replica, number, self._told.who(request))
        return told or handover.THROUGH_GATEWAYS

    async def _read_requests(self, caller: Caller) -> None:
        """Do all requests of a stream.

        Raises
        ------
        Failure
            Of a client that wants its stream to end with the first one.
        """
        room = asyncio.Semaphore(self.limits.in_flight_per_stream)
        first = True
        async with asyncio.TaskGroup() as requests:  # cancelled with this call, which frees the experts' slots
            with caller.reading():
                while (message := await caller.context.read()) is not grpc.aio.EOF:
                    await room.acquire()
                    task = requests.create_task(self._answer(message, Request("stream", caller.peer), caller, first))
                    caller.tasks.add(task)
                    task.add_done_callback(caller.tasks.discard)
                    task.add_done_callback(lambda _: room.release())
                    first = False
        if caller.failure is not None:
            raise caller.failure

    async def _answer(self, message: bytes, request: Request, caller: Caller, first: bool) -> None:
        """Do one request of a stream; `first`: it is the one that the call's metadata describe."""
        try:
            try:
                if self._is_draining and not first:
                    raise Failure(StatusCode.UNAVAILABLE, "this gateway is shutting down")
                attempt = partial(relay, self._told, message, request, caller, first, caller.write)
                await self._run(message, request, caller, attempt)
            except Failure as failure:
                if caller.ends_on_error:
                    raise
                if first and request.expert >= 0:
                    await caller.begin(self._told.who(request))
                await caller.write(wire.encode_error(str(failure), request.id))
            finally:
                if first:
                    self._told.at_the_end(caller, request)
        except NobodyListens:
            pass
        except Failure as failure:
            caller.end(failure)
        except Exception as error:  # which would cancel all other requests of this stream, even those that send
            caller.end(_broken(request, error))

    async def _infer(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        caller = Caller(context, self._behind_proxy, self.limits)
        caller.ends_on_error = True
        request = Request("unary", caller.peer)
        try:
            with self._admitted(caller, "unary"):
                answer = await self._run(
                    message, request, caller, partial(collect, self._told, message, request, caller)
                )
            self._told.at_the_end(caller, request)
            return answer
        except NobodyListens:
            raise asyncio.CancelledError from None  # as gRPC is about to do
        except Failure as failure:
            self._told.at_the_end(caller, request)
            await context.abort(failure.code, failure.details)
            raise

    @contextlib.contextmanager
    def _admitted(self, caller: Caller, kind: str) -> Iterator[None]:
        try:
            with self._peers.stream(caller.peer), self.telemetry.streams.track_inprogress():
                self._callers.add(caller)
                try:
                    yield
                finally:
                    self._callers.remove(caller)
        except Refused as refusal:
            failure = Failure(StatusCode.RESOURCE_EXHAUSTED, str(refusal))
            self.telemetry.note(Request(kind, caller.peer, code=failure.code.name))
            raise failure from None

    async def _run(
        self,
        message: bytes,
        request: Request,
        caller: Caller,
        attempt: Callable[[Try], Awaitable[_Done]],
    ) -> _Done:
        """Route one request and let `attempt` do it; it is counted, whatever its end.

        Raises
        ------
        Failure
        """
        caller.in_flight += 1
        try:
            return await self._route_and_try(message, request, caller, attempt)
        except Failure as failure:
            request.code = failure.code.name
            raise
        except (asyncio.CancelledError, NobodyListens):
            request.code = StatusCode.CANCELLED.name
            raise
        except Exception as error:
            request.code = StatusCode.INTERNAL.name
            raise _broken(request, error) from None
        finally:
            caller.in_flight -= 1
            self.telemetry.note(request)

    async def _route_and_try(
        self,
        message: bytes,
        request: Request,
        caller: Caller,
        attempt: Callable[[Try], Awaitable[_Done]],
    ) -> _Done:
        await self._decision.classify(message, request, str(caller.metadata.get("er-sent-ns", "")))
        expert, turns = self.experts[request.expert], caller.turns(request.expert)
        await turns.acquire()
        with contextlib.ExitStack() as turn:
            turn.callback(turns.release)
            failed = self._failed(expert, caller)
            replica = expert.choose(besides=failed)
            if replica is None:
                n = len(expert.replicas)
                why = "failed before its first response" if failed else f"is down (all {n} of its servers)"
                raise Failure(StatusCode.UNAVAILABLE, f"expert {request.expert} {why}")
            if failed is None:
                try:
                    return await attempt(Try(replica, expert.has_other(replica), turn.close))
                except Failure as failure:
                    other = expert.choose(besides=replica)
                    if other is None or request.responses or failure.code is not StatusCode.UNAVAILABLE:
                        raise
                replica = other
            request.retries += 1
            return await attempt(Try(replica, False, turn.close))

    @staticmethod
    def _failed(expert: Expert, caller: Caller) -> Replica | None:
        """The replica that has failed a request which NGINX took there."""
        url = caller.metadata.get(wire.FAILED)
        failed = next((replica for replica in expert.replicas if replica.url == url), None)
        if failed is not None:
            failed.suspect()
        return failed


def _broken(request: Request, error: Exception) -> Failure:
    """What the client is told of our own faults; the log says where, but not the error's text, which may quote it."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %r: %s\n%s", request.id, type(error).__name__, trace)
    return Failure(StatusCode.INTERNAL, "the gateway failed; its log says why")
