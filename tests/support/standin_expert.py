"""Experts that misbehave on command, for the tests of the gateway; in the test's own process or in one of their own.

A prompt says what is to happen to it, e.g. ``"2 n=50 gap=0.01 fail_after=3"``: its expert, then :class:`Orders`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2 as pb

from erlib.gateway import experts, handover, process, service
from erlib.serving import wire


@dataclasses.dataclass
class Orders:
    """What a prompt asks of the stand-in; times in s."""

    n: int = 3
    """responses"""
    first: float = 0.0
    """before the first response"""
    gap: float = 0.0
    """between two responses"""
    bytes: int = 2
    """of a response's text"""
    fail_after: int = -1
    """responses; then the call ends with `code` and `reason`"""
    code: str = "UNAVAILABLE"
    reason: str = "as ordered"
    error: str = ""
    """in-stream error, the only response; ~ stands for a space"""
    exit_after: int = -1
    """responses; then the process is gone as after kill -9"""

    @classmethod
    def of(cls, prompt: str) -> Orders:
        types = {field.name: {"int": int, "float": float, "str": str}[field.type] for field in dataclasses.fields(cls)}
        pairs = (word.partition("=") for word in prompt.split() if "=" in word)
        return cls(**{name: types[name](value) for name, _, value in pairs if name in types})


EXTENSIONS = [
    "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
    "model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters",
    "statistics", "trace", "logging",
]  # fmt: skip
"""What Triton says that it offers."""


def response(text: bytes, number: int, request_id: str = "") -> bytes:
    """One token as an expert sends it."""
    reply = pb.ModelStreamInferResponse()
    inner = reply.infer_response
    inner.model_name, inner.id = wire.MODEL_NAME, request_id
    inner.outputs.add(name="text_output", datatype="BYTES", shape=[1, 1])
    inner.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1])
    inner.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
    inner.raw_output_contents.append(number.to_bytes(4, "little"))
    return reply.SerializeToString()


@dataclasses.dataclass
class Seen:
    """One request as the stand-in saw it."""

    message: bytes
    metadata: list[tuple[str, str | bytes]]
    time_remaining_s: float | None
    sent: int = 0
    end: str = ""
    """``done``, ``cancelled`` or ``failed``."""
    t_end_s: float = 0.0


class StandIn(grpc.GenericRpcHandler):
    """An expert's service.

    Parameters
    ----------
    answer : callable, optional
        Raw request to raw responses, instead of what the prompt orders.
    """

    def __init__(self, answer: Callable[[bytes], Sequence[bytes]] | None = None):
        self.answer = answer
        self.seen: list[Seen] = []
        self.questions: list[str] = []
        self.shown: list[tuple[str, str | bytes]] = []
        """Metadata of the last question."""
        self.tells: Sequence[tuple[str, str | bytes]] = (("from-expert", "yes"), ("binary-bin", b"\x00\xff"))
        """Its trailing metadata."""
        self.url = ""
        self.is_ready = True
        self.context_tokens: int | None = None
        """What it says that a prompt and its answer may have together."""
        self.slots = 10**9
        """Streams at a time; more are refused as by a server whose queue is full."""
        self.line = asyncio.Semaphore(10**9)
        """What a request has while it is done; others stand in line."""
        self._busy = self._failures = 0
        self.broken = ""
        """If not empty: the in-stream error that every inference gets, as from a server whose backend is dead."""

    @property
    def requests(self) -> list[Seen]:
        """What it has seen, canaries aside."""
        return [seen for seen in self.seen if seen.message != experts.CANARY]

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = handler_call_details.method.rpartition("/")[2]
        if name == "ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(self._stream_infer)
        if name == "ModelInfer":
            return grpc.unary_unary_rpc_method_handler(self._infer)

        async def question(message: bytes, context: grpc.aio.ServicerContext) -> bytes:
            self.questions.append(name)
            self.shown = list(context.invocation_metadata() or ())
            config = pb.ModelConfigResponse()
            if self.context_tokens is not None:
                config.config.parameters[wire.CONTEXT].string_value = str(self.context_tokens)
            reply = {
                "ServerReady": pb.ServerReadyResponse(ready=self.is_ready),
                "ModelReady": pb.ModelReadyResponse(ready=self.is_ready),
                "ServerMetadata": pb.ServerMetadataResponse(name="triton", version="2.51", extensions=EXTENSIONS),
                "ModelMetadata": pb.ModelMetadataResponse(name=wire.MODEL_NAME, platform=self.url),
                "ModelConfig": config,
                "ModelStatistics": pb.ModelStatisticsResponse(
                    model_stats=[
                        pb.ModelStatistics(
                            name=wire.MODEL_NAME,
                            inference_count=len(self.requests),
                            inference_stats=pb.InferStatistics(fail=pb.StatisticDuration(count=self._failures)),
                        )
                    ]
                ),
            }.get(name)
            if reply is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, name)
            return reply.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(question)

    async def _infer(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ModelInfer does not take models that can stream")
        raise AssertionError

    async def _stream_infer(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            self.seen.append(seen := _seen(message, context))
            context.set_trailing_metadata(tuple(self.tells))
            try:
                await self._answer(message, context, seen)
                seen.end = "done"
            except asyncio.CancelledError:
                seen.end = "cancelled"
                raise
            except grpc.aio.AbortError:
                seen.end = "failed"
                raise
            finally:
                seen.t_end_s = time.monotonic()

    async def _answer(self, message: bytes, context: grpc.aio.ServicerContext, seen: Seen) -> None:
        self._failures += bool(self.broken)
        if self.broken or self._busy >= self.slots:
            await context.write(wire.encode_error(self.broken or "Exceeds maximum queue size"))
            return
        self._busy += 1
        try:
            async with self.line:
                await self._do(message, context, seen)
        finally:
            self._busy -= 1

    async def _do(self, message: bytes, context: grpc.aio.ServicerContext, seen: Seen) -> None:
        if self.answer is not None:
            for one in self.answer(message):
                await context.write(one)
                seen.sent += 1
            return
        request_id, prompt = wire.prompt_of(message)
        orders = Orders.of(prompt)
        await asyncio.sleep(orders.first)
        if orders.error:
            await context.write(wire.encode_error(orders.error.replace("~", " "), request_id))
            return
        for number in range(orders.n):
            if number == orders.exit_after:
                import os

                os._exit(9)
            if number == orders.fail_after:
                await context.abort(grpc.StatusCode[orders.code], orders.reason)
            await context.write(response(b"t" * orders.bytes, number, request_id))
            seen.sent += 1
            await asyncio.sleep(orders.gap)


def _seen(message: bytes, context: grpc.aio.ServicerContext) -> Seen:
    return Seen(message, list(context.invocation_metadata() or ()), context.time_remaining())


@asynccontextmanager
async def standin(
    answer: Callable[[bytes], Sequence[bytes]] | None = None,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[StandIn]:
    """An expert at an address, in this process; closed like one that is shut down."""
    expert = StandIn(answer)
    server = grpc.aio.server(options=[*wire.CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((expert,))
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    expert.url = f"{address.rpartition(':')[0]}:{port}"
    await server.start()
    try:
        yield expert
    finally:
        await server.stop(None)


def first_word(prompt: str) -> tuple[int, Sequence[int]]:
    """A router that a test can command."""
    return int(prompt.split(maxsplit=1)[0]), (1, 2, 3)


@dataclasses.dataclass
class Front:
    """A gateway, its address and a channel to it."""

    gateway: service.Gateway
    url: str
    channel: grpc.aio.Channel
    asked_at: str
    """Where an NGINX that relays asks it."""

    def stream(self, *messages: bytes, **arguments) -> grpc.aio.StreamStreamCall:
        """A stream that sends `messages` and then says that there are no more."""
        return self.channel.stream_stream(wire.STREAM_INFER)(iter(messages), **arguments)

    async def ask(self, prompt: str, request_id: str = "", **arguments) -> list[wire.Response]:
        """All responses to one prompt."""
        message = wire.encode_request(prompt, 1, request_id=request_id)
        return [wire.decode_response(one) async for one in self.stream(message, **arguments)]


@asynccontextmanager
async def front(
    addresses: str,
    *,
    silence_s: float = 30.0,
    drain_s: float = 5.0,
    max_streams: int | None = None,
    insist_s: float = 0.0,
    hands_over: bool = False,
    **arguments,
) -> AsyncIterator[Front]:
    """A gateway in front of experts (replicas of one joined by ``|``), in this process, and a channel to it."""
    behind = experts.connect(addresses)
    routing = service.Gateway(arguments.pop("route", first_word), behind, **arguments)
    settings = {"silence_s": silence_s, "drain_s": drain_s, "max_streams": max_streams, "insist_s": insist_s}
    async with AsyncExitStack() as exits:
        asked_at = ""
        if hands_over:
            hearing = handover.hearing(routing.decide, routing.handovers, "127.0.0.1:0")
            asked_at = await exits.enter_async_context(hearing)
        url = f"127.0.0.1:{await exits.enter_async_context(process.serving(routing, '127.0.0.1:0', **settings))}"
        channel = grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS)
        yield Front(routing, url, await exits.enter_async_context(channel), asked_at)


@asynccontextmanager
async def setting(
    *n_replicas: int, before: Sequence[str] = (), **arguments
) -> AsyncIterator[tuple[Front, list[StandIn]]]:
    """A gateway in front of so many replicas of each expert; gives it and all stand-ins.

    Expert 0 has those at the addresses `before`, too, as its first replicas.
    """
    async with AsyncExitStack() as exits:
        groups = [[await exits.enter_async_context(standin()) for _ in range(n)] for n in n_replicas]
        urls = [[one.url for one in group] for group in groups]
        urls[0] = [*before, *urls[0]]
        addresses = ",".join("|".join(group) for group in urls)
        yield await exits.enter_async_context(front(addresses, **arguments)), [one for group in groups for one in group]


async def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> float:
    """Wait until `condition` holds; returns how long that took."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > within_s:
            pytest.fail(f"not within {within_s:g} s")
        await asyncio.sleep(0.002)
    return time.monotonic() - began_s


async def _main(address: str) -> None:
    async with standin(address=address):
        print("up", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
