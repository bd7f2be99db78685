"""Replicas of hot experts: where they go, that they help, and when they are enough; simulated and on a real stack."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erlib import config, paths
from erlib.config.simulated import ReplicaSettings
from erlib.load import experiments, points, sweep, users
from erlib.paper_scale import batching, clock, emulation, replicas, setups
from erlib.paper_scale.batching import CannotServe
from erlib.report.own import hot_experts
from erlib.serving import stack, wire
from erlib.workload import prompts
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt


@given(
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    n=st.integers(0, 4),
)
def test_no_other_choice_leaves_less_demand_on_the_busiest_instance(weights: list[int], n: int) -> None:
    shares = np.array(weights) / sum(weights)

    def busiest(added: tuple[int, ...]) -> float:
        return float((shares / (1 + np.bincount(added, minlength=len(shares)))).max())

    others = itertools.combinations_with_replacement(range(len(shares)), n)
    added = setups.hottest(shares, n)
    assert busiest(added) == pytest.approx(min(map(busiest, others)))
    assert added[:-1] == setups.hottest(shares, max(0, n - 1))  # one at a time


def test_the_normal_mix_is_hottest_in_the_middle() -> None:
    assert set(setups.hottest(prompts.mix_shares("normal", 8, 2.0), 2)) == {3, 4}


@given(added=st.lists(st.integers(0, 7), max_size=5), clusters=st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_replicas_share_an_experts_requests_and_nobody_elses(added: list[int], clusters: list[int]) -> None:
    system = replace(batching.paper_system("p2.E"), added=tuple(added))
    drawn = [Prompt(n, cluster, "", 100, 5, FORCED) for n, cluster in enumerate(clusters)]
    seen = clock.trace(system, drawn, continues=False)
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
    seen = clock.trace(system, [Prompt(0, 0, "", 100, 900, FORCED), short], continues=[short, short])
    server = {(r.user, r.turn): r.server for r in seen.requests}
    assert server[1, "base"] == server[1, "continuation"] != server[0, "base"]


@pytest.mark.parametrize(("name", "added"), [("p2.E", (8,)), ("p2.E", (0, -1)), ("p2.A", (0,))])
def test_replicas_belong_to_experts(name: str, added: tuple[int, ...]) -> None:
    with pytest.raises(CannotServe, match="replicas are added to experts"):
        replace(batching.paper_system(name), added=added)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    profile = config.load_profile("smoke", {"paper_scale.repeats": 2, "workload.sigma": 1.0})
    return replicas.run_replicas(profile, configs=["p2.D"], users=[300], most_added=4)


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
    enough = replicas.gpus_needed(table).loc[("p2.D", 300), "response_p99_s"]
    assert normal.loc[enough, "response_p99_s"] <= uniform["response_p99_s"]
    assert (normal.loc[: enough - 1, "response_p99_s"] > uniform["response_p99_s"]).all()


def test_what_never_suffices_is_missing() -> None:
    rows = [("uniform", 0, 5.0, 100.0), ("normal", 0, 9.0, 80.0), ("normal", 1, 6.0, 99.0), ("normal", 2, 5.5, 100.0)]
    made = pd.DataFrame(rows, columns=["mix", "added", "response_p99_s", "session_tokens_per_s"])
    needed = replicas.gpus_needed(made.assign(config="p2.D", users=10, ttft_mean_s=1.0)).loc[("p2.D", 10)]
    assert pd.isna(needed["response_p99_s"])
    assert needed["session_tokens_per_s"] == 2 and needed["ttft_mean_s"] == 0


# --- on the real serving stack ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(profile: config.Profile) -> config.Profile:
    """The smoke profile with two arms, on ports of its own."""
    serving = profile.serving.model_copy(update={"base_port": profile.serving.base_port + 300})
    arms = ReplicaSettings(added=[0, 2], users=[40], output_tokens=8, slow_motion=2)
    return profile.model_copy(update={"serving": serving, "replicas": arms})


@pytest.fixture(scope="module")
def plan(small: config.Profile) -> list[experiments.Series]:
    return replicas.replicas_plan(small)


def test_arms_differ_in_nothing_but_replicas(plan: list[experiments.Series], small: config.Profile) -> None:
    assert [sorted(series.mixes) for series in plan] == [["normal", "uniform"], ["normal"]]
    assert [len(series.system.servers) for series in plan] == [8, 10]
    assert [series.system.replicas for series in plan] == [[1] * 8, [1, 1, 1, 2, 2, 1, 1, 1]]
    assert len({json.dumps(server.description) for series in plan for server in series.system.servers}) == 1
    for series in plan:
        assert series.system.source == "emulated"
        assert (series.workload.frame["max_tokens"] == 8).all()
        assert (series.workload.frame["end_id"] == wire.NEVER_STOP).all()
    drawn = [point for series in plan for point in points.points(small, series)]
    assert len({point.hash for point in drawn}) == len({point.path for point in drawn}) == 3


def test_nothing_is_emulated_where_experts_lack_clusters(
    small: config.Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = small.model_copy(update={"clusterer": small.clusterer.model_copy(update={"n_clusters": 4})})
    assert replicas.replicas_plan(fewer) == []
    assert "p2.D has 8 experts for 4 clusters" in capsys.readouterr().out


def test_replicas_need_a_system_that_classifies() -> None:
    with pytest.raises(config.ConfigError, match=r"replicas\.config: p2\.R does not classify"):
        config.load_profile("smoke", {"replicas.config": "p2.R"})


def _emulated(
    profile: config.Profile, plan: list[experiments.Series], slower: float, lost_time: float = 0.0
) -> pd.DataFrame:
    """Records as of a stack whose requests take `slower` times what they take in virtual time."""
    frames = []
    for series in plan:
        for point in points.points(profile, series):
            alone = emulation.simulated_beside(profile, [replace(series, mixes=[point.mix])])
            pace = {"slow_motion": 2.0, "steps": 100, "late_steps": 1, "lost_time": lost_time, "client_lag_p99_ms": 7.0}
            who = {"client": "asyncio", "classifier": "ours", "host": "here", "git_commit": "c", "profile_hash": "p"}
            spans = {f"route_{span}_ns": 0 for span in ("queue", "vectorise", "svd", "kmeans", "forward")}
            alone = alone.assign(source="emulated", point_hash=point.hash, versions="{}", **pace, **who, **spans)
            for name in ("t_first_ns", "t_last_ns"):
                taken_ns = (alone[name] - alone["t_send_ns"]) * slower
                alone[name] = alone["t_send_ns"] + taken_ns.round().astype(int)
            frames.append(alone)
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "in 9 of 9 values (9 "), (1.2, "in 0 of 9 values (0 ")])
def test_emulation_and_simulation_are_said_to_agree_only_if_they_do(
    small: config.Profile, plan: list[experiments.Series], slower: float, verdict: str
) -> None:
    table = replicas.replicas_beside_simulation(small, plan, _emulated(small, plan, slower))
    compared = replicas.replicas_agreement(table)
    assert len(compared) == 3 * len(replicas.BETTER)
    ratio = compared["ratio"].unstack("metric")
    assert ratio["response_p99_s"].to_numpy() == pytest.approx(slower)
    assert ratio["session_tokens_per_s"].to_numpy() == pytest.approx(1 / slower)
    assert compared["agrees"].all() == (slower == 1)
    said = replicas.replicas_finding(table)
    assert verdict in said and "up to 7 ms late" in said and "pace" not in said
    assert dict(table.groupby("added")["gpus"].first()) == {0: 8, 2: 10}


def test_the_figure_names_what_is_emulated_and_what_is_not(
    small: config.Profile, plan: list[experiments.Series], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    made = _emulated(small, plan, 1.1, lost_time=0.2)
    table = replicas.replicas_beside_simulation(small, plan, made)
    fig = hot_experts.replicas_emulated(table, made, small)
    labels = {text.get_text() for text in fig.legends[0].get_texts()}
    assert {"normal mix, emulated", "normal mix, simulated", "uniform mix, emulated"} <= labels
    folder = tmp_path / "smoke/emulated/workbench"
    assert set(pd.read_csv(folder / "replicas.csv")["source"]) == {"emulated", *hot_experts.SIMULATED}
    about = json.loads((folder / "replicas.json").read_text())
    assert about["source"] == "emulated" and about["records"]["points"] == 3 and "draws it in 06" in about["command"]
    assert "in 0 of 9 values" in about["caption"] and "did not keep the engines' pace" in about["caption"]


@pytest.mark.slow
def test_replicas_share_their_experts_requests_on_a_real_stack(
    small: config.Profile, plan: list[experiments.Series], tmp_path: Path
) -> None:
    """Every answer's tokens were made by a server of its expert, and all replicas had their part."""
    system, workload = plan[1].system, plan[1].workload
    drawn = prompts.draw(workload, 80, "normal", small.seed, 0)
    scripts = [
        users.Script(i, one.prompt, one.cluster, one.text, one.max_tokens, one.end_id, 0, None)
        for i, one in enumerate(drawn)
    ]
    served = stack.Stack(
        "shared", system.servers, system.routing, small.serving, system.router, tmp_path, replicas=system.replicas
    )
    with served as running, users.UserSimulator(system.tokenizer, 1, tmp_path / "users.log") as simulator:
        before = [server.counters()["expert_generated_tokens"] for server in running.servers]
        answers = simulator.run(scripts, running.targets, 60).answers
        made = [server.counters()["expert_generated_tokens"] for server in running.servers]
    assert {answer.status for answer in answers} == {"ok"}
    received = Counter({expert: 0 for expert in range(8)})
    for answer in answers:
        received[answer.expert] += len(answer.token_ns)
    experts = np.repeat(np.arange(8), system.replicas)
    tokens = np.array(made) - before
    assert {expert: tokens[experts == expert].sum() for expert in range(8)} == dict(received)
    for expert in (3, 4):
        its = tokens[experts == expert]
        assert len(its) == 2 and its.min() >= 0.3 * its.sum()


@pytest.mark.slow
def test_the_experiment_runs_on_a_real_stack_and_is_resumed(
    small: config.Profile, plan: list[experiments.Series], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = small.model_copy(update={"name": f"smoke-{tmp_path.name}"})
    try:
        made = sweep.run(apart, plan)
        assert set(made["source"]) == {"emulated"} and set(made["status"]) == {"ok"}
        assert set(made["experiment"]) == {"replicas"} and len(made) == 3 * 40
        compared = replicas.replicas_agreement(replicas.replicas_beside_simulation(apart, plan, made))
        # what is left is the harness, on whatever machine this is: a wrong scale would be off by far more
        assert compared["ratio_replayed"].between(0.5, 2).all()
        capsys.readouterr()
        pd.testing.assert_frame_equal(sweep.run(apart, plan), made)
        assert "3 of 3 points found by content hash, 0 to measure" in capsys.readouterr().out
    finally:
        shutil.rmtree(paths.run_dir(apart.name))
