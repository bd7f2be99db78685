"""Which node of a Ray cluster runs what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from erlib.load.backends import NO_RAY
from erlib.machine import hardware
from erlib.machine.hardware import Gpu
from erlib.machine.processes import StartError
from erlib.serving.triton import ServerPlan

EXPERTS, USERS = "experts", "users"
"""Custom resources: how many engines a node may run without a GPU; that it is there for the users."""

Demand = Mapping[str, float]
"""What one server asks of its node, by Ray's names of resources."""


@dataclass(frozen=True)
class Node:
    """One node of the cluster and all that it has, in use or not."""

    id: str
    name: str
    address: str
    resources: Demand


@dataclass(frozen=True)
class Seats:
    """Which nodes run the servers, in order, and which the users."""

    servers: tuple[Node, ...]
    users: Node


def place(nodes: Sequence[Node], demands: Sequence[Demand], users: Literal["apart", "anywhere"] = "apart") -> Seats:
    """Spread servers evenly over nodes, as far as resources allow, and find a node for the users.

    `demands`: what each server asks for. `users`: whether their node must be free of servers, or is only if that is
    possible. StartError says what is lacking.
    """
    reserved = [node for node in nodes if node.resources.get(USERS)]
    for candidate in reserved or sorted(nodes, key=lambda node: _room([node], demands)):
        seats = _seat([node for node in nodes if node not in (*reserved, candidate)], demands)
        if None not in seats:
            return Seats(_complete(seats), candidate)
    seats = _seat(nodes, demands)
    if None in seats:
        asked = ", ".join(f"{count} x {_list(dict(demand))}" for demand, count in _counted(demands))
        has = "; ".join(f"{node.name} has {_list(node.resources)}" for node in nodes)
        raise StartError(
            f"the cluster has room for {_room(nodes, demands)} of {len(demands)} servers, which ask for {asked}: {has}"
        )
    if users == "apart":
        names = ", ".join(node.name for node in nodes)
        raise StartError(
            f"{len(demands)} servers leave no node for the users: they need all of {names}. Add a node, or let users "
            "run beside experts with --set serving.cluster_users=anywhere"
        )
    seated = Counter(node.id for node in _complete(seats))
    return Seats(_complete(seats), min(reserved or nodes, key=lambda node: seated[node.id]))


def demands_of(plans: Sequence[ServerPlan], nodes: Sequence[Node]) -> list[Demand]:
    """What each server asks for in this cluster."""
    counted = any(node.resources.get(EXPERTS) for node in nodes)

    def of(plan: ServerPlan) -> Demand:
        return {EXPERTS: 1} if counted and "GPU" not in plan.demand else plan.demand

    return [of(plan) for plan in plans]


def _seat(nodes: Sequence[Node], demands: Sequence[Demand]) -> list[Node | None]:
    """A node for each server, the one with the fewest so far that has room; the most demanding choose first."""
    left = {node.id: dict(node.resources) for node in nodes}
    seated: Counter[str] = Counter()
    seats: list[Node | None] = [None] * len(demands)
    for i in sorted(range(len(demands)), key=lambda i: -sum(demands[i].values())):
        demand = demands[i]
        fitting = [n for n in nodes if all(left[n.id].get(name, 0) >= amount for name, amount in demand.items())]
        if fitting:
            node = seats[i] = min(fitting, key=lambda node: seated[node.id])
            seated[node.id] += 1
            for name, amount in demand.items():
                left[node.id][name] -= amount
    return seats


def _complete(seats: Sequence[Node | None]) -> tuple[Node, ...]:
    return tuple(node for node in seats if node)


def _room(nodes: Sequence[Node], demands: Sequence[Demand]) -> int:
    return len(_complete(_seat(nodes, demands)))


def _counted(demands: Sequence[Demand]) -> list[tuple[tuple[tuple[str, float], ...], int]]:
    return Counter(tuple(sorted(demand.items())) for demand in demands).most_common()


def _list(resources: Demand) -> str:
    """E.g. ``4 CPU, 2 GPU``, without what Ray adds for itself."""
    named = {name: amount for name, amount in resources.items() if name in ("CPU", "GPU", EXPERTS, USERS)}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(named.items())) or "nothing"


def living_nodes(address: str) -> list[Node]:
    """Living nodes of the cluster at `address`: ``auto``, or ``HOST:PORT`` of its head."""
    try:
        import ray  # noqa: PLC0415  (optional)
    except ImportError:
        raise StartError(NO_RAY) from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StartError(f"no Ray cluster at {address} (start one with ray start --head): {error}") from None
    living = [node for node in ray.nodes() if node["Alive"]]
    found = [Node(n["NodeID"], n["NodeName"], n["NodeManagerAddress"], n["Resources"]) for n in living]
    return sorted(found, key=lambda node: (node.name, node.id))


def gpus(address: str | None) -> list[Gpu]:
    """GPUs of this machine or, in a cluster, of all nodes for experts, taken to be of the kind that this node has."""
    here = hardware.gpus()
    if not address or not here:
        return here
    serving = [node.resources for node in living_nodes(address) if not node.resources.get(USERS)]
    return here[:1] * int(sum(resources.get("GPU", 0) for resources in serving))
