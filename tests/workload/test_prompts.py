"""Workloads: lengths, the router's agreement, mixes and draws."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from erlib import config, paths
from erlib.routing import building, training
from erlib.routing.clusterer import Clusterer
from erlib.workload import lengths, prompts
from tests.support import texts

MLPERF = texts.C4.with_name("mlperf_llama2_70b_lengths.csv")


def train_tokenizer(documents: list[str], size: int = 600) -> Tokenizer:
    """A byte-level BPE of the GPT-2 and SmolLM2 kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write_profile(tmp_path: Path, documents: list[str], **overrides: Any) -> config.Profile:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return config.load_profile("laptop", {"corpus.name": "jsonl", "corpus.path": str(path), **overrides})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[config.Profile, Tokenizer, Clusterer]:
    directory = tmp_path_factory.mktemp("topical")
    documents, _ = texts.topical(400)
    profile = write_profile(directory, documents, **{"clusterer.n_clusters": 4, "clusterer.n_components": 8})
    return profile, train_tokenizer(documents), training.fit(documents, n_clusters=4, n_components=8)


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")


@pytest.mark.parametrize("paper", ["p1", "p2", "preliminary"])
def test_pool(made: tuple[config.Profile, Tokenizer, Clusterer], paper: lengths.Paper) -> None:
    profile, tokenizer, model = made
    workload = prompts.build(profile, paper, tokenizer, model, n=159)
    frame = workload.frame
    assert frame["prompt"].tolist() == list(range(160))
    assert frame["cluster"].value_counts().to_dict() == dict.fromkeys(range(4), 40)
    assert (model.predict(frame["text"].tolist()) == frame["cluster"]).all()
    assert [len(tokenizer.encode(text)) for text in frame["text"]] == frame["input_tokens"].tolist()
    scaled = [profile.scaled_input_tokens(length) for length in frame["paper_input_tokens"]]
    assert scaled == frame["input_tokens"].tolist()
    full_scale = lengths.input_tokens(paper, profile.workload, 40)
    planned = [mine[["paper_input_tokens", "max_tokens"]].to_numpy() for _, mine in frame.groupby("cluster")]
    assert all((mine == planned[0]).all() for mine in planned)
    assert sorted(planned[0][:, 0]) == full_scale.tolist()
    if paper == "p1":
        assert all(map(str.startswith, frame["follow_up"], frame["text"]))
        follow_ups = [len(tokenizer.encode(text)) for text in frame["follow_up"]]
        assert follow_ups == (frame["input_tokens"] + frame["max_tokens"]).tolist()
    else:
        assert frame["follow_up"].isna().all()
    assert {prompt.end_id for prompt in prompts.draw(workload, 16, "uniform", 0, 0)} == {-1}
    if paper == "p2":  # 1,000 tokens at most
        assert abs(frame["max_tokens"].mean() * profile.scale.tokens / 291.9 - 1) < 0.1
        assert frame["max_tokens"].between(1, 42).all()
    else:
        assert set(frame["max_tokens"]) == {{"p1": 50, "preliminary": 8}[paper]}
    corpus_texts = " ".join(texts.topical(400)[0])
    assert all(part.strip() in corpus_texts for text in frame["text"] for part in text.split("\n\n"))


def test_answers_of_paper_2_may_end_early(made: tuple[config.Profile, Tokenizer, Clusterer]) -> None:
    profile, tokenizer, model = made
    settings = profile.workload.model_copy(update={"p2_answers": "eos"})
    workload = prompts.build(profile.model_copy(update={"workload": settings}), "p2", tokenizer, model, n=40)
    assert {(prompt.max_tokens, prompt.end_id) for prompt in prompts.draw(workload, 16, "uniform", 0, 0)} == {
        (42, None)
    }


def test_pool_is_cached_by_content(
    made: tuple[config.Profile, Tokenizer, Clusterer], capsys: pytest.CaptureFixture[str]
) -> None:
    profile, tokenizer, model = made
    first = prompts.build(profile, "p1", tokenizer, model, n=16)
    assert "cutting 16" in capsys.readouterr().out
    second = prompts.build(profile, "p1", tokenizer, model, n=16)
    assert "reused" in capsys.readouterr().out
    pd.testing.assert_frame_equal(first.frame, second.frame)
    assert prompts.draw(first, 9, "normal", 0, 0) == prompts.draw(second, 9, "normal", 0, 0)
    prompts.build(profile, "p1", train_tokenizer(texts.topical(400)[0], 400), model, n=16)
    assert "cutting" in capsys.readouterr().out
    directory = paths.run_dir(profile.name) / "prompts"
    assert len(list(directory.iterdir())) == len(list(directory.glob("p1-*.parquet"))) == 2


def test_a_damaged_pool_is_cut_again(
    made: tuple[config.Profile, Tokenizer, Clusterer], capsys: pytest.CaptureFixture[str]
) -> None:
    profile, tokenizer, model = made
    first = prompts.build(profile, "p1", tokenizer, model, n=16)
    (path,) = (paths.run_dir(profile.name) / "prompts").glob("p1-*.parquet")
    whole = path.read_bytes()
    first.frame.iloc[:-1].to_parquet(path)
    for damaged in (path.read_bytes(), whole[:-1], b""):
        path.write_bytes(damaged)
        capsys.readouterr()
        pd.testing.assert_frame_equal(prompts.build(profile, "p1", tokenizer, model, n=16).frame, first.frame)
        assert f"workload p1: {path.name} is made again" in capsys.readouterr().out


def test_beginning_of_sequence_token_is_counted(made: tuple[config.Profile, Tokenizer, Clusterer]) -> None:
    profile, tokenizer, model = made
    with_bos = Tokenizer.from_str(tokenizer.to_str())
    with_bos.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    for text, tokens in prompts.build(profile, "p1", with_bos, model, n=16).frame[["text", "input_tokens"]].to_numpy():
        assert len(with_bos.encode(text)) == tokens == len(tokenizer.encode(text)) + 1


def test_too_little_text(made: tuple[config.Profile, Tokenizer, Clusterer], tmp_path: Path) -> None:
    profile, tokenizer, model = made
    few = write_profile(tmp_path, texts.topical(8, words=6)[0])
    with pytest.raises(prompts.WorkloadError, match=r"no held-out text of \d+ tokens .* raise corpus.documents"):
        prompts.build(few.model_copy(update={"scale": config.Scale(users=1, tokens=1)}), "p1", tokenizer, model, n=16)
    assert not (paths.run_dir(few.name) / "prompts").exists()
    with pytest.raises(prompts.WorkloadError, match="paper must be"):
        prompts.build(profile, "p3", tokenizer, model)  # type: ignore[arg-type]
    with pytest.raises(prompts.WorkloadError, match="at least one prompt"):
        prompts.build(profile, "p1", tokenizer, model, n=0)


@pytest.mark.parametrize("scale", [1.0, 24.0])
def test_real_text_at_full_and_laptop_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    documents = texts.c4()
    profile = write_profile(tmp_path, documents, **{"scale.tokens": scale, "scale.input_tokens": scale})
    model = Clusterer.load(building.build_clusterer(profile))
    tokenizer = train_tokenizer(documents[:300], 4000)
    for paper in ("p1", "p2"):
        frame = prompts.build(profile, paper, tokenizer, model, n=256).frame  # type: ignore[arg-type]
        assert (model.predict(frame["text"].tolist()) == frame["cluster"]).all()
        assert [len(tokenizer.encode(text)) for text in frame["text"]] == frame["input_tokens"].tolist()
        assert frame["text"].nunique() > 0.9 * len(frame)
        if scale == 1 and paper == "p1":
            assert kstest(frame["input_tokens"], "norm", args=(335, 30)).statistic < 0.05
        if scale == 1 and paper == "p2":
            assert ks_2samp(frame["input_tokens"], _mlperf()).statistic < 0.06


def _mlperf() -> pd.Series:
    if not MLPERF.exists():
        pytest.skip(f"needs {MLPERF}")
    return pd.read_csv(MLPERF)["input_length"]


# --- lengths ---


def test_mlperf_quantiles_stand_for_the_samples() -> None:
    drawn = lengths.input_tokens("p2", config.WorkloadSettings(), 24576)
    assert (drawn.min(), drawn.max()) == (48, 1021)
    assert (np.diff(drawn) >= 0).all()
    assert drawn.mean() == pytest.approx(222.33, abs=0.01)
    assert ks_2samp(drawn, _mlperf()).statistic < 0.025


def test_answers_are_as_long_as_the_model_writes_them() -> None:
    settings = config.WorkloadSettings(p2_answers="mlperf")
    full = config.load_profile("smoke").model_copy(
        update={"workload": settings, "scale": config.Scale(users=1, tokens=1)}
    )
    drawn, end_id = lengths.answer_tokens("p2", full, 24576, np.random.default_rng(0))
    assert (drawn.min(), drawn.max(), end_id) == (4, 1000, lengths.FORCED)
    assert drawn.mean() == pytest.approx(7_174_833 / 24_576, rel=2e-3)


def test_normal_lengths() -> None:
    drawn = lengths.input_tokens("p1", config.WorkloadSettings(), 1000)
    assert abs(drawn.mean() - 335) < 0.5
    assert abs(drawn.std() - 30) < 0.5
    assert set(lengths.input_tokens("p1", config.WorkloadSettings(p1_input_sd=0), 5)) == {335}
    assert lengths.input_tokens("p1", config.WorkloadSettings(p1_input_tokens=1), 100).min() == 1


# --- mixes and draws ---


def _pool(k: int, per_cluster: int, sigma: float = 2.0) -> prompts.Workload:
    n = k * per_cluster
    frame = pd.DataFrame({"prompt": range(n), "paper": "p2", "cluster": np.repeat(np.arange(k), per_cluster)})
    frame["text"] = [f"prompt {i}" for i in range(n)]
    frame[["input_tokens", "paper_input_tokens", "max_tokens"]] = 5
    frame["input_tokens"] += np.tile(np.arange(per_cluster), k)
    frame["end_id"] = pd.array([None] * n, dtype="Int32")
    frame["follow_up"] = None
    return prompts.Workload(frame, k, sigma)


@settings(max_examples=100, deadline=None)
@given(
    k=st.integers(1, 12),
    per_cluster=st.integers(1, 9),
    users=st.integers(1, 200),
    mix=st.sampled_from(["uniform", "normal"]),
    seed=st.integers(0, 999),
    repeat=st.integers(0, 9),
)
def test_draw_conserves_users_and_mix(
    k: int, per_cluster: int, users: int, mix: config.Mix, seed: int, repeat: int
) -> None:
    pool = _pool(k, per_cluster)
    drawn = prompts.draw(pool, users, mix, seed, repeat)
    assert len(drawn) == users
    assert drawn == prompts.draw(pool, users, mix, seed, repeat)
    counts = np.bincount([prompt.cluster for prompt in drawn], minlength=k)
    assert (np.abs(counts - users * prompts.mix_shares(mix, k, 2.0)) < 1).all()
    lengths = Counter(prompt.input_tokens for prompt in drawn)
    assert max(lengths.values()) - min(lengths.values() if users >= per_cluster else [1]) <= 1
    assert all(prompt.text == f"prompt {prompt.prompt}" for prompt in drawn)


@settings(max_examples=100, deadline=None)
@given(
    k=st.integers(1, 12),
    per_cluster=st.integers(1, 9),
    users=st.integers(1, 200),
    sigma=st.floats(0.3, 9),
    repeat=st.integers(0, 9),
)
def test_mixes_differ_in_nothing_but_whose_experts_answer(
    k: int, per_cluster: int, users: int, sigma: float, repeat: int
) -> None:
    pool = _pool(k, per_cluster, sigma)
    uniform, normal = (prompts.draw(pool, users, mix, 0, repeat) for mix in ("uniform", "normal"))  # type: ignore[arg-type]
    planned = [[(prompt.input_tokens, prompt.max_tokens) for prompt in drawn] for drawn in (uniform, normal)]
    assert planned[0] == planned[1]
    counts = [np.bincount([prompt.cluster for prompt in drawn], minlength=k) for drawn in (uniform, normal)]
    moved = sum(one.prompt != other.prompt for one, other in zip(uniform, normal, strict=True))
    assert moved == np.maximum(0, counts[1] - counts[0]).sum()
    assert uniform == normal or users > 1


def test_draws_differ_between_repeats_and_are_shuffled() -> None:
    pool = _pool(8, 64)
    draws = [[prompt.prompt for prompt in prompts.draw(pool, 32, "uniform", 0, repeat)] for repeat in range(3)]
    assert draws[0] != draws[1] != draws[2]
    clusters = [prompt.cluster for prompt in prompts.draw(pool, 32, "uniform", 0, 0)]
    assert clusters != sorted(clusters)


@pytest.mark.parametrize(("sigma", "hottest"), [(1, 352), (1.5, 253), (2, 202), (2.5, 175), (3, 160)])
def test_normal_mix_at_a_thousand_users(sigma: float, hottest: int) -> None:
    counts = prompts.partition(1000, prompts.mix_shares("normal", 8, sigma), np.random.default_rng(0))
    assert counts.sum() == 1000
    assert counts.max() == hottest
    assert np.abs(counts - counts[::-1]).max() <= 1
    assert (np.diff(counts[:4]) > 0).all()


def test_remainders_fall_by_lot() -> None:
    shares = prompts.mix_shares("uniform", 8, 2.0)
    single = [prompts.partition(1, shares, np.random.default_rng(seed)).argmax() for seed in range(200)]
    assert set(single) == set(range(8))


def test_bad_draws() -> None:
    with pytest.raises(prompts.WorkloadError, match="users must be at least 1"):
        prompts.draw(_pool(2, 2), 0, "uniform", 0, 0)
    with pytest.raises(prompts.WorkloadError, match="mix must be"):
        prompts.draw(_pool(2, 2), 1, "poisson", 0, 0)  # type: ignore[arg-type]


def test_tables_for_the_reader() -> None:
    pool = _pool(8, 10)
    table = prompts.mix_table(pool, 1000, 0)
    assert table.sum().tolist() == [1000, 1000]
    assert table["normal"].max() == 202
    assert {"input_tokens", "paper_input_tokens"} <= set(prompts.input_lengths(pool).columns)


def test_default_pool_serves_the_largest_draw_without_repeats(
    made: tuple[config.Profile, Tokenizer, Clusterer],
) -> None:
    profile, tokenizer, model = made
    sweep = profile.paper2.model_copy(update={"users": [300], "repeats": 1})
    profile = profile.model_copy(update={"paper2": sweep})
    workload = prompts.build(profile, "p2", tokenizer, model)
    drawn = prompts.draw(workload, 300, "normal", 0, 0)
    assert len({prompt.prompt for prompt in drawn}) == 300
