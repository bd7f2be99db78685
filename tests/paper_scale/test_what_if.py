"""The most that every design carries: searched for below what arithmetic allows, with intervals, and what is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from erlib import config
from erlib.config import ConfigError
from erlib.paper_scale import what_if
from erlib.paper_scale.questions import Question
from erlib.workload.traces import Trace


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    return config.load_profile("smoke")


def asked(**changed: object) -> Question:
    return Question(**{"model": "llama-3-8b", "gpus": 2, "requests_per_s": 5.0, "window_s": 2.0, **changed})


@pytest.fixture(scope="module")
def table(profile: config.Profile) -> pd.DataFrame:
    return what_if.answered(asked(spread="normal"), profile)


def test_every_form_that_is_known_is_asked_about(table: pd.DataFrame) -> None:
    forms = {"2 × FP16 TP1, one model", "2 × FP16 TP1, an expert each", "2 × FP16 TP1, 8 adapters each"}
    assert set(table["design"]) == {*forms, "2 × FP8 TP1, one model", "2 × FP8 TP1, an expert each"}
    assert (table["gpus"] == 2).all()
    assert table["most"].is_monotonic_decreasing
    assert table["headroom"].to_numpy() == pytest.approx(table["most"] / 5.0)
    assert set(table["bottleneck"]) <= {"TTFT", "TPOT", "batch slots", "KV cache"}
    assert table["design"][0].startswith("2 × FP8")  # half the bytes
    carried = table.set_index("design")["most"]
    assert carried["2 × FP16 TP1, 8 adapters each"] < carried["2 × FP16 TP1, one model"]


def test_intervals_hold_the_draws_and_the_known_error(table: pd.DataFrame) -> None:
    assert (table["most_low"] < 0.9 * table["most"]).all() and (table["most_high"] > 1.1 * table["most"]).all()
    for metric in ("ttft_p99_s", "tpot_p99_s"):
        assert (table[f"{metric}_low"] <= table[metric]).all() and (table[metric] <= table[f"{metric}_high"]).all()


def test_a_stricter_level_carries_less_and_says_what_breaks(profile: config.Profile, table: pd.DataFrame) -> None:
    strict = what_if.answered(asked(tpot_s=0.0075), profile)
    assert strict["most"].max() < table["most"].max()
    assert strict["bottleneck"][0] == "TPOT"


def test_users_who_wait_are_counted_as_users(profile: config.Profile) -> None:
    its = what_if.answered(asked(requests_per_s=None, users=50, gpus=1, slots=32, formats=("fp8",)), profile)
    assert list(its["design"]) == ["1 × FP8 TP1, one model"]
    assert its["headroom"][0] == pytest.approx(its["most"][0] / 50)
    assert its["most"][0] > 50  # beyond the slots they wait, but for no longer than they may
    impatient = asked(requests_per_s=None, users=50, gpus=1, slots=32, formats=("fp8",), ttft_s=0.1)
    its = what_if.answered(impatient, profile)
    assert 25 < its["most"][0] <= 36
    assert "No design carries 50 users" in what_if.verdict(impatient, its)


def test_the_most_does_not_hang_on_what_is_asked(profile: config.Profile) -> None:
    its: list[pd.DataFrame] = []
    for rate in (1.0, 20.0, 500.0):
        its.append(
            what_if.answered(asked(requests_per_s=rate, gpus=1, slots=8, formats=("fp8",), window_s=20.0), profile)
        )
    most = [table["most"][0] for table in its]
    assert max(most) < 1.02 * min(most)
    assert [table["headroom"][0] for table in its] == pytest.approx([most[0], most[1] / 20, most[2] / 500])
    assert its[0]["price_per_million_tokens"][0] == pytest.approx(its[2]["price_per_million_tokens"][0], rel=0.05)


def test_requests_that_no_design_can_serve_are_refused(profile: config.Profile) -> None:
    tokens = np.full(40, 9000)
    trace = Trace("mine.csv", "own", np.arange(40.0), tokens, np.full(40, 5))
    with pytest.raises(ConfigError, match=r"no design can serve this: .* 9000 prompt tokens"):
        what_if.answered(asked(lengths=trace, requests_per_s=None, window_s=None, gpus=1), profile)


def test_what_follows_is_said_and_ties_are_named(table: pd.DataFrame) -> None:
    said = what_if.verdict(asked(), table)
    assert said.startswith(f"Most is carried by {table['design'][0]}: ")
    assert "5 of 5 designs carry what is asked, 5 of them even at the lower end" in said
    few = table.assign(headroom=0.5)
    assert "No design carries 5 requests/s" in what_if.verdict(asked(), few)
    none = table.assign(most=0.0, headroom=0.0)
    assert "No design serves even a lone request" in what_if.verdict(asked(), none)
    same = table.assign(most=10.0)
    assert f"not told from it: {', '.join(same['design'][1:])}" in what_if.verdict(asked(), same)
