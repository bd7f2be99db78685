"""Which router gives a text to an expert: c-BTM's clusterer, one of the others, or the topics that people gave.

What an expert is trained on, where a held-out text goes and where each of its beginnings would have gone: all are told
by the same distances, so that every comparison of notebook 11 can be had for any router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from erlib import cache
from erlib.config import ConfigError, Profile
from erlib.machine.progress import Bar
from erlib.routing import building, embeddings
from erlib.routing.clusterer import Clusterer
from erlib.workload import corpus

Distances = npt.NDArray[np.float32]

_AT_ONCE = 256
"""Texts that are embedded between two steps of a bar."""


@dataclass(frozen=True)
class Division:
    """How texts are division among the experts.

    Attributes
    ----------
    key : str
        Content hash of what it was made from.
    n_experts : int
    distances : callable
        Of texts and their topics (names, empty where there are none) to the experts, float32 array (texts, experts);
        the nearest expert has a text. Squared distances to the clusters' centres; of ``neighbours``, the share of
        votes that an expert did not get; of ``topics``, 0 and 1.
    """

    key: str
    n_experts: int
    distances: Callable[[Sequence[str], Sequence[str]], Distances]

    def choose(self, texts: Sequence[str], topics: Sequence[str]) -> npt.NDArray[np.int64]:
        """Expert of each text, int array (texts,)."""
        return self.distances(texts, topics).argmin(axis=1)


def division_of(profile: Profile) -> Division:
    """The division that ``experts.router`` asks for, fitted to the profile's corpus.

    Raises
    ------
    ConfigError
        If topics are asked for and a text has none.
    RouterError, ClustererError, CorpusError
    """
    return {"classify": _clusterer, "embeddings": _centres, "neighbours": _neighbours, "topics": _topics}[
        profile.experts.router
    ](profile)


def topics_of(part: corpus.Corpus) -> list[str]:
    """Name of every text's topic, empty where it has none."""
    labels = part.labels or [corpus.NO_LABEL] * len(part.texts)
    return [part.label_names[label] if label != corpus.NO_LABEL else "" for label in labels]


def _clusterer(profile: Profile) -> Division:
    directory = building.build_clusterer(profile)
    model = Clusterer.load(directory)
    return Division(directory.name, model.n_clusters, lambda texts, _: _squared(model.transform(texts), model.centres))


def _embedded(profile: Profile) -> Path:
    from erlib.routing import embedding_export  # noqa: PLC0415  (brings torch and NLTK, which take four seconds)

    return embedding_export.build(profile)


def _centres(profile: Profile) -> Division:
    directory = _embedded(profile)
    embedder = embeddings.Embedder(directory)
    centres = embeddings.nearest_centre(directory, embedder).centres
    return Division(directory.name, len(centres), lambda texts, _: _squared(_vectors(embedder, texts), centres))


def _neighbours(profile: Profile) -> Division:
    directory = _embedded(profile)
    embedder = embeddings.Embedder(directory)
    model = embeddings.neighbours(directory, embedder)

    def distances(texts: Sequence[str], _: Sequence[str]) -> Distances:
        votes = [model.votes(vector) for vector in _vectors(embedder, texts)]
        return (1 - np.array(votes) / model.n_neighbours).astype(np.float32)

    return Division(f"votes-{directory.name}", model.n_experts, distances)


def _vectors(embedder: embeddings.Embedder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Vectors of many texts, with a bar where that takes long."""
    parts = [texts[first : first + _AT_ONCE] for first in range(0, len(texts), _AT_ONCE)]
    with Bar(total=len(texts), desc="sentence embeddings", unit="text", delay=5, leave=False) as bar:
        vectors = []
        for part in parts:
            vectors.append(embedder.many(part))
            bar.update(len(part))
    return np.concatenate(vectors)


def _topics(profile: Profile) -> Division:
    train = corpus.load_corpus(profile.corpus, profile.seed, "train")
    n_experts = profile.clusterer.n_clusters
    if train.labels is None or corpus.NO_LABEL in train.labels:
        raise ConfigError(f"experts.router=topics, but not every text of {train.name} has a topic: take another router")
    if len(train.label_names) < n_experts:
        raise ConfigError(
            f"experts.router=topics, but {train.name} has {len(train.label_names)} topics for {n_experts} experts: "
            "lower clusterer.n_clusters"
        )
    expert_of = dict(zip(train.label_names, embeddings.experts_of_topics(train.labels, n_experts), strict=True))

    def distances(_: Sequence[str], topics: Sequence[str]) -> Distances:
        if unknown := set(topics) - set(expert_of):
            raise ConfigError(f"experts.router=topics, but no text to train on has the topic {min(unknown)!r}")
        chosen = np.array([expert_of[topic] for topic in topics], dtype=np.int64)
        return (chosen[:, None] != np.arange(n_experts)).astype(np.float32)

    return Division(cache.digest("topics", train.sha, n_experts), n_experts, distances)


def _squared(vectors: npt.NDArray[np.float32], centres: npt.NDArray[np.float32]) -> Distances:
    """Squared distances, float32 array (vectors, centres)."""
    return ((vectors[:, None] - centres[None]) ** 2).sum(axis=2)
