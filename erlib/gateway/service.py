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
from typing import NamedTuple, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb

from erlib.gateway import handover
from erlib.gateway.callers import Caller, Failure, NobodyListens, forwarded, pairs
from erlib.gateway.experts import SERVER_AT_FAULT, Expert, Replica
from erlib.gateway.handover import Handovers
from erlib.gateway.limits import Limits, Peers, Refused
from erlib.gateway.telemetry import Request, Telemetry, logger
from erlib.routing.policies import Route
from erlib.serving import wire

Distances = Callable[[str], Sequence[float]]
"""Prompt -> its distance to each cluster's centre."""

_QUESTIONS = ["ServerReady", "ModelReady", "ModelMetadata", "ModelConfig", "RepositoryIndex"]
"""Methods that any live server is asked to answer. Those that would change a server are not offered."""
_EXTENSIONS = {"classification", "model_configuration", "parameters", "schedule_policy", "statistics"}
"""Of what Triton says that it offers, what it offers through a gateway, too."""
_SILENT = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
"""How a question ends that a server has not answered."""
_METADATA_BYTES = 8 << 10
"""What any gRPC server takes; NGINX would not notice that it does not."""
_UNREADABLE = "the expert's answer cannot be read"
_TIME_DIGITS = 20
"""More than this host's clock can show."""

_Done = TypeVar("_Done")


class _Try(NamedTuple):
    """One try to have a request done."""

    replica: Replica
    has_spare: bool
    """Whether there may be another one."""
    begun: Callable[[], None]
    """To be called when the replica has begun to answer."""


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
        Where `route` is called if it takes so long that others' tokens would have to wait; by default in the event
        loop, because to hand a prompt to a thread costs about as much as c-BTM's decision itself.
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
        self._route = route
        self.index = index
        self._distances = distances
        self._peers = Peers(limits)
        self._behind_proxy = behind_proxy
        self._thread = thread
        self.handovers = Handovers(self.telemetry.note)
        self._is_draining = False
        self._callers: set[Caller] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method == wire.STREAM_INFER:
            return grpc.stream_stream_rpc_method_handler(self._stream_infer)
        service, _, name = method.removeprefix("/").partition("/")
        answer = {
            "ModelInfer": self._infer,
            "ModelStatistics": self._statistics,
            "ServerLive": self._live,
            "ServerMetadata": self._metadata,
            **{question: partial(self._ask, question) for question in _QUESTIONS},
        }.get(name)
        return grpc.unary_unary_rpc_method_handler(answer) if service == wire.SERVICE and answer else None

    def drain(self) -> None:
        """From now on do what streams that are already open have asked for, and no more."""
        self._is_draining = True

    def who(self, request: Request) -> dict[str, int | str]:
        """What the client is told of its request when it has been forwarded."""
        return {"er-gateway": self.index, "er-expert": request.expert, **request.span_metadata}

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
            await self._classify(message, request, metadata.get("er-sent-ns", ""))
        except Exception:  # it will come again on its way through here, and then be told, counted and logged
            return handover.THROUGH_GATEWAYS
        expert = self.experts[request.expert]
        replica = expert.choose()
        if replica is None:
            return handover.THROUGH_GATEWAYS
        request.spans_ns["forward"] = time.monotonic_ns() - request.t_routed_ns
        ticket, number = metadata.get(handover.TICKET, ""), expert.replicas.index(replica)
        told = self.handovers.begin(ticket, request, replica, number, self.who(request))
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
                relay = partial(self._relay, message, request, caller, first, caller.write)
                await self._run(message, request, caller, relay)
            except Failure as failure:
                if caller.ends_on_error:
                    raise
                if first and request.expert >= 0:
                    await caller.begin(self.who(request))
                await caller.write(wire.encode_error(str(failure), request.id))
            finally:
                if first:
                    self._set_trailing_metadata(caller, request)
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
                answer = await self._run(message, request, caller, partial(self._collect, message, request, caller))
            self._set_trailing_metadata(caller, request)
            return answer
        except NobodyListens:
            raise asyncio.CancelledError from None  # as gRPC is about to do
        except Failure as failure:
            self._set_trailing_metadata(caller, request)
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
        attempt: Callable[[_Try], Awaitable[_Done]],
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
        attempt: Callable[[_Try], Awaitable[_Done]],
    ) -> _Done:
        await self._classify(message, request, str(caller.metadata.get("er-sent-ns", "")))
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
                    return await attempt(_Try(replica, expert.has_other(replica), turn.close))
                except Failure as failure:
                    other = expert.choose(besides=replica)
                    if other is None or request.responses or failure.code is not StatusCode.UNAVAILABLE:
                        raise
                replica = other
            request.retries += 1
            return await attempt(_Try(replica, False, turn.close))

    @staticmethod
    def _failed(expert: Expert, caller: Caller) -> Replica | None:
        """The replica that has failed a request which NGINX took there."""
        url = caller.metadata.get(wire.FAILED)
        failed = next((replica for replica in expert.replicas if replica.url == url), None)
        if failed is not None:
            failed.suspect()
        return failed

    async def _classify(self, message: bytes, request: Request, sent: str) -> None:
        """Note in `request` which expert it is for; `sent`: the client's ``er-sent-ns``.

        Raises
        ------
        Failure
        """
        try:
            self._peers.charge(request.peer)
            request.id, request.prompt = wire.prompt_of(message, self.limits.prompt_bytes)
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

    async def _relay(
        self,
        prompt: bytes,
        request: Request,
        caller: Caller,
        first: bool,
        hand_on: Callable[[bytes], Awaitable[None]],
        this: _Try,
    ) -> None:
        """Hand a replica's answer on, as it comes."""
        replica = this.replica
        request.replica = replica.url
        call = replica.stream_infer(prompt, timeout=caller.context.time_remaining(), metadata=caller.forwarded)
        with replica.busy_with(call), _blaming(replica, request):
            await asyncio.sleep(0)  # in which the call is handed to gRPC
            t_forwarded_ns = time.monotonic_ns()
            request.spans_ns["forward"] = t_forwarded_ns - request.t_routed_ns
            if first:
                await caller.begin(self.who(request))  # only now, because it would have delayed the prompt
            async for message in call:
                response, failure = message, _in_stream_failure(message) if wire.is_error(message) else None
                is_first = not request.responses
                if is_first:
                    request.spans_ns["first_byte"] = time.monotonic_ns() - t_forwarded_ns
                if failure is None:
                    replica.responses += 1
                elif failure.code.name in SERVER_AT_FAULT:
                    replica.suspect()
                    if is_first and this.has_spare:
                        raise Failure(StatusCode.UNAVAILABLE, "its first word was an error")
                if is_first:
                    this.begun()
                    if caller.explain:
                        request.explanation = self._explanation(request)
                        response = wire.with_parameters(response, request.explanation)
                request.responses += 1
                if failure is not None:
                    request.expert_error = failure.code.name
                    if caller.ends_on_error:
                        raise failure
                await hand_on(response)
            request.trailing_metadata = tuple(await call.trailing_metadata())

    async def _collect(self, message: bytes, request: Request, caller: Caller, this: _Try) -> bytes:
        """A replica's one answer. It is asked for as a stream, too: Triton answers only so where a model can stream."""
        answers: list[bytes] = []

        async def keep(response: bytes) -> None:
            if answers:
                advice = "send stream: false, or use ModelStreamInfer"
                raise Failure(StatusCode.INVALID_ARGUMENT, f"ModelInfer has room for one response only: {advice}")
            answers.append(response)

        await self._relay(message, request, caller, True, keep, this)
        if not answers:
            raise Failure(StatusCode.INTERNAL, f"expert {request.expert} has sent no answer")
        try:
            return wire.unary(answers[0])
        except DecodeError:
            raise Failure(StatusCode.UNKNOWN, _UNREADABLE) from None

    # --- what a client is told about its request ---

    def _explanation(self, request: Request) -> dict[str, int | str]:
        told = self.who(request) | {"er-replica": request.replica}
        if self._distances is not None:
            told["er-distances"] = ",".join(f"{distance:.6g}" for distance in self._distances(request.prompt))
        return told

    def _set_trailing_metadata(self, caller: Caller, request: Request) -> None:
        if caller.explain and request.expert >= 0:
            ours = request.explanation or self.who(request)
        else:
            ours = {name: ns for name, ns in request.span_metadata.items() if name == "er-first-byte-ns"}
        caller.context.set_trailing_metadata((*request.trailing_metadata, *pairs(ours)))

    # --- everything else ---

    async def _live(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def _metadata(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        reply = pb.ServerMetadataResponse.FromString(await self._ask("ServerMetadata", message, context))
        reply.extensions[:] = [extension for extension in reply.extensions if extension in _EXTENSIONS]
        return reply.SerializeToString()

    async def _ask(self, question: str, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Ask one server after the other until one answers."""
        last = Failure(
            StatusCode.UNAVAILABLE, "this gateway is shutting down" if self._is_draining else "no expert is up"
        )
        for expert in [] if self._is_draining else self.experts:
            replica = expert.choose()
            if replica is None:
                continue
            try:
                return await self._ask_one(replica, question, message, context)
            except Failure as failure:
                last = failure
                if failure.code not in _SILENT:
                    break
        await context.abort(last.code, last.details)
        raise last

    async def _statistics(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Statistics of all live servers, one entry each."""
        servers = [replica for expert in self.experts for replica in expert.replicas if replica.is_up]
        questions = [self._ask_one(replica, "ModelStatistics", message, context) for replica in servers]
        replies = await asyncio.gather(*questions, return_exceptions=True)
        good = [reply for reply in replies if isinstance(reply, bytes)]
        if not good:
            await self._ask("ModelStatistics", message, context)
        return b"".join(good)  # serialised messages one behind the other are one that has the elements of all

    @staticmethod
    async def _ask_one(replica: Replica, question: str, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return await replica.ask(question, message, context.time_remaining(), forwarded(context))
        except grpc.aio.AioRpcError as error:
            if error.code() in _SILENT:
                replica.suspect(infer=False)
            raise Failure(error.code(), error.details() or "") from None


@contextlib.contextmanager
def _blaming(replica: Replica, request: Request) -> Iterator[None]:
    """What goes wrong between a replica and us, as what the client is told."""
    who = f"expert {request.expert}"
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code().name in SERVER_AT_FAULT:
            replica.suspect()
        reason = error.details() if replica.is_connected else f"no connection to {replica.url}: {error.details()}"
        raise Failure(error.code(), f"{who} failed: {reason}") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # our client has gone
            raise
        raise Failure(StatusCode.UNAVAILABLE, f"{who} has fallen silent and is given up") from None


def _in_stream_failure(message: bytes) -> Failure:
    """An expert's serialised in-stream error, as the status that its client may prefer."""
    try:
        return Failure(*wire.status_of(pb.ModelStreamInferResponse.FromString(message).error_message))
    except DecodeError:
        return Failure(StatusCode.UNKNOWN, _UNREADABLE)


def _broken(request: Request, error: Exception) -> Failure:
    """What the client is told of our own faults; the log says where, but not the error's text, which may quote it."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %r: %s\n%s", request.id, type(error).__name__, trace)
    return Failure(StatusCode.INTERNAL, "the gateway failed; its log says why")
