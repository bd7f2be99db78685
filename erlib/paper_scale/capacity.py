"""What a design can carry at most, by arithmetic: engines that are always full, and requests of mean lengths.

An upper bound for what comes at random, found without simulating. It says which designs are worth simulating, for how
long, and how much head room is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from erlib.paper_scale.batching import System
from erlib.paper_scale.steptimes import OutOfRange
from erlib.workload.prompts import Prompt

_BATCHES = 32


class Capacity(NamedTuple):
    """What is carried with every step within a bound."""

    requests_per_s: float
    users: float
    """Requests under way in all engines, at most; more than at `requests_per_s`, where a step that has more sequences
    takes as many times as long."""
    limited_by: str
    """What keeps it from more: ``batch slots``, ``KV cache`` or ``TPOT``."""
    responses_s: tuple[tuple[float, float], ...]
    """Requests per second, ascending, and how long an answer takes then without waiting."""

    def response_s(self, requests_per_s: float) -> float:
        """How long an answer takes at a load; beyond the most, as at the most."""
        return next((its for rate, its in self.responses_s if rate >= requests_per_s), self.responses_s[-1][1])


class Lengths(NamedTuple):
    """Mean tokens of what is asked."""

    prompt: float
    answer: float
    context: float
    """In the KV cache of a sequence that is decoded."""


def lengths(asked: Sequence[Prompt]) -> Lengths:
    """Of these requests."""
    prompt, answer = np.array([(one.input_tokens, one.max_tokens) for one in asked], float).T
    context = (answer * (prompt + answer / 2)).sum() / answer.sum()  # a long answer is in more steps
    return Lengths(prompt.mean(), answer.mean(), context)


def capacity(
    system: System, asked: Sequence[Prompt], share: npt.NDArray[np.float64], tpot_s: float = math.inf
) -> Capacity:
    """The most that a system carries of requests with such lengths, if no step may last longer than `tpot_s`.

    `share` is each expert's of the requests; it matters where they are routed.
    """
    mean = lengths(asked)
    limit = system.answer_limit or 0
    blocks = float(
        np.mean([math.ceil((one.input_tokens + max(one.max_tokens, limit)) / system.kv_block_tokens) for one in asked])
    )
    in_cache = (system.kv_tokens // system.kv_block_tokens) / blocks
    most = float(min(system.batch_size, in_cache))
    servers: float = len(system.experts)
    if system.routing == "expert_router" and not system.adapters:
        has = np.bincount(system.experts, minlength=system.instances)
        servers = 1 / (share / has).max()
    found: list[tuple[float, float, int]] = []
    limited_by = "batch slots" if system.batch_size <= in_cache else "KV cache"
    for batch in np.unique(np.geomspace(1, max(1, most), _BATCHES).astype(int)).tolist():
        step_s = _step_s(system, batch, mean)
        if step_s > tpot_s:
            limited_by = "TPOT"
            break
        found.append((servers * batch / step_s / mean.answer, step_s * mean.answer, batch))
    if not found:
        return Capacity(0.0, 0.0, limited_by, ((0.0, _step_s(system, 1, mean) * mean.answer),))
    responses_s = tuple((rate, response_s) for rate, response_s, _ in found)
    return Capacity(max(found)[0], servers * found[-1][2], limited_by, responses_s)


def _step_s(system: System, batch: int, mean: Lengths) -> float:
    """A step of a full engine: decoding, and its part of the prompts of those who take the places of who leaves."""
    steps, prompt = system.steps, max(1, round(mean.prompt))
    try:
        decodes_s = steps.step_s(0, 0, batch, round(batch * mean.context))
        reads_s = steps.step_s(1, prompt, batch, round(batch * mean.context)) - decodes_s
    except OutOfRange:
        return math.inf
    return decodes_s + batch / mean.answer * reads_s
