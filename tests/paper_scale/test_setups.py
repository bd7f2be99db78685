"""What the papers left open: each number does what it says, to whom it says, and nothing else."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erlib import config, paths
from erlib.config.choices import LeftOpen
from erlib.load import records
from erlib.paper_scale import batching, clock, left_out, service_levels, setups
from erlib.paper_scale.clock import HARDWARE
from erlib.paper_scale.setups import UNKNOWNS, Setup
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    return config.load_profile("smoke", {"sensitivity.users": [12]})


def stamps(frame: pd.DataFrame) -> dict[str, list[int]]:
    return {str(name): mine["t_last_ns"].tolist() for name, mine in frame.groupby("config")}


def test_every_unknown_is_a_field_a_key_and_has_its_default_among_its_values() -> None:
    assert list(UNKNOWNS) == list(get_args(LeftOpen))
    for name, unknown in UNKNOWNS.items():
        assert getattr(Setup(), name) in unknown.values
    assert {field.name for field in fields(Setup)} == set(UNKNOWNS)


@pytest.mark.parametrize("name", sorted(set(UNKNOWNS) - {"sigma"}))
def test_a_number_changes_whom_it_concerns_and_nobody_else(name: str, profile: config.Profile) -> None:
    unknown = UNKNOWNS[name]
    paper = config.paper_of(unknown.configs[0])
    mine = [config_id for config_id in setups.CONFIGS if config.paper_of(config_id) == paper]
    value = {"slots": 0.001}.get(name, unknown.values[-1])  # a dozen users fill hardly any slot
    usual = stamps(setups.simulated(Setup(), mine, profile, [12], 1))
    changed = stamps(setups.simulated(replace(Setup(), **{name: value}), mine, profile, [12], 1))
    moved = {config_id for config_id in mine if usual[config_id] != changed[config_id]}
    assert moved == {config_id for config_id in unknown.configs if config.paper_of(config_id) == paper}


def test_allreduce_is_a_part_of_the_step_and_can_be_taken_out_of_it() -> None:
    usual, free, slow = (setups.system("p1.A", Setup(allreduce=factor)).steps for factor in (1.0, 0.0, 2.0))
    for asked in ((0, 0, 200, 60_000), (3, 900, 10, 900)):
        step_s = usual.step_s(*asked)
        assert 0 < step_s - free.step_s(*asked) == pytest.approx(slow.step_s(*asked) - step_s)
        assert free.step_s(*asked) > 0.5 * step_s
    one_by_one = [slow.step_s(0, 0, 50, 5000 + 50 * n) for n in range(40)]
    assert slow.decode_steps_s(40, 50, 5000) == pytest.approx(one_by_one)


def test_the_beside_table_and_the_papers_agree_on_what_they_share() -> None:
    for name in ("p1.A", "p2.B", "p2.C"):
        printed = config.load_configuration(name).system
        of_step = setups.allreduce_s(printed.model, printed.dtype, printed.tensor_parallel)
        steps = batching.paper_system(name).steps
        assert all(1e3 * of_step[n] < steps.part_ms("dense", n) for n in (1, 64, 1000, 8192))


def test_the_share_that_moves_is_the_share_that_is_asked_for_and_more_moves_the_same_too() -> None:
    drawn = [Prompt(n, n % 8, "", 335, 100, FORCED) for n in range(4000)]
    some, more = (setups.continuations(drawn, share, 8, [1]) for share in (0.16, 0.55))
    goes = [[a.cluster != b.cluster for a, b in zip(drawn, then, strict=True)] for then in (some, more)]
    assert np.mean(goes[0]) == pytest.approx(0.16, abs=0.02) and np.mean(goes[1]) == pytest.approx(0.55, abs=0.02)
    assert all(b for a, b in zip(*goes, strict=True) if a)
    assert {prompt.input_tokens for prompt in more} == {435} and {prompt.cluster for prompt in more} == set(range(8))
    assert [prompt.cluster for prompt in setups.continuations(drawn, 0, 8, [1])] == [p.cluster for p in drawn]


def test_poisson_users_come_over_the_window_and_are_the_same_for_all_systems() -> None:
    drawn = [Prompt(n, n % 8, "", 100, 20, FORCED) for n in range(200)]
    around = replace(HARDWARE, arrivals_s=50.0)
    sent = [
        [request.sent_s for request in clock.trace(batching.paper_system(name), drawn, False, around, seed=3).requests]
        for name in ("p2.A", "p2.E")
    ]
    assert sent[0] == sent[1] == sorted(sent[0])
    assert 0 < sent[0][0] < sent[0][-1] < 50 and np.median(sent[0]) == pytest.approx(25, abs=5)


@pytest.mark.parametrize(("field", "tokens_per_s"), [("server_us", 8000), ("shared_us", 1000)])
def test_a_host_takes_so_long_for_a_token_and_does_not_hold_engines_up(field: str, tokens_per_s: int) -> None:
    """Eight servers with cores of their own take eight times what they take of one."""
    drawn = [Prompt(n, n % 8, "", 100, 100, FORCED) for n in range(80)]
    around = replace(Setup(), **{field: 1000.0}).around
    seen, free = (clock.trace(batching.paper_system("p2.E"), drawn, False, its) for its in (around, HARDWARE))
    assert 8000 / (max(its[-1] for its in seen.token_ns()) * 1e-9) == pytest.approx(tokens_per_s, rel=0.05)
    assert [server.ends_s for server in seen.servers] == [server.ends_s for server in free.servers]


def test_left_out_records_are_whole_named_and_made_once(
    profile: config.Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = left_out.simulate_left_out(profile, tmp_path)
    assert len(files) == len(set(files)) == 4 + 4 + 3 + 2 * 2
    assert [records.damage(path) for path in files] == [""] * len(files)
    frame = records.read_files(files)
    assert set(frame["experiment"]) == set(left_out.EXPERIMENTS)
    tokens = frame[frame["paper"] == "p1"].groupby("experiment")["output_tokens"].unique()
    shorter = profile.workload.model_copy(update={"p2_max_output_tokens": 300})
    assert tokens["short-answers"].tolist() == [150] and tokens["no-allreduce"].tolist() == [1200]
    asked_for = left_out.simulate_left_out(profile.model_copy(update={"workload": shorter}), tmp_path)
    assert set(asked_for).isdisjoint(files), "answers of another length are other records"
    monkeypatch.setattr(setups, "points", None)
    assert left_out.simulate_left_out(profile, tmp_path) == files


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 17, 100, 1000])
def test_the_most_that_is_served_is_found(limit: int) -> None:
    found = service_levels.most(lambda n: n <= limit, 1.05)
    assert found <= limit <= max(found, math.floor(1.05 * found))


def test_a_stricter_service_level_serves_fewer_and_what_nobody_meets_nobody(
    profile: config.Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    settings = profile.sensitivity.model_copy(update={"precision": 1.3, "window_s": 4.0})
    profile = profile.model_copy(update={"sensitivity": settings})
    some = {"p2": {name: service_levels.systems(profile)["p2"][name] for name in ("p2.B", "p2.E")}}
    monkeypatch.setattr(service_levels, "systems", lambda _: some)
    usual, strict, never = (service_levels.goodput(profile, *level) for level in ((1, 0.2), (0.1, 0.01), (1e-6, 0.2)))
    assert (strict["users"] < usual["users"]).all() and (strict["requests_per_s"] < usual["requests_per_s"]).all()
    assert (never[["users", "requests_per_s", "tokens_per_gpu_hour"]] == 0).all(axis=None)
    assert never["price_per_million_tokens"].isna().all()
    price = usual["tokens_per_gpu_hour"] * usual["price_per_million_tokens"] / 1e6
    assert price.to_numpy() == pytest.approx(profile.sensitivity.gpu_hour)
    monkeypatch.setattr(service_levels, "_served", None)
    pd.testing.assert_frame_equal(service_levels.goodput(profile, 1), usual)

    table = service_levels.under_load(profile, usual)
    assert table.groupby("system").size().to_dict() == {name: len(service_levels.LOADS) for name in some["p2"]}
    assert set(table["model"]) == {"llama-3-70b", "llama-3-8b"}
    for _, its in table.groupby("system"):
        little, much = its.iloc[0], its.iloc[-1]
        assert little["goodput_per_gpu"] == pytest.approx(little["requests_per_s"] / service_levels.GPUS)
        assert much["goodput_per_gpu"] < 0.95 * much["requests_per_s"] / service_levels.GPUS
        assert much["ttft_p99_s"] > 1 >= little["ttft_p99_s"]
        assert its["on_frontier"].any()  # of its model, which no other has here


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1))
def test_what_is_not_on_the_frontier_is_beaten_by_something_on_it(points: list[tuple[int, int]]) -> None:
    goodput, ttft_s = np.array(points, float).T
    on = service_levels.unbeaten(goodput, ttft_s)
    for mine, its, is_on in zip(goodput, ttft_s, on, strict=True):
        beaten = (goodput > mine) & (ttft_s < its)
        assert is_on == (mine > 0 and not beaten.any())
        assert (beaten & on).any() == beaten.any()
