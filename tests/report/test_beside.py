"""A tool's measurement beside a simulation of what it asked."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.config import ConfigError
from erlib.load import metrics, other_tools
from erlib.paper_scale import batching, replay
from erlib.report.own import beside

matplotlib.use("agg")

RESULTS = Path(__file__).parent.parent / "support" / "results"
RUNS = {"guidellm_benchmarks.json": "0: constant 20", "aiperf_profile_export.jsonl": "profiling"}
RUNS |= dict.fromkeys(("vllm_detailed.json", "vllm_summary.json"), "0: rate 20.0")


@pytest.fixture
def simulated() -> pd.DataFrame:
    measured = other_tools.read_results(RESULTS / "vllm_detailed.json")
    asked = other_tools.trace(measured, RUNS["vllm_detailed.json"])
    return replay.replay(batching.paper_system("p2.E"), *replay.asked(asked))


def test_what_a_tool_asked_can_be_asked_of_a_simulation(simulated: pd.DataFrame) -> None:
    requests = other_tools.read_results(RESULTS / "vllm_detailed.json").requests
    for column in ("input_tokens", "output_tokens"):
        assert simulated[column].tolist() == requests[column].tolist()
    assert simulated["t_send_ns"].to_numpy() * 1e-9 == pytest.approx(requests["t_send_s"].to_numpy(), abs=1e-8)
    assert set(simulated["source"]) == {"simulated"}


@pytest.mark.parametrize("name", RUNS)
def test_every_tools_file_is_laid_over(
    name: str, simulated: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    measured = other_tools.read_results(RESULTS / name)
    beside.measured_beside_simulated(measured, RUNS[name], simulated, config.load_profile("smoke"), "a mock server")
    (written,) = tmp_path.rglob("measured_beside_simulated.csv")
    table = pd.read_csv(written).set_index(["metric", "statistic"])
    assert table.loc[("ttft_s", "p99"), "simulated"] == pytest.approx(metrics.p99(simulated["ttft_s"]))
    of = measured.summary.set_index("metric")
    assert table.loc[("tpot_s", "mean"), "measured"] == pytest.approx(of.loc["tpot_s", "mean"])
    about = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["footer"].startswith(f"measured by {measured.tool} on a mock server, beside p2.E simulated")
    assert all(left in about["caption"] for left in measured.left_out)


def test_a_run_that_is_not_there_is_named_with_those_that_are(simulated: pd.DataFrame) -> None:
    measured = other_tools.read_results(RESULTS / "guidellm_benchmarks.json")
    with pytest.raises(ConfigError, match="runs are 0: constant 20"):
        other_tools.trace(measured, "7: sweep")
    with pytest.raises(ConfigError, match="runs are 0: constant 20"):
        other_tools.beside(measured, "7: sweep", simulated)
    with pytest.raises(ConfigError, match="needs --save-detailed"):
        other_tools.trace(other_tools.read_results(RESULTS / "vllm_summary.json"), "0: rate 20.0")


def test_nothing_answered_leaves_no_simulated_number(simulated: pd.DataFrame) -> None:
    measured = other_tools.read_results(RESULTS / "vllm_summary.json")
    table = other_tools.beside(measured, "0: rate 20.0", simulated.assign(status="refused"))
    assert np.isnan(table["simulated"]).all()
