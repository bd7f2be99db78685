"""Results of AIPerf, GuideLLM and vLLM's bench, as the tools wrote them (tests/support/results has how)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from erlib.config import ConfigError
from erlib.load import metrics, other_tools

RESULTS = Path(__file__).parent.parent / "support" / "results"
AIPERF, GUIDELLM = RESULTS / "aiperf_profile_export.jsonl", RESULTS / "guidellm_benchmarks.json"
DETAILED, SUMMARY = RESULTS / "vllm_detailed.json", RESULTS / "vllm_summary.json"


def answered(path: Path) -> pd.DataFrame:
    requests = other_tools.read_results(path).requests
    return requests[requests["status"] == "ok"]


def guidellm() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GUIDELLM.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(("path", "tool"), [(AIPERF, "AIPerf"), (GUIDELLM, "GuideLLM"), (DETAILED, "vllm bench")])
def test_every_tool_gives_the_same_columns(path: Path, tool: str) -> None:
    """The mock server sends 12 tokens, 5 ms apart, and its clients were busy."""
    found = other_tools.read_results(path)
    done = answered(path)
    assert found.tool == tool
    assert set(found.requests["source"]) == {"measured"}
    assert set(done["output_tokens"]) == {12}
    assert done["response_s"].to_numpy() == pytest.approx((done["ttft_s"] + 11 * done["tpot_s"]).to_numpy())
    assert done["tpot_s"].between(0.004, 0.012).all()
    assert done["user_tokens_per_s"].to_numpy() == pytest.approx(12 / done["response_s"].to_numpy())
    assert found.requests["t_send_s"].min() == 0
    assert list(found.summary["metric"]) == list(other_tools.METRICS)
    of = found.summary.set_index("metric")
    assert of.loc["tpot_s", "p99"] == metrics.p99(done["tpot_s"])
    assert of["failures"].unique().tolist() == [len(found.requests) - len(done)]
    assert found.left_out is other_tools.LEFT_OUT[tool]


def test_tpot_of_guidellm_is_what_it_calls_inter_token_latency() -> None:
    """guidellm 0.8.1, schemas/base/request_stats.py: ``time_per_output_token_ms`` is (last - start) / n, "including
    first token"; ``inter_token_latency_ms`` is (last - first) / (n - 1); ``request_latency`` ends with the stream.
    """
    theirs = guidellm()["benchmarks"][0]["requests"]["successful"]
    done = answered(GUIDELLM)
    assert done["tpot_s"].to_numpy() * 1e3 == pytest.approx([its["inter_token_latency_ms"] for its in theirs])
    assert done["ttft_s"].to_numpy() * 1e3 == pytest.approx([its["time_to_first_token_ms"] for its in theirs])
    with_first = np.array([its["time_per_output_token_ms"] for its in theirs])
    assert (with_first > 1.5 * 1e3 * done["tpot_s"]).all()
    assert with_first == pytest.approx(done["response_s"].to_numpy() * 1e3 / 12)
    assert (done["response_s"].to_numpy() <= [its["request_latency"] for its in theirs]).all()


def test_tpot_of_aiperf_has_the_servers_tokens() -> None:
    """aiperf 0.13.0, metrics/types/inter_token_latency_metric.py: (request_latency - TTFT) / (output_sequence_length -
    1), and the length is its own tokenizer's unless --use-server-token-count; request_latency ends with the last
    response that has content.
    """
    lines = [json.loads(line)["metrics"] for line in AIPERF.read_text(encoding="utf-8").splitlines()][:3]
    done = answered(AIPERF)
    theirs = np.array([its["inter_token_latency"]["value"] for its in lines])
    assert {its["output_sequence_length"]["value"] for its in lines} == {7}
    assert done["tpot_s"].to_numpy() * 1e3 * 11 / 6 == pytest.approx(theirs)
    assert done["response_s"].to_numpy() * 1e3 == pytest.approx([its["request_latency"]["value"] for its in lines])
    assert other_tools.read_results(AIPERF).requests["status"].tolist() == ["ok", "ok", "ok", "error 500"]


def test_tpot_of_vllm_is_ours() -> None:
    """vllm 0.32.0, benchmarks/serve.py: (latency - ttft) / (output_len - 1), percentiles by numpy."""
    theirs = json.loads(DETAILED.read_text(encoding="utf-8"))
    done = answered(DETAILED)
    for name, metric in (("ttft", "ttft_s"), ("tpot", "tpot_s"), ("e2el", "response_s")):
        assert done[metric].mean() * 1e3 == pytest.approx(theirs[f"mean_{name}_ms"])
        assert np.percentile(done[metric], 99) * 1e3 == pytest.approx(theirs[f"p99_{name}_ms"])
    assert done["response_s"].to_numpy() == pytest.approx(theirs["latencies"])


def test_a_summary_of_vllm_has_no_requests() -> None:
    found = other_tools.read_results(SUMMARY)
    theirs = json.loads(SUMMARY.read_text(encoding="utf-8"))
    assert found.requests.empty
    of = found.summary.set_index("metric")
    assert of.loc["tpot_s", "mean"] == pytest.approx(theirs["mean_tpot_ms"] / 1e3)
    assert of.loc["ttft_s", "p99"] == pytest.approx(theirs["p99_ttft_ms"] / 1e3)
    assert of["answers"].tolist() == [10] * 3


def test_failures_are_counted_and_not_averaged(tmp_path: Path) -> None:
    changed = json.loads(DETAILED.read_text(encoding="utf-8"))
    changed["errors"][2], changed["ttfts"][2], changed["itls"][2] = "Service Unavailable", 0.0, []
    changed["output_lens"][2] = 0
    (tmp_path / "one.json").write_text(json.dumps(changed), encoding="utf-8")
    found = other_tools.read_results(tmp_path / "one.json")
    assert found.requests["status"].value_counts().to_dict() == {"ok": 9, "failed": 1}
    assert found.requests["ttft_s"].min() > 0.01
    assert found.summary["failures"].tolist() == [1] * 3


def test_runs_of_one_file_stay_apart(tmp_path: Path) -> None:
    report = guidellm()
    report["benchmarks"] *= 2
    (tmp_path / "two.json").write_text(json.dumps(report), encoding="utf-8")
    assert other_tools.read_results(tmp_path / "two.json").summary["run"].unique().tolist() == [
        "0: constant 20",
        "1: constant 20",
    ]
    (tmp_path / "appended.json").write_text(2 * (DETAILED.read_text(encoding="utf-8") + "\n"), encoding="utf-8")
    appended = other_tools.read_results(tmp_path / "appended.json")
    assert appended.requests.groupby("run").size().to_dict() == {"0: rate 20.0": 10, "1: rate 20.0": 10}


def test_warming_up_is_not_measured(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in AIPERF.read_text(encoding="utf-8").splitlines()]
    lines[0]["metadata"]["benchmark_phase"] = "warmup"
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert len(other_tools.read_results(tmp_path / "p.jsonl").requests) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no results"),
        ("[1]", "holds no results"),
        ('{"a": 1}\n{"b"', "line 2: not JSON"),
        ('{"a": 1}', "is none of AIPerf's profile_export.jsonl, GuideLLM's benchmarks.json"),
        ('{"benchmarks": []}', "schema without a version; version 2 is read"),
        ('{"metadata": {"version": 1}, "benchmarks": []}', "schema version 1; version 2 is read"),
        ('{"metadata": {"version": 2}, "benchmarks": []}', "holds no answered request"),
        ('{"metadata": {"version": 2}, "benchmarks": [{}]}', r"not a report of GuideLLM's \(KeyError\('config'\)\)"),
        ('{"metadata": {}, "metrics": {}}', r"line 1: not a record of AIPerf's \(KeyError\('request_start_ns'\)\)"),
        ('{"input_config": {}}', "AIPerf's averages only: give the file profile_export.jsonl beside it"),
        ('{"mean_ttft_ms": 1, "ttfts": [], "itls": []}', "not what vllm bench serve --save-detailed writes"),
        ('{"mean_ttft_ms": 1}', r"run '0: rate \?': not what .* --save-result writes: completed is missing"),
        ('{"mean_ttft_ms": null, "completed": 1}', "mean_ttft_ms is missing"),
        ('{"mean_ttft_ms": 1, "completed": "x"}', "completed must be a number from 0, not 'x'"),
        ('{"mean_ttft_ms": 1, "completed": 1, "p99_tpot_ms": -1}', "p99_tpot_ms must be a number from 0, not -1"),
        ('{"mean_ttft_ms": 1, "completed": 1}\n{"a": 1}', "run '1: rate .*completed is missing"),
        ('{"mean_ttft_ms": 0, "completed": 0}', "holds no answered request"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as refused:
        other_tools.read_results(tmp_path / "results.json")
    assert "\n" not in str(refused.value)


def written(path: Path, tmp_path: Path, **changes: Any) -> Path:
    """The tool's file with other values in its first answered request; None: without the value."""
    if path is DETAILED:
        document = json.loads(path.read_text(encoding="utf-8"))
        for name, value in changes.items():
            document[name][0] = value
        lines = [document]
    elif path is GUIDELLM:
        lines = [guidellm()]
        request = lines[0]["benchmarks"][0]["requests"]["successful"][0]
        for name, value in changes.items():
            (request if name in request else request["info"]["timings"])[name] = value
    else:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, value in changes.items():
            if value is None:
                del lines[0]["metrics"][name]
            else:
                lines[0]["metrics"][name]["value"] = value
    (tmp_path / "f.json").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path / "f.json"


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        (
            DETAILED,
            {"start_times": "x"},
            r"f\.json, run '0: rate 20\.0', request 1: the moment of sending must be a nu",
        ),
        (DETAILED, {"output_lens": "x"}, "request 1: tokens of the answer must be a whole number from 0, not 'x'"),
        (DETAILED, {"input_lens": 1e30}, r"request 1: tokens of the prompt must be a whole number from 0, not 1e\+30"),
        (DETAILED, {"input_lens": 10**400}, "request 1: tokens of the prompt must be"),
        (DETAILED, {"ttfts": -0.5}, r"request 1: TTFT is negative \(-0\.5 s\)"),
        (DETAILED, {"itls": [-0.01]}, "request 1: TPOT is negative"),
        (DETAILED, {"ttfts": float("nan")}, "request 1: TTFT must be a number, not nan"),
        (DETAILED, {"ttfts": 10**400}, "OverflowError"),
        (AIPERF, {"usage_prompt_tokens": None, "input_sequence_length": None}, "line 1: no token counts"),
        (AIPERF, {"usage_completion_tokens": None, "output_sequence_length": None}, "line 1: no token counts"),
        (AIPERF, {"time_to_first_token": -1}, r"line 1: TTFT is negative \(-0\.001 s\)"),
        (AIPERF, {"time_to_first_token": 1e6}, "line 1: TPOT is negative"),
        (AIPERF, {"time_to_first_token": None, "request_latency": -1}, "line 1: the response time is negative"),
        (AIPERF, {"usage_completion_tokens": 1.5}, "line 1: tokens of the answer must be a whole number from 0"),
        (GUIDELLM, {"output_tokens": None}, "run '0: constant 20', successful request 1: no token counts"),
        (GUIDELLM, {"output_tokens": 0}, "request 1: no token counts: measure again with a server that reports usage"),
        (GUIDELLM, {"prompt_tokens": None}, "request 1: no token counts"),
        (GUIDELLM, {"first_token_iteration": 1}, "request 1: TTFT is negative"),
        (GUIDELLM, {"last_token_iteration": 1}, "request 1: the response time is negative"),
        (GUIDELLM, {"request_start": None}, "request 1: no moment of sending"),
        (GUIDELLM, {"request_start": "x"}, "not a report of GuideLLM's"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(
    tmp_path: Path, path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        other_tools.read_results(written(path, tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_a_report_whose_rate_is_no_number_is_refused(tmp_path: Path) -> None:
    report = guidellm()
    report["benchmarks"][0]["config"]["strategy"]["rate"] = "fast"
    (tmp_path / "f.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(ConfigError, match="not a report of GuideLLM's"):
        other_tools.read_results(tmp_path / "f.json")


def test_an_empty_answer_is_none(tmp_path: Path) -> None:
    nothing = {"output_tokens": 0, "first_token_iteration": None, "last_token_iteration": None}
    found = other_tools.read_results(written(GUIDELLM, tmp_path, **nothing))
    assert found.requests["status"].tolist() == ["no answer", "ok", "ok", "errored"]


def test_a_byte_order_mark_and_other_line_separators_are_read(tmp_path: Path) -> None:
    text = AIPERF.read_text(encoding="utf-8").replace("Mock server", "Mock\u2028server")
    (tmp_path / "f.jsonl").write_text(f"\ufeff{text}", encoding="utf-8")
    pd.testing.assert_frame_equal(
        other_tools.read_results(tmp_path / "f.jsonl").requests, other_tools.read_results(AIPERF).requests
    )


def test_what_is_no_text_file() -> None:
    with pytest.raises(ConfigError, match="there are no results"):
        other_tools.read_results(RESULTS)
