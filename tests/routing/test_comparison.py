"""Routers beside each other: what the changes do to a text, and what the table says of routers with known habits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erlib import config, paths
from erlib.routing import clusterer, comparison, embedding_export, policies
from erlib.routing.clusterer import Spans
from erlib.workload.corpus import Corpus
from tests.support import texts

words = st.lists(st.text("abcdefgh", min_size=1, max_size=8), max_size=60).map(" ".join)
seeds = st.integers(0, 999)


@given(text=words, seed=seeds)
def test_changes_do_what_they_say_and_nothing_without_a_share(text: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert comparison.without_words(text, 0, rng) == comparison.with_typos(text, 0, rng) == text
    assert Counter(comparison.reordered(text, rng).split()) == Counter(text.split())
    assert comparison.reordered(text, rng, words=1000) == text
    assert comparison.without_words(text, 1, rng).split() == text.split()[:1]
    shorter = iter(text.split())
    assert all(word in shorter for word in comparison.without_words(text, 0.5, rng).split())  # in their order


@given(text=st.text("abcdefgh ,.\n", max_size=300), seed=seeds)
def test_a_typo_is_one_edit_of_one_word(text: str, seed: int) -> None:
    changed = comparison.with_typos(text, 1, np.random.default_rng(seed))
    assert re.split(r"\w+", changed) == re.split(r"\w+", text)
    for before, after in zip(re.findall(r"\w+", text), re.findall(r"\w+", changed), strict=True):
        assert abs(len(before) - len(after)) <= 1
        if len(before) == 1:
            assert before == after
        elif len(before) == len(after):
            off = [i for i in range(len(before)) if before[i] != after[i]]
            assert len(off) <= 1 or (len(off) == 2 and sorted(before) == sorted(after))
        else:
            short, long = sorted((before, after), key=len)
            assert any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def test_about_the_share_that_was_asked_for() -> None:
    text = " ".join(["word"] * 20_000)
    rng = np.random.default_rng(0)
    assert len(comparison.without_words(text, 0.1, rng).split()) == pytest.approx(18_000, rel=0.02)
    typos = sum(word != "word" for word in comparison.with_typos(text, 0.1, rng).split())
    assert typos == pytest.approx(2000 * (1 - 1 / 4 / 26), rel=0.1)  # now and then the same letter replaces one


class FirstWord:
    """Reads the topic off the first word."""

    n_experts = 4

    def route(self, prompt: str) -> tuple[int, Spans]:
        return len(prompt.split(maxsplit=1)[0]) % 4, Spans(0, 0, 0)


class Always:
    n_experts = 4

    def route(self, prompt: str) -> tuple[int, Spans]:
        return 2, Spans(0, 0, 0)


@pytest.fixture(scope="module")
def documents() -> Corpus:
    """Four topics, told by the length of the first word; every third document goes on for 1,200 words."""
    labels = [i % 4 for i in range(240)]
    rows = [" ".join(["x" * (4 + label), *["word"] * (1200 if i % 3 == 0 else 20)]) for i, label in enumerate(labels)]
    return Corpus(rows, labels, ["a", "b", "c", "d"], "made up", "sha")


@pytest.fixture(scope="module")
def table(documents: Corpus) -> pd.DataFrame:
    entries = {
        "topic": FirstWord(),
        "always": Always(),
        "turns": policies.RoundRobin(4),
        "random": policies.Random(4, 0),
        "absent": "because",
    }
    return comparison.compare(entries, documents, seed=0, n_documents=200, n_prompts=20).set_index("router")


def test_known_habits_are_seen(table: pd.DataFrame) -> None:
    topic, always = table.loc["topic"], table.loc["always"]
    assert topic["nmi"] == topic["purity"] == 1 and 0.7 < topic["smallest"] <= 1 <= topic["largest"] < 1.3
    assert always["nmi"] == 0 and always["smallest"] == 0 and always["largest"] == 4
    assert (always[comparison.KEPT] == 1).all()
    assert (topic[list(comparison.GROWTH)] == 1).all()  # the first word stays the first
    assert topic["conversations_growth"] == topic["conversations_growth_short"] == 80
    assert topic["dropped_words"] < 1


def test_who_reads_nothing_keeps_experts_by_chance(table: pd.DataFrame) -> None:
    for name in ("turns", "random"):
        assert table.loc[name, comparison.KEPT].between(0.1, 0.4).all(), name
        assert table.loc[name, "nmi"] < 0.1


def test_latencies_are_ordered(table: pd.DataFrame) -> None:
    for n in comparison.LATENCY_WORDS:
        there = table.drop("absent")
        assert (there[f"p50_ms_{n}"] > 0).all() and (there[f"p99_ms_{n}"] >= there[f"p50_ms_{n}"]).all()


def test_who_is_not_there_has_a_reason_and_no_number(table: pd.DataFrame) -> None:
    assert table.loc["absent", "reason"] == "because"
    assert table.loc["absent"].drop("reason").isna().all()
    assert (table.drop("absent")["reason"] == "").all()


def test_without_labels_there_is_no_agreement_but_everything_else(documents: Corpus) -> None:
    unlabelled = Corpus(documents.texts[:40], None, [], "made up", "sha")
    table = comparison.compare({"topic": FirstWord()}, unlabelled, seed=0, n_documents=40, n_prompts=2)
    assert "nmi" not in table and table["typos"].notna().all()


def test_decisions_repeat_with_the_seed(documents: Corpus) -> None:
    def decided(seed: int) -> pd.DataFrame:
        entries = {"topic": FirstWord(), "random": policies.Random(4, 0)}
        table = comparison.compare(entries, documents, seed, n_documents=100, n_prompts=2)
        return table.drop(columns=[c for c in table if "_ms_" in c])

    pd.testing.assert_frame_equal(decided(1), decided(1))
    assert not decided(1).equals(decided(2))


def test_a_profile_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")

    def missing(profile: config.Profile) -> Path:
        raise clusterer.RouterError("no wheel")

    monkeypatch.setattr(embedding_export, "build", missing)
    made, topics = texts.topical(300)
    lines = [f'{{"text": "{text}", "topic": "{topic}"}}' for text, topic in zip(made, topics, strict=True)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    corpus = {"corpus.name": "jsonl", "corpus.path": str(tmp_path / "texts.jsonl"), "corpus.label_field": "topic"}
    few = {"routers.documents": 100, "routers.prompts": 2}
    profile = config.load_profile("smoke", {**corpus, **few, "clusterer.n_clusters": 4, "clusterer.n_components": 8})
    first = comparison.compare_routers(profile)
    assert "reused routers" not in capsys.readouterr().out
    again = comparison.compare_routers(profile)
    assert "router comparison: reused" in capsys.readouterr().out
    pd.testing.assert_frame_equal(first, again)
    assert list(first["router"]) == list(comparison.NAMES)
    reasons = first.set_index("router")["reason"]
    assert set(reasons.index[reasons == "no wheel"]) == {"embeddings", "neighbours"}
    told = first.set_index("router").loc["classify"]
    assert told["nmi"] > 0.5 and told["reordered"] == 1  # a bag of words has no order
