"""The benchmark of a host's cost per token: real Triton, the papers' ensemble, an engine that keeps time."""

from __future__ import annotations

import asyncio
import os

import psutil
import pytest

from benchmarks import host_binding
from benchmarks.host_binding import Condition
from erlib.machine import processes
from tests.support.ports import BASE_PORT


@pytest.mark.parametrize("per_response", [1, 8])
def test_tokens_responses_and_cpu_time_are_counted(per_response, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(host_binding, "BASE_PORT", BASE_PORT + 600)
    monkeypatch.setattr(host_binding, "SETTLE_S", 0.2)
    monkeypatch.setattr(host_binding, "SECONDS", 2.0)
    before = os.sched_getaffinity(0)
    with host_binding.running(Condition(1, 1, 1, per_response), tokenizer.parent, tmp_path) as (server,):
        family = psutil.Process(server.process.pid)
        assert {tuple(member.cpu_affinity()) for member in (family, *family.children(recursive=True))} == {(0,)}
        assert os.sched_getaffinity(0) == before
        seen = asyncio.run(host_binding.point([server], 2, ["a word or two"]))
        with pytest.raises(ExceptionGroup) as refused:
            asyncio.run(host_binding.point([server], 1, [" "]))
        assert refused.group_contains(processes.StartError, match="text_input is empty")
    assert not family.is_running()
    # a step lasts 20 ms and what Triton adds to it; 60 tokens are seven responses of eight and one of four
    assert 30 < seen["tokens_per_s"] <= 2 * 1.1 / host_binding.STEP_S
    assert seen["tokens_per_s"] / seen["responses_per_s"] == pytest.approx(per_response, rel=0.15)
    assert seen["tpot_mean_s"] == pytest.approx(host_binding.STEP_S, rel=0.5)
    assert 0 < seen["busy_cores"] <= 1.1
    parts = [seen[f"{program}_us_per_token"] for program in (*host_binding.PROGRAMS, "users")]
    assert all(0 < part < 20_000 for part in parts)
