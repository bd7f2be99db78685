"""More than one machine: experts, gateways, NGINX and users on the nodes of a Ray cluster that is already there.

Ray places and watches; nothing that is measured passes through it. On every node one actor keeps that node's
:class:`~erlib.serving.Share` of the stack, and on the users' node another keeps the
:class:`~erlib.load.users.UserSimulator`. All of them end with the driver, however it ends.

Servers of TensorRT-LLM ask for as many GPUs as they have ranks. Engines on a CPU ask for one of the custom resource
``experts`` where a node offers it, and for CPUs otherwise. Gateways and NGINX run beside the experts and ask for
nothing. Users get a node that offers the custom resource ``users``; where none does, the one that is missed least.

Every node needs this repository, its environment, and engines and router at the same places: a shared file system.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from erlib import paths
from erlib.cluster.placement import Demand, Node, demands_of, living_nodes, place
from erlib.config import Routing, ServingSettings
from erlib.config.system import HAVE_GATEWAYS
from erlib.load.users import Client, Observation, Script, UserSimulator
from erlib.machine import hardware
from erlib.machine.processes import StartError
from erlib.serving import stack
from erlib.serving.share import Classifier, Placement, Share
from erlib.serving.stack import NodeLost
from erlib.serving.triton import ServerPlan

_VERDICT_S = 120
"""By when Ray has said whether a node that does not answer is lost; its own limit is about a minute."""

_OBITUARY_S = 5
"""The same where it already knows that an actor is gone."""

_WATCH_S = 1.0

_STOP_S = 30

_ENDED_BY_THE_KERNEL = {"RAY_kill_child_processes_on_worker_exit": "0"}
"""An actor's children get SIGTERM when it ends, as :mod:`erlib.machine.processes` wants it. Ray would kill them, and an
NGINX that is killed leaves its worker behind, a Triton its shared memory."""

Kept = TypeVar("Kept")

Result = TypeVar("Result")


class _Keeper(Generic[Kept]):
    """Actor that keeps something on its node and lets it work.

    It has one thread, its worker process's main thread. What that starts dies with it: the kernel sends the death
    signal that :func:`erlib.machine.processes.spawn` asks for when the starting *thread* ends.
    """

    def __init__(self, kept: Kept):
        self._kept = kept

    def let(self, do: Callable[[Kept], Result]) -> Result:
        return do(self._kept)


class _Remote(Generic[Kept]):
    """The driver's end of a :class:`_Keeper`: `kept` goes to the node, holds `demand` there, and does not come back."""

    def __init__(self, node: Node, demand: Demand, kept: Kept, what: str, cluster: str):

        self.node = node
        self._what = what
        self._cluster = cluster
        self._actor = (
            ray.remote(_Keeper)
            .options(
                num_cpus=demand.get("CPU", 0),
                num_gpus=demand.get("GPU", 0),
                resources={name: amount for name, amount in demand.items() if name not in ("CPU", "GPU")},
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
                runtime_env={"env_vars": _ENDED_BY_THE_KERNEL},
            )
            .remote(kept)
        )

    def begin(self, do: Callable[[Kept], Any]) -> Any:
        """Let it work; returns what :meth:`result` takes."""
        return self._actor.let.remote(do)

    def result(self, reply: Any, timeout_s: float | None = None) -> Any:
        """What came of it; NodeLost or StartError if nothing did."""

        try:
            return ray.get(reply, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StartError):
                raise StartError(f"{self.node.name}: {error.cause}") from None
            raise error.cause from None
        except ray.exceptions.GetTimeoutError:
            raise StartError(
                f"{self.node.name} does not answer within {timeout_s:.0f} s: is what it should run there, "
                f"{self._what}, more than other jobs leave of its resources?"
            ) from None
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError) as error:
            reason = error
        # Ray knows of a lost actor before it knows of a lost node.
        unsure = isinstance(reason, ray.exceptions.ActorUnavailableError)
        deadline = time.monotonic() + (_VERDICT_S if unsure else _OBITUARY_S)
        while time.monotonic() < deadline:
            self.require_node()
            time.sleep(_WATCH_S / 4)
        raise StartError(f"the actor with {self._what} died, but its node {self.node.name} did not: {reason}")

    def require_node(self) -> None:
        """NodeLost if the node does not live."""
        if self.node.id not in {node.id for node in living_nodes(self._cluster)}:
            raise NodeLost(f"node {self.node.name} is lost, and with it {self._what}")

    def end(self) -> None:
        """End the actor, and with it the processes that it has started."""

        ray.kill(self._actor)


class ClusterStack(stack.Stack):
    """A stack on the nodes of a Ray cluster. NodeLost on entering, and whenever a host that is gone is asked."""

    def __init__(
        self,
        label: str,
        servers: list[ServerPlan],
        routing: Routing,
        settings: ServingSettings,
        clusterer: Path | None,
        log_dir: Path,
        classifier: Classifier = "ours",
        replicas: Sequence[int] | None = None,
        adapters: int = 0,
    ):
        assert settings.cluster is not None
        self.address = settings.cluster
        living = living_nodes(self.address)
        asked = demands_of(servers, living)
        seats = place(living, asked, settings.cluster_users)
        self.users_node = seats.users
        self._nodes = [node for node in living if node in seats.servers]
        self._demands = [
            _total(demand for demand, its in zip(asked, seats.servers, strict=True) if its == node)
            for node in self._nodes
        ]
        self._one_machine = len({node.address for node in living}) == 1
        n_gateways = settings.gateways if routing in HAVE_GATEWAYS else 0
        placement = Placement(
            addresses=tuple(settings.host if self._one_machine else node.address for node in self._nodes),
            servers=tuple(self._nodes.index(node) for node in seats.servers),
            gateways=tuple(itertools.islice(itertools.cycle(range(len(self._nodes))), n_gateways)),
            nginx=0,
            log_dirs=tuple(_directory(node) for node in self._nodes),
        )
        super().__init__(
            label, servers, routing, settings, clusterer, log_dir, classifier, placement, replicas, adapters=adapters
        )
        self._inputs = [Path(plan.parameters["engine"]) for plan in servers] + ([clusterer] if clusterer else [])
        fronts = {self._nodes[host].address for host in placement.gateways}
        self.users_share_clock = fronts <= {self.users_node.address}
        """Whether users and gateways read one clock."""
        self.users_machine = ""
        """What the users' node is, once they are there."""
        self._hosts: list[_Remote[Share]] = []

    def each(self, do: Callable[[Share], Result]) -> list[Result]:
        replies = [host.begin(do) for host in self._hosts]
        return [host.result(reply) for host, reply in zip(self._hosts, replies, strict=True)]

    @property
    def machines(self) -> str:
        counted = Counter(self.each(lambda share: hardware.machine()))
        how = "sharing" if self._one_machine else "of"
        experts = [f"{count} node{'s' * (count > 1)} {how} {machine}" for machine, count in counted.items()]
        return "; ".join([*experts, f"users on {self.users_machine}"])

    def require_nodes(self) -> None:
        """NodeLost if a node does not live; nobody there is asked."""
        for host in self._hosts:
            host.require_node()

    def _start(self) -> None:
        for node, demand, share in zip(self._nodes, self._demands, self._shares, strict=True):
            self._hosts.append(_Remote(node, demand, share, share.title, self.address))
        inputs = self._inputs
        try:
            for host in self._hosts:
                host.result(host.begin(lambda share: _settle(share, inputs)), self._start_timeout_s)
        except BaseException:
            self._end()  # nothing runs yet that would have to be stopped
            raise
        try:
            super()._start()
        except StartError:
            self.each(lambda share: None)  # if it failed because a node is lost, that is what to say
            raise

    def _stop(self) -> None:

        replies = [host.begin(Share.stop) for host in self._hosts]
        if replies:
            ray.wait(replies, num_returns=len(replies), timeout=_STOP_S)
        self._end()

    def _end(self) -> None:
        for host in self._hosts:
            host.end()
        self._hosts = []


class ClusterUsers:
    """The users of a stack, on the node that they have; used as :class:`erlib.load.users.UserSimulator` is."""

    def __init__(self, served: ClusterStack, tokenizer: Path, n_processes: int, log: Path, client: Client):
        self._served = served
        self._log = log.parent / _directory(served.users_node) / log.name
        self._simulator = UserSimulator(
            tokenizer, n_processes, self._log, client, served.harness_niceness, None, served.users_share_clock
        )

    def __enter__(self) -> Self:
        node = self._served.users_node
        self._remote = _Remote(node, {}, self._simulator, "the users", self._served.address)
        try:
            self._served.users_machine = self._remote.result(self._remote.begin(_enter))
        except BaseException:
            self._remote.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remote.end()

    def run(self, scripts: Sequence[Script], targets: Sequence[str], timeout_s: float) -> Observation:
        """See :meth:`erlib.load.users.UserSimulator.run`. NodeLost as soon as Ray knows: requests would wait on."""

        reply = self._remote.begin(lambda simulator: simulator.run(scripts, targets, timeout_s))
        while not ray.wait([reply], timeout=_WATCH_S)[0]:
            self._served.require_nodes()
        try:
            return self._remote.result(reply)
        except StartError:
            self._served.require_alive()  # if it failed because a node is lost, that is what to say
            raise


def _directory(node: Node) -> str:
    return f"{node.name}-{node.id[:6]}"


def _total(demands: Iterable[Demand]) -> dict[str, float]:
    total: dict[str, float] = {}
    for demand in demands:
        for name, amount in demand.items():
            total[name] = total.get(name, 0) + amount
    return total


def _enter(simulator: UserSimulator) -> str:
    simulator.__enter__()
    return hardware.machine()


def _settle(share: Share, inputs: Sequence[Path]) -> None:
    """Check what must lie on this node, and give the servers the GPUs that Ray has set aside for them."""
    for path in (paths.ENGINE_SPECS, *inputs):
        if not path.exists():
            raise StartError(f"{path} is missing here; all nodes need it, on a shared file system or copied")
    gpus = (int(gpu) for gpu in ray.get_gpu_ids())
    for server in share.servers:
        server.take_gpus(gpus)
