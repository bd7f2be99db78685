"""Everything between the users and the engines: up, proven to work by a canary inference, and down without a trace."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, Self

import grpc
import grpc.aio

from erlib import processes, triton, wire
from erlib.config import Routing, ServingSettings
from erlib.nginx import Nginx
from erlib.processes import StartError
from erlib.triton import ServerPlan, TritonServer

_CANARY = "How long does a letter take from one end of the country to the other?"


Classifier = Literal["ours", "stock"]
"""How gateways evaluate the router's model: as :mod:`erlib.clusterer` does, or as scikit-learn does when unpickled."""


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

    Raises
    ------
    StartError
        On entering, if anything is missing, a port is in use or a server does not answer the canary.

    Notes
    -----
    Ports, from ``settings.base_port``: NGINX, the gateways, then three for each server.
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
    ):
        self.label = label
        self._settings = settings
        self._log_dir = log_dir
        has_gateways = routing in ("expert_router", "replicas")
        self._gateway_ports = [settings.base_port + 1 + i for i in range(settings.gateways if has_gateways else 0)]
        first = settings.base_port + 1 + settings.gateways
        self.servers = [
            plan.server(f"{label}-{i}", first + i * TritonServer.PORTS, log_dir, settings.host)
            for i, plan in enumerate(servers)
        ]
        self.harness_niceness = max(0, -min(plan.niceness for plan in servers))
        """How far what is around the engines stands back."""
        self._warm_up_streams = [plan.max_batch_size for plan in servers]
        classify = {"ours": "classify", "stock": "stock"}[classifier]
        self._policy = classify if routing == "expert_router" else "replicas"
        self._clusterer = clusterer
        gateways = [f"{settings.host}:{port}" for port in self._gateway_ports]
        self._nginx = Nginx(settings.base_port, gateways, log_dir, settings.host) if has_gateways else None
        self._gateways: list[subprocess.Popen[bytes]] = []

    @property
    def targets(self) -> list[str]:
        """Addresses that users connect to: NGINX, or the servers themselves where the baseline bypasses it."""
        return [self._nginx.url] if self._nginx else [server.url for server in self.servers]

    def counters(self) -> dict[str, float]:
        """What all servers together have counted since they started; see :meth:`erlib.triton.TritonServer.counters`."""
        counted = [server.counters() for server in self.servers]
        return {name: sum(one[name] for one in counted) for name in counted[0]}

    def require_alive(self) -> None:
        """Check that no process of the stack has died.

        Raises
        ------
        StartError
            Naming the one that has.
        """
        for process, what, log in self._all():
            if process is not None and process.poll() is not None:
                raise StartError(f"{what} died with code {process.returncode}; {log} ends:\n{processes.tail(log)}")
        for server in self.servers:
            if not server.has_backend():
                raise StartError(f"the engine of Triton server {server.label} died (out of memory?); see {server.log}")

    def __enter__(self) -> Self:
        self._trap_sigterm()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        settings = self._settings
        triton.preflight()
        ports = [port for server in self.servers for port in (server.http_port, server.grpc_port, server.metrics_port)]
        if self._nginx:
            ports += [self._nginx.port, *self._gateway_ports]
        processes.require_free_ports(ports, settings.host)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for server in self.servers:
            server.start()
        self._gateways = [
            processes.spawn(
                processes.python(
                    "-m", "erlib.gateway", "--port", str(port), "--host", settings.host,
                    "--experts", ",".join(server.url for server in self.servers),
                    "--clusterer", self._clusterer or "", "--policy", self._policy, "--index", str(index),
                ),
                self._gateway_log(index),
                niceness=self.harness_niceness,
            )
            for index, port in enumerate(self._gateway_ports)
        ]  # fmt: skip
        for server in self.servers:
            server.wait_ready(settings.start_timeout_s)
        for index, (gateway, port) in enumerate(zip(self._gateways, self._gateway_ports, strict=True)):
            processes.wait_until(
                lambda port=port: processes.listening(port, settings.host),  # type: ignore[misc]
                gateway, f"gateway {index}", self._gateway_log(index), settings.start_timeout_s,
            )  # fmt: skip
        if self._nginx:
            self._nginx.start()
        # In a thread of its own, because a notebook's main thread already runs an event loop.
        self._in_thread(self._canaries())
        for server in self.servers:
            server.verify()

    async def _canaries(self) -> None:
        """Let every server fill its batch once (which also compiles its kernels), then ask through the front door."""
        await asyncio.gather(
            *(
                _ask(server.url, f"server {server.label}", streams, self._settings.start_timeout_s)
                for server, streams in zip(self.servers, self._warm_up_streams, strict=True)
            )
        )
        if self._nginx:
            ways = len(self._gateway_ports)
            await _ask(self._nginx.url, "NGINX and the gateways", ways, self._settings.start_timeout_s)

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
        # Front to back, so that nobody sends to a server that is gone.
        if self._nginx and self._nginx.process:
            processes.stop([self._nginx.process])
        processes.stop(self._gateways)
        # Triton takes seconds to unload a model; nobody is served any more and the engine holds nothing worth saving.
        processes.stop([server.process for server in self.servers if server.process], grace_s=0)
        for server in self.servers:
            if server.process:  # one that never started must not sweep up another's memory
                server.clean_up()

    def _gateway_log(self, index: int) -> Path:
        return self._log_dir / f"gateway-{index}.log"

    def _all(self) -> Iterator[tuple[subprocess.Popen[bytes] | None, str, Path]]:
        yield from ((server.process, f"Triton server {server.label}", server.log) for server in self.servers)
        gateways = enumerate(self._gateways)
        yield from ((process, f"gateway {index}", self._gateway_log(index)) for index, process in gateways)
        if self._nginx:
            yield self._nginx.process, "NGINX", self._nginx.log

    @staticmethod
    def _trap_sigterm() -> None:
        """SIGTERM ends a Python process without clean-up unless it is turned into an exception."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:

            def leave(number: int, frame: FrameType | None) -> None:
                raise SystemExit(128 + number)

            signal.signal(signal.SIGTERM, leave)


async def _ask(url: str, what: str, streams: int, timeout_s: float) -> None:
    """`streams` concurrent canary inferences of two tokens.

    Raises
    ------
    StartError
        If one of them fails.
    """
    async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
        infer = channel.stream_stream(wire.STREAM_INFER)

        async def one() -> None:
            call = infer(iter([wire.encode_request(_CANARY, 2, wire.NEVER_STOP)]), timeout=timeout_s)
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
