"""What a gateway lets be seen of its requests: Prometheus metrics, and at debug level one line of JSON for each."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from erlib.gateway.experts import Expert, servers_of
from erlib.serving import spans

logger = logging.getLogger("erlib.gateway")

_LOGGED = ["id", "kind", "peer", "expert", "replica", "retries", "responses", "expert_error", "code", "spans_ns"]
NO_EXPERT = "none"
"""The label of requests that were refused before an expert was chosen."""
SEVERAL = "several"
"""The label of a server that has several experts' adapters."""
_KINDS = ("stream", "unary")
_BUCKETS_S = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10, 30, 100]


@dataclass(slots=True)
class Request:
    """One request and what became of it."""

    kind: str
    """``stream`` or ``unary``."""
    peer: str
    id: str = ""
    prompt: str = ""
    expert: int = -1
    replica: str = ""
    retries: int = 0
    responses: int = 0
    expert_error: str = ""
    """Status code of the expert's own last word, if that is an error; it counts as no token."""
    code: str = grpc.StatusCode.OK.name
    spans_ns: dict[str, int] = field(default_factory=dict)
    """In the order of time: ``queue``, ``vectorise``, ``svd``, ``kmeans``, ``forward``, ``first_byte``."""
    t_read_ns: int = field(default_factory=time.monotonic_ns)
    t_routed_ns: int = 0
    trailing_metadata: tuple[tuple[str, str | bytes], ...] = ()
    """The expert's own."""
    explanation: dict[str, int | str] = field(default_factory=dict)
    """What a client that asked for it has been told with the first response."""

    @property
    def span_metadata(self) -> dict[str, int]:
        """The spans under the names that they have on the wire."""
        return {spans.header(span): ns for span, ns in self.spans_ns.items()}


class Telemetry:
    """Counters of one gateway.

    Parameters
    ----------
    experts : sequence of Expert
    log_prompts : bool
        Whether log lines hold the prompt's text.
    """

    def __init__(self, experts: Sequence[Expert], log_prompts: bool = False):
        self._log_prompts = log_prompts
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU, open files

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"er_{name}", what, labels, registry=self.registry)

        self._requests = counter("requests", "requests that have ended", "expert", "kind")
        self._errors = counter("errors", "requests that have ended with an error", "expert", "kind")
        self._tokens = counter("tokens", "responses relayed, one of which is one token", "expert")
        self._retries = counter("retries", "requests that a second replica was asked to do", "expert")
        self._spans = Histogram(
            "er_span_seconds", "where a request's time went", ["span"], buckets=_BUCKETS_S, registry=self.registry
        )
        self.streams = Gauge("er_streams", "streams that clients hold open", registry=self.registry)
        outstanding = Gauge(
            "er_outstanding", "requests a replica owes us", ["expert", "replica"], registry=self.registry
        )
        up = Gauge("er_replica_up", "0: its circuit breaker is open", ["expert", "replica"], registry=self.registry)
        for replica in servers_of(experts):
            its = [number for number, expert in enumerate(experts) if replica in expert.replicas]
            number = str(its[0]) if len(its) == 1 else SEVERAL
            outstanding.labels(number, replica.url).set_function(partial(len, replica.calls))
            up.labels(number, replica.url).set_function(partial(getattr, replica, "is_up"))
        self._begin_at_zero(len(experts))

    def _begin_at_zero(self, n_experts: int) -> None:
        """Show all that there may be: what first appears with an event has no rate then, and no ratio before."""
        experts = [str(number) for number in range(n_experts)]
        for expert in (*experts, NO_EXPERT):
            for kind in _KINDS:
                self._requests.labels(expert, kind)
            for code in grpc.StatusCode:
                if code is not grpc.StatusCode.OK:
                    self._errors.labels(expert, code.name)
        for expert in experts:
            self._tokens.labels(expert)
            self._retries.labels(expert)
        for span in spans.SPANS:
            self._spans.labels(span)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count the tasks of `loop` whenever somebody asks."""
        tasks = Gauge("er_tasks", "asyncio tasks", registry=self.registry)
        tasks.set_function(lambda: len(asyncio.all_tasks(loop)))

    def note(self, request: Request) -> None:
        """Count a request that has ended, whatever its end."""
        expert = str(request.expert) if request.expert >= 0 else NO_EXPERT
        self._requests.labels(expert, request.kind).inc()
        if request.code != grpc.StatusCode.OK.name:
            self._errors.labels(expert, request.code).inc()
        elif request.expert_error:
            self._errors.labels(expert, request.expert_error).inc()
        if request.responses:
            self._tokens.labels(expert).inc(request.responses - bool(request.expert_error))
        if request.retries:
            self._retries.labels(expert).inc(request.retries)
        for span, ns in request.spans_ns.items():
            self._spans.labels(span).observe(ns * 1e-9)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(json.dumps(self._line(request)))

    def _line(self, request: Request) -> Mapping[str, object]:
        line = {name: getattr(request, name) for name in _LOGGED}
        line |= {"prompt_chars": len(request.prompt), "total_ns": time.monotonic_ns() - request.t_read_ns}
        return line | ({"prompt": request.prompt} if self._log_prompts else {})
