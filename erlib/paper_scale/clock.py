"""Both papers' systems in virtual time: users, client, gateway, servers, and the machine that they share."""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simpy

from erlib.config import ConfigError, Paper
from erlib.config.system import HAVE_GATEWAYS
from erlib.paper_scale.batching import CannotServe, Engine, System
from erlib.workload.prompts import Prompt

Preset = Literal["hardware", "harness"]

_Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Harness:
    """What stands between users and engines.

    A gateway's stream is free again when the server has sent the last token; what the client has not taken yet waits
    in the stream's buffers. The client takes messages in the order in which they were sent, at
    ``client_tokens_per_s / (1 + max(0, n - client_knee) / client_slope)`` per second while the servers have n requests:
    its threads get into each other's way.
    """

    name: str
    gateway_streams: int | None = None
    """Requests that the gateways relay at a time, all together; further ones wait. None: no limit."""
    routing_mean_s: float = 0.0
    routing_sd_s: float = 0.0
    """Latency of classification (lognormal), for configurations that classify."""
    client_tokens_per_s: float | None = None
    """None: the client keeps up with everything."""
    client_knee: int = 200
    client_slope: float = 800
    per_request_s: float = 0.0
    """Clients and gateways send one request after the other, each taking so long."""


HARDWARE = Harness("hardware")

HARNESS: dict[Paper, Harness] = {
    "p1": Harness("harness", 160, routing_mean_s=0.442, routing_sd_s=0.302, client_tokens_per_s=2000),
    "p2": Harness("harness", 48, routing_mean_s=0.442, routing_sd_s=0.302),
}
"""Routing latency as both papers state it (section VI); streams and client speed fitted to their claims."""


def harness(preset: Preset, paper: Paper) -> Harness:
    """The harness of a preset; change single numbers with :func:`dataclasses.replace`."""
    if preset not in ("hardware", "harness"):
        raise ConfigError(f"preset must be 'hardware' or 'harness', not {preset!r}")
    return HARDWARE if preset == "hardware" else HARNESS[paper]


@dataclass
class Request:
    """One request on its way; times in seconds of virtual time."""

    user: int
    turn: str
    prompt: Prompt
    input_tokens: int
    expert: int
    sent_s: float
    done: simpy.Event
    server: int = -1
    """Which instance: of the expert's replicas the one with the fewest requests outstanding when it is forwarded."""
    queued_s: float = 0.0
    routed_s: float = 0.0
    first_step: int = -1

    @property
    def output_tokens(self) -> int:
        return self.prompt.max_tokens


@dataclass
class Server:
    """One engine instance; what it did stays readable afterwards."""

    engine: Engine[Request]
    taken_s: list[float]
    """When the client had each step's tokens."""
    ends_s: list[float] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    """Sequences that got a token in each step."""
    kv_blocks: list[int] = field(default_factory=list)
    """KV blocks reserved in each step."""
    _arrival: simpy.Event | None = None

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        CannotServe
            If it would wait for ever.
        """
        may_enter = not self.engine.waiting
        self.engine.submit(request)
        if may_enter and self._arrival and not self._arrival.triggered:
            self._arrival.succeed()

    def run(self, env: simpy.Environment, client: _Client, machine: _SharedMachine | None) -> _Process:
        """The engine's loop; `machine` is what it shares with others, if it does."""
        engine = self.engine
        while True:
            self._arrival = env.event()
            if engine.is_idle:
                yield self._arrival
                self._arrival = env.event()
            begun = len(self.ends_s)
            yield from self._steps(env) if machine is None else self._shared_step(env, machine)
            steps = len(self.ends_s) - begun
            done = engine.end_steps(steps)
            self.kv_blocks += [done.kv_blocks] * steps
            if done.finished:
                client.take(self.ends_s[-1])
            for request in done.finished:
                request.done.succeed(self.taken_s[-1])

    def _steps(self, env: simpy.Environment) -> _Process:
        """All steps in which nobody joins or leaves, as one event."""
        begun = len(self.ends_s)
        self.ends_s += itertools.islice(itertools.accumulate(self.engine.begin_steps(), initial=env.now), 1, None)
        self.sequences += [self.engine.sequences] * (len(self.ends_s) - begun)
        assert self._arrival is not None
        yield env.timeout(self.ends_s[-1] - env.now) | self._arrival
        if self._arrival.triggered:  # the step that runs ends as it would have; whoever arrived may join the next
            last = bisect_left(self.ends_s, env.now, begun)
            del self.ends_s[last + 1 :], self.sequences[last + 1 :]
            yield env.timeout(max(0.0, self.ends_s[-1] - env.now))

    def _shared_step(self, env: simpy.Environment, machine: _SharedMachine) -> _Process:
        """One step, whose end depends on what the other instances do meanwhile."""
        yield machine.work(self.engine.begin_step())
        self.ends_s.append(env.now)
        self.sequences.append(self.engine.sequences)


class _Client:
    """Takes the messages of all streams, in the order in which they come, as fast as it can."""

    def __init__(self, settings: Harness):
        self._settings = settings
        self._free_s = 0.0
        self._open_streams = 0
        self.servers: list[Server] = []

    def server(self, engine: Engine[Request]) -> Server:
        """A server whose messages it takes; one that keeps up with everything has them when steps end."""
        ends_s: list[float] = []
        self.servers.append(Server(engine, ends_s if self._settings.client_tokens_per_s is None else [], ends_s))
        return self.servers[-1]

    def open(self, now_s: float, streams: int) -> None:
        """Servers have so many requests more, or fewer, from now on."""
        self.take(now_s)
        self._open_streams += streams

    def take(self, now_s: float) -> None:
        """Take the messages of all steps that have ended; those of a step count as taken together."""
        if self._settings.client_tokens_per_s is None:
            return
        slower = 1 + max(0, self._open_streams - self._settings.client_knee) / self._settings.client_slope
        ended: list[tuple[float, int, list[float]]] = []
        for server in self.servers:
            new = slice(len(server.taken_s), bisect_right(server.ends_s, now_s, len(server.taken_s)))
            ended += zip(server.ends_s[new], server.sequences[new], itertools.repeat(server.taken_s))
        ended.sort(key=itemgetter(0))
        free_s, tokens_per_s = self._free_s, self._settings.client_tokens_per_s
        for end_s, messages, taken_s in ended:
            free_s = (end_s if end_s > free_s else free_s) + messages * slower / tokens_per_s
            taken_s.append(free_s)
        self._free_s = free_s


class _SharedMachine:
    """Hardware that all instances share: each gets an equal part, so their steps go on at one pace, and end in turn.

    Parameters
    ----------
    env : simpy.Environment
    slowdown : callable
        How many times as long a step takes while so many are under way.
    """

    def __init__(self, env: simpy.Environment, slowdown: Callable[[int], float]):
        self._env, self._slowdown = env, slowdown
        self._done_s = 0.0
        """Work that a step under way since the beginning would have done."""
        self._since_s = 0.0
        self._steps: list[tuple[float, int, simpy.Event]] = []
        self._changes = 0

    def work(self, seconds: float) -> simpy.Event:
        """An event after a step that takes so long on a machine of its own."""
        self._catch_up()
        ended = self._env.event()
        heapq.heappush(self._steps, (self._done_s + seconds, self._changes, ended))
        self._wait_for_next()
        return ended

    def _catch_up(self) -> None:
        if self._steps:
            self._done_s += (self._env.now - self._since_s) / self._slowdown(len(self._steps))
        self._since_s = self._env.now

    def _wait_for_next(self) -> None:
        self._changes += 1
        if self._steps:
            left_s = max(0.0, self._steps[0][0] - self._done_s) * self._slowdown(len(self._steps))
            self._env.timeout(left_s, self._changes).callbacks.append(self._end_next)

    def _end_next(self, timeout: simpy.Event) -> None:
        if timeout.value == self._changes:  # otherwise a step has begun or ended since, and this is no longer the time
            self._catch_up()
            heapq.heappop(self._steps)[2].succeed()
            self._wait_for_next()


@dataclass(frozen=True)
class Trace:
    """Everything that happened at one point."""

    requests: list[Request]
    servers: list[Server]

    def token_ns(self) -> list[npt.NDArray[np.int64]]:
        """When the client had each request's tokens, in the order of :attr:`requests`."""
        steps_ns = [np.rint(np.array(server.taken_s) * 1e9).astype(np.int64) for server in self.servers]
        return [steps_ns[r.server][r.first_step : r.first_step + r.output_tokens] for r in self.requests]


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection: half of a simulation's time would go into looking at what lives until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collections()
def trace(
    system: System,
    drawn: Sequence[Prompt],
    continues: bool | Sequence[Prompt],
    around: Harness = HARDWARE,
    seed: int = 0,
    routing_s: Sequence[float] | None = None,
) -> Trace:
    """Let all users of one point do their requests; they start together, each waits for an answer before the next.

    Parameters
    ----------
    system : System
    drawn : sequence of Prompt
        One per user, at full scale (:func:`erlib.paper_scale.simulation.at_paper_scale`); ``cluster`` is the router's
        decision, and ``max_tokens`` the length of the answer.
    continues : bool or sequence of Prompt
        Whether a continuation prompt follows: the base prompt and its answer (paper 1, section IV-B), to the same
        cluster. Or these prompts themselves, one per user, where they are known.
    around : Harness
    seed : int
        Of the routing latencies.
    routing_s : sequence of float, optional
        Routing latencies seen elsewhere, in seconds, in place of the harness' own: two per user, of the base and of
        the continuation prompt.

    Raises
    ------
    CannotServe
        If a cluster has no server, or a request can never be served.
    OutOfRange
        If a step is larger than the step times know.
    """
    if not drawn:
        raise CannotServe("a point needs at least one user")
    prompts_of = _turns(drawn, continues)
    if min(min(prompt.input_tokens, prompt.max_tokens) for mine in prompts_of for prompt in mine) < 1:
        raise CannotServe("every prompt and every answer has at least one token")
    classifies = system.routing == "expert_router"
    strays = {prompt.cluster for mine in prompts_of for prompt in mine} - set(range(system.instances))
    if classifies and strays:
        raise CannotServe(
            f"{system.config} has {system.instances} experts, but a prompt belongs to cluster {max(strays)}"
        )
    latencies_s = routing_s or _routing_latencies(around if classifies else HARDWARE, 2 * len(drawn), seed)
    return _Point(system, prompts_of, around, latencies_s).run()


class _Point:
    """Users, and what stands between them and the engines of one system, in one virtual time."""

    def __init__(
        self, system: System, prompts_of: list[tuple[Prompt, ...]], around: Harness, latencies_s: Sequence[float]
    ):
        self._system, self._prompts_of = system, prompts_of
        self._latencies_s, self._per_request_s = latencies_s, around.per_request_s
        self._env, self._client = simpy.Environment(), _Client(around)
        self._servers = [self._client.server(Engine(system)) for _ in system.experts]
        self._replicas = {
            expert: [i for i, its in enumerate(system.experts) if its == expert] for expert in system.experts
        }
        self._sender = simpy.Resource(self._env) if around.per_request_s else None
        self._gateway = None
        if system.routing in HAVE_GATEWAYS:
            self._gateway = simpy.Resource(self._env, capacity=around.gateway_streams or len(prompts_of))
        self._requests: list[Request] = []

    def run(self) -> Trace:
        """Until every user has every answer."""
        steps = self._system.steps
        apart = min(steps.at_full_speed, steps.limits.instances) >= len(self._servers)
        machine = None if apart else _SharedMachine(self._env, steps.slowdown)
        for server in self._servers:
            self._env.process(server.run(self._env, self._client, machine))
        users = [self._env.process(self._user(number)) for number in range(len(self._prompts_of))]
        self._env.run(self._env.all_of(users))
        return Trace(self._requests, self._servers)

    def _user(self, number: int) -> _Process:
        env = self._env
        for turn, prompt in zip(("base", "continuation"), self._prompts_of[number], strict=False):
            request = Request(
                number, turn, prompt, prompt.input_tokens, self._expert(number, prompt), env.now, env.event()
            )
            self._requests.append(request)
            if self._sender is not None:
                with self._sender.request() as my_turn:
                    yield my_turn
                    yield env.timeout(self._per_request_s)
            if self._gateway is None:
                taken_s = yield from self._answer(request)
            else:
                with self._gateway.request() as stream:
                    yield stream
                    request.queued_s = env.now - request.sent_s
                    request.routed_s = self._latencies_s[2 * number + (turn == "continuation")]
                    yield env.timeout(request.routed_s)
                    taken_s = yield from self._answer(request)
            yield env.timeout(max(0.0, taken_s - env.now))

    def _expert(self, user: int, prompt: Prompt) -> int:
        if self._system.routing == "expert_router":
            return prompt.cluster
        turns_taken = len(self._requests) if self._system.routing == "replicas" else user
        return turns_taken % self._system.instances

    def _answer(self, request: Request) -> Generator[simpy.Event, Any, float]:
        """Let the least busy replica of the request's expert answer; when the client has the last token."""
        replicas = self._replicas[request.expert]
        request.server = min(replicas, key=lambda server: self._servers[server].engine.outstanding)
        self._client.open(self._env.now, 1)
        self._servers[request.server].submit(request)
        taken_s: float = yield request.done
        self._client.open(self._env.now, -1)
        return taken_s


def _turns(drawn: Sequence[Prompt], continues: bool | Sequence[Prompt]) -> list[tuple[Prompt, ...]]:
    """What each user asks, one after the other."""
    if continues is True:
        continues = [prompt._replace(input_tokens=prompt.input_tokens + prompt.max_tokens) for prompt in drawn]
    return list(zip(drawn, continues, strict=True) if continues else zip(drawn, strict=True))


def _routing_latencies(around: Harness, n: int, seed: int) -> list[float]:
    if not around.routing_mean_s:
        return [0.0] * n
    variance = math.log1p((around.routing_sd_s / around.routing_mean_s) ** 2)
    mean = math.log(around.routing_mean_s) - variance / 2
    return np.random.default_rng(seed).lognormal(mean, math.sqrt(variance), n).tolist()
