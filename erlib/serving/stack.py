"""Everything between the users and the engines: up, proven to work by a canary inference, and down without a trace."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio

from erlib.config import Routing, ServingSettings
from erlib.config.system import HAVE_GATEWAYS
from erlib.machine import hardware, processes
from erlib.machine.processes import StartError
from erlib.serving import wire
from erlib.serving.nginx import Nginx
from erlib.serving.share import Classifier, Gateway, Placement, Share
from erlib.serving.triton import ServerPlan, TritonServer

_CANARY = "How long does a letter take from one end of the country to the other?"

Result = TypeVar("Result")


class NodeLost(RuntimeError):
    """A host of a stack is gone, and with it what it ran; the message names both."""


class Stack:
    """One system under test, as a context manager.

    Parameters
    ----------
    label : str
        Configuration, for messages and log names.
    servers : list of ServerPlan
        One Triton server each.
    routing : Routing
        ``direct``, ``round_robin``, ``expert_router`` or ``replicas``; see :data:`erlib.config.Routing`.
    settings : ServingSettings
        Ports, number of gateways, timeouts.
    clusterer : Path or None
        Directory of the router's model (only for the two routings with gateways).
    log_dir : Path
        Logs are kept here; everything else that a run leaves is removed.
    classifier : {"ours", "stock"}
        How the gateways of ``expert_router`` classify.
    placement : Placement, optional
        Of as many servers and gateways; by default everything is on this host, at ``settings.host``.
    replicas : sequence of int, optional
        How many of `servers`, in their order, each expert has; by default one.
    adapters : int
        How many experts each server has, all of them, as adapters of one model: then every server is a replica of every
        expert, and is told which one a request is for. 0: one expert each.
    metrics_port : int, optional
        Gateway i serves Prometheus metrics at this port + i.

    Raises
    ------
    StartError
        On entering, if anything is missing, a port is in use or a server does not answer the canary.

    Notes
    -----
    Ports, from ``settings.base_port``: NGINX, two for each gateway, then three for each server.
    """

    def __init__(
        self,
        label: str,
        servers: list[ServerPlan],
        routing: Routing,
        settings: ServingSettings,
        clusterer: Path | None,
        log_dir: Path,
        classifier: Classifier = "ours",
        placement: Placement | None = None,
        replicas: Sequence[int] | None = None,
        metrics_port: int | None = None,
        adapters: int = 0,
    ):
        has_gateways = routing in HAVE_GATEWAYS
        hands_over = settings.relay == "front"
        if placement is None:
            gateways = (0,) * (settings.gateways if has_gateways else 0)
            placement = Placement((settings.host,), (0,) * len(servers), gateways, 0, ("",))
        addresses, directories = placement.addresses, [log_dir / name for name in placement.log_dirs]
        first = settings.base_port + 1 + settings.gateways * Gateway.PORTS
        self.servers = [
            plan.server(f"{label}-{i}", first + i * TritonServer.PORTS, directories[host], addresses[host])
            for i, (plan, host) in enumerate(zip(servers, placement.servers, strict=True))
        ]
        self.harness_niceness = max(0, -min(plan.niceness for plan in servers))
        """How far what is around the engines stands back."""
        self._warm_up_streams = [plan.max_batch_size for plan in servers]
        self._start_timeout_s = settings.start_timeout_s
        classify = {"ours": "classify", "stock": "stock"}[classifier]
        policy = classify if routing == "expert_router" else "replicas"
        experts = _experts([server.url for server in self.servers], replicas, adapters)
        self._gateways = [
            Gateway(
                i, addresses[host], settings.base_port + 1 + i * Gateway.PORTS, experts, clusterer, policy,
                directories[host], self.harness_niceness, ["--insist-s", str(settings.start_timeout_s)], hands_over,
            )
            for i, host in enumerate(placement.gateways)
        ]  # fmt: skip
        self._front: Nginx | None = None
        if has_gateways:
            host = placement.nginx
            upstreams = [gateway.url for gateway in self._gateways]
            relayed = (experts, [gateway.questions for gateway in self._gateways]) if hands_over else ()
            self._front = Nginx(settings.base_port, upstreams, directories[host], addresses[host], *relayed)
        if metrics_port:
            for i, gateway in enumerate(self._gateways):
                gateway.serve_metrics(metrics_port + i)
        self._shares = [
            Share(
                address,
                _on(host, self.servers, placement.servers),
                _on(host, self._gateways, placement.gateways),
                self._front if host == placement.nginx else None,
            )
            for host, address in enumerate(addresses)
        ]

    def each(self, do: Callable[[Share], Result]) -> list[Result]:
        """Let every host do something with its share."""
        return [do(share) for share in self._shares]

    @property
    def targets(self) -> list[str]:
        """Addresses that users connect to: NGINX, or the servers themselves where the baseline bypasses it."""
        return [self._front.url] if self._front else [server.url for server in self.servers]

    @property
    def metrics_targets(self) -> list[str]:
        """Where Prometheus finds the gateways' metrics, ``host:port`` each; empty if they serve none."""
        return [f"{gateway.host}:{gateway.metrics_port}" for gateway in self._gateways if gateway.metrics_port]

    @property
    def machines(self) -> str:
        """What it runs on."""
        return hardware.machine()

    def counters(self) -> dict[str, float]:
        """What all servers together have counted since they started; see
        :meth:`erlib.serving.triton.TritonServer.counters`."""
        counted = [counters for counters in self.each(Share.counters) if counters]
        return {name: sum(one[name] for one in counted) for name in counted[0]}

    def cores(self) -> list[frozenset[int]]:
        """CPU cores that each server may use, by the numbers that they have on its host."""
        return [each for cores in self.each(Share.cores) for each in cores]

    def require_alive(self, engines: bool = True) -> None:
        """Check that no process of the stack has died; see :meth:`Share.require_alive`.

        Raises
        ------
        StartError
            Naming the one that has.
        """
        self.each(lambda share: share.require_alive(engines))

    def revive(self) -> list[str]:
        """Start again what has died, for clients that go on; nothing that is measured may need it. A line for each.

        Raises
        ------
        StartError
            If one of them does not come up.
        """
        timeout_s = self._start_timeout_s
        return [line for lines in self.each(lambda share: share.revive(timeout_s)) for line in lines]

    def __enter__(self) -> Self:
        processes.end_on_signals()
        try:
            self._start()
        except BaseException:
            with processes.undisturbed():
                self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with processes.undisturbed():
            self._stop()

    def _start(self) -> None:
        timeout_s = self._start_timeout_s
        self.each(Share.start)
        self.each(lambda share: share.wait_ready(timeout_s))
        # In a thread of its own, because a notebook's main thread already runs an event loop.
        self._in_thread(self._canaries())
        self.each(Share.verify)

    async def _canaries(self) -> None:
        """Let every server fill its batch once (which also compiles its kernels), then ask through the front door."""
        await asyncio.gather(
            *(
                _ask(server.url, f"server {server.label}", streams, self._start_timeout_s, ((wire.EXPERT, "0"),))
                for server, streams in zip(self.servers, self._warm_up_streams, strict=True)
            )
        )
        if self._front:
            what, n = f"{self._front.title} and the gateways", len(self._gateways)
            for metadata in ((), (wire.COMPLETE,)):  # through the gateways and, if it relays, past them
                await _ask(self._front.url, what, n, self._start_timeout_s, metadata)

    @staticmethod
    def _in_thread(coroutine: Coroutine[None, None, None]) -> None:
        failure: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(coroutine)
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]

    def _stop(self) -> None:
        self.each(Share.stop)


def _experts(urls: Sequence[str], replicas: Sequence[int] | None, adapters: int) -> list[str]:
    """Addresses of each expert, replicas joined by ``|``."""
    if adapters:
        return ["|".join(urls)] * adapters
    left = iter(urls)
    return ["|".join(itertools.islice(left, n)) for n in replicas or [1] * len(urls)]


def _on(host: int, parts: Sequence[Result], hosts: Sequence[int]) -> list[Result]:
    return [part for part, its in zip(parts, hosts, strict=True) if its == host]


async def _ask(url: str, what: str, streams: int, timeout_s: float, metadata: Sequence[tuple[str, str]] = ()) -> None:
    """`streams` concurrent canary inferences of two tokens.

    Raises
    ------
    StartError
        If one of them fails.
    """
    async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
        infer = channel.unary_stream(wire.STREAM_INFER)

        async def one() -> None:
            message = wire.encode_request(_CANARY, 2, wire.NEVER_STOP)
            call = infer(message, timeout=timeout_s, metadata=metadata)
            try:
                responses = [wire.decode_response(message) async for message in call]
            except grpc.aio.AioRpcError as error:
                raise StartError(
                    f"{what}: the canary inference failed: {error.code().name}: {error.details()}"
                ) from None
            errors = [response.error for response in responses if response.error]
            if errors or sum(len(response.token_ids) for response in responses) != 2:
                raise StartError(f"{what}: the canary inference failed: {errors or 'wrong number of tokens'}")

        await asyncio.gather(*(one() for _ in range(streams)))
