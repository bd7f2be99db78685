"""What experts are trained on and judged by: blocks of tokens per arm, and held-out texts with their routes.

Arms (c-BTM's, and the controls that make a comparison fair): the seed as it is; ``adapted``, the seed after some tokens
of all clusters, from which everything else branches off; ``expert-0`` and so on, one per cluster; ``random-0`` and so
on, of random clusters; ``dense``, one model with the tokens of all experts together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tokenizers import Tokenizer

from erlib.config import ConfigError, Profile
from erlib.experts.division import Division, division_of, topics_of
from erlib.experts.tables import LEAST_TOKENS
from erlib.machine.progress import Bar
from erlib.workload import corpus

Blocks = npt.NDArray[np.int32]


class HeldOut(NamedTuple):
    """Held-out texts, as many of each cluster."""

    documents: pd.DataFrame
    """One row per text: ``document``, ``cluster`` (by the whole text), ``topic`` (the corpus' label, or empty), and
    ``d0`` ...: squared distances of the whole text to the clusters."""
    tokens: pd.DataFrame
    """One row per token: ``document``, ``position`` (from 1), ``token``, ``n_bytes``, and ``d0`` ...: squared distances
    to the clusters of the text before it, which is what a router has seen when this token is to be predicted."""


def on_own_corpus(profile: Profile) -> Profile:
    """The profile with the corpus that experts are trained on."""
    return profile.model_copy(update={"corpus": profile.experts.corpus})


def training_blocks(profile: Profile, division: Division, tokenizer: Tokenizer, end: int) -> dict[str, Blocks]:
    """Tokens of every arm, shape (blocks, ``experts.sequence``).

    Texts are drawn in random order; what the seed is adapted to, no other arm sees; the dense model sees what the
    experts see, mixed. `end` stands before every text.

    Raises
    ------
    ConfigError
        If a cluster has too few tokens.
    """
    settings = profile.experts
    part = corpus.load_corpus(settings.corpus, profile.seed, split="train")
    texts, topics = part.texts, topics_of(part)
    order = [int(i) for i in np.random.default_rng(profile.seed).permutation(len(texts))]
    packer = _Packer(texts, tokenizer, end, settings.sequence)
    blocks = {}
    if settings.seed_tokens:
        blocks["adapted"], used = packer.pack(order, settings.seed_tokens, "the corpus", "experts.seed_tokens")
        order = order[used:]
    clusters = division.choose([texts[i] for i in order], [topics[i] for i in order])
    for cluster in range(division.n_experts):
        own = [i for i, at in zip(order, clusters, strict=True) if at == cluster]
        what = f"cluster {cluster} of {division.n_experts}"
        blocks[f"expert-{cluster}"], _ = packer.pack(own, settings.tokens, what, "experts.tokens")
    dense = np.concatenate([blocks[f"expert-{cluster}"] for cluster in range(division.n_experts)])
    blocks["dense"] = np.random.default_rng(profile.seed).permutation(dense)
    for number in range(settings.random):
        mixed = [order[i] for i in np.random.default_rng([profile.seed, number]).permutation(len(order))]
        blocks[f"random-{number}"], _ = packer.pack(mixed, settings.tokens, "the corpus", "experts.tokens")
    return blocks


class _Packer:
    """Texts one after the other, cut into blocks."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer, end: int, sequence: int) -> None:
        self._texts, self._tokenizer, self._end, self._sequence = texts, tokenizer, end, sequence

    def pack(self, chosen: Iterable[int], wanted: int, what: str, key: str) -> tuple[Blocks, int]:
        """Blocks of `wanted` tokens in all, rounded up to whole ones, and how many texts went in."""
        n_blocks = -(-wanted // self._sequence)
        ids: list[int] = []
        used = 0
        for i in chosen:
            if len(ids) >= n_blocks * self._sequence:
                break
            ids += [self._end, *self._tokenizer.encode(self._texts[i]).ids]
            used += 1
        if len(ids) < n_blocks * self._sequence:
            raise ConfigError(
                f"{what} has {len(ids):,} tokens to train on, but {key} asks for {wanted:,}: lower it, take more "
                "documents, or fewer clusters (clusterer.n_clusters)"
            )
        return np.array(ids[: n_blocks * self._sequence], dtype=np.int32).reshape(n_blocks, -1), used


def held_out(profile: Profile, division: Division, tokenizer: Tokenizer) -> HeldOut:
    """``experts.documents`` texts of each cluster, drawn at random from those that are long enough.

    Raises
    ------
    ConfigError
        If a cluster has too few of them.
    """
    settings = profile.experts
    part = corpus.load_corpus(settings.corpus, profile.seed, split="holdout")
    most, least = settings.sequence - 1, min(LEAST_TOKENS, settings.sequence - 1)  # one place is the end's
    documents: list[dict[str, object]] = []
    tokens: list[pd.DataFrame] = []
    missing = dict.fromkeys(range(division.n_experts), settings.documents)
    topics = topics_of(part)
    with Bar(total=sum(missing.values()), desc="routing held-out texts", unit="text") as bar:
        for i in np.random.default_rng(profile.seed).permutation(len(part.texts)):
            if not any(missing.values()):
                break
            distances = division.distances([part.texts[i]], [topics[i]])[0]
            cluster = int(distances.argmin())
            ids = tokenizer.encode(part.texts[i]).ids[:most] if missing[cluster] else []
            if len(ids) < least:
                continue
            missing[cluster] -= 1
            tokens.append(_routed_tokens(len(documents), ids, topics[i], division, tokenizer))
            by_cluster = {f"d{i}": distance for i, distance in enumerate(distances)}
            documents.append({"document": len(documents), "cluster": cluster, "topic": topics[i], **by_cluster})
            bar.update()
    if lacking := {cluster: n for cluster, n in missing.items() if n}:
        cluster, n = next(iter(lacking.items()))
        raise ConfigError(
            f"cluster {cluster} of {division.n_experts} has {settings.documents - n} held-out texts of {least} or "
            f"more tokens, but experts.documents asks for {settings.documents}: lower it or take more documents"
        )
    return HeldOut(pd.DataFrame(documents), pd.concat(tokens, ignore_index=True))


def cluster_shares(profile: Profile) -> list[float]:
    """How the held-out texts spread over the clusters: what a router would send to each expert.

    Those that the clusters were made of are spread evenly, by construction.
    """
    division = division_of(on_own_corpus(profile))
    part = corpus.load_corpus(profile.experts.corpus, profile.seed, split="holdout")
    counts = np.bincount(division.choose(part.texts, topics_of(part)), minlength=division.n_experts)
    shares: list[float] = (counts / counts.sum()).tolist()
    return shares


def _routed_tokens(document: int, ids: list[int], topic: str, division: Division, tokenizer: Tokenizer) -> pd.DataFrame:
    """The tokens of one text, and where a router would have sent what stands before each."""
    begun = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    # A character may be cut between two tokens: until it is whole, nothing is added.
    lengths = np.maximum.accumulate([len(text.encode()) for text in begun])
    facts = {"document": document, "position": np.arange(1, len(ids) + 1), "token": ids, "n_bytes": np.diff(lengths)}
    columns = [f"d{expert}" for expert in range(division.n_experts)]
    return pd.DataFrame(facts).join(pd.DataFrame(division.distances(begun[:-1], [topic] * len(ids)), columns=columns))
