"""Ways to put eight experts on eight GPUs: who answers, what is carried, and what that is worth beside the language."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.paper_scale import batching, clock, designs, setups
from erlib.paper_scale.designs import Design
from erlib.workload import prompts
from erlib.workload.prompts import Prompt

N = 60
STRICT = batching.paper_system("p2.E")


@functools.cache
def drawn() -> list[Prompt]:
    """Prompts of paper 2, three of four of which belong to one expert."""
    pool = setups.workload(config.load_profile("smoke"), "p2")
    asked = prompts.draw(pool, N, "uniform", seed=0, repeat=0)
    return [prompt._replace(cluster=3) if i % 4 else prompt for i, prompt in enumerate(asked)]


def seen(design: Design, apart_s: float = 0.0) -> designs.Seen:
    starts_s = [apart_s * user for user in range(N)]
    others = [prompt._replace(cluster=(prompt.cluster + 1) % 8) for prompt in drawn()]
    return designs.see(design, drawn(), others, starts_s)


def test_adapters_make_the_spread_over_experts_free() -> None:
    shared = replace(STRICT, adapters=True)
    happened = clock.trace(shared, drawn(), continues=False)
    assert {request.expert for request in happened.requests} == {prompt.cluster for prompt in drawn()}
    answered = np.bincount([request.server for request in happened.requests], minlength=8)
    assert answered.max() - answered.min() <= 1
    strict, free = seen(Design(STRICT)), seen(Design(shared))
    assert free.ttft_s.max() < strict.ttft_s.max() / 2
    assert strict.elsewhere == free.elsewhere == 0
    assert strict.tokens == free.tokens == sum(prompt.max_tokens for prompt in drawn())


def test_steps_with_adapters_may_be_slower() -> None:
    shared = replace(STRICT, adapters=True)
    once, twice = seen(Design(shared)), seen(Design(setups.slower(shared, 2.0), slower=2.0))
    assert twice.ttft_s == pytest.approx(2 * once.ttft_s)
    assert twice.tpot_s == pytest.approx(2 * once.tpot_s)


def test_what_spills_over_goes_to_the_least_busy() -> None:
    strict = seen(Design(STRICT))
    never = seen(Design(replace(STRICT, spill_over=N)))
    assert never.elsewhere == 0
    assert np.array_equal(never.ttft_s, strict.ttft_s)
    happened = clock.trace(replace(STRICT, spill_over=1), drawn(), continues=False)
    answered = np.bincount([request.server for request in happened.requests], minlength=8)
    assert answered.max() - answered.min() <= 1
    assert seen(Design(replace(STRICT, spill_over=1))).elsewhere > 0.4
    some = seen(Design(replace(STRICT, spill_over=8))).elsewhere
    assert 0 < some < seen(Design(replace(STRICT, spill_over=1))).elsewhere


def test_a_token_of_two_experts_is_there_when_both_have_it() -> None:
    alone, both = (seen(Design(STRICT, answers), 60.0) for answers in ("routed", "two experts"))
    assert both.tokens == alone.tokens
    assert both.ttft_s == pytest.approx(alone.ttft_s)  # two GPUs, of which nobody else wants anything
    assert seen(Design(STRICT, "two experts")).ttft_s.mean() > seen(Design(STRICT)).ttft_s.mean()


def test_users_come_when_they_are_said_to() -> None:
    starts_s = [0.5 * user for user in range(N)]
    happened = clock.trace(STRICT, drawn(), continues=False, starts_s=starts_s)
    assert sorted(request.sent_s for request in happened.requests) == pytest.approx(starts_s)


LANGUAGE = pd.DataFrame(
    [(0.0, 0.0, 0.0), (0.02, 0.01, 0.03), (-0.01, -0.02, 0.0), (-0.03, -0.04, -0.02)],
    index=["routed", "other expert", "two experts", "dense"],
    columns=["worse_by", "ci95_low", "ci95_high"],
)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pd.DataFrame]:
    given = {"sensitivity.window_s": 1, "sensitivity.users": [100]}
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(paths, "RUNS", tmp_path_factory.mktemp("runs"))
        yield designs.design_load(config.load_profile("smoke", given), [0.5, *[0.5 / 7] * 7])


def test_every_design_is_seen_under_every_spread(load: pd.DataFrame) -> None:
    names = list(designs.designs(config.load_profile("smoke"), [1 / 8] * 8))
    assert load.groupby("spread")["design"].apply(list).to_dict() == dict.fromkeys(designs.SPREADS, names)
    indifferent = load[load["design"].isin([designs.IN_TURN, designs.ADAPTERS, designs.BY_PYTORCH])]
    assert indifferent.groupby("design")["requests_per_s"].nunique().max() == 1
    by_pytorch, *assumed = (
        load[load["design"] == name].set_index("spread")["tpot_mean_s"]["uniform"]
        for name in (designs.BY_PYTORCH, designs.ADAPTERS, f"{designs.ADAPTERS}, steps × 1.5")
    )
    assert assumed[0] < by_pytorch < assumed[1]
    strict = load[load["design"] == designs.STRICT].set_index("spread")
    assert strict["ttft_p99_s"]["measured"] > strict["ttft_p99_s"]["normal"] > strict["ttft_p99_s"]["uniform"]
    assert set(load.loc[load["gpus"] != 8, "design"]) == {name for name in names if "2 more" in name}
    gain = designs.break_even(load)["gain"]
    assert gain["measured"] > gain["normal"] > gain["uniform"] >= -0.1


def test_as_many_experts_as_gpus() -> None:
    with pytest.raises(config.ConfigError, match="8 GPUs have an expert each, but there are 4 clusters"):
        designs.design_load(config.load_profile("smoke"), [0.25] * 4)


def test_language_that_is_lost_is_that_of_who_answers(load: pd.DataFrame) -> None:
    both = designs.quality_and_load(load, LANGUAGE).set_index(["spread", "design"])
    of = both.loc["measured"]
    assert of["worse_by"][designs.STRICT] == 0
    assert of["worse_by"][designs.IN_TURN] == -0.03
    (spills,) = [name for name in of.index if "least busy" in name]
    share = of["elsewhere_then"][spills]
    assert 0 < share < 1
    assert of["worse_by"][spills] == pytest.approx(0.02 * share)
    assert of["ci95_high"][spills] == pytest.approx(0.03 * share)


def test_break_even_lies_between_what_was_simulated() -> None:
    rows = [{"spread": "a", "design": designs.STRICT, "requests_per_s": 90.0, "slower": 1.0}]
    rows += [{"spread": "b", "design": designs.STRICT, "requests_per_s": 10.0, "slower": 1.0}]
    for slower, rate in ((1.0, 120.0), (1.5, 80.0), (2.0, 60.0)):
        its = {"design": f"{designs.ADAPTERS} {slower}", "requests_per_s": rate, "slower": slower}
        rows += [{"spread": spread, **its} for spread in "ab"]
    found = designs.break_even(pd.DataFrame(rows))
    assert found.loc["a", "gain"] == pytest.approx(1 / 3)
    assert found.loc["a", "slower_at_break_even"] == pytest.approx(1.375)
    assert np.isnan(found.loc["b", "slower_at_break_even"])  # even twice as slow, they carry more
