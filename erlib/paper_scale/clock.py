"""Both papers' systems in virtual time: users, client, gateway, servers, and the machine that they share."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from erlib.config.system import HAVE_GATEWAYS
from erlib.load import metrics
from erlib.paper_scale.batching import CannotServe, Engine, System
from erlib.paper_scale.instances import Clock, Request, Server, SharedMachine
from erlib.workload.prompts import Floats, Prompt

_GPUS = 8
"""On which either paper's systems run, whole."""


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
    client_per_server: bool = False
    """Each server's messages have a client of this speed to themselves, as if it were the server's own host."""
    per_request_s: float = 0.0
    """Clients and gateways send one request after the other, each taking so long."""
    arrivals_s: float = 0.0
    """Users come at moments of a Poisson process, all of them within so long; 0: all at once."""
    tensor_parallel: Harness | None = None
    """What stands around servers of several GPUs, where that is something else."""

    def around(self, system: System) -> Harness:
        """What stands around a system's engines."""
        several_gpus = system.instances < _GPUS
        return self.tensor_parallel if several_gpus and self.tensor_parallel else replace(self, tensor_parallel=None)


HARDWARE = Harness("hardware")


class _Client:
    """Takes the messages of all streams, in the order in which they come, as fast as it can."""

    def __init__(self, settings: Harness, clock: Clock, servers: Mapping[int, Server]):
        self._knee, self._slope = settings.client_knee, settings.client_slope
        self._tokens_per_s, self._clock, self._servers = settings.client_tokens_per_s, clock, servers
        self._free_s = 0.0
        self._changed_s: list[float] = []
        self._open_streams = [0]
        """Since the beginning, and since each change."""
        self._asked: list[tuple[Request, Callable[..., None], tuple[Any, ...]]] = []

    def open(self, streams: int) -> None:
        """Servers have so many requests more, or fewer, from now on."""
        if self._tokens_per_s is None:
            return
        self._changed_s.append(self._clock.now_s)
        self._open_streams.append(self._open_streams[-1] + streams)

    def after(self, request: Request, do: Callable[..., None], *arguments: Any) -> None:
        """Let something happen when the last token of a request, which is there, has been taken."""
        self._asked.append((request, do, arguments))
        if len(self._asked) == 1:  # it is not taken sooner, and then others can be looked at together with it
            self._clock.at(max(self._clock.now_s, self._free_s), self._answer)

    def _answer(self) -> None:
        self.take(self._clock.now_s)
        for request, do, arguments in self._asked:
            self._clock.at(self._servers[request.server].taken_s[request.last_step], do, *arguments)
        self._asked.clear()

    def take(self, now_s: float) -> None:
        """Take the messages of all steps that have ended; those of a step count as taken together."""
        if self._tokens_per_s is None:
            return
        servers = self._servers.values()
        for server in servers:
            server.note(now_s)
        ends_s = np.concatenate([server.ends_s[len(server.taken_s) :] for server in servers])
        messages = np.concatenate([server.sequences[len(server.taken_s) :] for server in servers])
        if not len(ends_s):
            return
        streams = np.array(self._open_streams)[np.searchsorted(self._changed_s, ends_s)]
        self._changed_s, self._open_streams = [], self._open_streams[-1:]
        order = np.argsort(ends_s, kind="stable")
        lasts_s = (messages * (1 + np.maximum(0, streams - self._knee) / self._slope) / self._tokens_per_s)[order]
        # Until it has taken a message, the client has been busy with all so far, and else idle: it has been idle for as
        # long as any of them came later than the work before it would have taken.
        busy_s = lasts_s.cumsum()
        idle_s = np.maximum.accumulate(np.maximum(ends_s[order] - (busy_s - lasts_s), self._free_s))
        taken_s = np.empty_like(ends_s)
        taken_s[order] = idle_s + busy_s
        self._free_s = float(taken_s[order[-1]])
        rest = iter(taken_s.tolist())
        for server in servers:
            server.taken_s += itertools.islice(rest, len(server.ends_s) - len(server.taken_s))


@dataclass(frozen=True)
class Trace:
    """Everything that happened at one point."""

    requests: list[Request]
    servers: list[Server]

    def token_ns(self) -> list[npt.NDArray[np.int64]]:
        """When the client had each request's tokens, in the order of :attr:`requests`."""
        steps_ns = [np.rint(np.array(server.taken_s) * 1e9).astype(np.int64) for server in self.servers]
        return [steps_ns[r.server][r.first_step : r.first_step + r.output_tokens] for r in self.requests]

    def latencies_s(self) -> tuple[Floats, Floats]:
        """TTFT of every request, and TPOT of those with more than one token, in seconds."""
        stamps_ns = self.token_ns()
        first_s, last_s = (np.array([its[place] for its in stamps_ns]) * 1e-9 for place in (0, -1))
        tokens = np.array([request.output_tokens for request in self.requests])
        sent_s = np.array([request.sent_s for request in self.requests])
        return first_s - sent_s, metrics.tpot_s(last_s - first_s, tokens)[tokens > 1]


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection: half of a simulation's time would go into looking at what lives until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collections()
def trace(
    system: System,
    drawn: Sequence[Prompt],
    continues: bool | Sequence[Prompt] | Sequence[Sequence[Prompt]],
    around: Harness = HARDWARE,
    seed: int = 0,
    routing_s: Sequence[float] | None = None,
    starts_s: Sequence[float] | None = None,
    until_s: float = math.inf,
) -> Trace:
    """Let all users of one point do their requests; each waits for an answer before the next.

    Parameters
    ----------
    system : System
    drawn : sequence of Prompt
        One per user, at full scale (:func:`erlib.paper_scale.simulation.at_paper_scale`); ``cluster`` is the router's
        decision, and ``max_tokens`` the length of the answer.
    continues : bool or sequence of Prompt, or of such sequences
        Whether a continuation prompt follows: the base prompt and its answer (paper 1, section IV-B), to the same
        cluster. Or these prompts themselves, where they are known: one per user, or all that each goes on with.
    around : Harness
    seed : int
        Of the routing latencies and the moments at which users come.
    routing_s : sequence of float, optional
        Routing latencies seen elsewhere, in seconds, in place of the harness' own: two per user, of the base and of
        all further prompts.
    starts_s : sequence of float, optional
        When each user comes, in seconds; by default as the harness says.
    until_s : float
        After this moment nobody goes on with another prompt.

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
    if starts_s is None:
        starts_s = np.random.default_rng([seed, len(drawn)]).uniform(0, around.arrivals_s, len(drawn)).tolist()
    return _Point(system, prompts_of, around, latencies_s, until_s).run(starts_s)


class _Point:
    """Users, and what stands between them and the engines of one system, in one virtual time."""

    def __init__(
        self,
        system: System,
        prompts_of: list[tuple[Prompt, ...]],
        around: Harness,
        latencies_s: Sequence[float],
        until_s: float,
    ):
        self._system, self._prompts_of, self._latencies_s, self._until_s = system, prompts_of, latencies_s, until_s
        self._asked = [0] * len(prompts_of)
        """Prompts that each user has sent."""
        self._per_request_s, self._sender_free_s = around.per_request_s, 0.0
        self._clock, steps = Clock(), system.steps
        apart = min(steps.at_full_speed, steps.limits.instances) >= len(system.experts)
        machine = None if apart else SharedMachine(self._clock, steps.slowdown)
        slow_client = around.client_tokens_per_s is not None
        self._servers = [Server(Engine(system), self._clock, machine, slow_client) for _ in system.experts]
        for server in self._servers:
            server.finish = self._finish
        known = dict(enumerate(self._servers))
        if around.client_per_server:
            self._clients = [_Client(around, self._clock, {number: server}) for number, server in known.items()]
        else:
            self._clients = [_Client(around, self._clock, known)] * len(known)
        self._replicas = {
            expert: [i for i, its in enumerate(system.experts) if its == expert or system.adapters]
            for expert in system.experts
        }
        limited = system.routing in HAVE_GATEWAYS and around.gateway_streams
        self._free_streams = limited or len(prompts_of)
        self._queue: deque[Request] = deque()
        self._requests: list[Request] = []

    def run(self, starts_s: Sequence[float]) -> Trace:
        """Until every user has every answer."""
        for user, start_s in enumerate(starts_s):
            self._clock.at(start_s, self._send, user)
        self._clock.run()
        for client in self._clients:
            client.take(math.inf)
        for server in self._servers:
            del server.finish  # which knows this point, which knows the server: else only a collection would end them
        return Trace(self._requests, self._servers)

    def _send(self, user: int) -> None:
        prompt, now_s = self._prompts_of[user][self._asked[user]], self._clock.now_s
        turn = "continuation" if self._asked[user] else "base"
        self._asked[user] += 1
        request = Request(user, turn, prompt, prompt.input_tokens, self._expert(user, prompt), now_s)
        self._requests.append(request)
        if self._per_request_s:
            self._sender_free_s = max(self._sender_free_s, now_s) + self._per_request_s
            self._clock.at(self._sender_free_s, self._queue_up, request)
        else:
            self._queue_up(request)

    def _expert(self, user: int, prompt: Prompt) -> int:
        if self._system.routing == "expert_router":
            return prompt.cluster
        turns_taken = len(self._requests) if self._system.routing == "replicas" else user
        return turns_taken % self._system.instances

    def _queue_up(self, request: Request) -> None:
        """Wait for one of the gateways' streams; where there are no gateways, there is one for everybody."""
        self._queue.append(request)
        self._relay()

    def _relay(self) -> None:
        if self._queue and self._free_streams:
            self._free_streams -= 1
            request, now_s = self._queue.popleft(), self._clock.now_s
            request.queued_s = now_s - request.sent_s
            request.routed_s = self._latencies_s[2 * request.user + (request.turn == "continuation")]
            self._clock.at(now_s + request.routed_s, self._submit, request)

    def _submit(self, request: Request) -> None:
        """Let the least busy replica of the request's expert answer, or another expert, if that is what is done."""
        replicas, spill_over = self._replicas[request.expert], self._system.spill_over
        request.server = replicas[0]
        if len(replicas) > 1 or spill_over is not None:
            owed = [server.engine.outstanding for server in self._servers]
            request.server = min(replicas, key=owed.__getitem__)
            if spill_over is not None and owed[request.server] - min(owed) >= spill_over:
                request.server = owed.index(min(owed))
        self._clients[request.server].open(1)
        self._servers[request.server].submit(request)

    def _finish(self, request: Request) -> None:
        self._clients[request.server].open(-1)
        self._free_streams += 1
        self._relay()
        more = self._asked[request.user] < len(self._prompts_of[request.user])
        if more and self._clock.now_s < self._until_s:
            self._clients[request.server].after(request, self._send, request.user)


def _turns(
    drawn: Sequence[Prompt], continues: bool | Sequence[Prompt] | Sequence[Sequence[Prompt]]
) -> list[tuple[Prompt, ...]]:
    """What each user asks, one after the other."""
    if not continues:
        return [(prompt,) for prompt in drawn]
    if continues is True:
        continues = [prompt._replace(input_tokens=prompt.input_tokens + prompt.max_tokens) for prompt in drawn]
    then = [[its] if isinstance(its, Prompt) else its for its in continues]
    return [(first, *its) for first, its in zip(drawn, then, strict=True)]


def _routing_latencies(around: Harness, n: int, seed: int) -> list[float]:
    if not around.routing_mean_s:
        return [0.0] * n
    variance = math.log1p((around.routing_sd_s / around.routing_mean_s) ** 2)
    mean = math.log(around.routing_mean_s) - variance / 2
    return np.random.default_rng(seed).lognormal(mean, math.sqrt(variance), n).tolist()
