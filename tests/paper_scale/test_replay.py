"""Traces in virtual time: who answers, what is refused, and how long a long one takes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from erlib.paper_scale import batching, designs, replay
from erlib.paper_scale.batching import CannotServe
from erlib.workload import traces
from erlib.workload.traces import Trace

SMALL, LARGE = batching.paper_system("p2.E"), batching.paper_system("p2.A")


def of(arrival_s: list[float], inputs: list[int], outputs: list[int], cluster: list[int] | None = None) -> Trace:
    clusters = None if cluster is None else np.array(cluster)
    experts = () if cluster is None else tuple(f"expert-{i}" for i in range(max(cluster) + 1))
    return Trace("a trace", "own", np.array(arrival_s), np.array(inputs), np.array(outputs), clusters, experts)


def azure(path: Path, requests: int) -> Trace:
    """The format of Azure's traces of 2023, with lengths and gaps of about their size."""
    rng = np.random.default_rng(0)
    ticks = np.cumsum(rng.exponential(0.18, requests) * 1e7).astype(int)
    lengths = np.clip(rng.lognormal(6.7, 0.8, requests), 1, 7000), np.clip(rng.lognormal(5, 0.9, requests), 1, 1000)
    rows = [
        f"2023-11-16 {18 + tick // 36_000_000_000:02}:{tick // 600_000_000 % 60:02}:{tick // 10_000_000 % 60:02}."
        f"{tick % 10_000_000:07},{inputs:.0f},{outputs:.0f}\r\n"
        for tick, inputs, outputs in zip(ticks, *lengths, strict=True)
    ]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + "".join(rows), encoding="utf-8", newline="")
    return traces.read(path)


def test_five_thousand_requests_take_seconds(tmp_path: Path) -> None:
    """A bound with room for a slow machine: it takes one or two."""
    began = time.monotonic()
    trace = azure(tmp_path / "azure.csv", 5000)
    rows = replay.replay(SMALL, *replay.asked(trace))
    assert time.monotonic() - began < 30
    assert trace.format == "azure"
    assert len(rows) == 5000
    assert rows["t_send_ns"].to_numpy() * 1e-9 == pytest.approx(trace.arrival_s, abs=1e-8)
    assert rows["output_tokens"].tolist() == trace.output_tokens.tolist()


def test_a_trace_says_who_answers() -> None:
    trace = of([0, 0, 0.5], [10, 20, 30], [5, 6, 7], [7, 0, 7])
    drawn, starts_s = replay.asked(trace)
    rows = replay.replay(SMALL, drawn, starts_s)
    assert rows["cluster"].tolist() == rows["expert"].tolist() == [7, 0, 7]
    assert rows["input_tokens"].tolist() == [10, 20, 30]
    again = traces.of_records(rows, "again")
    assert again.cluster is not None
    assert again.cluster.tolist() == [7, 0, 7]
    assert again.arrival_s.tolist() == [0, 0, 0.5]
    fewer, _ = replay.asked(trace, clusters=2)
    assert [prompt.cluster for prompt in fewer] == [1, 0, 1]


def test_a_trace_that_does_not_is_spread() -> None:
    trace = of([0.0] * 4000, [10] * 4000, [5] * 4000)
    for mix, sigma, busiest in (("uniform", 2.0, 1 / 8), ("normal", 0.5, 0.491)):
        drawn, _ = replay.asked(trace, mix=mix, sigma=sigma)
        shares = np.bincount([prompt.cluster for prompt in drawn], minlength=8) / 4000
        assert shares.max() == pytest.approx(busiest, abs=0.03)
    assert replay.asked(trace, seed=1) == replay.asked(trace, seed=1) != replay.asked(trace, seed=2)


def test_latencies_are_those_of_a_design() -> None:
    """:func:`designs.see` takes the same prompts and moments."""
    drawn, starts_s = replay.asked(of([0, 0, 0.1, 3], [10, 2000, 30, 40], [5, 6, 1, 8], [3, 3, 3, 4]))
    seen = designs.see(designs.Design(SMALL), drawn, drawn, starts_s)
    rows = replay.replay(SMALL, drawn, starts_s)
    assert rows["ttft_s"].to_numpy() == pytest.approx(seen.ttft_s, abs=1e-8)
    assert rows["tpot_s"].dropna().to_numpy() == pytest.approx(seen.tpot_s, abs=1e-8)
    assert np.isnan(rows["tpot_s"][2])


def test_what_does_not_fit_is_refused_and_missed() -> None:
    drawn, starts_s = replay.asked(of([0, 1, 2, 3], [10, 9000, 8000, 20], [5, 5, 500, 5], [0, 1, 2, 3]))
    rows = replay.replay(SMALL, drawn, starts_s)
    assert rows["status"].tolist() == ["ok", "refused", "refused", "ok"]
    assert rows["ttft_s"].isna().tolist() == [False, True, True, False]
    assert replay.attained(rows, ttft_s=1.0, tpot_s=1.0) == 0.5
    assert replay.attained(rows, ttft_s=0.0, tpot_s=1.0) == 0.0
    with pytest.raises(CannotServe, match="none of the 2 requests fits"):
        replay.replay(replace(LARGE, max_step_tokens=100), drawn[1:3], starts_s[1:3])
