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
    ],
)
def test_what_is_not_known_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as refused:
        other_tools.read_results(tmp_path / "results.json")
    assert "\n" not in str(refused.value)


def test_what_is_no_text_file() -> None:
    with pytest.raises(ConfigError, match="there are no results"):
        other_tools.read_results(RESULTS)
