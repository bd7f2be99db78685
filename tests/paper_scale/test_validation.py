"""What the simulation is compared with, and whether it predicts loads that it was not fitted to."""

from __future__ import annotations

import functools
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.paper_scale import clock, fitting, simulation, steptimes, validation
from erlib.paper_scale.clock import Harness
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt
from tests.support import synthetic
from tests.support.linear import Linear

matplotlib.use("agg")

SHARED = paths.ROOT.parent / "shared" / "data"
PROFILE = config.load_profile("laptop", {"paper2.users": [1, 4, 8, 16]})
LEVELS = (1, 4, 8, 16)


class Crowded(Linear):
    """Instances of which a machine carries one and a half at full speed."""

    at_full_speed = 1.5


# --- beside others' numbers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aisimulate() -> pd.DataFrame:
    return validation.aisimulate()


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return validation.published(weights=["parameters"])


def test_agrees_with_nvidias_simulator(aisimulate):
    table = aisimulate[aisimulate["metric"] != "ttft_s"].set_index("config")
    assert table.index.nunique() == 9
    assert set(table[~table["same_prices"]].index) == {"p1.B", "p2.D"}
    assert table[table["same_prices"]]["difference"].abs().max() <= 0.02
    assert table["difference"].abs().max() <= 0.25


def test_the_difference_is_relative_to_the_point_given():
    point = pd.read_csv(validation.AISIMULATE).query("config == 'p2.E'").assign(tpot_s=1.0, output_tokens=20)
    table = validation.aisimulate(point).set_index("metric")
    assert table.loc["tpot_s", "difference"] == pytest.approx(table.loc["tpot_s", "simulated"] - 1)


def test_agrees_with_published_throughputs(published):
    assert len(published) == 39  # those whose prompts fit into a step
    assert validation.mape(published["ratio"]) <= 0.08


def test_weights_as_loaded_leave_less_for_the_kv_cache():
    points = pd.read_csv(validation.PUBLISHED).query("model == 'llama-3.1-70b' and input_tokens == 1000")
    ratio = validation.published(points).pivot_table(index="tensor_parallel", columns="weights", values="ratio")
    assert ratio.loc[1, "loaded"] < 0.9 * ratio.loc[1, "parameters"]
    assert ratio.loc[8, "loaded"] == pytest.approx(ratio.loc[8, "parameters"], rel=0.01)
    roomier = validation.published(points.query("tensor_parallel == 1"), ["loaded"], workspace_bytes=2e9)
    assert roomier["ratio"].item() > ratio.loc[1, "loaded"]


def test_reference_numbers_are_those_of_their_sources():
    golden, throughput = SHARED / "aisimulate_golden_200_users.json", "trtllm_0_17_h100_fp8_offline_throughput.csv"
    if not golden.exists():
        pytest.skip("the sources of the reference numbers are not part of this repository")
    ours = pd.read_csv(validation.AISIMULATE).set_index("config")
    names = {"output_tokens_per_s": "thr", "ttft_s": "ttft", "tpot_s": "tpot", "response_p99_s": "p99"}
    for key, values in json.loads(golden.read_text()).items():
        row = ours.loc[f"{key[:2].lower()}.{key[2]}"]
        assert [row[name] for name in names] == pytest.approx([values[short] for short in names.values()], rel=1e-6)
    keys = ["model", "tensor_parallel", "input_tokens", "output_tokens", "output_tokens_per_s"]
    pd.testing.assert_frame_equal(pd.read_csv(validation.PUBLISHED)[keys], pd.read_csv(SHARED / throughput)[keys])


# --- beside measured engines --------------------------------------------------------------------------------------


def _measure(steps, name="p2.E", levels=LEVELS, repeats=2, jitter=0.0) -> pd.DataFrame:
    """Records of a configuration whose step times are known."""
    system = validation.measured_system(name, PROFILE, steps)
    rng = np.random.default_rng(0)
    rows = []
    for users in levels:
        for repeat in range(repeats):
            drawn = [Prompt(n, n % system.instances, "", *rng.integers(5, 20, 2), FORCED) for n in range(users)]
            point = simulation.simulate(
                system,
                drawn,
                paper="p2",
                repeat=repeat,
                around=Harness("crowd", per_request_s=0.002),
                columns={"source": "measured", "point_hash": f"{name}-{users}-{repeat}", "host": "a machine"},
            )
            late_ns = round(1e9 * jitter * repeat)
            for row in point.to_pylist():
                row |= {name: row[name] + late_ns for name in ("t_first_ns", "t_last_ns")}
                rows.append(row | {"token_ns": [stamp + late_ns for stamp in row["token_ns"]]})
    return synthetic.frame(rows)


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return _measure(Crowded())


def test_held_out_loads_are_predicted(measured):
    table = validation.calibrated(measured, PROFILE)
    assert set(table["users"]) == {8}  # fitted to the lowest two and the highest
    assert set(table["metric"]) == set(validation.METRICS)
    assert table["error"].abs().max() < 0.1
    assert (table["refused"] == "").all()


def test_instances_that_share_a_machine_are_told_from_those_that_do_not(measured):
    """A fit that did not know of sharing would be wrong by what the others take."""
    steps = fitting.Fitted(measured)
    assert steps.at_full_speed == pytest.approx(1.5, rel=0.1)
    assert steps.slowdown(1) == 1
    assert steps.slowdown(6) == pytest.approx(4, rel=0.1)
    apart = fitting.Fitted(_measure(Linear()))
    assert apart.slowdown(8) == pytest.approx(1, abs=0.05)
    with pytest.raises(steptimes.OutOfRange, match="instances 9"):
        apart.slowdown(9)


def test_no_time_of_a_held_out_load_is_looked_at(measured):
    late = measured.copy()
    held_out = late["users"] == 8
    for name in ("t_first_ns", "t_last_ns", "token_ns"):
        late.loc[held_out, name] = late.loc[held_out, name] * 3
    before, after = (validation.calibrated(frame, PROFILE) for frame in (measured, late))
    assert after["predicted"].tolist() == before["predicted"].tolist()
    assert (after["measured"] != before["measured"]).all()


def test_what_lies_beyond_the_measured_loads_is_refused(measured):
    table = validation.leave_one_out(measured, PROFILE)
    assert set(table["users"]) == {4, 8, 16}  # every fit needs the single user
    beyond = table[table["users"] == 16]
    assert beyond["predicted"].isna().all()
    assert beyond["refused"].str.contains("batch 2.*does not extrapolate").all()
    assert table[table["users"] < 16]["predicted"].notna().all()
    few = validation.calibrated(measured[measured["users"].isin([1, 8])], PROFILE, [8])
    assert few["refused"].str.contains("instances 2 .*up to 1 and does not extrapolate").all()
    with pytest.raises(ValueError, match="single user"):
        validation.calibrated(measured, PROFILE, [1])


def test_too_few_tokens_to_fit_to_are_a_reason_not_to_predict(measured, monkeypatch):
    monkeypatch.setattr(fitting, "Fitted", functools.partial(fitting.Fitted, min_gaps=10**6))
    table = validation.calibrated(measured, PROFILE)
    assert table["predicted"].isna().all()
    assert table["refused"].str.contains("no batch size").all()


def test_too_few_loads_hold_none_out(measured):
    table = validation.calibrated(measured[measured["users"] < 16], PROFILE)
    assert table.empty
    assert validation.errors(table).empty


def test_continuations_go_where_they_went_and_are_as_long_as_they_were():
    system = validation.measured_system("p1.D", PROFILE, Linear())
    base = [Prompt(n, n, "", 14, 20, FORCED) for n in range(3)]
    second = [Prompt(n, n + 4, "", 25 + n, 10, FORCED) for n in range(3)]
    asked = simulation.simulate(system, base, paper="p1", continues=second).to_pandas()
    again = validation.predict(asked, system, clock.HARDWARE)
    seen = again[again["turn"] == "continuation"].sort_values("user")
    assert seen["expert"].tolist() == [4, 5, 6]
    assert seen["input_tokens"].tolist() == [25, 26, 27]
    assert (again["t_last_ns"] - again["t_send_ns"]).tolist() == (asked["t_last_ns"] - asked["t_send_ns"]).tolist()


def test_repeats_differ_by_what_the_table_says():
    table = validation.calibrated(_measure(Linear(), jitter=0.5), PROFILE).set_index("metric")
    ttft = table.loc["ttft_mean_s"]  # the draws differ a little too
    assert ttft["between_repeats"] == pytest.approx(0.5 / ttft["measured"], rel=0.1)


def test_errors_are_summed_up():
    table = pd.DataFrame(
        {
            "metric": ["ttft_mean_s"] * 3 + ["tpot_mean_s"],
            "error": [0.1, -0.3, np.nan, 0.02],
            "between_repeats": [0.2, 0.4, 0.6, 0.0],
        }
    )
    seen = validation.errors(table)
    expected = [0.2, 0.3, 0.5, 0.4, 2, 1]
    assert seen.loc["ttft_mean_s"].tolist() == pytest.approx(expected)
    assert seen.loc["tpot_mean_s", ["predictions", "refused"]].tolist() == [1, 0]


# --- the figure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:2]], ids=["predicted", "too few loads"])
def test_the_figure_carries_all_three_comparisons(levels, measured, aisimulate, tmp_path, monkeypatch):
    from erlib.report import canvas
    from erlib.report.own import trust

    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    canvas.style()
    points = pd.read_csv(validation.PUBLISHED).query("input_tokens == 2048 and output_tokens == 128")
    used = measured[measured["users"].isin(levels)]
    predictions = validation.calibrated(used, PROFILE)
    fig = trust.simulation_trust(validation.published(points), aisimulate, predictions, used, PROFILE)
    path = tmp_path / "laptop" / "simulated-hardware" / "workbench" / "simulation_trust.csv"
    panels = pd.read_csv(path)["panel"].value_counts()
    assert panels["published"] == 2 * len(points)
    assert panels["aisimulate"] == len(aisimulate)
    assert panels.get("predicted", 0) == len(predictions)
    about = json.loads(path.with_suffix(".json").read_text())
    assert "measured on a machine" in about["footer"]
    assert about["records"]["points"] == used["point_hash"].nunique()
    right = fig.axes[2]
    drawn = sum(len(line.get_xdata()) for line in right.lines if line.get_label() in validation.METRICS.values())
    assert drawn == len(predictions)
