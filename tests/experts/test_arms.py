"""Training and judging with real PEFT on a tiny Llama whose corpus has four topics that share no word."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from erlib import config, experts, paths
from erlib.config import ConfigError, Profile
from erlib.experts import arms
from erlib.experts.base import base_of, dtype_of
from erlib.experts.tables import Judged
from tests.support import tiny_llama
from tests.support.tiny_experts import SETTINGS, TOPICS, load


@pytest.fixture(scope="module")
def profile(corpus_file: Path, llama: Path) -> Profile:
    return load(corpus_file, llama)


@pytest.fixture(autouse=True)
def own_places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "_KEPT", home / "experts")
    monkeypatch.setattr(paths, "RUNS", home / "runs")


def test_experts_of_topics_know_their_own(judged: Judged) -> None:
    matrix = experts.matrix(judged)
    own = matrix.loc[[f"expert-{i}" for i in range(TOPICS)]].to_numpy()
    assert list(own.argmin(axis=0)) == list(range(TOPICS))
    table = experts.compare(judged, 0.1, 0).set_index("design")["worse_by"]
    assert table["wrong expert"] > 0.01
    assert table["seed, as it is"] > 0


def test_every_arm_is_trained_on_what_it_should_be(judged: Judged) -> None:
    tokens = judged.training.set_index("arm")["tokens"]
    assert tokens["adapted"] == 256
    assert (tokens[[f"expert-{i}" for i in range(TOPICS)]] == 1024).all()
    assert tokens["dense"] == TOPICS * 1024
    assert {"random-0", "random-1"} <= set(tokens.index)
    assert set(judged.scores["arm"]) == {*tokens.index, "seed", "average"}
    assert (judged.scores["log_probability"] < 0).all()
    assert judged.documents["cluster"].value_counts().to_list() == [2] * TOPICS


def test_what_is_kept_is_found_and_runs_nothing(
    judged: Judged, profile: Profile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arms, "_do", lambda *_: pytest.fail("something was trained"))
    again = experts.judged(profile)
    assert "experts: reused" in capsys.readouterr().out
    assert experts.matrix(again).equals(experts.matrix(judged))


def test_an_adapter_is_pefts_and_says_no_path(judged: Judged, home: Path, llama: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (directory,) = (home / "experts").glob("expert-1-*")
    written = (directory / "adapter_config.json").read_text()
    assert str(home) not in written
    assert str(llama) not in written
    base = AutoModelForCausalLM.from_pretrained(llama, dtype="float32")
    model = PeftModel.from_pretrained(base, directory)
    assert model.peft_config["default"].r == 4
    changed = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(changed) == 2 * 7  # layers and matrices
    assert all(float(p.detach().abs().max()) > 0 for p in changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tokens": 10**6},
            "cluster 0 of 4 has .* tokens to train on, but experts.tokens asks for 1,000,000: lower",
        ),
        ({"seed_tokens": 10**6}, "the corpus has .* tokens to train on, but experts.seed_tokens asks for 1,000,000"),
        ({"documents": 500}, "of 4 has .* held-out texts of 63 or more tokens, but experts.documents asks for 500"),
    ],
)
def test_too_few_texts_are_one_line(corpus_file: Path, llama: Path, changed: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        experts.judged(load(corpus_file, llama, **changed))
    assert "\n" not in str(refused.value)


def test_what_is_no_llama_is_refused(corpus_file: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts.checkpoint: .*config.json cannot be read"):
        experts.judged(load(corpus_file, tmp_path))
    other = shutil.copytree(llama, tmp_path / "other")
    described = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**described, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="holds a 'gpt2', no Llama"):
        experts.judged(load(corpus_file, other))
    (other / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"experts.layers=9, but the checkpoint .* has 2"):
        experts.judged(load(corpus_file, other, layers=9))
    for changed, message in (
        ([], r"holds a \[\], no Llama"),
        ({"model_type": "llama", "eos_token_id": 0}, "config.json has no num_hidden_layers"),
        ({**described, "bos_token_id": None, "eos_token_id": None}, "config.json has no bos_token_id or eos_token_id"),
    ):
        (other / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=message):
            experts.judged(load(corpus_file, other))
    (other / "config.json").write_text(json.dumps(described))
    (other / "tokenizer.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        experts.judged(load(corpus_file, other))
    (other / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no weights in safetensors"):
        experts.judged(load(corpus_file, other))


def test_bfloat16_is_taken_only_where_it_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.ExpertSettings(dtype="bfloat16")
    monkeypatch.setattr("erlib.machine.hardware.multiplies_bfloat16", lambda: False)
    with pytest.raises(ConfigError, match="this machine does not multiply it: set float32 or auto"):
        dtype_of(settings)
    assert dtype_of(config.ExpertSettings()) == "float32"
    monkeypatch.setattr("erlib.machine.hardware.multiplies_bfloat16", lambda: True)
    assert dtype_of(config.ExpertSettings()) == "bfloat16"


def test_adapters_of_the_users_own_are_looked_at(judged: Judged, profile: Profile, home: Path, tmp_path: Path) -> None:
    def own() -> Profile:
        return profile.model_copy(
            update={"experts": profile.experts.model_copy(update={"adapters": tmp_path / "adapters"})}
        )

    for i in range(TOPICS):
        (directory,) = (home / "experts").glob(f"expert-{i}-*")
        shutil.copytree(directory, tmp_path / "adapters" / f"expert-{i}")
    adopted = arms.adapters(own(), TOPICS)
    assert len({path.name for path in adopted}) == TOPICS  # known by content, not by the name of their folder
    for i, path in enumerate(adopted):
        mine = tmp_path / "adapters" / f"expert-{i}" / "adapter_model.safetensors"
        assert (path / "adapter_model.safetensors").read_bytes() == mine.read_bytes()
    last = tmp_path / "adapters" / "expert-3"
    described = json.loads((last / "adapter_config.json").read_text())
    (last / "adapter_config.json").write_text(json.dumps({**described, "r": 8}))
    with pytest.raises(ConfigError, match=r"expert-3 is of another base model or rank: .* expected \(8, 256\)"):
        arms.adapters(own(), TOPICS)
    (last / "adapter_config.json").write_text(json.dumps(described))
    deeper = tiny_llama.make(tmp_path / "one-layer", layers=1)
    shallow = own().experts.model_copy(update={"checkpoint": str(deeper)})
    with pytest.raises(ConfigError, match="expert-0 is of another base model: it changes layers up to 1, but"):
        arms.adapters(profile.model_copy(update={"experts": shallow}), TOPICS)
    shutil.rmtree(last)
    with pytest.raises(ConfigError, match="expert-3 holds no adapter of PEFT's"):
        arms.adapters(own(), TOPICS)
    with pytest.raises(ConfigError, match=f"8 servers need an expert each, but clusterer.n_clusters is {TOPICS}"):
        arms.adapters(own(), 8)


@pytest.mark.slow
def test_what_is_killed_loses_no_arm_that_was_complete(corpus_file: Path, llama: Path, tmp_path: Path) -> None:
    program = tmp_path / "run.py"
    overrides = {**SETTINGS, "experts.corpus.path": str(corpus_file), "experts.checkpoint": str(llama)}
    overrides["experts.tokens"] = 4096  # long enough to be met in the middle
    program.write_text(
        f"from erlib import config, experts\nexperts.judged(config.load_profile('smoke', {overrides!r}))\n"
    )
    environment = {**os.environ, "ERLIB_HOME": str(tmp_path), "PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, str(program)]
    kept = tmp_path / "cache" / "experts"
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(list(kept.glob("[!.]*"))) < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    complete = {path.name for path in kept.glob("[!.]*")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    arms_in_all = 1 + TOPICS + 1 + 2  # adapted, experts, dense, random ones
    assert f"{len(complete)} arms found by content hash, {arms_in_all - len(complete)} to train" in ran.stdout
    assert complete <= {path.name for path in kept.glob("[!.]*")}


def test_the_same_settings_are_the_same_adapters(judged: Judged, profile: Profile) -> None:
    base = base_of(profile)
    blocks = np.zeros((1, 64), dtype=np.int32)
    key = arms._key(profile, base, blocks, None)
    assert key == arms._key(profile, base, blocks.copy(), None)
    assert key != arms._key(profile, base, blocks + 1, None)
    assert key != arms._key(profile, base._replace(dtype="bfloat16"), blocks, None)
    fewer = profile.model_copy(update={"experts": profile.experts.model_copy(update={"layers": 1})})
    assert key != arms._key(fewer, base_of(fewer), blocks, None)
    warmer = profile.experts.model_copy(update={"temperature": 1.0})
    assert key == arms._key(profile.model_copy(update={"experts": warmer}), base, blocks, None)


def test_experts_of_ones_own_checkpoint_are_not_promised_to_be_served(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"not served: set experts.users=\[\]"):
        config.load_profile("laptop", {"experts.checkpoint": str(llama), "experts.users": [8]})
    with pytest.raises(ConfigError, match=r"some layers alone can be trained and judged, not served"):
        config.load_profile("laptop", {"experts.layers": 2, "experts.users": [8]})
    with pytest.raises(ConfigError, match=r"served as adapters \(x1.L\): set experts.adapters, or experts.users=\[\]"):
        config.load_profile("dgx-h100", {"experts.users": [8]})


@pytest.mark.parametrize("unusual", [{"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 8}}])
def test_adapters_whose_arithmetic_is_another_are_refused(
    judged: Judged, profile: Profile, home: Path, tmp_path: Path, unusual: dict[str, object]
) -> None:
    """OpenVINO would add them to the weights by another factor, without a word."""
    (directory,) = (home / "experts").glob("expert-0-*")
    mine = shutil.copytree(directory, tmp_path / "expert-0")
    described = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps({**described, **unusual}))
    settings = profile.experts.model_copy(update={"adapters": str(tmp_path)})
    with pytest.raises(ConfigError, match=f"is no plain LoRA adapter: it sets {next(iter(unusual))}"):
        arms.adapters(profile.model_copy(update={"experts": settings}), TOPICS)
