"""What is made of systems near their capacity: whether the simulation would have decided rightly."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from benchmarks import near_capacity


def case(name: str, predicted: float, seen: dict[int, float], mix: str = "uniform", added: int = 0) -> list[dict]:
    """Rows of one case: p99 of TTFT by number of requests."""
    return [
        {
            **{"config": name, "mix": mix, "tokens": 24, "added": added, "predicted_most": predicted},
            **{"requests": n, "ttft_p99_s": ttft, "tpot_p99_s": 0.01, "lost_time": 0.0},
            **{
                "ttft_p99_predicted_s": 0.5 * n / predicted,
                "carried": ttft <= near_capacity.LEVEL_S["ttft"],
                "carried_predicted": n <= predicted,
            },
        }
        for n, ttft in seen.items()
    ]


def test_what_is_carried_at_nine_tenths_and_not_at_eleven_is_within_ten_per_cent() -> None:
    rows = [
        *case("p1.A", 100, {90: 0.4, 110: 0.6}),
        *case("p1.B", 200, {180: 0.51, 220: 0.9}),  # less than predicted
        *case("p1.C", 300, {270: 0.2, 330: 0.45}),  # more than predicted
    ]
    found = near_capacity.judge(pd.DataFrame(rows))
    assert (found["cases"], found["within_10_percent"]) == (3, 1)
    assert (found["points"], found["carried_rightly"]) == (6, 4)
    assert found["not_within"] == ["p1.B uniform 24 0", "p1.C uniform 24 0"]


def test_the_better_of_two_designs_and_what_a_wrong_choice_costs() -> None:
    """Predicted: B carries more; seen: A does. Designs of other papers, mixes or lengths are no alternatives."""
    rows = [
        *case("p1.A", 100, {90: 0.45, 110: 0.5}),
        *case("p1.B", 105, {80: 0.5, 110: 0.6}),
        *case("p1.C", 500, {450: 0.4, 550: 0.6}),
        *case("p2.A", 90, {81: 0.4, 99: 0.6}),
        *case("p1.A", 90, {81: 0.4, 99: 0.6}, mix="normal"),
    ]
    found = near_capacity.judge(pd.DataFrame(rows))
    assert (found["pairs"], found["named_rightly"]) == (3, 2)
    assert found["regrets"] == [pytest.approx(1 - 80 / 110, abs=1e-3)]


def test_what_is_carried_lies_between_the_points() -> None:
    frame = pd.DataFrame(case("p1.A", 100, {90: 0.25, 110: 1.0}))
    assert near_capacity._most(frame).seen == pytest.approx(100)  # half way by the latency's logarithm
    never = pd.DataFrame(case("p1.A", 100, {90: 0.6, 110: 1.0}))
    assert near_capacity._most(never).seen == 90
    assert not math.isnan(near_capacity._most(never).seen)
