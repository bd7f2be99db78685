"""What is said of an answer: whether it is carried, whether the better of two is sure, what is not known."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from erlib.paper_scale import decisions, known_error
from erlib.paper_scale.decisions import NO, SURE, UNSURE
from erlib.paper_scale.exploring import METRICS, Answer
from erlib.paper_scale.questions import IN_TURN, ROUTED, Question

LOW, HIGH = 0.85, 1.14


def row(design: str, headroom: float, **changed: Any) -> dict[str, Any]:
    its: dict[str, Any] = {"design": design, "kind": IN_TURN, "form": design[:3], "draws": 3, "limited_by": "KV cache"}
    values = dict.fromkeys(METRICS, 0.01) | {"price_per_million_tokens": 2.0, "within": 1.0, "goodput_per_s": 5.0}
    for name, value in values.items():
        its |= {name: value, f"{name}_low": 0.9 * value, f"{name}_high": 1.1 * value}
    its |= {"headroom": headroom, "headroom_low": LOW * headroom, "headroom_high": HIGH * headroom}
    return its | {"bottleneck": "TPOT", "slots_used": 0.5, "kv_used": 0.25, "gpus": 8, "refused": ""} | changed


def answer(*rows: dict[str, Any], **asked: Any) -> Answer:
    errors = pd.DataFrame(
        {"points": 59, "smallest": 2.0, "largest": 4.0, "low": LOW, "high": HIGH},
        index=["throughput", "TPOT", "TTFT", "TPOT, open loop", "TTFT, open loop"],
    )
    errors.loc["throughput, roofline"] = [11, 0.5, 2.0, 0.5, 2.0]
    errors.loc["TTFT, roofline"] = [4, 1.1, 3.0, 1.1, 3.0]
    question = Question(**{"model": "llama-3-8b", "gpus": 8, "requests_per_s": 5.0, **asked})
    return Answer(question, pd.DataFrame(rows), errors)


@pytest.mark.parametrize(
    ("headroom", "changed", "verdict", "said"),
    [
        (3.0, {}, SURE, "a a carries 5 requests/s within p99 TTFT 2 s and TPOT 0.2 s: headroom 3 (2.55 to 3.42)"),
        (1.1, {}, UNSURE, "Whether 5 requests/s are carried"),
        (0.8, {}, NO, "No design carries 5 requests/s"),
        (3.0, {"ttft_p99_s": 2.0, "ttft_p99_s_low": 1.9, "ttft_p99_s_high": 2.1}, UNSURE, "cannot be told"),
        (3.0, {"tpot_p99_s": 0.3, "tpot_p99_s_low": 0.25}, NO, "No design carries"),
    ],
)
def test_what_is_carried_is_sure_or_not(headroom: float, changed: dict[str, Any], verdict: str, said: str) -> None:
    its = answer(row("a a", headroom, **changed))
    assert decisions.carries(its, "a a") == verdict
    assert said in decisions.decision(its)[0]
    assert len(decisions.decision(its)) == 1


def test_the_better_of_two_is_sure_where_no_known_error_turns_them_round() -> None:
    close = answer(row("abc 1", 3.0), row("xyz 2", 2.5))
    assert "is not sure: 1.2 times (0.895 to 1.61)" in decisions.decision(close)[1]
    far = answer(row("abc 1", 3.0), row("xyz 2", 2.0))
    assert decisions.decision(far)[1] == "abc 1 rather than xyz 2: 1.5 times (1.12 to 2.01) the headroom."
    same_steps = answer(row("abc 1", 3.0), row("abc 2", 2.5))
    assert decisions.decision(same_steps)[1] == "abc 1 rather than abc 2: 1.2 times the headroom."


def test_designs_that_carry_nothing_are_compared_with_nobody() -> None:
    late = {"goodput_per_s": 0.0, "goodput_per_s_low": 0.0, "within": 0.0, "ttft_p99_s": 9.0, "ttft_p99_s_low": 8.0}
    users = answer(row("abc 1", 0.4, **late), row("abc 2", 0.3, kind=ROUTED, **late), requests_per_s=None, users=9)
    assert len(decisions.decision(users)) == 1
    rates = answer(row("abc 1", 0.0), row("xyz 2", 0.0, kind=ROUTED))
    assert len(decisions.decision(rates)) == 1
    some = answer(row("abc 1", 1.5, goodput_per_s_low=0.0), row("xyz 2", 1.0), requests_per_s=None, users=9)
    assert "the answers" in decisions.decision(some)[1]


def test_who_is_late_at_any_load_is_not_told_of_slots() -> None:
    its = answer(row("abc 1", 1.4, ttft_p99_s=2.5, ttft_p99_s_low=2.4, bottleneck="TTFT"))
    assert "Nearest to it is abc 1: p99 TTFT 2.5 s, headroom 1.4" in decisions.decision(its)[0]
    assert "ended by" not in decisions.decision(its)[0]


def test_one_model_stands_beside_experts() -> None:
    its = answer(row("abc 1", 3.0), row("abc 2", 0.5, kind=ROUTED))
    assert (
        "Experts instead of one model (abc 2 against abc 1) have 0.167 times the headroom" in decisions.decision(its)[2]
    )
    assert "they do not carry 5 requests/s" in decisions.decision(its)[2]


def test_two_columns_say_what_grows_with_time() -> None:
    table = decisions.side_by_side(answer(row("abc 1", 3.0), row("abc 2", 1.05), row("abc 3", 1.0)))
    assert list(table) == ["abc 1", "abc 2"]
    assert list(table.loc["TTFT, p99 [ms]"]) == ["10 (9 to 11)", "> 10 (9 to 11)"]
    assert list(table.loc["goodput [requests/s within the service level]"])[1].startswith("< 5")
    assert table.loc["slots, KV cache in use at most [%]", "abc 1"] == "50, 25"


def test_limits_name_the_load_that_they_are_of() -> None:
    rates, users = answer(row("a", 2.0)), answer(row("a", 2.0), requests_per_s=None, users=9)
    assert any(said.startswith("Too good near saturation") for said in decisions.limits(rates))
    assert any(said.startswith("Of users who wait") for said in decisions.limits(users))
    other = answer(row("a", 2.0), gpu="h200-pytorch")
    assert len(decisions.limits(other)) == len(decisions.limits(rates)) + 1


@pytest.mark.parametrize("gpu", ["a100", "h200"])
@pytest.mark.parametrize("load", [{}, {"requests_per_s": None, "users": 9}])
def test_of_a_data_sheet_less_is_known(gpu: str, load: dict[str, Any]) -> None:
    close, far = (answer(row("abc 1", 3.0), row("xyz 2", its), gpu=gpu) for its in (2.0, 0.5))
    assert "is not sure: 1.5 times (0.375 to 6)" in decisions.decision(close)[1]
    assert "6 times (1.5 to 24) the headroom" in decisions.decision(far)[1]
    said = decisions.limits(answer(row("a", 2.0), gpu=gpu, **load))
    assert any("0.5 to 2 times the simulated ones, in static batches" in line and "11 points" in line for line in said)
    assert any("Published TTFTs of a lone prompt are 1.1 to 3 times" in line and "4 points" in line for line in said)
    assert not any("90 % probability (" in line or line.startswith(("Too good", "Of users")) for line in said)


def test_known_error_of_data_sheets_is_all_that_is_published() -> None:
    table = known_error.known_error()
    priced = table.loc[known_error.THROUGHPUT + known_error.SHEET]
    assert priced["points"] == 11 and (priced["low"], priced["high"]) == (priced["smallest"], priced["largest"])
    assert 0.6 < priced["low"] < 1 < priced["high"] < 1.3


def test_known_error_is_that_of_the_published_comparison() -> None:
    table = known_error.known_error()
    assert table.loc["throughput", "points"] > 50
    low, high = known_error.between(table, known_error.THROUGHPUT)
    assert 0.7 < low < 1 < high < 1.3
    assert pd.isna(table.loc["TTFT, open loop", "low"]) and table.loc["TTFT, open loop", "smallest"] > 1.5
    assert all(pd.isna(its) for its in known_error.between(table, "nothing"))
