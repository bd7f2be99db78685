"""Trained experts behind the real Triton: an adapter put on a shared engine says what the merged model says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import served_experts
from erlib import config, paths
from erlib.config import ConfigError
from erlib.engines import build
from erlib.experts import arms
from erlib.load import on_cores
from tests.support import tiny_experts, tiny_llama
from tests.support.ports import BASE_PORT


def test_an_adapter_is_known_by_its_content_and_its_factor_is_said(tmp_path: Path) -> None:
    engine, adapter = tmp_path / "engine-1", tmp_path / "expert-0-abc"
    engine.mkdir()
    adapter.mkdir()
    (engine / "config.json").write_text('{"max_position_embeddings": 128}')
    (adapter / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    plan = on_cores.with_adapter(on_cores.server_plan(engine, 2, 4, "f16", 1), adapter)
    described = plan.description["parameters"]
    assert (described["engine"], described["adapter"], described["adapter_alpha"]) == (
        "engine-1",
        "expert-0-abc",
        "2.0",
    )


def test_experts_of_another_checkpoint_are_not_put_on_these_engines(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    profile = config.load_profile("smoke", {"experts.checkpoint": str(other)})
    with pytest.raises(ConfigError, match="experts can be trained and judged, not served"):
        on_cores.served(profile, [config.load_configuration("x1.T")], "load")


@pytest.mark.slow
def test_static_adapters_and_merged_engines_answer_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "_KEPT", tmp_path / "kept")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "ENGINE_BUILDS", tmp_path / "builds")
    llama = tiny_llama.make(tmp_path / "llama")
    profile = tiny_experts.load(tiny_experts.corpus(tmp_path / "topics.jsonl"), llama, seed_tokens=0)
    adapter = arms.adapters(profile, tiny_experts.TOPICS)[1]
    (shared,) = build.build_all(profile, [("whole", "fp16")], llama)
    (own,) = build.build_all(profile, [("whole", "fp16")], arms.merged(profile, adapter))
    merged, base = (on_cores.server_plan(engine.path, 2, 16, "f16", 2) for engine in (own, shared))
    static = on_cores.with_adapter(base, adapter)
    unscaled = dataclasses.replace(static, parameters={**static.parameters, "adapter_alpha": "1.0"})
    prompts = [" ".join(f"w{10 + 60 * (i % 4) + j}" for j in range(12)) for i in range(10)]
    said = {
        name: served_experts.measured(name, plan, prompts, 12, BASE_PORT + 200 + 10 * number)["answers"]
        for number, (name, plan) in enumerate(
            {"merged": merged, "static": static, "unscaled": unscaled, "base": base}.items()
        )
    }
    assert said["static"] == said["merged"]
    assert said["base"] != said["merged"]
    assert said["unscaled"] != said["merged"], json.dumps(said)
