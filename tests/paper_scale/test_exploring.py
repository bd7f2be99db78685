"""Answers of notebook 13: eleven questions whose values are the simulation's; users, traces, refusals, the frontier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from erlib import config
from erlib.config import ConfigError
from erlib.load import metrics
from erlib.paper_scale import clock, exploring, questions
from erlib.paper_scale.exploring import Effort, Explorer
from erlib.paper_scale.questions import Question
from erlib.workload.traces import Trace

QUESTIONS: list[dict[str, Any]] = [
    {},
    {"requests_per_s": 40.0},
    {"spread": "normal"},
    {"gpus": 1},
    {"model": "llama-3-70b", "requests_per_s": 2.0},
    {"model": "llama-2-13b", "lengths": "p1", "requests_per_s": 0.5},
    {"formats": ("fp8",), "slots": 16},
    {"gpu": "h200-pytorch"},
    {"gpu": "a100", "gpus": 4, "spread": "normal"},
    {"requests_per_s": None, "users": 20},
    {"gpus": 4, "experts": 2, "spread": "normal", "gpu_hour": 3.0},
]


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    return config.load_profile("smoke")


@pytest.fixture(scope="module")
def explorer(profile: config.Profile) -> Iterator[Explorer]:
    with Explorer(profile) as its:
        yield its


def asked(**changed: Any) -> Question:
    return Question(**{"model": "llama-3-8b", "gpus": 2, "requests_per_s": 5.0, **changed})


@pytest.mark.parametrize("changed", QUESTIONS, ids=lambda changed: ", ".join(map(str, changed)) or "as it is")
def test_answers_are_the_simulations(explorer: Explorer, changed: dict[str, Any]) -> None:
    question = asked(**changed)
    answer = explorer.answer(question)
    known = questions.ways(question, explorer.profile)
    assert set(answer.table["design"]) == set(known)
    best = answer.table.iloc[0]
    way = known[best["design"]]
    effort = exploring.effort_for(question, exploring.bound(question, explorer.profile, way))
    effort = effort._replace(requests=max(effort.requests, 400))
    draws = [exploring.observe(question, explorer.profile, way, effort, draw) for draw in range(best["draws"])]
    for metric in exploring.METRICS:
        values = [draw[metric] for draw in draws]
        assert best[metric] == pytest.approx(np.mean(values), rel=1e-9)
        assert best[f"{metric}_low"] <= best[metric] <= best[f"{metric}_high"]
    paid = question.gpus * question.gpu_hour / 3600
    assert best["price_per_million_tokens"] == pytest.approx(np.mean([1e6 * paid / d["tokens_per_s"] for d in draws]))
    assert best["bottleneck"] in ("TTFT", "TPOT")


def test_what_is_observed_is_what_the_clock_says(profile: config.Profile) -> None:
    question, n = asked(spread="normal"), 90
    way = questions.ways(question, profile)["2 × FP8 TP1, an expert each"]
    seen = exploring.observe(question, profile, way, Effort(n), draw=1)
    drawn = questions.for_experts(question, questions.drawn(question, profile, n, 1), way.system)
    starts_s = np.random.default_rng([profile.seed, 1, n]).exponential(1 / 5.0, n).cumsum()
    happened = clock.trace(way.system, drawn, continues=False, starts_s=starts_s.tolist())
    ttft, tpot = [], []
    for request, stamps in zip(happened.requests, happened.token_ns(), strict=True):
        if request.sent_s >= starts_s[-1] / 3:
            ttft.append(stamps[0] * 1e-9 - request.sent_s)
            tpot += [(stamps[-1] - stamps[0]) * 1e-9 / (len(stamps) - 1)] if len(stamps) > 1 else []
    assert (seen["ttft_mean_s"], seen["ttft_p99_s"]) == pytest.approx((np.mean(ttft), metrics.p99(np.array(ttft))))
    assert (seen["tpot_mean_s"], seen["tpot_p99_s"]) == pytest.approx((np.mean(tpot), metrics.p99(np.array(tpot))))
    assert {prompt.cluster for prompt in drawn} == {0, 1}


def test_users_ask_again_when_they_have_an_answer_and_no_sooner(profile: config.Profile) -> None:
    question = asked(requests_per_s=None, users=3, gpus=1)
    way = questions.ways(question, profile)["1 × FP8 TP1, one model"]
    bound = exploring.bound(question, profile, way)
    effort = exploring.effort_for(question, bound)
    seen = exploring.observe(question, profile, way, effort)
    # by Little's law: as many are under way as there are users
    assert seen["requests_per_s"] * bound.response_s(0) == pytest.approx(3, rel=0.2)
    more = exploring.observe(question, profile, way, effort, faster=4.0)
    assert more["requests_per_s"] > 3 * seen["requests_per_s"]
    assert seen["slots_used"] == 3 / way.system.batch_size


def test_the_next_question_is_sent_with_the_last_token_and_none_after_the_end(profile: config.Profile) -> None:
    question = asked(gpus=1)
    system = questions.ways(question, profile)["1 × FP8 TP1, one model"].system
    drawn = questions.drawn(question, profile, 6, 0)
    happened = clock.trace(system, drawn[:2], [drawn[2:4], drawn[4:6]], starts_s=[0.0, 0.5])
    for user, texts in enumerate(((0, 2, 3), (1, 4, 5))):
        mine = [
            (r.sent_s, stamps[-1] * 1e-9, r.prompt)
            for r, stamps in zip(happened.requests, happened.token_ns(), strict=True)
            if r.user == user
        ]
        assert [prompt for *_, prompt in mine] == [drawn[n] for n in texts]
        assert [sent for sent, *_ in mine[1:]] == pytest.approx([last for _, last, _ in mine[:-1]], abs=2e-9)
    ends = clock.trace(system, drawn[:2], [drawn[2:4], drawn[4:6]], starts_s=[0.0, 0.5], until_s=0.6)
    assert len(ends.requests) < 6 and all(request.sent_s < 0.6 for request in ends.requests)


def test_arithmetic_bounds_what_saturated_engines_answer(profile: config.Profile) -> None:
    for changed in ({"gpus": 1}, {"gpus": 1, "slots": 24}, {"gpus": 1, "lengths": "p1"}):
        question = asked(**changed, formats=("fp8",))
        way = questions.ways(question, profile)["1 × FP8 TP1, one model"]
        bound = exploring.bound(question, profile, way)
        seen = exploring.observe(
            replace(question, requests_per_s=1.5 * bound.requests_per_s), profile, way, Effort(1500)
        )
        assert seen["requests_per_s"] == pytest.approx(bound.requests_per_s, rel=0.08), changed


def test_a_trace_comes_as_it_came(explorer: Explorer) -> None:
    mine = _trace()
    answer = explorer.answer(asked(lengths=mine, requests_per_s=None))
    assert answer.table["within"][0] == 1
    assert answer.question.load == f"{answer.question.rate_per_s:.4g} requests/s, as its trace has them"
    burst = _trace(arrival_s=np.repeat(np.arange(4) * 5.0, 20))
    assert (
        explorer.answer(asked(lengths=burst, requests_per_s=None)).table["ttft_p99_s"][0]
        > (answer.table["ttft_p99_s"][0])
    )


def _trace(n: int = 80, **changed: Any) -> Any:
    rng = np.random.default_rng(0)
    its = {"arrival_s": np.arange(n) * 0.25, "input_tokens": rng.integers(100, 500, n)}
    return Trace(
        **{
            "name": "mine.csv",
            "format": "own",
            **its,
            "output_tokens": rng.integers(1, 50, n),
            "cluster": None,
            **changed,
        }
    )


def test_a_request_that_no_engine_can_hold_is_said(explorer: Explorer) -> None:
    long = _trace(input_tokens=np.full(80, 9000))
    with pytest.raises(ConfigError, match=r"no design can serve this: .*9000 prompt tokens"):
        explorer.answer(asked(lengths=long, requests_per_s=None))


def test_what_arithmetic_rules_out_is_not_simulated(explorer: Explorer) -> None:
    table = explorer.answer(asked(model="llama-3-70b", gpus=8, requests_per_s=None, users=900)).table
    assert (table["draws"] == 0).any() and table["draws"][0] >= 3
    assert table.loc[table["draws"] == 0, "ttft_p99_s"].isna().all()


def test_the_frontier_is_what_nothing_beats(explorer: Explorer) -> None:
    table = explorer.frontier(asked(gpus=1), loads=(0.3, 0.9))
    assert len(table) == 2 * table["design"].nunique()
    for _, row in table.iterrows():
        beaten = (table["goodput_per_gpu"] > row["goodput_per_gpu"]) & (table["ttft_p99_s"] < row["ttft_p99_s"])
        assert row["on_frontier"] == (not beaten.any())
    with pytest.raises(ConfigError, match="no design serves even one request"):
        explorer.frontier(asked(gpus=1, tpot_s=1e-6))
