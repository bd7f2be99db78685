"""Intervals and what they decide."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from erlib.claims.uncertainty import Estimate, Value, decide, estimate, ratio


def _value(seen: np.ndarray) -> Value:
    return Value(float(seen.mean()), float(seen.std(ddof=1)), len(seen))


def test_a_value_has_students_interval() -> None:
    seen = np.array([3.0, 4.0, 6.5])
    known = estimate(_value(seen), "x")
    low, high = stats.t.interval(0.95, 2, seen.mean(), stats.sem(seen))
    assert (known.low, known.high) == pytest.approx((low, high))
    assert known.interval == f"{low:.3g} to {high:.3g}"


def test_one_run_has_no_interval() -> None:
    known = ratio([Value(3.0, math.nan)], [Value(2.0, 0.1, 5)], "x")
    assert (known.low, known.value, known.high) == pytest.approx((1.5, 1.5, 1.5))
    assert known.interval == "one run"


def test_a_ratio_to_nothing_is_infinite() -> None:
    assert ratio([Value(1.0, 0.1, 2)], [Value(0.0, 0.0, 2)], "x").value == math.inf
    assert ratio([Value(0.0, 0.0, 2)], [Value(1.0, 0.1, 2)], "x").value == 0


@given(st.integers(2, 30), st.floats(0.5, 2), st.integers(0, 2**32 - 1))
def test_a_ratio_turned_over_has_its_interval_turned_over(n: int, truth: float, seed: int) -> None:
    a, b = map(_value, np.random.default_rng(seed).normal([[truth], [1]], 0.05, (2, n)))
    one, other = ratio([a], [b], "a/b"), ratio([b], [a], "b/a")
    assert (one.low, one.high) == pytest.approx((1 / other.high, 1 / other.low))
    assert one.low <= one.value <= one.high


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        a, b = map(_value, rng.normal([[1.2], [1.0]], 0.08, (2, 3)))
        known = ratio([a], [b], "")
        covered += known.low <= 1.2 <= known.high
    assert 0.93 < covered / 2000 < 0.98


NUMBERS = st.lists(
    st.tuples(st.floats(0.1, 10), st.floats(0, 3)).map(lambda x: Estimate(x[0], x[0] - x[1], x[0] + x[1], 3, "")),
    min_size=1,
    max_size=8,
)


@given(NUMBERS, st.floats(0.1, 5), st.floats(0, 5), st.sampled_from([0.5, 1.0]))
def test_a_decision_counts_everybody_once(numbers: list[Estimate], low: float, width: float, share: float) -> None:
    found = decide(numbers, low, low + width, share)
    outside = sum(number.high < low or number.low > low + width for number in numbers)
    assert found.held + found.open + outside == found.of == len(numbers)
    if found.holds:
        assert found.held >= share * len(numbers)
    if found.holds is False:
        assert len(numbers) - outside < share * len(numbers)
    if not found.open:
        assert found.holds is not None
    sure = [number._replace(low=number.value, high=number.value) for number in numbers]
    assert decide(sure, low, low + width, share).holds is not None


def test_what_is_closest_to_failing_is_named() -> None:
    numbers = [Estimate(value, value, value, 1, f"{value:g}") for value in (1.5, 1.1, 3.0)]
    assert decide(numbers, low=1).closest.text == "1.1"
    assert decide(numbers, 0.5, 2.0).closest.text == "3"
