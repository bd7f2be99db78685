"""Published measurements beside the same conditions simulated, and intervals from how far off predictions are."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.paper_scale import batching, cited
from tests.support.linear import Linear

matplotlib.use("agg")

POINTS = pd.read_csv(cited.POINTS)


def _system(batch_size=8, kv_tokens=100_000) -> batching.System:
    return batching.System("hand-made", "direct", Linear(), 1, batch_size, kv_tokens)


# --- the file -----------------------------------------------------------------------------------------------------


def test_every_published_point_says_where_it_is_from_and_under_which_conditions():
    stated = [*("benchmark", "source", "address", "date", "software", "gpu", "model"), "dtype", "load", "batch_size"]
    assert POINTS[stated].notna().all(axis=None)
    assert POINTS["address"].str.startswith("https://").all()
    assert POINTS[list(cited.METRICS)].notna().any(axis=1).all()
    assert (POINTS[list(cited.METRICS)].dropna(how="all").min() > 0).all()
    assert set(POINTS["load"]) == {"static", "at once", "queue", "closed", "open"}


# --- one engine in steady state -----------------------------------------------------------------------------------


def test_a_lone_user_in_a_closed_loop_is_arithmetic():
    seen = cited.steady(_system(), [(100, 11)] * 6, in_flight=1)
    prefill_s, decode_s = 0.004 + 0.0001 * 100, 0.005
    assert seen["ttft_ms"] == pytest.approx(1e3 * prefill_s)
    assert seen["tpot_ms"] == pytest.approx(1e3 * decode_s)
    assert seen["tokens_per_s"] == pytest.approx(11 / (prefill_s + 10 * decode_s))


def test_a_closed_loop_has_as_many_in_flight_as_are_asked_for():
    """Little's law: tokens per second times the time per token is how many there are."""
    seen = cited.steady(_system(), [(10, 50)] * 60, in_flight=8)
    latency_s = 1e-3 * (seen["ttft_ms"] + 49 * seen["tpot_ms"])
    assert seen["tokens_per_s"] / 50 * latency_s == pytest.approx(8, rel=0.03)


def test_requests_that_come_seldom_are_served_as_if_they_were_alone():
    asked = [(100, 11)] * 9
    alone, seen = cited.steady(_system(), asked, in_flight=1), cited.steady(_system(), asked, sent_s=np.arange(9.0))
    assert [seen[name] for name in ("ttft_ms", "tpot_ms")] == pytest.approx([alone["ttft_ms"], alone["tpot_ms"]])


def test_host_time_holds_the_engine_up_for_each_token():
    free, held = (cited.steady(_system(), [(10, 21)] * 48, in_flight=8, host_s_per_token=s) for s in (0, 0.001))
    assert 1 / held["tokens_per_s"] - 1 / free["tokens_per_s"] == pytest.approx(0.001)


def test_near_saturation_an_open_loop_magnifies_what_a_closed_loop_does_not():
    lengths = [(10, 40)] * 1500
    rng = np.random.default_rng(0)
    capacity = cited.steady(_system(), lengths, in_flight=16)["tokens_per_s"]
    sent_s = rng.exponential(40 / (0.97 * capacity), len(lengths)).cumsum()
    slower = dict(host_s_per_token=0.03 / capacity)
    opened = [cited.steady(_system(), lengths, sent_s=sent_s, **more)["ttft_ms"] for more in ({}, slower)]
    closed = [cited.steady(_system(), lengths, in_flight=16, **more)["ttft_ms"] for more in ({}, slower)]
    assert closed[1] / closed[0] < 1.1
    assert opened[1] / opened[0] > 1.4


def test_a_static_batch_reads_all_prompts_before_it_answers():
    seen = cited.static_batch(Linear(), 100, 128, 3)  # 64 prompts fit into a step
    first_s = 2 * 0.004 + 0.0001 * 128 * 100
    assert seen["ttft_ms"] == pytest.approx(1e3 * first_s)
    assert seen["tokens_per_s"] == pytest.approx(300 / (first_s + 2 * 0.104))


def test_mlperfs_answers_have_the_mean_that_was_published_and_its_limit():
    prompts, answers = np.array(cited.mlperf_lengths(4000, np.random.default_rng(0))).T
    assert answers.mean() == pytest.approx(291.9, abs=0.5)
    assert answers.max() == 1024
    assert prompts.max() <= 1021


# --- all of it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside() -> pd.DataFrame:
    some = POINTS["source"].isin(["MLPerf v4.1 NVIDIA", "TensorRT-LLM 0.9.0 H100"]) | (POINTS["gpu"] == "a100")
    published = pd.DataFrame(
        {"model": "llama-3.1-8b", "tensor_parallel": 1, "requests": 10, "input_tokens": 128, "output_tokens": 128}
        | {"weights": ["parameters", "loaded"], "output_tokens_per_s": 100.0, "simulated_tokens_per_s": 90.0}
    )
    return cited.beside_published(published, POINTS[some])


def test_throughput_agrees_and_latency_near_saturation_does_not(beside):
    ratio = beside.groupby(["load", "gpu", "metric"])["ratio"].agg(["min", "max"])
    assert ratio.loc[("queue", "h100", "throughput")].between(0.95, 1.1).all()
    assert ratio.loc[("static", "h100", "throughput")].between(0.9, 1.15).all()
    assert ratio.loc[("open", "h100", "TPOT"), "max"] < 0.5
    assert ratio.loc[("in flight", "h100", "TPOT")].between(0.75, 1).all()
    assert ratio.loc[("open", "h100", "TPOT"), "min"] < ratio.loc[("host", "h100", "TPOT"), "max"] < 0.6


def test_what_the_load_itself_fixes_is_not_compared(beside):
    assert set(beside.loc[beside["load"].isin(["open", "host"]), "metric"]) == set(cited.METRICS.values()) - {
        "throughput"
    }
    assert set(beside.loc[beside["load"] == "in flight", "metric"]) == {"TPOT", "p99 of TPOT"}


def test_other_throughputs_are_one_more_benchmark(beside):
    row = beside[beside["benchmark"] == "TensorRT-LLM 0.17"]
    assert row[["published", "simulated", "ratio", "group"]].values.tolist() == [[100, 90, 0.9, "throughput"]]


def test_runs_under_the_same_conditions_say_how_much_runs_differ():
    runs = POINTS[(POINTS["source"] == "MLPerf v4.1 HPE") & (POINTS["load"] == "queue")]
    seen = cited.beside_published(points=runs)
    assert seen["between_runs"].tolist() == pytest.approx([(24528.3 - 24424.7) / 24476.5] * 2)
    assert cited.error_table(seen)["between_runs"].notna().all()


# --- intervals ----------------------------------------------------------------------------------------------------


def _predictions(n, sources=4, **columns) -> pd.DataFrame:
    ratio = np.exp(np.random.default_rng(1).normal(0, 0.1, n))
    return pd.DataFrame({"ratio": ratio, "group": "x", "source": np.arange(n) % sources} | columns)


def test_an_interval_covers_what_was_held_out_if_errors_are_alike():
    seen = cited.intervals(_predictions(400), "group", "source").loc["x"]
    assert seen[["predictions", "sources", "tested"]].tolist() == [400, 4, 400]
    assert seen["covered"] == pytest.approx(0.9, abs=0.04)
    assert (math.log(seen["low"]), math.log(seen["high"])) == pytest.approx((-0.1645, 0.1645), abs=0.03)


def test_a_source_that_errs_otherwise_is_outside_of_the_others_interval():
    odd = _predictions(100).assign(ratio=lambda rows: rows["ratio"] * np.where(rows["source"] == 0, 3, 1))
    assert cited.intervals(odd, "group", "source").loc["x", "covered"] < 0.75


def test_fewer_than_19_have_no_interval():
    few, enough = (cited.intervals(_predictions(n), "group", "source").loc["x"] for n in (18, 19))
    assert few[["low", "high", "covered"]].isna().all()
    assert few["tested"] == 0
    assert enough[["low", "high"]].notna().all()


def test_the_knee_is_where_a_configuration_serves_nearly_all_it_can():
    rows = [
        (config_id, users, metric, measured if metric == "session_tokens_per_s" else 1.0)
        for config_id, users, measured in [
            ("a", 4, 70.0),
            ("a", 8, 85.0),
            ("a", 16, 100.0),
            ("b", 4, 9.0),
            ("b", 8, 10.0),
        ]
        for metric in ("session_tokens_per_s", "ttft_mean_s")
    ]
    table = pd.DataFrame(rows, columns=["config", "users", "metric", "measured"]).assign(mix="uniform", turn="base")
    near = table[cited.at_the_knee(table)]
    assert near.groupby("config")["users"].unique().map(list).to_dict() == {"a": [8, 16], "b": [4, 8]}
    assert near["metric"].value_counts().tolist() == [4, 4]


# --- the figure ---------------------------------------------------------------------------------------------------


def test_the_figure_says_where_latency_is_too_good(beside, tmp_path, monkeypatch):
    from erlib.report import canvas
    from erlib.report.own import cited as figure

    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    canvas.style()
    fig = figure.published_points(beside, config.load_profile("laptop"))
    path = tmp_path / "laptop" / "simulated-hardware" / "workbench" / "published_points"
    assert len(pd.read_csv(path.with_suffix(".csv"))) == len(beside)
    assert "times too good" in path.with_suffix(".json").read_text()
    assert sum(len(line.get_xdata()) for line in fig.axes[0].lines if line.get_marker() != "None") == len(beside)
