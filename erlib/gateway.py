"""The routing gateway (papers, section III-A): a reverse proxy that classifies a prompt and relays the answer.

It speaks the same gRPC service as the experts, reads nothing of a request but its prompt and nothing of a response:
tokens pass through as raw bytes. One process is one instance; the papers run sixteen behind NGINX.

Run as ``python -m erlib.gateway --port PORT --experts HOST:PORT,... --clusterer DIR [--policy POLICY --index I]``.

Metadata, all times in ns: a client may send ``er-sent-ns`` (its CLOCK_MONOTONIC, meaningful on one host). When it has
forwarded the prompt, the gateway answers with ``er-gateway`` (which instance), ``er-expert`` and the spans
``er-queue-ns`` (client's send to prompt read), ``er-vectorise-ns``, ``er-svd-ns``, ``er-kmeans-ns`` and
``er-forward-ns`` (classified to written to the expert); at the end follows ``er-first-byte-ns`` (written to the
expert's first response). On a stream that carries several requests they describe the first one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from erlib import wire
from erlib.clusterer import Clusterer

if TYPE_CHECKING:
    from erlib import stock

Route = Callable[[str], tuple[int, Sequence[int]]]
"""Prompt -> expert and (vectorise, svd, k-means) ns."""


class Gateway(grpc.GenericRpcHandler):
    """All methods of the inference service: streaming inference is routed, the rest goes to the first expert."""

    def __init__(self, route: Route, experts: Sequence[str], index: int):
        self._route = route
        self._index = index
        channels = [grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) for url in experts]
        self._streams = [channel.stream_stream(wire.STREAM_INFER) for channel in channels]
        self._first = channels[0]

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        if method == wire.STREAM_INFER:
            return grpc.stream_stream_rpc_method_handler(self._stream_infer)
        if method.startswith(f"/{wire.SERVICE}/"):
            return grpc.unary_unary_rpc_method_handler(self._pass_to_first(method))
        return None

    def _pass_to_first(self, method: str) -> Callable[..., Any]:
        async def relay(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            try:
                return await self._first.unary_unary(method)(request, timeout=context.time_remaining())
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
                raise

        return relay

    async def _stream_infer(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        requests: set[asyncio.Task[None]] = set()
        one_writer = asyncio.Lock()  # gRPC takes one write at a time; requests of one stream interleave
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                task = asyncio.create_task(self._serve(message, context, one_writer, first=not requests))
                requests.add(task)
            if requests:
                await asyncio.gather(*requests)
        finally:  # the client has cancelled: so do we, which frees the experts' slots
            for task in requests:
                task.cancel()

    async def _serve(
        self, message: bytes, context: grpc.aio.ServicerContext, one_writer: asyncio.Lock, first: bool
    ) -> None:
        request_id = ""
        try:
            request_id, prompt = wire.prompt_of(message)
        except wire.BadRequest as error:
            await self._write(context, one_writer, wire.encode_error(str(error), request_id))
            return
        t_read = time.monotonic_ns()
        expert, (vectorise_ns, svd_ns, kmeans_ns) = self._route(prompt)
        t_classified = time.monotonic_ns()
        call = self._streams[expert](timeout=context.time_remaining())
        try:
            try:
                await call.write(message)
                await call.done_writing()
            finally:
                t_forwarded = time.monotonic_ns()
                if first:  # only now, because it would have delayed the prompt
                    sent = str(dict(context.invocation_metadata() or ()).get("er-sent-ns", ""))
                    spans = {"queue": t_read - int(sent)} if sent.isdigit() else {}
                    spans |= {"vectorise": vectorise_ns, "svd": svd_ns, "kmeans": kmeans_ns}
                    spans |= {"forward": t_forwarded - t_classified}
                    times = [(f"er-{span}-ns", str(ns)) for span, ns in spans.items()]
                    who = [("er-gateway", str(self._index)), ("er-expert", str(expert))]
                    await context.send_initial_metadata((*who, *times))
            t_first = 0
            async for response in call:
                t_first = t_first or time.monotonic_ns()
                await self._write(context, one_writer, response)
            if first:
                context.set_trailing_metadata((("er-first-byte-ns", str(max(0, t_first - t_forwarded))),))
        except grpc.aio.AioRpcError as error:
            reason = f"expert {expert} failed: {error.code().name}: {error.details()}"
            await self._write(context, one_writer, wire.encode_error(reason, request_id))
        finally:
            call.cancel()

    @staticmethod
    async def _write(context: grpc.aio.ServicerContext, one_writer: asyncio.Lock, message: bytes) -> None:
        async with one_writer:
            await context.write(message)


def classify_with(model: Clusterer | stock.Router) -> Route:
    """The papers' policy: the expert of the prompt's cluster."""
    return model.route


def replicas(n_experts: int, index: int) -> Route:
    """Baseline without classification: experts in turn.

    Gateway `index` begins at expert `index`, so that gateways behind a round-robin balancer, which start out in step,
    do not all begin at the same expert.
    """
    turn = itertools.count(index)
    return lambda prompt: (next(turn) % n_experts, (0, 0, 0))


async def serve(route: Route, experts: Sequence[str], port: int, host: str, index: int) -> None:
    """Serve until SIGTERM or SIGINT, then let running streams end for up to two seconds."""
    server = grpc.aio.server(options=[*wire.CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Gateway(route, experts, index),))
    if server.add_insecure_port(f"{host}:{port}") == 0:
        raise SystemExit(f"port {port} is in use")
    await server.start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await stopping.wait()
    await server.stop(grace=2)


def main() -> None:
    """Entry point of one gateway process."""
    parser = argparse.ArgumentParser(prog="python -m erlib.gateway", description="one routing gateway instance")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--experts", required=True, help="comma-separated gRPC addresses, one per cluster, in order")
    parser.add_argument("--clusterer", type=Path, required=True, help="directory of clusterer.build or stock.build")
    parser.add_argument(
        "--policy",
        choices=["classify", "stock", "replicas"],
        default="classify",
        help="stock: classify with the unpickled scikit-learn pipeline that stock.build left in --clusterer",
    )
    parser.add_argument("--index", type=int, default=0, help="which of the instances this is")
    args = parser.parse_args()
    experts = args.experts.split(",")
    if args.policy == "replicas":
        route = replicas(len(experts), args.index)
    else:
        model = _stock(args.clusterer) if args.policy == "stock" else Clusterer.load(args.clusterer)
        if model.n_clusters != len(experts):
            raise SystemExit(f"{model.n_clusters} clusters need as many experts; --experts names {len(experts)}")
        route = classify_with(model)
    asyncio.run(serve(route, experts, args.port, args.host, args.index))


def _stock(directory: Path) -> stock.Router:
    from erlib import stock  # brings scikit-learn along, which the others do without

    return stock.load(directory)


if __name__ == "__main__":
    main()
