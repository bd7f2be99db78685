"""Replicas of hot experts: where they go, that they help, and when they are enough."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erlib import balance, batching, config, prompts, simulation
from erlib.batching import CannotServe
from erlib.prompts import FORCED, Prompt


@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    replicas=st.integers(0, 4),
)
def test_no_other_choice_leaves_less_demand_on_the_busiest_instance(weights: list[int], replicas: int) -> None:
    shares = np.array(weights) / sum(weights)

    def busiest(added: tuple[int, ...]) -> float:
        return float((shares / (1 + np.bincount(added, minlength=len(shares)))).max())

    others = itertools.combinations_with_replacement(range(len(shares)), replicas)
    added = balance.hottest(shares, replicas)
    assert busiest(added) == pytest.approx(min(map(busiest, others)))
    assert added[:-1] == balance.hottest(shares, max(0, replicas - 1))  # one at a time


def test_the_normal_mix_is_hottest_in_the_middle() -> None:
    assert set(balance.hottest(prompts.mix_shares("normal", 8, 2.0), 2)) == {3, 4}


@given(added=st.lists(st.integers(0, 7), max_size=5), clusters=st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_replicas_share_an_experts_requests_and_nobody_elses(added: list[int], clusters: list[int]) -> None:
    system = replace(batching.paper_system("p2.E"), added=tuple(added))
    drawn = [Prompt(n, cluster, "", 100, 5, FORCED) for n, cluster in enumerate(clusters)]
    seen = simulation.trace(system, drawn, continues=False)
    assert len(seen.servers) == 8 + len(added)
    asked = np.bincount([r.server for r in seen.requests], minlength=len(seen.servers))
    for expert in range(8):
        its = [server for server, owner in enumerate(system.experts) if owner == expert]
        assert asked[its].sum() == clusters.count(expert)
        assert asked[its].max() - asked[its].min() <= 1  # all came at once
    assert all(r.expert == r.prompt.cluster == system.experts[r.server] for r in seen.requests)


def test_a_request_goes_where_fewest_are_outstanding() -> None:
    """One long answer keeps a replica busy: those that come one after the other all go to the other one."""
    system = replace(batching.paper_system("p2.E"), added=(0,))
    short = Prompt(1, 0, "", 100, 5, FORCED)
    seen = simulation.trace(system, [Prompt(0, 0, "", 100, 900, FORCED), short], continues=[short, short])
    server = {(r.user, r.turn): r.server for r in seen.requests}
    assert server[1, "base"] == server[1, "continuation"] != server[0, "base"]


@pytest.mark.parametrize(("name", "added"), [("p2.E", (8,)), ("p2.E", (0, -1)), ("p2.A", (0,))])
def test_replicas_belong_to_experts(name: str, added: tuple[int, ...]) -> None:
    with pytest.raises(CannotServe, match="replicas are added to experts"):
        replace(batching.paper_system(name), added=added)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    profile = config.load_profile("smoke", {"paper_scale.repeats": 2, "workload.sigma": 1.0})
    return balance.run(profile, configs=["p2.D"], users=[300], most_added=4)


def test_both_mixes_answer_the_same(table: pd.DataFrame) -> None:
    assert len(table) == 2 * (1 + 5)
    assert (table["answers"] == 300).all() and (table["failures"] == 0).all()
    assert set(table["gpus"] - table["added"]) == {8}
    assert set(table["source"]) == {"simulated-hardware"}
    per_gpu = table["session_tokens_per_s"] / table["gpus"]
    assert table["session_tokens_per_s_per_gpu"].to_numpy() == pytest.approx(per_gpu.to_numpy())


def test_replicas_help_the_normal_mix(table: pd.DataFrame) -> None:
    means = table.groupby(["mix", "added"])[["response_p99_s", "session_tokens_per_s"]].mean()
    normal, uniform = means.loc["normal"], means.loc["uniform"].iloc[0]
    assert normal.loc[0, "response_p99_s"] > 1.1 * uniform["response_p99_s"]
    assert normal.loc[4, "response_p99_s"] < 0.9 * normal.loc[0, "response_p99_s"]
    assert normal.loc[4, "session_tokens_per_s"] > normal.loc[0, "session_tokens_per_s"]
    enough = balance.needed(table).loc[("p2.D", 300), "response_p99_s"]
    assert normal.loc[enough, "response_p99_s"] <= uniform["response_p99_s"]
    assert (normal.loc[: enough - 1, "response_p99_s"] > uniform["response_p99_s"]).all()


def test_what_never_suffices_is_missing() -> None:
    rows = [("uniform", 0, 5.0, 100.0), ("normal", 0, 9.0, 80.0), ("normal", 1, 6.0, 99.0), ("normal", 2, 5.5, 100.0)]
    made = pd.DataFrame(rows, columns=["mix", "added", "response_p99_s", "session_tokens_per_s"])
    needed = balance.needed(made.assign(config="p2.D", users=10, ttft_mean_s=1.0)).loc[("p2.D", 10)]
    assert pd.isna(needed["response_p99_s"])
    assert needed["session_tokens_per_s"] == 2 and needed["ttft_mean_s"] == 0
