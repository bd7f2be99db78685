"""How sure a number is, and whether it lies on one side of a threshold.

A value is a mean over repeats, with Student's 95 % interval; a ratio has its interval on the logarithmic scale, from
the relative spreads of what it is made of. Repeats of different systems share their draws, which makes their ratio
surer than that: the interval is rather too wide than too narrow. One run has no interval, and is taken at its word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

CONFIDENCE = 0.95


class Value(NamedTuple):
    """Mean over repeats, its standard deviation (NaN for a single one), and how many they are."""

    mean: float
    sd: float
    n: int = 1


class Estimate(NamedTuple):
    """A number, the interval that it lies in, and from how many runs that is known (of the fewest)."""

    value: float
    low: float
    high: float
    n: int
    text: str

    @property
    def interval(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}" if self.n > 1 else "one run"


class Decision(NamedTuple):
    """Whether numbers lie where they should: None if their intervals do not tell."""

    holds: bool | None
    held: int
    open: int
    of: int
    closest: Estimate
    """The number on which it hangs: the one least inside, or farthest outside."""
    low: float
    high: float

    @property
    def counted(self) -> str:
        """How many hold for certain."""
        return f"{self.held} of {self.of}" + f" (of {self.open} it cannot be told)" * bool(self.open)


def estimate(value: Value, text: str) -> Estimate:
    """A value with its interval."""
    half = _student(value.n - 1) * value.sd / math.sqrt(value.n) if value.n > 1 else 0.0
    return Estimate(value.mean, value.mean - half, value.mean + half, value.n, text)


def ratio(above: Sequence[Value], below: Sequence[Value], text: str) -> Estimate:
    """The product of some values over the product of others; infinite if one of these is 0."""
    values = [*above, *below]
    n = min(value.n for value in values)
    if min(value.mean for value in values) <= 0:
        exact = math.inf if min(value.mean for value in below) <= 0 else 0.0
        return Estimate(exact, exact, exact, n, text)
    log = sum(math.log(value.mean) for value in above) - sum(math.log(value.mean) for value in below)
    half = 0.0
    if n > 1:
        error = math.sqrt(sum((value.sd / value.mean) ** 2 / value.n for value in values))
        half = _student(sum(value.n - 1 for value in values)) * error
    return Estimate(math.exp(log), math.exp(log - half), math.exp(log + half), n, text)


def decide(numbers: Sequence[Estimate], low: float = 0.0, high: float = math.inf, share: float = 1.0) -> Decision:
    """Whether at least a `share` of `numbers` lies between `low` and `high`, with their whole intervals.

    It does not if so many lie outside with their whole intervals that the rest is not enough; otherwise nobody can
    tell.
    """
    inside = sum(low <= number.low and number.high <= high for number in numbers)
    outside = sum(number.high < low or number.low > high for number in numbers)
    needed = share * len(numbers)
    holds = True if inside >= needed else False if len(numbers) - outside < needed else None
    closest = max(numbers, key=lambda number: max(_beyond(number.value, high), _beyond(low, number.value)))
    return Decision(holds, inside, len(numbers) - inside - outside, len(numbers), closest, low, high)


def _beyond(value: float, bound: float) -> float:
    """How far a value lies above a bound, relative to the bound; negative if it is below."""
    if math.isinf(bound) and not math.isinf(value):
        return -math.inf
    return (value - bound) / abs(bound) if bound else value - bound


def _student(degrees: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
