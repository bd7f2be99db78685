"""The ways from users to the engine that are compared: direct, through our gateways, through what others would use.

LiteLLM has an environment of its own in the cache, made of pinned packages when it is first used.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environments import environment
from erlib.machine import processes
from erlib.machine.processes import Process
from erlib.serving.nginx import Nginx
from erlib.serving.share import Gateway

GATEWAYS = 16
EXPERTS = 8
LITELLM_WORKERS = 2
START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Way:
    """Where users connect, in which protocol (``grpc`` or ``openai``), and whose CPU time that takes."""

    url: str
    protocol: str
    relays: Sequence[Process]

    def processes(self) -> list[int]:
        """Process ids of the relays and their children."""
        families = [psutil.Process(relay.pid) for relay in self.relays]
        return [member.pid for parent in families for member in (parent, *parent.children(recursive=True))]


class Site:
    """What ways are built on: an engine, the router's model, ports, a directory for logs.

    Parameters
    ----------
    base_port : int
        The engine's; OpenAI's protocol, and what stands before the engine, get those that follow.
    router : Path
        Directory of the clusterer.
    work : Path
    """

    def __init__(self, base_port: int, router: Path, work: Path) -> None:
        self.engine_port, self.openai_port = base_port, base_port + 1
        self._engine, self._openai_engine = f"127.0.0.1:{self.engine_port}", f"127.0.0.1:{self.openai_port}"
        self._router = router
        self._work = work
        self._ports = itertools.count(base_port + 2)

    @contextlib.contextmanager
    def way(self, name: str) -> Iterator[Way]:
        """Start the way `name`, one of :data:`WAYS`; it is gone after the block.

        Raises
        ------
        StartError
            If it cannot be started here.
        """
        with contextlib.ExitStack() as running:
            yield WAYS[name](self, running)

    def direct(self, _: contextlib.ExitStack) -> Way:
        return Way(self._engine, "grpc", [])

    def direct_openai(self, _: contextlib.ExitStack) -> Way:
        return Way(self._openai_engine, "openai", [])

    def gateway(self, running: contextlib.ExitStack) -> Way:
        urls, gateways = self.gateways(running, 1)
        return Way(urls[0], "grpc", gateways)

    def nginx(self, running: contextlib.ExitStack) -> Way:
        url, relay = self._nginx(running, [self._engine])
        return Way(url, "grpc", [relay])

    def nginx_and_gateways(self, running: contextlib.ExitStack) -> Way:
        urls, gateways = self.gateways(running, GATEWAYS)
        url, relay = self._nginx(running, urls)
        return Way(url, "grpc", [relay, *gateways])

    def nginx_relaying(self, running: contextlib.ExitStack) -> Way:
        gateways = self._start(running, GATEWAYS, hands_over=True)
        urls, questions = [each.url for each in gateways], [each.questions for each in gateways]
        url, relay = self._nginx(running, urls, [self._engine] * EXPERTS, questions)
        return Way(url, "grpc", [relay, *map(_process, gateways)])

    def litellm(self, running: contextlib.ExitStack) -> Way:
        python = environment("litellm")
        port = next(self._ports)
        configuration = self._work / "litellm.yaml"
        configuration.write_text(_LITELLM_CONFIG.format(engine=self._openai_engine), encoding="utf-8")
        command: list[str | Path] = [
            *(python, "-c", "from litellm import run_server; run_server()", "--config", configuration),
            *("--host", "127.0.0.1", "--port", str(port), "--num_workers", str(LITELLM_WORKERS)),
        ]
        return Way(f"127.0.0.1:{port}", "openai", [self._spawn(running, "litellm", command, port)])

    def gateways(self, running: contextlib.ExitStack, n: int, *options: str) -> tuple[list[str], list[Process]]:
        """Addresses and processes of `n` gateways, started together; all experts are the one engine."""
        gateways = self._start(running, n, *options)
        return [each.url for each in gateways], list(map(_process, gateways))

    def _start(self, running: contextlib.ExitStack, n: int, *options: str, hands_over: bool = False) -> list[Gateway]:
        experts = [self._engine] * EXPERTS
        gateways = []
        for index in range(n):
            port = next(self._ports)
            next(self._ports)  # where it may be asked
            gateways.append(
                Gateway(index, "127.0.0.1", port, experts, self._router, "classify", self._work, 0, options, hands_over)
            )
        nursery = gateways[0].nursery()
        running.callback(processes.stop, [nursery.process], 3)
        for gateway in gateways:
            gateway.start(nursery)
            running.callback(processes.stop, [_process(gateway)], 3)
        for gateway in gateways:
            gateway.wait_ready(START_TIMEOUT_S)
        return gateways

    def _nginx(
        self,
        running: contextlib.ExitStack,
        upstreams: list[str],
        experts: Sequence[str] = (),
        questions: Sequence[str] = (),
    ) -> tuple[str, subprocess.Popen[bytes]]:
        nginx = Nginx(next(self._ports), upstreams, self._work, experts=experts, questions=questions)
        nginx.start()
        assert nginx.process is not None
        running.callback(processes.stop, [nginx.process], 3)
        return nginx.url, nginx.process

    def _spawn(
        self, running: contextlib.ExitStack, what: str, command: list[str | Path], port: int, **spawn: Any
    ) -> subprocess.Popen[bytes]:
        """Start what listens on `port`, and wait until it does."""
        log = self._work / f"{what}.log"
        process = processes.spawn(command, log, **spawn)
        running.callback(processes.stop, [process], 3)
        processes.wait_until(lambda: processes.listening(port), process, what, log, START_TIMEOUT_S)
        return process


def _process(gateway: Gateway) -> Process:
    assert gateway.process is not None  # it has been started
    return gateway.process


WAYS: dict[str, Callable[[Site, contextlib.ExitStack], Way]] = {
    "direct": Site.direct,
    "NGINX": Site.nginx,
    "gateway": Site.gateway,
    f"NGINX + {GATEWAYS} gateways": Site.nginx_and_gateways,
    f"NGINX, asking {GATEWAYS} gateways": Site.nginx_relaying,
    "direct, OpenAI": Site.direct_openai,
    "LiteLLM": Site.litellm,
}
"""By the name in the table; what has no proxy comes before those that are compared with it."""


_LITELLM_CONFIG = """\
model_list:
- model_name: paced
  litellm_params: {{model: openai/paced, api_base: "http://{engine}/v1", api_key: none}}
litellm_settings: {{telemetry: false, request_timeout: 3600}}
"""
