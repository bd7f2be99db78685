"""Engine instances in virtual time, and the machine that they share."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from erlib.paper_scale.batching import Engine
from erlib.workload.prompts import Prompt


@dataclass
class Request:
    """One request on its way; times in seconds of virtual time."""

    user: int
    turn: str
    prompt: Prompt
    input_tokens: int
    expert: int
    sent_s: float
    server: int = -1
    """Which instance: of the expert's replicas the one with the fewest requests outstanding when it is forwarded."""
    queued_s: float = 0.0
    routed_s: float = 0.0
    first_step: int = -1
    kv_blocks: int = 0

    @property
    def output_tokens(self) -> int:
        return self.prompt.max_tokens

    @property
    def last_step(self) -> int:
        """The step that gives the last token."""
        return self.first_step + self.output_tokens - 1


class Clock:
    """Virtual time, in which everything happens when it is planned for; at the same time, in the order of planning."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._planned: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._plans = itertools.count()

    def at(self, when_s: float, do: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._planned, (when_s, next(self._plans), do, arguments))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._planned:
            self.now_s, _, do, arguments = heapq.heappop(self._planned)
            do(*arguments)


class Server:
    """One engine instance; what it did stays readable afterwards."""

    def __init__(self, engine: Engine[Request], clock: Clock, machine: SharedMachine | None, slow_client: bool):
        self.engine = engine
        self._clock, self._machine = clock, machine
        self.ends_s: list[float] = []
        self.taken_s: list[float] = [] if slow_client else self.ends_s
        """When the client had each step's tokens; one that keeps up with everything has them when steps end."""
        self.sequences: list[int] = []
        """Sequences that got a token in each step."""
        self.kv_blocks: list[int] = []
        """KV blocks reserved in each step."""
        self.finish: Callable[[Request], None]
        """What happens when a request has its last token."""
        self._running_s = np.empty(0)
        """When the steps end that are under way, which are one event."""
        self._begun = 0
        """The first of them."""
        self._plans = 0

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        CannotServe
            If it would wait for ever.
        """
        idle, may_enter = self.engine.is_idle, not self.engine.waiting
        self.engine.submit(request)
        if idle:  # it may share the first step with others that come at the same time
            self._clock.at(self._clock.now_s, self._begin)
        elif may_enter and self._machine is None:  # after the step that runs, which ends as it would have
            ended = int(self._running_s.searchsorted(self._clock.now_s))
            if ended + 1 < len(self._running_s):
                self._running_s = self._running_s[: ended + 1]
                self._plan_end()

    def _begin(self) -> None:
        """All steps in which nobody joins or leaves; or one, whose end depends on what other instances do meanwhile."""
        self._begun = len(self.ends_s)
        if self._machine is None:
            steps_s = self.engine.begin_steps()
            steps_s[0] += self._clock.now_s
            self._running_s = steps_s.cumsum()
            self._plan_end()
        else:
            self._machine.work(self.engine.begin_step(), self._end_shared)

    def _plan_end(self) -> None:
        self._plans += 1
        self._clock.at(float(self._running_s[-1]), self._end, self._plans)

    def _end_shared(self) -> None:
        self._running_s = np.array([self._clock.now_s])
        self._end(self._plans)

    def note(self, now_s: float) -> None:
        """Note the steps that have ended."""
        self._note(int(self._running_s.searchsorted(now_s, "right")))

    def _note(self, ended: int) -> None:
        self.ends_s += self._running_s[:ended].tolist()
        self.sequences += [self.engine.sequences] * ended
        self._running_s = self._running_s[ended:]

    def _end(self, plan: int) -> None:
        if plan != self._plans:  # somebody has come since, and this is no longer the end
            return
        self._note(len(self._running_s))
        steps = len(self.ends_s) - self._begun
        done = self.engine.end_steps(steps)
        self.kv_blocks += [done.kv_blocks] * steps
        if not self.engine.is_idle:
            self._begin()
        for request in done.finished:
            self.finish(request)


class SharedMachine:
    """Hardware that all instances share: each gets an equal part, so their steps go on at one pace, and end in turn.

    `slowdown` says how many times as long a step takes while so many are under way.
    """

    def __init__(self, clock: Clock, slowdown: Callable[[int], float]):
        self._clock, self._slowdown = clock, slowdown
        self._done_s = 0.0
        """Work that a step under way since the beginning would have done."""
        self._since_s = 0.0
        self._steps: list[tuple[float, int, Callable[[], None]]] = []
        self._changes = 0

    def work(self, seconds: float, do: Callable[[], None]) -> None:
        """What happens after a step that takes so long on a machine of its own."""
        self._catch_up()
        heapq.heappush(self._steps, (self._done_s + seconds, self._changes, do))
        self._wait_for_next()

    def _catch_up(self) -> None:
        if self._steps:
            self._done_s += (self._clock.now_s - self._since_s) / self._slowdown(len(self._steps))
        self._since_s = self._clock.now_s

    def _wait_for_next(self) -> None:
        self._changes += 1
        if self._steps:
            left_s = max(0.0, self._steps[0][0] - self._done_s) * self._slowdown(len(self._steps))
            self._clock.at(self._clock.now_s + left_s, self._end_next, self._changes)

    def _end_next(self, change: int) -> None:
        if change == self._changes:  # otherwise a step has begun or ended since, and this is no longer the time
            self._catch_up()
            _, _, do = heapq.heappop(self._steps)
            self._wait_for_next()
            do()
