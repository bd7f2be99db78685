"""One question, all designs: who carries most, what breaks first, and what cannot be asked."""

from __future__ import annotations

import pandas as pd
import pytest

from erlib import config
from erlib.config import ConfigError
from erlib.paper_scale import what_if
from erlib.paper_scale.what_if import Question


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
    assert table["most_requests_per_s"].is_monotonic_decreasing
    assert table["headroom"].to_numpy() == pytest.approx(table["most_requests_per_s"] / 5.0)
    assert set(table["bottleneck"]) <= {"TTFT", "TPOT"}
    assert table["design"][0].startswith("2 × FP8")  # half the bytes
    carried = table.set_index("design")["most_requests_per_s"]
    assert carried["2 × FP16 TP1, 8 adapters each"] < carried["2 × FP16 TP1, one model"]


def test_a_stricter_level_carries_less_and_says_what_breaks(profile: config.Profile, table: pd.DataFrame) -> None:
    strict = what_if.answered(asked(tpot_s=0.0075), profile)
    assert strict["most_requests_per_s"].max() < table["most_requests_per_s"].max()
    assert strict["bottleneck"][0] == "TPOT"


def test_what_follows_is_said_and_ties_are_named(table: pd.DataFrame) -> None:
    assert what_if.verdict(asked(), table).startswith(f"Most is carried by {table['design'][0]}: ")
    few = table.assign(headroom=0.5)
    assert "No design carries 5 requests/s" in what_if.verdict(asked(), few)
    none = table.assign(most_requests_per_s=0.0, headroom=0.0)
    assert "No design serves even a lone request" in what_if.verdict(asked(), none)
    same = table.assign(most_requests_per_s=10.0)
    assert f"not told from it: {', '.join(same['design'][1:])}" in what_if.verdict(asked(), same)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gpus": 0}, "1 to 8 GPUs, not 0"),
        ({"gpus": 9}, "1 to 8 GPUs, not 9"),
        ({"requests_per_s": 0.0}, "must be more than 0"),
        ({"ttft_s": -1.0}, "must be more than 0"),
    ],
)
def test_what_cannot_be_asked_is_said(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(**changed)


def test_a_model_without_step_times_names_those_that_have_some(profile: config.Profile) -> None:
    with pytest.raises(ConfigError, match=r"no step times for smollm2-135m on 2 GPUs.*has llama-2-13b, llama-2-70b"):
        what_if.ways(asked(model="smollm2-135m"), profile)
