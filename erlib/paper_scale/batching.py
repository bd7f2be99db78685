"""In-flight batching as TensorRT-LLM does it under ``guaranteed_no_evict``: which requests share an engine's steps.

First come, first served; a request enters when a batch slot is free, KV blocks for its prompt and its longest answer
can be reserved, and its prompt fits into the step. How long a step lasts, :mod:`erlib.paper_scale.steptimes` says. What
passes the time is somebody else's business: the simulation's virtual clock, or the wall clock of an emulated engine.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from erlib import config
from erlib.config import Dtype, Routing
from erlib.engines import llama
from erlib.paper_scale import steptimes
from erlib.paper_scale.steptimes import StepTimes

_STATED_KV_TOLERANCE = 0.03


class CannotServe(ValueError):
    """A system, or a request that it can never serve; the message says why."""


@dataclass(frozen=True)
class System:
    """Engines and how requests reach them; sizes are per instance."""

    config: str
    routing: Routing
    steps: StepTimes
    instances: int
    batch_size: int
    kv_tokens: int
    answer_limit: int | None = None
    """Tokens of the longest answer, for which KV cache is reserved; None: each request's own length."""
    kv_block_tokens: int = 64
    max_step_tokens: int = 8192
    """Prompt and decoded tokens of one step; a prompt is never cut in two (chunked context off)."""
    added: tuple[int, ...] = ()
    """Experts that have one more replica, each as often as it has one more."""
    adapters: bool = False
    """Whether every instance has all experts, on top of one model, so that any of them will do."""
    spill_over: int | None = None
    """A request goes to the least busy instance, whatever its expert, if its own owes so many requests more."""

    def __post_init__(self) -> None:
        sizes = (self.instances, self.batch_size, self.kv_tokens, self.kv_block_tokens, self.max_step_tokens)
        if min(sizes) < 1:
            raise CannotServe(f"{self.config}: all sizes must be at least 1, not {sizes}")
        if self.added and (
            self.routing != "expert_router" or not 0 <= min(self.added) <= max(self.added) < self.instances
        ):
            raise CannotServe(
                f"{self.config}: replicas are added to experts 0 to {self.instances - 1} of a system that classifies, "
                f"not to {self.added}"
            )

    @property
    def experts(self) -> tuple[int, ...]:
        """The expert of each engine instance."""
        return (*range(self.instances), *self.added)


def paper_system(name: str, answer_limit: int | None = None, steps: Path | None = None) -> System:
    """A configuration of a paper (or a baseline beside one) on 8 H100s, or on other GPUs that `steps` is a table of.

    KV tokens are those that the text states where they agree with the printed KV cache, and otherwise those that the
    printed cache holds (p1.C states more than twice as many).
    """
    configuration = config.load_configuration(name)
    printed = configuration.system
    held = llama.kv_tokens(printed)
    agree = printed.kv_tokens and abs(printed.kv_tokens / held - 1) <= _STATED_KV_TOLERANCE
    return System(
        config=name,
        routing=configuration.routing,
        steps=steptimes.for_configuration(configuration, steps),
        instances=printed.instances,
        batch_size=printed.batch_size,
        kv_tokens=printed.kv_tokens if printed.kv_tokens and agree else held,
        answer_limit=answer_limit,
    )


def preliminary_system(dtype: Dtype, tensor_parallel: int, batch_size: int) -> System:
    """One instance of Llama 3 70B on 4 or 8 H100s, as in paper 2's search for its baselines (section IV-C).

    The paper states no KV cache: it is given all the memory that the weights leave. That is room for 600 sequences of
    335 + 200 tokens in every data type, even in FP16 on four GPUs, so that the batch size alone limits what runs
    together. As in Table I, FP8 engines have an FP8 KV cache, FP16 and INT4 ones an FP16 one.

    Raises
    ------
    OutOfRange
        If the step times know no such engine.
    """
    model = "llama-3-70b"
    kv_dtype: Dtype = "fp8" if dtype == "fp8" else "fp16"
    return System(
        config=f"p2.{dtype}-tp{tensor_parallel}-bs{batch_size}",
        routing="direct",
        steps=steptimes.Table(model, dtype, kv_dtype, tensor_parallel),
        instances=1,
        batch_size=batch_size,
        kv_tokens=llama.most_kv_tokens(model, dtype, kv_dtype, tensor_parallel),
    )


class Request(Protocol):
    """What an engine has to know of a request."""

    input_tokens: int
    first_step: int
    """Set by the engine: the step that reads the prompt and gives the first token."""
    kv_blocks: int
    """Set by the engine: the KV blocks that are reserved for it."""

    @property
    def output_tokens(self) -> int:
        """Length of the answer."""
        ...


R = TypeVar("R", bound=Request)


class Step(NamedTuple, Generic[R]):
    """What one step did."""

    joined: list[R]
    """Requests whose prompts it read."""
    sequences: int
    """Requests that got a token, those that joined among them."""
    kv_blocks: int
    """KV blocks reserved while it ran."""
    finished: list[R]
    """Requests that got their last token."""


class Engine(Generic[R]):
    """One engine instance: call :meth:`begin_step`, let so many seconds pass, call :meth:`end_step`.

    Or, where nobody needs to see every single step, :meth:`begin_steps` and :meth:`end_steps`.
    """

    def __init__(self, system: System):
        self.system = system
        self.kv_blocks_total = system.kv_tokens // system.kv_block_tokens
        self.waiting: deque[R] = deque()
        self.steps = 0
        """Steps done."""
        self.sequences = 0
        """Requests under way, those included that join in the step that has begun."""
        self._context_tokens = 0
        self._reserved = 0
        self.joining: list[R] = []
        """Requests that join in the step that has begun."""
        self._joining_tokens = 0
        self._ending: dict[int, list[R]] = {}

    @property
    def outstanding(self) -> int:
        """Requests that wait or are under way."""
        return len(self.waiting) + self.sequences

    @property
    def is_idle(self) -> bool:
        return not self.outstanding

    def blocks(self, request: R) -> int:
        """KV blocks to reserve, so that the request never has to be evicted."""
        answer = max(request.output_tokens, self.system.answer_limit or 0)
        return math.ceil((request.input_tokens + answer) / self.system.kv_block_tokens)

    def check(self, request: R) -> int:
        """KV blocks to reserve for a request.

        Raises
        ------
        CannotServe
            If it would wait for ever.
        """
        needed, most = self.blocks(request), self.system.max_step_tokens
        if needed > self.kv_blocks_total or request.input_tokens > most:
            raise CannotServe(
                f"{self.system.config}: a request with {request.input_tokens} prompt tokens needs {needed} KV blocks; "
                f"an instance has {self.kv_blocks_total}, and a step takes {most} tokens"
            )
        return needed

    def submit(self, request: R) -> None:
        """Queue a request.

        Raises
        ------
        CannotServe
            If it would wait for ever.
        """
        request.kv_blocks = self.check(request)
        self.waiting.append(request)

    def begin_step(self) -> float:
        """Admit who may enter; returns how long the step takes, in seconds."""
        self._admit()
        return self._step_s()

    def begin_steps(self) -> npt.NDArray[np.float64]:
        """Admit who may enter; returns how long each of the next steps takes, in seconds.

        One step if somebody joins, otherwise all up to the first at whose end somebody leaves. A request that is
        submitted meanwhile may enter after any of them, if no other waits before it.
        """
        self._admit()
        if self.joining:
            return np.array([self._step_s()])
        steps = min(self._ending) + 1 - self.steps
        return self.system.steps.decode_steps_s(steps, self.sequences, self._context_tokens)

    def end_step(self) -> Step[R]:
        """Everybody under way has one more token."""
        return self.end_steps(1)

    def end_steps(self, steps: int) -> Step[R]:
        """Everybody under way has `steps` more tokens; at most as many as have begun."""
        joined, self.joining = self.joining, []
        self._context_tokens += steps * self.sequences + self._joining_tokens
        for request in joined:
            self._reserved += request.kv_blocks
            request.first_step = self.steps
            self._ending.setdefault(self.steps + request.output_tokens - 1, []).append(request)
        self.steps += steps
        done = Step(joined, self.sequences, self._reserved, self._ending.pop(self.steps - 1, []))
        for request in done.finished:
            self._leave(request, request.output_tokens)
        return done

    def cancel(self, request: R) -> None:
        """Let go of a request under way, between two steps."""
        self._ending[request.first_step + request.output_tokens - 1].remove(request)
        self._leave(request, self.steps - request.first_step)

    def _leave(self, request: R, answered: int) -> None:
        self.sequences -= 1
        self._context_tokens -= request.input_tokens + answered
        self._reserved -= request.kv_blocks

    def _step_s(self) -> float:
        joining = len(self.joining)
        decoded = self.sequences - joining
        return self.system.steps.step_s(joining, self._joining_tokens, decoded, self._context_tokens)

    def _admit(self) -> None:
        self.joining = []
        prompt_tokens, reserved = 0, self._reserved
        most = min(self.system.batch_size - self.sequences, self.system.steps.limits.prompts)
        while self.waiting and len(self.joining) < most:
            request = self.waiting[0]
            fits = self.sequences + prompt_tokens + request.input_tokens <= self.system.max_step_tokens
            reserved += request.kv_blocks
            if not fits or reserved > self.kv_blocks_total:
                break
            self.joining.append(self.waiting.popleft())
            prompt_tokens += request.input_tokens
        self.sequences += len(self.joining)
        self._joining_tokens = prompt_tokens
