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
                "tpot_p99_predicted_s": 0.01,
                "carried": ttft <= near_capacity.LEVEL_S["ttft"],
                "carried_predicted": n <= predicted,
            },
        }
        for n, ttft in seen.items()
    ]


def test_the_rate_that_is_carried_stands_beside_that_of_the_same_requests_in_the_simulation() -> None:
    rows = [
        *case("p1.A", 100, {90: 0.4, 110: 0.6}),
        *case("p1.B", 200, {140: 0.45, 180: 0.55, 220: 0.9}),  # less than predicted
        *case("p1.C", 300, {270: 0.2, 330: 0.45, 400: 0.51}),  # more than predicted
    ]
    found = near_capacity.judge(pd.DataFrame(rows))
    assert (found["cases"], found["within_10_percent"], found["between_90_and_110_percent"]) == (3, 1, 1)
    assert (found["points"], found["carried_rightly"]) == (8, 6)
    assert found["not_between"] == ["p1.B uniform 24 0", "p1.C uniform 24 0"]
    assert found["rate_error"]["0"] == pytest.approx(160 / 200 - 1, abs=0.01)
    assert found["rate_error"]["1"] == pytest.approx(389 / 300 - 1, abs=0.01)


def test_levels_are_added_until_one_is_carried_and_one_is_not(monkeypatch) -> None:
    """A system that carries 1.3 times as much as predicted, and one that carries nothing."""
    asked: list[list[float]] = []

    def measured(profile: object, one: object, levels: list[float]) -> pd.DataFrame:
        asked.append(levels)
        return pd.DataFrame({"carried": [level <= limit for level in levels]})

    monkeypatch.setattr(near_capacity, "plan", lambda profile, cases, levels: [levels])
    monkeypatch.setattr(near_capacity, "measured", measured)
    limit = 1.3
    assert len(near_capacity.bracketed(None, None, [0.9, 1.1])) == 4
    assert asked[-1] == pytest.approx([0.9, 1.1, 1.25, 1.4])
    limit = 0.0
    near_capacity.bracketed(None, None, [1.1, 0.9])
    assert asked[-1] == pytest.approx([0.45, 0.6, 0.75, 0.9, 1.1])


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
