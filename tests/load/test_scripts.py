"""What users say: the same whatever answers them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd

from erlib import config
from erlib.config import Paper, Routing
from erlib.load import experiments, points, scripts
from erlib.serving.triton import ServerPlan
from erlib.workload import lengths, prompts


def _series(paper: Paper, name: str, routing: Routing, instances: int) -> experiments.Series:
    columns = {"prompt": range(64), "paper": paper, "cluster": [i % 8 for i in range(64)], "end_id": lengths.FORCED}
    frame = pd.DataFrame({**columns, "input_tokens": [10 + i // 8 for i in range(64)], "paper_input_tokens": 240})
    frame["max_tokens"] = [1 + i // 8 for i in range(64)]
    frame["text"] = [f"prompt {i}" for i in range(64)]
    frame["follow_up"] = frame["text"] + " and its answer"
    plan = ServerPlan(backend="emulated", parameters={"engine": "none"}, max_batch_size=4)
    system = experiments.System(name, routing, [plan] * instances, Path("tokenizer.json"), Path("router"))
    return experiments.Series(paper, "load", system, prompts.Workload(frame, 8, 2.0), [1, 12], 2, ["uniform", "normal"])


def test_all_systems_are_asked_the_same() -> None:
    profile = config.load_profile("smoke")
    direct, routed = _series("p1", "p1.A", "direct", 1), _series("p1", "p1.D", "expert_router", 8)
    for one, other in zip(points.points(profile, direct), points.points(profile, routed), strict=True):
        assert (one.users, one.mix, one.repeat) == (other.users, other.mix, other.repeat)
        asked = [scripts.scripts_of(profile, series, point, 1) for series, point in ((direct, one), (routed, other))]
        assert asked[0] == asked[1] and len(asked[0]) == one.users
        assert all(script.follow_up == f"{script.text} and its answer" for script in asked[0])


def test_one_user_is_the_same_user_under_both_mixes() -> None:
    profile = config.load_profile("smoke")
    routed = _series("p1", "p1.D", "expert_router", 8)
    alone = [point for point in points.points(profile, routed) if point.users == 1]
    for repeat in (0, 1):
        mine = [point for point in alone if point.repeat == repeat]
        assert {point.mix for point in mine} == {"uniform", "normal"}
        first, second = (scripts.scripts_of(profile, routed, point, 1) for point in mine)
        assert first == second


def test_only_paper_1_goes_on() -> None:
    profile = config.load_profile("smoke")
    series = _series("p2", "p2.D", "expert_router", 8)
    for point in points.points(profile, series):
        assert {script.follow_up for script in scripts.scripts_of(profile, series, point, 1)} == {None}


def test_users_of_a_window_come_within_it_by_the_engines_clock() -> None:
    """The same moments for every system; in slow motion as many times as long, because the engines' second is."""
    profile = config.load_profile("smoke")
    at_once = _series("p2", "p2.D", "expert_router", 8)
    slow = dataclasses.replace(at_once.system, servers=[dataclasses.replace(
        at_once.system.servers[0], parameters={"engine": "none", "slow_motion": "5"})] * 8)  # fmt: skip
    within = dataclasses.replace(at_once, window_s=4.0)
    slower = dataclasses.replace(within, system=slow)
    of = [points.points(profile, series)[1] for series in (at_once, within, slower)]
    comes_s = [
        [script.comes_s for script in scripts.scripts_of(profile, series, point, 1)]
        for series, point in zip((at_once, within, slower), of, strict=True)
    ]
    assert of[0].users == 12 and set(comes_s[0]) == {0.0}
    assert len(set(comes_s[1])) == 12 and 0 < min(comes_s[1]) < max(comes_s[1]) < 4
    assert comes_s[2] == [5 * moment for moment in comes_s[1]]
    assert of[0].hash != of[1].hash  # other measurements
