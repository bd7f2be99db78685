"""Definitions of both papers, checked by hand-computed examples and by what must always hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib.load import metrics
from erlib.serving.spans import GATEWAY_SPANS
from tests.support import synthetic

S = 1_000_000_000


def request(user: int, send_s: float, *token_s: float, turn: str = "base", **more: object) -> dict:
    row = synthetic.point("p1", "load", "p1.A", 1, 0, tokens=1)[0]
    stamps = [round(t * S) for t in token_s]
    row |= {
        "user": user,
        "turn": turn,
        "t_send_ns": round(send_s * S),
        "token_ns": stamps,
        "output_tokens": len(stamps),
    }
    return row | {"t_first_ns": stamps[0], "t_last_ns": stamps[-1]} | more


TWO = [request(0, 10.0, 11.0, 11.5, 13.0), request(1, 10.5, 12.5, 14.5)]
"""User 0: three tokens, first after 1 s, last after 3 s. User 1: two tokens, first after 2 s, last after 4 s."""


@st.composite
def sessions(draw: st.DrawFn) -> pd.DataFrame:
    """One point: up to 12 users with any positive latencies."""
    rows = []
    for user in range(draw(st.integers(1, 12))):
        send = draw(st.integers(0, 5 * S))
        stamps = np.cumsum([send, *draw(st.lists(st.integers(1, 3 * S), min_size=1, max_size=20))]) / S
        rows.append(request(user, *stamps.tolist()))
    return synthetic.frame(rows)


def test_latencies_of_a_worked_example() -> None:
    done = metrics.answers(synthetic.frame(TWO))
    assert done["ttft_s"].tolist() == pytest.approx([1.0, 2.0])
    assert done["tpot_s"].tolist() == pytest.approx([1.0, 2.0])
    assert done["response_s"].tolist() == pytest.approx([3.0, 4.0])
    assert done["user_tokens_per_s"].tolist() == pytest.approx([1.0, 0.5])
    assert sorted(metrics.token_gaps(done)) == pytest.approx([0.5, 1.5, 2.0])


def test_session_throughput_is_equation_3() -> None:
    # five tokens between t_S = 10.0 (user 0 sends) and t_E = 14.5 (user 1's last token)
    assert metrics.session_throughput(metrics.answers(synthetic.frame(TWO))) == pytest.approx(5 / 4.5)


def test_session_throughput_leaves_out_the_slowest_percent() -> None:
    fast = [request(user, 0.0, 1.0, 2.0) for user in range(199)]
    slow = request(199, -5.0, 1.0, 50.0)  # alone beyond p99, so neither its tokens nor its times count
    assert metrics.session_throughput(metrics.answers(synthetic.frame([*fast, slow]))) == pytest.approx(199 * 2 / 2.0)


@pytest.mark.parametrize(("n", "within"), [(1, 1), (2, 2), (99, 99), (100, 99), (200, 198), (1000, 990), (1001, 991)])
def test_p99_covers_99_percent_and_no_more(n: int, within: int) -> None:
    values = np.random.default_rng(n).permutation(n) + 1.0
    assert (values <= metrics.p99(values)).sum() == within


def test_buckets_of_a_worked_example() -> None:
    buckets = metrics.bucket_throughput(synthetic.frame(TWO), width_s=2.0)
    assert buckets["t_s"].tolist() == [0.0, 2.0, 4.0]
    assert buckets["tokens"].tolist() == [2, 2, 1]
    assert buckets["tokens_per_s"].tolist() == [1.0, 1.0, 0.5]


def test_buckets_keep_silent_intervals() -> None:
    assert metrics.bucket_throughput(synthetic.frame([request(0, 0.0, 0.5, 3.5)]), 1.0)["tokens"].tolist() == [
        1,
        0,
        0,
        1,
    ]


def test_average_buckets_counts_a_finished_repeat_as_silence() -> None:
    rows = [request(0, 0.0, 0.5, 1.5), request(0, 0.0, 0.25, 0.75, repeat=1, point_hash="other")]
    mean = metrics.average_buckets(metrics.bucket_throughput(synthetic.frame(rows), 1.0))
    assert mean["tokens_per_s"].tolist() == [1.5, 0.5]


@pytest.mark.parametrize(
    ("lasts_s", "width_s"), [(2.0, 0.1), (3.99, 0.1), (4.0, 0.2), (10.0, 0.5), (39.9, 1.0), (40.0, 2.0), (1000.0, 2.0)]
)
def test_buckets_are_the_papers_or_resolve_the_longest_run(lasts_s: float, width_s: float) -> None:
    rows = [request(0, 0.0, 0.5, lasts_s), request(0, 0.0, 0.25, 0.75, repeat=1, point_hash="other")]
    assert metrics.bucket_width_s(synthetic.frame(rows), 2.0) == pytest.approx(width_s)


@pytest.mark.parametrize("width_s", [0.0, -1.0])
def test_a_bucket_without_width_is_an_error(width_s: float) -> None:
    with pytest.raises(ValueError, match="positive width"):
        metrics.bucket_throughput(synthetic.frame(TWO), width_s)


def test_failures_are_counted_and_left_out() -> None:
    failed = request(2, 0.0, 100.0, status="UNAVAILABLE", point_hash=TWO[0]["point_hash"])
    row = metrics.summarise(synthetic.frame([*TWO, failed])).iloc[0]
    assert (row["answers"], row["failures"]) == (2, 1)
    assert row["ttft_mean_s"] == pytest.approx(1.5)
    assert metrics.bucket_throughput(synthetic.frame([*TWO, failed]), 2.0)["tokens"].sum() == 5


def test_a_point_where_everything_failed_stays_visible() -> None:
    row = metrics.summarise(synthetic.frame([request(0, 0.0, 1.0, status="DEADLINE_EXCEEDED")])).iloc[0]
    assert (row["answers"], row["failures"]) == (0, 1)
    assert np.isnan(row["ttft_mean_s"])


def test_an_answer_of_one_token_has_no_tpot() -> None:
    row = metrics.summarise(synthetic.frame([request(0, 0.0, 1.0)])).iloc[0]
    assert np.isnan(row["tpot_mean_s"]) and np.isnan(row["gap_median_s"])
    assert row["ttft_mean_s"] == 1.0


@pytest.mark.parametrize(
    "damage", [{"output_tokens": 4}, {"t_first_ns": 0}, {"output_tokens": 0, "token_ns": []}, {"t_last_ns": None}]
)
def test_damaged_records_are_refused(damage: dict) -> None:
    with pytest.raises(ValueError, match="damaged"):
        metrics.answers(synthetic.frame([TWO[0] | damage]))


def test_records_that_are_read_twice_are_refused_and_not_added_up() -> None:
    spans = dict.fromkeys((f"route_{span}_ns" for span in GATEWAY_SPANS), 1)
    frame = synthetic.frame([TWO[0] | spans, TWO[1] | spans, request(0, 20.0, 21.0, turn="continuation")])
    assert metrics.summarise(frame)["answers"].sum() == 3
    for twice in (pd.concat([frame, frame]), synthetic.frame([*TWO, TWO[1] | {"status": "UNAVAILABLE"}])):
        for metric in (metrics.summarise, metrics.routing_overhead, metrics.accounting, metrics.answers):
            with pytest.raises(ValueError, match=r"in the records twice, the first of them p1\.A, 1 users.*once$"):
                metric(twice)


def test_two_measurements_of_one_point_are_refused() -> None:
    with pytest.raises(ValueError, match="2 different measurements"):
        metrics.summarise(synthetic.frame([TWO[0], TWO[1] | {"point_hash": "stale"}]))


def test_summary_keeps_turns_and_repeats_apart() -> None:
    rows = [
        row
        for repeat in (0, 1)
        for row in synthetic.point("p1", "load", "p1.B", 3, repeat, turns=("base", "continuation"))
    ]
    summary = metrics.summarise(synthetic.frame(rows))
    assert summary[["repeat", "turn"]].value_counts().to_dict() == {
        (r, t): 1 for r in (0, 1) for t in ("base", "continuation")
    }
    assert (summary["answers"] == 3).all()


def test_aggregate_is_mean_sd_and_students_interval() -> None:
    rows = [request(0, 0.0, ttft, ttft + 1, repeat=i, point_hash=str(i)) for i, ttft in enumerate([1.0, 2.0, 6.0])]
    result = metrics.aggregate(metrics.summarise(synthetic.frame(rows))).set_index("metric").loc["ttft_mean_s"]
    assert result["mean"] == pytest.approx(3.0)
    assert result["sd"] == pytest.approx(7**0.5)
    assert result["ci95"] == pytest.approx(4.302653 * 7**0.5 / 3**0.5)  # t(0.975, 2) = 4.3027
    assert result["repeats"] == 3


def test_one_repeat_has_no_spread() -> None:
    result = metrics.aggregate(metrics.summarise(synthetic.frame(TWO))).set_index("metric").loc["ttft_mean_s"]
    assert result["mean"] == pytest.approx(1.5) and np.isnan(result["sd"]) and np.isnan(result["ci95"])


def test_routing_overhead_sums_the_gateways_own_spans() -> None:
    spans = {f"route_{span}_ns": (i + 1) * 1_000_000 for i, span in enumerate(GATEWAY_SPANS)}
    spans["relay"] = "front"
    rows = [request(0, 0.0, 1.0, **spans, route_first_byte_ns=500_000_000), request(1, 0.0, 1.0, route_forward_ns=None)]
    table = metrics.routing_overhead(synthetic.frame(rows)).set_index("span")
    assert table.loc["gateway", "mean_ms"] == pytest.approx(1 + 2 + 3 + 4 + 5)  # the expert's first byte is not in it
    assert table.loc["first_byte", "mean_ms"] == pytest.approx(500)
    assert table.loc["gateway", "requests"] == 1  # the second request met no gateway


def test_routing_without_classification_has_no_classification_time() -> None:
    rows = synthetic.point("p1", "load", "p1.R", 4, 0, kmeans=False)
    spans = metrics.routing_spans(synthetic.frame(rows))
    assert (spans[["vectorise", "svd", "kmeans"]] == 0).all().all() and (spans["forward"] > 0).all()


def test_empty_records_give_empty_tables() -> None:
    nothing = synthetic.frame([])
    assert metrics.summarise(nothing).empty
    assert metrics.bucket_throughput(nothing, 1.0).empty
    assert metrics.routing_overhead(nothing).empty


@settings(deadline=None, max_examples=60)
@given(sessions(), st.floats(0.05, 10))
def test_buckets_conserve_tokens(records: pd.DataFrame, width_s: float) -> None:
    buckets = metrics.bucket_throughput(records, width_s)
    assert buckets["tokens"].sum() == records["output_tokens"].sum()
    assert buckets["tokens_per_s"].sum() * width_s == pytest.approx(records["output_tokens"].sum())
    assert buckets["bucket"].tolist() == list(range(len(buckets)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=400))
def test_p99_is_one_of_the_values(values: list[float]) -> None:
    result = metrics.p99(values)
    assert min(values) <= result <= max(values)
    assert sum(value <= result for value in values) >= 0.99 * len(values)


_STAMPS = ("t_send_ns", "t_first_ns", "t_last_ns")


@settings(deadline=None, max_examples=60)
@given(sessions(), st.integers(0, 10**17))
def test_a_clock_shift_changes_nothing(records: pd.DataFrame, shift_ns: int) -> None:
    shifted = records.assign(
        **{name: records[name] + shift_ns for name in _STAMPS},
        token_ns=[stamps + shift_ns for stamps in records["token_ns"]],
    )
    for table in (metrics.summarise, metrics.answers, lambda frame: metrics.bucket_throughput(frame, 1.0)):
        moved, plain = (
            table(frame).drop(columns=["token_ns", *_STAMPS], errors="ignore") for frame in (shifted, records)
        )
        pd.testing.assert_frame_equal(moved, plain, check_exact=True)


@settings(deadline=None, max_examples=60)
@given(sessions(), st.integers(2, 1000))
def test_a_slower_clock_scales_throughput(records: pd.DataFrame, factor: int) -> None:
    slower = records.assign(
        **{name: records[name] * factor for name in _STAMPS},
        token_ns=[stamps * factor for stamps in records["token_ns"]],
    )
    expected, got = (metrics.session_throughput(metrics.answers(frame)) for frame in (records, slower))
    assert got * factor == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(sessions())
def test_session_throughput_of_one_request_is_its_user_throughput(records: pd.DataFrame) -> None:
    one = metrics.answers(records.head(1))
    assert metrics.session_throughput(one) == pytest.approx(one["user_tokens_per_s"].iloc[0])


@settings(deadline=None, max_examples=60)
@given(sessions())
def test_response_time_is_ttft_plus_tpot_times_the_other_tokens(records: pd.DataFrame) -> None:
    # paper 1, section VI-A, with n - 1 gaps between n tokens
    done = metrics.answers(records)
    assert (done["ttft_s"] + done["tpot_s"].fillna(0) * (done["output_tokens"] - 1)).tolist() == pytest.approx(
        done["response_s"].tolist()
    )


def test_the_highest_load_is_each_papers_own() -> None:
    rows = [
        row
        for paper, levels in {"p1": (1, 4), "p2": (1, 8)}.items()
        for users in levels
        for row in synthetic.point(paper, "load", f"{paper}.A", users, 0)
    ]
    table = metrics.at_highest_load(metrics.aggregate(metrics.summarise(synthetic.frame(rows))))
    assert {(config, users) for config, users, *_ in table.index} == {("p1.A", 4), ("p2.A", 8)}
    assert list(table.columns) == metrics.HIGHLIGHTS
    assert table.notna().all(axis=None)


def test_accounting_of_a_worked_example() -> None:
    """Two users on eight experts, both on expert 3 at first; one continuation moves to expert 5."""
    routed = {"config": "p1.C", "route_kmeans_ns": 9.0, "point_hash": "a", "server_tokens": 7}
    rows = [
        request(0, 1.0, 2.0, 3.0, expert=3, **routed),
        request(1, 1.0, 2.0, expert=3, **routed),
        request(0, 4.0, 5.0, 6.0, turn="continuation", expert=5, **routed),
        request(1, 4.0, 5.0, 6.0, turn="continuation", expert=3, **routed),
    ]
    (row,) = metrics.accounting(synthetic.frame(rows)).to_dict("records")
    assert row == {"received_tokens": 7, "counted_tokens": 7, "busiest_share": 3 / 4 * 8, "moved": 0.5}
