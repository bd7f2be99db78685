"""One try to have a request done: a replica's answer, handed on as it comes or collected."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

import grpc.aio
from google.protobuf.message import DecodeError
from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb

from erlib.gateway.callers import Caller, Failure
from erlib.gateway.experts import SERVER_AT_FAULT, Replica
from erlib.gateway.telemetry import Request
from erlib.gateway.told import Told
from erlib.serving import wire

_UNREADABLE = "the expert's answer cannot be read"


class Try(NamedTuple):
    """One try to have a request done."""

    replica: Replica
    has_spare: bool
    """Whether there may be another one."""
    begun: Callable[[], None]
    """To be called when the replica has begun to answer."""


async def relay(
    told: Told,
    prompt: bytes,
    request: Request,
    caller: Caller,
    first: bool,
    hand_on: Callable[[bytes], Awaitable[None]],
    this: Try,
) -> None:
    """Hand a replica's answer on, as it comes."""
    replica = this.replica
    request.replica = replica.url
    metadata = (*caller.forwarded, (wire.EXPERT, str(request.expert)))
    call = replica.stream_infer(prompt, timeout=caller.context.time_remaining(), metadata=metadata)
    with replica.busy_with(call), _blaming(replica, request):
        await asyncio.sleep(0)  # in which the call is handed to gRPC
        t_forwarded_ns = time.monotonic_ns()
        request.spans_ns["forward"] = t_forwarded_ns - request.t_routed_ns
        if first:
            await caller.begin(told.who(request))  # only now, because it would have delayed the prompt
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
                    request.explanation = told.explanation(request)
                    response = wire.with_parameters(response, request.explanation)
            request.responses += 1
            if failure is not None:
                request.expert_error = failure.code.name
                if caller.ends_on_error:
                    raise failure
            await hand_on(response)
        request.trailing_metadata = tuple(await call.trailing_metadata())


async def collect(told: Told, message: bytes, request: Request, caller: Caller, this: Try) -> bytes:
    """A replica's one answer. It is asked for as a stream, too: Triton answers only so where a model can stream."""
    answers: list[bytes] = []

    async def keep(response: bytes) -> None:
        if answers:
            advice = "send stream: false, or use ModelStreamInfer"
            raise Failure(StatusCode.INVALID_ARGUMENT, f"ModelInfer has room for one response only: {advice}")
        answers.append(response)

    await relay(told, message, request, caller, True, keep, this)
    if not answers:
        raise Failure(StatusCode.INTERNAL, f"expert {request.expert} has sent no answer")
    try:
        return wire.unary(answers[0])
    except DecodeError:
        raise Failure(StatusCode.UNKNOWN, _UNREADABLE) from None


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
