"""One routing gateway as a process (papers, section III-A); the papers run sixteen behind NGINX.

Run as ``python -m erlib.gateway --port PORT --experts HOST:PORT,... --clusterer DIR`` (``--help`` has the rest). What
it does with a request is :mod:`erlib.gateway.service`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import prometheus_client
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from erlib.gateway import experts, handover
from erlib.gateway.limits import Limits
from erlib.gateway.service import Gateway
from erlib.gateway.telemetry import Telemetry, logger
from erlib.gateway.told import Distances
from erlib.machine.processes import StartError
from erlib.routing import policies
from erlib.routing.clusterer import Clusterer, ClustererError
from erlib.serving import wire

_SETTLE_S = 0.5
"""The last requests' status has been sent within this time."""


def distances_with(model: Clusterer) -> Distances:
    """Euclidean distances in the space in which `model` classifies."""
    return lambda prompt: np.linalg.norm(model.centres - model.transform([prompt]), axis=1).tolist()


@contextlib.asynccontextmanager
async def serving(
    gateway: Gateway,
    address: str,
    *,
    credentials: grpc.ServerCredentials | None = None,
    max_streams: int | None = None,
    silence_s: float = 30.0,
    drain_s: float = 30.0,
    insist_s: float = 0.0,
) -> AsyncIterator[int]:
    """Serve at `address`; gives the port. In the end, new requests are refused and old ones have time to end.

    Parameters
    ----------
    gateway : Gateway
    address : str
        ``host:port``; port 0 takes a free one.
    credentials : ServerCredentials, optional
        For TLS; None: plain text.
    max_streams : int, optional
        Calls of all clients at a time; more are refused as RESOURCE_EXHAUSTED.
    silence_s : float
        An expert that owes an answer and is silent for so long is asked whether it is alive.
    drain_s : float
        At most so long do old requests have.
    insist_s : float
        At most so long it waits for experts that refuse connections, before it listens. Connections that are being made
        are awaited in any case: a burst of requests is not the time to make them.

    Raises
    ------
    StartError
        If nothing can be served there.
    """
    options = dict(wire.CHANNEL_OPTIONS) | {
        "grpc.max_receive_message_length": gateway.limits.message_bytes,
        "grpc.so_reuseport": 0,
        # By default, a client that asks every few seconds whether a queued request is still alive loses its connection.
        "grpc.http2.max_ping_strikes": 0,
        # What clients may send by default, 8 KB, and what a proxy adds to it.
        "grpc.max_metadata_size": 9 << 10,
    }
    server = grpc.aio.server(options=list(options.items()), maximum_concurrent_rpcs=max_streams)
    server.add_generic_rpc_handlers((gateway,))
    standing = health.aio.HealthServicer()
    await standing.set(wire.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(standing, server)
    reflection.enable_server_reflection((wire.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    if missing := await experts.unconnected(gateway.experts, insist_s):
        logger.warning("no connection yet to %s", ", ".join(missing))
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:  # gRPC does not say why
        reasons = "the port is in use, the host is not this one" + (
            ", or key and certificate are none" * bool(credentials)
        )
        raise StartError(f"cannot listen at {address}: {reasons}") from None
    await server.start()
    replicas = experts.servers_of(gateway.experts)
    background = [
        asyncio.create_task(experts.watch(gateway.experts, silence_s)),
        *(asyncio.create_task(replica.keep_connected()) for replica in replicas),
    ]
    try:
        yield port
    finally:
        for task in background:
            task.cancel()
        await asyncio.wait(background)
        await _end(server, gateway, standing, drain_s)
        for replica in replicas:
            await replica.close()


async def _end(server: grpc.aio.Server, gateway: Gateway, standing: health.aio.HealthServicer, drain_s: float) -> None:
    """Refuse new requests, and give old ones time."""
    await standing.enter_graceful_shutdown()
    gateway.drain()
    stopped = asyncio.create_task(server.stop(drain_s))  # no new streams from now on
    idle_s = 0.0
    while not stopped.done() and idle_s < _SETTLE_S:
        await asyncio.wait({stopped}, timeout=0.05)
        idle_s = 0.0 if gateway.is_busy else idle_s + 0.05
    # What is left are streams that their clients merely keep open, and what slow clients have yet to take. There,
    # gRPC would wait for as long as they like.
    await asyncio.wait({stopped, asyncio.create_task(server.stop(None))}, timeout=_SETTLE_S)


def _router(args: argparse.Namespace, behind: Sequence[experts.Expert]) -> policies.Router:
    def outstanding() -> list[int]:
        return [sum(len(replica.calls) for replica in expert.replicas) for expert in behind]

    try:
        return policies.load(args.policy, args.clusterer, len(behind), args.index, outstanding)
    except ClustererError as error:
        raise StartError(f"--policy {args.policy}: {error}") from None


async def _run_until_signalled(args: argparse.Namespace) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    behind = experts.connect(args.experts, args.index, _expert_credentials(args))
    router = _router(args, behind)
    model = router.model if isinstance(router, policies.ByCluster) else None
    distances = distances_with(model) if isinstance(model, Clusterer) else None
    telemetry = Telemetry(behind, args.log_prompts)
    telemetry.watch(asyncio.get_running_loop())
    if args.metrics_port:
        try:
            prometheus_client.start_http_server(args.metrics_port, args.host, telemetry.registry)
        except OSError as error:
            raise StartError(f"cannot serve metrics at {args.host}:{args.metrics_port}: {error}") from None
    limits = Limits(
        args.max_prompt_bytes, args.max_streams_per_peer, args.max_requests_per_s, args.max_waiting_per_stream
    )
    thread = ThreadPoolExecutor(1) if args.policy in policies.SLOW else None
    gateway = Gateway(router.route, behind, args.index, distances, limits, telemetry, args.behind_proxy, thread)
    settings = {name: getattr(args, name) for name in ("max_streams", "silence_s", "drain_s", "insist_s")}
    address = f"{args.host}:{args.port}"
    gc.freeze()  # what is there now stays: no collection need look at it again
    async with contextlib.AsyncExitStack() as open_:
        if args.hands_over:  # NGINX, which waits for the port below, may ask from then on
            hearing = handover.hearing(gateway.decide, gateway.handovers, f"{args.host}:{args.hands_over}")
            await open_.enter_async_context(hearing)
        await open_.enter_async_context(serving(gateway, address, credentials=_server_credentials(args), **settings))
        await stopping.wait()


def _server_credentials(args: argparse.Namespace) -> grpc.ServerCredentials | None:
    if not args.tls_certificate:
        return None
    authority = args.tls_client_ca.read_bytes() if args.tls_client_ca else None
    pair = (args.tls_key.read_bytes(), args.tls_certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def _expert_credentials(args: argparse.Namespace) -> grpc.ChannelCredentials | None:
    if not args.expert_ca:
        return None
    key, certificate = (
        path.read_bytes() if path else None for path in (args.expert_client_key, args.expert_client_certificate)
    )
    return grpc.ssl_channel_credentials(args.expert_ca.read_bytes(), key, certificate)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m erlib.gateway", description="one routing gateway instance")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="other than loopback: see the TLS options")
    parser.add_argument(
        "--experts", required=True, help="comma-separated gRPC addresses, one per cluster, in order; replicas: A|B"
    )
    parser.add_argument(
        "--clusterer",
        type=Path,
        required=True,
        help="what building.build_clusterer, sklearn_pipeline.build or embedding_export.build made",
    )
    parser.add_argument(
        "--policy",
        choices=policies.POLICIES,
        default="classify",
        help="how an expert is chosen, see erlib.routing.policies.load",
    )
    parser.add_argument(
        "--hands-over", type=int, metavar="PORT", help="where an NGINX that relays asks for the expert (TCP, and UDP)"
    )
    parser.add_argument("--index", type=int, default=0, help="which of the instances this is")
    parser.add_argument(
        "--silence-s", type=_positive(float), default=30.0, help="after which an expert is asked if it is alive"
    )
    parser.add_argument("--drain-s", type=float, default=30.0, help="time for running requests after SIGTERM")
    parser.add_argument(
        "--insist-s", type=float, default=0.0, help="at most so long wait for experts that refuse connections, to begin"
    )

    limits = parser.add_argument_group("limits, of this instance")
    limits.add_argument("--max-prompt-bytes", type=_positive(int), default=Limits.prompt_bytes)
    limits.add_argument("--max-streams", type=_positive(int), help="of all clients")
    limits.add_argument("--max-streams-per-peer", type=_positive(float), default=math.inf)
    limits.add_argument("--max-requests-per-s", type=_positive(float), default=math.inf, help="per peer")
    limits.add_argument(
        "--max-waiting-per-stream",
        type=_positive(int),
        default=Limits.waiting_per_stream,
        help="requests of one stream that wait for one expert; more are held back, not refused",
    )
    limits.add_argument("--behind-proxy", action="store_true", help="x-real-ip names the peer")

    seen = parser.add_argument_group("seen from outside")
    seen.add_argument("--metrics-port", type=int, help="serve Prometheus metrics there")
    seen.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    seen.add_argument("--log-prompts", action="store_true", help="debug lines hold the prompts' text")

    tls = parser.add_argument_group("TLS (PEM files)")
    tls.add_argument("--tls-certificate", type=Path, help="of this gateway; without it, plain text is spoken")
    tls.add_argument("--tls-key", type=Path)
    tls.add_argument("--tls-client-ca", type=Path, help="clients must have a certificate that it signed")
    tls.add_argument("--expert-ca", type=Path, help="speak TLS to the experts, whose certificates it signed")
    tls.add_argument("--expert-client-certificate", type=Path, help="to show them")
    tls.add_argument("--expert-client-key", type=Path)
    return parser


def _positive(kind: type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
        return value

    return number


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, of which no part is ignored: plain text must not be spoken where TLS was asked for."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if bool(args.tls_certificate) != bool(args.tls_key):
        parser.error("--tls-certificate and --tls-key go together")
    if args.tls_client_ca and not args.tls_certificate:
        parser.error("--tls-client-ca needs --tls-certificate")
    if bool(args.expert_client_certificate) != bool(args.expert_client_key):
        parser.error("--expert-client-certificate and --expert-client-key go together")
    if args.expert_client_certificate and not args.expert_ca:
        parser.error("--expert-client-certificate needs --expert-ca")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of one gateway process; by default its arguments are the command line's."""
    args = _parsed(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("erlib").setLevel(args.log_level.upper())  # gRPC's own debug lines are many, and not of requests
    try:
        asyncio.run(_run_until_signalled(args))
    except (StartError, OSError) as error:  # OSError: a file that is not there
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
