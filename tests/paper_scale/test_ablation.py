"""What the exchanged parts of the harness do is told apart from noise and from a lack of cores."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.load import records
from erlib.paper_scale import ablation
from erlib.report.own import harness
from erlib.serving import wire

ENGINE_S = 0.03
"""Time per token of the made-up engine."""


def _point(client, classifier, users, repeat, *, tpot_s=ENGINE_S, route_s=0.002, lost_time=0.0, tokens=8):
    """Rows of one point: every user's answer as slow as the harness makes it."""
    rows = []
    for user in range(users):
        send = 10**12 + repeat * 10**11
        first = send + round((route_s * (1 + 0.1 * user) + 0.1) * 1e9)
        token_ns = first + np.round(np.arange(tokens) * tpot_s * (1 + 0.01 * repeat) * 1e9).astype(int)
        row = dict.fromkeys(records.SCHEMA.names) | {
            **dict(source="emulated", paper="p1", experiment="ablation", config="p1.B", mix="uniform", users=users),
            **dict(repeat=repeat, user=user, turn="base", cluster=0, expert=0, prompt=user, status="ok"),
            **dict(input_tokens=300, output_tokens=tokens, client=client, classifier=classifier, slow_motion=1.0),
            **dict(steps=100, late_steps=int(100 * lost_time), lost_time=lost_time, client_cpu_cores=0.5),
            **dict(t_send_ns=send, t_first_ns=int(token_ns[0]), t_last_ns=int(token_ns[-1]), token_ns=token_ns),
            **dict(point_hash=f"{client}{classifier}{users}{repeat}", host="here", git_commit="c", profile_hash="p"),
            **dict(versions="{}", profile="test"),
        }
        if client == "asyncio":
            row |= {f"route_{span}_ns": 0 for span in ("queue", "vectorise", "kmeans", "forward")}
            row |= {"route_svd_ns": round(route_s * (1 + 0.1 * user) * 1e9)}
        rows.append(row)
    return rows


def _records(late_from=99):
    """Threads are slower from 25 users on, the stock router takes 0.4 s; `late_from` users on, engines are late."""
    rows = []
    for client, classifier in ablation.ARMS:
        for users in (1, 25):
            for repeat in range(3):
                slow = {"tpot_s": 2 * ENGINE_S} if client == "threads" and users == 25 else {}
                route = {"route_s": 0.4} if classifier == "stock" else {}
                late = {"lost_time": 0.2} if users >= late_from else {}
                rows += _point(client, classifier, users, repeat, **slow, **route, **late)
    return pd.DataFrame(rows).astype({name: "float" for name in records.SCHEMA.names if name.startswith("route_")})


def _effect(effects, part, users, metric):
    (row,) = effects[(effects["part"] == part) & (effects["users"] == users) & (effects["metric"] == metric)].to_dict(
        "records"
    )
    return row


def test_effects_are_those_of_the_exchanged_part():
    effects = ablation.ablation_effects(ablation.by_point(_records()))
    client = _effect(effects, "client", 25, "tpot_mean_s")
    assert client["finding"] == "established"
    assert client["difference"] == pytest.approx(ENGINE_S * 1.01)
    assert client["ours"] == pytest.approx(ENGINE_S * 1.01)
    assert _effect(effects, "client", 1, "tpot_mean_s")["finding"] == "no difference seen"
    router = _effect(effects, "classifier", 1, "gateway_mean_s")
    assert (router["difference"], router["finding"]) == (pytest.approx(0.398), "established")
    assert _effect(effects, "classifier", 25, "tpot_mean_s")["difference"] == pytest.approx(0, abs=1e-9)
    assert effects[(effects["part"] == "client") & (effects["metric"] == "gateway_mean_s")].empty


def test_late_engines_establish_nothing():
    effects = ablation.ablation_effects(ablation.by_point(_records(late_from=25)))
    assert set(effects.loc[effects["users"] == 25, "finding"]) == {"engines were late"}  # a difference or not
    assert _effect(effects, "classifier", 1, "gateway_mean_s")["finding"] == "established"


def test_what_one_state_of_the_other_part_shows_in_pace_is_found_there():
    frame = _records()
    frame.loc[(frame["classifier"] == "stock") & (frame["users"] == 25), "lost_time"] = 0.2
    effects = ablation.ablation_effects(ablation.by_point(frame))
    client = _effect(effects, "client", 25, "tpot_mean_s")
    assert (client["beside"], client["finding"]) == ("ours", "established")
    assert _effect(effects, "classifier", 25, "gateway_mean_s")["finding"] == "engines were late"
    assert _effect(effects, "client", 1, "tpot_mean_s")["beside"] == "ours, stock"


def test_levels_that_one_arm_lacks_are_compared_where_they_exist():
    frame = _records()
    frame = frame[(frame["classifier"] == "ours") | (frame["users"] == 1)]
    effects = ablation.ablation_effects(ablation.by_point(frame))
    assert _effect(effects, "client", 25, "tpot_mean_s")["difference"] == pytest.approx(ENGINE_S * 1.01)
    assert effects[(effects["part"] == "classifier") & (effects["users"] == 25)].empty


def test_the_table_has_intervals_over_repeats():
    points = ablation.by_point(_records())
    table = ablation.ablation_table(points).set_index(["client", "classifier", "users", "metric"])
    values = ENGINE_S * np.array([1, 1.01, 1.02])
    row = table.loc[("asyncio", "ours", 25, "tpot_mean_s")]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["ci95"] == pytest.approx(4.302653 * values.std(ddof=1) / np.sqrt(3), rel=1e-5)
    wall_s = 0.1 + 0.002 * 3.4 + 7 * ENGINE_S
    expected = 0.5 * wall_s / (25 * 8) * 1e6
    cpu = points.set_index(["client", "classifier", "users", "repeat"]).loc[("asyncio", "ours", 25, 0)]
    assert cpu["client_cpu_us_per_token"] == pytest.approx(expected, rel=1e-6)


def test_the_figure_shows_all_arms_and_says_what_was_late(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    frame = _records(late_from=25)
    alone = frame[(frame["client"] == "asyncio") & (frame["classifier"] == "ours")].assign(source="simulated-hardware")
    profile = config.load_profile("smoke")
    harness.harness_ablation(frame, alone, profile)
    drawn = pd.read_csv(tmp_path / "smoke/emulated/workbench/harness_ablation.csv")
    assert set(zip(drawn["client"], drawn["classifier"], strict=True)) == {*ablation.ARMS, ("none", "none")}
    assert not drawn.duplicated(["client", "classifier", "users", "metric"]).any()
    assert not drawn.loc[(drawn["users"] == 25) & (drawn["client"] != "none"), "kept_pace"].any()


@pytest.mark.parametrize("terms", [100_000, 10**8], ids=["for all gateways", "for a single one"])
def test_too_little_memory_is_an_error_before_anything_starts(terms):
    profile = config.load_profile("smoke", {"ablation.gateways": 1000, "ablation.terms": terms})
    with pytest.raises(config.ConfigError, match=r"need .* GB.*lower ablation\.gateways"):
        ablation.run_ablation(profile)


def test_the_plan_changes_nothing_but_the_two_parts():
    profile = config.load_profile("smoke")
    series = ablation.ablation_plan(profile)
    assert [(one.client, one.system.classifier) for one in series] == ablation.ARMS
    assert len({one.workload.frame.to_json() for one in series}) == 1
    assert len({str(one.system.router) for one in series}) == 1
    assert {one.system.source for one in series} == {"emulated"}
    for one in series:
        assert (one.workload.frame["max_tokens"] == profile.ablation.output_tokens).all()
        assert (one.workload.frame["end_id"] == wire.NEVER_STOP).all()
        assert one.system.slow_motion == 1
