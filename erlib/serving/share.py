"""One host's share of a stack: its servers, gateways and NGINX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from erlib.machine import leftovers, processes
from erlib.machine.nursery import Forked, Nursery
from erlib.machine.processes import StartError
from erlib.serving import triton, wheel
from erlib.serving.nginx import Nginx
from erlib.serving.triton import TritonServer

Classifier = Literal["ours", "stock"]
"""How gateways evaluate the router's model: as :mod:`erlib.routing.clusterer` does, or as scikit-learn does when
unpickled."""

_GATEWAY_ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener"}
"""gRPC's older event loop hands a message on through fewer threads: behind NGINX, a quarter less CPU per token."""

STANDS_BACK = 8
"""How far a gateway that only decides stands back behind NGINX, whose tokens would wait for its decisions."""


class Gateway:
    """One process of :mod:`erlib.gateway`, which reaches all `experts`; its :meth:`nursery` forks it.

    Parameters
    ----------
    index : int
        Which of the instances this is.
    host, port : str, int
        Where it listens.
    experts : sequence of str
        gRPC addresses, one per cluster, in order.
    clusterer : Path or None
        Directory of the router's model, if the policy has one.
    policy : str
        As :mod:`erlib.gateway` takes it.
    log_dir : Path
    niceness : int
        How far it stands back where cores are short.
    options : sequence of str
        More of what it takes.
    hands_over : bool
        Whether NGINX asks it, at the next port, and relays itself.
    """

    PORTS = 2

    def __init__(
        self, index: int, host: str, port: int, experts: Sequence[str], clusterer: Path | None, policy: str,
        log_dir: Path, niceness: int, options: Sequence[str] = (), hands_over: bool = False,
    ):  # fmt: skip
        self.title = f"gateway {index}"
        self.host, self.port = host, port
        self.log = log_dir / f"gateway-{index}.log"
        self.metrics_port: int | None = None
        self.process: Forked | None = None
        self._niceness = niceness + (STANDS_BACK if hands_over else 0)
        self._router = (policy, clusterer)
        self._arguments = [
            "--port", str(port), "--host", host, "--experts", ",".join(experts), "--clusterer", clusterer or "",
            "--policy", policy, "--index", str(index), "--behind-proxy", *options,
            *(("--hands-over", str(port + 1)) if hands_over else ()),
        ]  # fmt: skip

    @property
    def url(self) -> str:
        """``host:port`` of its gRPC endpoint."""
        return f"{self.host}:{self.port}"

    @property
    def questions(self) -> str:
        """``host:port`` where NGINX asks it."""
        return f"{self.host}:{self.port + 1}"

    @property
    def ports(self) -> list[int]:
        """All that it listens on."""
        return [self.port, self.port + 1, *([self.metrics_port] if self.metrics_port else [])]

    def serve_metrics(self, port: int) -> None:
        """Let it serve Prometheus metrics at `port`, too, once it has been started."""
        self.metrics_port = port
        self._arguments += ["--metrics-port", str(port)]

    def nursery(self) -> Nursery:
        """A new process that forks this gateway, and others of its policy and model; its log is beside theirs."""
        policy, clusterer = self._router
        command = processes.python("-m", "erlib.gateway.forks", policy, clusterer or "")
        return Nursery(command, self.log.parent / "gateways.log", _GATEWAY_ENVIRONMENT)

    def start(self, nursery: Nursery) -> None:
        """Start the process; see :meth:`wait_ready`."""
        self.process = nursery.fork(self._arguments, self.log, self._niceness)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it listens.

        Raises
        ------
        StartError
            If it exits or does not listen within `timeout_s`.
        """
        assert self.process is not None
        processes.wait_until(
            lambda: processes.listening(self.port, self.host), self.process, self.title, self.log, timeout_s
        )


@dataclass(frozen=True)
class Placement:
    """Which host runs what of a stack; hosts are indices into `addresses`."""

    addresses: tuple[str, ...]
    """Where the parts of each host listen."""
    servers: tuple[int, ...]
    """Host of each server."""
    gateways: tuple[int, ...]
    """Host of each gateway."""
    nginx: int
    """Host of the balancer, whichever it is."""
    log_dirs: tuple[str, ...]
    """Directory of each host's logs, below the stack's."""


class Share:
    """What one host runs of a stack: all of it, or a part."""

    def __init__(self, host: str, servers: Sequence[TritonServer], gateways: Sequence[Gateway], front: Nginx | None):
        self.host = host
        self.servers = servers
        self._gateways = gateways
        self._front = front
        self._nursery: Nursery | None = None
        self._parts: list[TritonServer | Gateway] = [*servers, *gateways]
        self._everything: list[TritonServer | Gateway | Nginx] = [*self._parts, *([front] if front else [])]

    @property
    def title(self) -> str:
        """What messages call it: everything in it."""
        return ", ".join(part.title for part in self._everything)

    def start(self) -> None:
        """Start servers and gateways; of servers that start in turn, the first, and gateways with the last.

        Raises
        ------
        StartError
            If anything is missing or a port is in use.
        """
        leftovers.sweep()
        wheel.preflight(len(self.servers))
        ports = [port for server in self.servers for port in (server.http_port, server.grpc_port, server.metrics_port)]
        ports += [port for gateway in self._gateways for port in gateway.ports]
        processes.require_free_ports([*ports, *([self._front.port] if self._front else [])], self.host)
        for part in self._parts:
            part.log.parent.mkdir(parents=True, exist_ok=True)
        for part in self._turn(0):
            self._begin(part)

    @property
    def _last_turn(self) -> int:
        return max((server.turn for server in self.servers), default=0)

    def _turn(self, turn: int) -> list[TritonServer | Gateway]:
        """What starts together and does not wait for each other: gateways look for servers as soon as they start."""
        servers = [server for server in self.servers if server.turn == turn]
        return [*servers, *(self._gateways if turn == self._last_turn else [])]

    def _begin(self, part: TritonServer | Gateway | Nginx) -> None:
        if not isinstance(part, Gateway):
            part.start()
            return
        if self._nursery is None or self._nursery.process.poll() is not None:
            self._nursery = part.nursery()
        part.start(self._nursery)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until servers and gateways are up, each at most `timeout_s`, then start what is in front if it is here.

        Servers that have to wait for their turn are started here.

        Raises
        ------
        StartError
            If one of them is not.
        """
        for turn in range(self._last_turn + 1):
            together = self._turn(turn)
            for part in together if turn else []:
                self._begin(part)
            for part in together:
                part.wait_ready(timeout_s)
        if self._front:
            self._front.start()

    def verify(self) -> None:
        """Check what shows only once the servers have answered; see
        :meth:`erlib.serving.triton.TritonServer.verify`."""
        for server in self.servers:
            server.verify()

    def counters(self) -> dict[str, float]:
        """What the servers of this host together have counted since they started."""
        total: dict[str, float] = {}
        for server in self.servers:
            for name, value in server.counters().items():
                total[name] = total.get(name, 0) + value
        return total

    def cores(self) -> list[frozenset[int]]:
        """CPU cores that each server of this host may use; see :func:`erlib.serving.triton.cores`."""
        return triton.cores(self.servers)

    def require_alive(self, engines: bool = True) -> None:
        """Check that no process has died; without `engines`, in next to no time.

        Raises
        ------
        StartError
            Naming the one that has.
        """
        for part in self._everything:
            if part.process is not None and part.process.poll() is not None:
                how = f"died with code {part.process.returncode}; {part.log} ends:\n{processes.tail(part.log)}"
                raise StartError(f"{part.title} {how}")
        for server in self.servers if engines else ():
            if not server.has_backend():
                raise StartError(f"the engine of Triton server {server.label} died (out of memory?); see {server.log}")

    def revive(self, timeout_s: float) -> list[str]:
        """Start again, at the same ports, what has died; a line for each.

        Raises
        ------
        StartError
            If one of them does not come up.
        """
        lines = []
        for part in self._everything:
            assert part.process is not None
            if part.process.poll() is not None:
                how = f"died with code {part.process.returncode}"
            elif isinstance(part, TritonServer) and not part.has_backend():
                how = "lost its engine"
            else:
                continue
            processes.stop([part.process], grace_s=0)
            _clean_up(part)
            last_words = processes.keep_last_words(part.log)
            self._begin(part)
            if not isinstance(part, Nginx):  # those wait by themselves
                part.wait_ready(timeout_s)
            lines.append(f"{part.title} {how} (see {last_words}) and has been started again")
        return lines

    def stop(self) -> None:
        """Stop what has been started, front to back, so that nobody sends to a server that is gone."""
        if self._front and self._front.process:
            processes.stop([self._front.process])
        # Nobody is served any more: gateways need not wait for requests to end, nor Triton, for seconds, for its model.
        for parts in (self._gateways, self.servers):
            processes.stop([part.process for part in parts if part.process], grace_s=0)
        if self._nursery:
            processes.stop([self._nursery.process], grace_s=0)
        for part in self._everything:
            _clean_up(part)
        leftovers.sweep()


def _clean_up(part: TritonServer | Gateway | Nginx) -> None:
    if isinstance(part, (TritonServer, Nginx)):
        part.clean_up()
