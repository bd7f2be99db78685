"""Routers beside each other: agreement with topics, balance, stability under changes that keep the topic, latency.

No model answers anything here. What a paraphrase, a typing error or a grown conversation does to a decision is seen on
held-out text that is changed by rule, with a seed:

* :func:`without_words` drops words at random: the same matter in fewer words;
* :func:`reordered` puts passages into another order (no synonyms, no new words);
* :func:`with_typos` edits characters;
* a conversation grows when the prompt and its answer come back as the next prompt (paper 1, section IV-B); the text by
  which the document goes on stands for an answer that stays with its topic.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import ascii_lowercase

import numpy as np
import numpy.typing as npt
import pandas as pd

from erlib import cache, paths, provenance
from erlib.config import Profile
from erlib.machine import hardware
from erlib.machine.progress import Bar
from erlib.routing import building, clusterer, embedding_export, embeddings, evaluate, policies
from erlib.routing.clusterer import Clusterer
from erlib.routing.policies import Router
from erlib.workload import corpus
from erlib.workload.corpus import Corpus

CHANGED = 0.1
"""Share of the words that are dropped, or get a typing error."""
PASSAGE_WORDS = 15
"""About a sentence; the newsgroups' texts come without punctuation."""
LATENCY_WORDS = (35, 335, 2000)
GROWTH = {"growth_short": (35, 935), "growth": (250, 1150)}
"""Words of the prompt, and of prompt and answer: paper 1's 335 and 1,535 tokens, and a short question before it."""

KEPT = ["dropped_words", "reordered", "typos", *GROWTH]
"""Columns that say which share of the prompts stays at its expert."""
NAMES = {
    "classify": "c-BTM: TF-IDF, SVD, k-means",
    "embeddings": "sentence embeddings, k-means",
    "neighbours": "sentence embeddings, nearest examples",
    "replicas": "round robin",
    "random": "random",
    "least_loaded": "least loaded",
}
"""Policies that are compared, as tables and figures call them."""


# --- changes that keep the topic ----------------------------------------------------------------------------------


def without_words(text: str, share: float, rng: np.random.Generator) -> str:
    """`text` without about a `share` of its words; at least one stays, if there is one."""
    words = text.split()
    kept = [word for word, chance in zip(words, rng.random(len(words)), strict=True) if chance >= share]
    return " ".join(kept or words[:1])


def reordered(text: str, rng: np.random.Generator, words: int = PASSAGE_WORDS) -> str:
    """`text` with its passages of so many words in random order."""
    every = text.split()
    passages = [every[start : start + words] for start in range(0, len(every), words)]
    return " ".join(word for i in rng.permutation(len(passages)) for word in passages[i])


def with_typos(text: str, share: float, rng: np.random.Generator) -> str:
    """`text` with one character dropped, doubled, replaced or swapped with the next in about a `share` of its words.

    Everything between the words stays as it is; words of one character do too.
    """

    def edited(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() >= share:
            return word
        i = int(rng.integers(len(word) - 1))
        before, first, second, after = word[:i], word[i], word[i + 1], word[i + 2 :]
        other = ascii_lowercase[int(rng.integers(26))]
        edits = [before + second + after, before + first + first + second + after, before + other + second + after]
        return [*edits, before + second + first + after][int(rng.integers(4))]

    return re.sub(r"\w\w+", edited, text)


# --- the comparison -----------------------------------------------------------------------------------------------


def compare(
    entries: Mapping[str, Router | str],
    documents: Corpus,
    seed: int,
    n_documents: int,
    n_prompts: int,
) -> pd.DataFrame:
    """One row per router.

    Parameters
    ----------
    entries : mapping
        Name to router, or to the reason why there is none.
    documents : Corpus
        Held out: no router has been fitted on them.
    seed : int
        Draws documents and changes; the same for all routers.
    n_documents : int
        For agreement, balance and each change; grown conversations come from as many of the long enough documents.
    n_prompts : int
        For each latency, all different.

    Returns
    -------
    DataFrame
        ``router``; ``reason`` (empty, or why everything else is missing); ``documents``; ``nmi`` and ``purity``
        (missing without labels), ``smallest`` and ``largest`` as :func:`erlib.routing.evaluate.evaluate` defines them;
        a column for each of :data:`KEPT`, shares between 0 and 1; ``conversations_<name>``, how many each growth was
        tried with; ``p50_ms_<words>`` and ``p99_ms_<words>`` for each of :data:`LATENCY_WORDS`.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(documents.texts))[:n_documents]
    texts = [documents.texts[i] for i in chosen]
    labels = [documents.labels[i] for i in chosen] if documents.labels is not None else None
    changed = {
        "dropped_words": [without_words(text, CHANGED, rng) for text in texts],
        "reordered": [reordered(text, rng) for text in texts],
        "typos": [with_typos(text, CHANGED, rng) for text in texts],
    }
    pairs = {name: list(zip(texts, versions, strict=True)) for name, versions in changed.items()}
    pairs |= {name: _conversations(documents.texts, *words, n_documents) for name, words in GROWTH.items()}
    timed = {words: _prompts(documents.texts, words, n_prompts, rng) for words in LATENCY_WORDS}
    # Where no time is taken, embeddings are made of all texts at once, and routers that share a model share them.
    every = list(dict.fromkeys([*texts, *(text for both in pairs.values() for pair in both for text in pair)]))
    embed = functools.cache(lambda model: dict(zip(every, _vectors(model, every), strict=True)))
    rows = []
    for name, router in Bar(entries.items(), desc="routers", delay=2, leave=False):
        if isinstance(router, str):
            rows.append({"router": name, "reason": router})
            continue
        decide = _decider(router, embed)
        row = {"router": name, "reason": "", "documents": len(texts)}
        row |= evaluate.evaluate(np.array([decide(text) for text in texts]), router.n_experts, labels)
        for number, (change, versions) in enumerate(pairs.items()):
            row[change] = _stay(decide, versions, np.random.default_rng([seed, number]))
        row |= {f"conversations_{growth}": len(pairs[growth]) for growth in GROWTH}
        for words, prompts in timed.items():
            row |= _latencies(router, words, prompts)
        rows.append(row)
    return pd.DataFrame(rows)


def _decider(
    router: Router, embed: Callable[[embeddings.Embed], Mapping[str, clusterer.Floats]]
) -> Callable[[str], int]:
    if isinstance(router, embeddings.ByEmbedding):
        vectors = embed(router.embed)
        return lambda text: router.choose(vectors[text])
    return lambda text: router.route(text)[0]


def _vectors(model: embeddings.Embed, texts: Sequence[str]) -> Iterable[clusterer.Floats]:
    return model.many(texts) if isinstance(model, embeddings.Embedder) else (model(text).vector for text in texts)


def _stay(decide: Callable[[str], int], versions: Sequence[tuple[str, str]], rng: np.random.Generator) -> float:
    """Share of the texts that come to the same expert before and after.

    All are asked about in random order, as if they came from many users: a router that takes turns would otherwise keep
    none or all of them, by the order alone.
    """
    if not versions:
        return np.nan
    every = [text for both in versions for text in both]
    order = rng.permutation(len(every))
    experts = np.empty(len(every), dtype=np.int64)
    experts[order] = [decide(every[i]) for i in order]
    return float(np.mean(experts[::2] == experts[1::2]))


def _conversations(texts: Sequence[str], first: int, then: int, most: int) -> list[tuple[str, str]]:
    """Beginnings of `first` words and of `then` words of the documents that have as many, up to `most`."""
    long_enough = (words for text in texts if len(words := text.split()) >= then)
    pairs = ((" ".join(words[:first]), " ".join(words[:then])) for words in long_enough)
    return [pair for pair, _ in zip(pairs, range(most), strict=False)]


def _prompts(texts: Sequence[str], words: int, n: int, rng: np.random.Generator) -> list[str]:
    """`n` prompts of exactly so many words, documents one after the other."""
    every = np.array(" ".join(texts[i] for i in rng.permutation(len(texts))).split())
    return [" ".join(prompt) for prompt in np.resize(every, (n, words))]


def _latencies(router: Router, words: int, prompts: Sequence[str]) -> dict[str, float]:
    """Median and p99 (nearest rank) of decisions on prompts of so many words."""
    ms = _latencies_ms(router, prompts)
    p99 = np.percentile(ms, 99, method="inverted_cdf")
    return {f"p50_ms_{words}": float(np.median(ms)), f"p99_ms_{words}": float(p99)}


def _latencies_ms(router: Router, prompts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Wall time of each decision, after one that is not counted."""
    router.route(prompts[0])
    stamps = [time.perf_counter_ns()]
    for prompt in prompts:
        router.route(prompt)
        stamps.append(time.perf_counter_ns())
    return np.diff(stamps) / 1e6


def compare_routers(profile: Profile) -> pd.DataFrame:
    """:func:`compare` for a profile's own clusterer, corpus and number of experts, or what an earlier run found.

    Without the extra ``embeddings`` its two routers have a reason in place of numbers. Nobody is asked anything here,
    so that for ``least_loaded`` all experts are equally idle.

    Raises
    ------
    ClustererError, CorpusError
    """
    held_out = corpus.load_corpus(profile.corpus, profile.seed, "holdout")
    directory = building.build_clusterer(profile)
    n = profile.clusterer.n_clusters
    entries: dict[str, Router | str] = {
        "classify": policies.ByCluster(Clusterer.load(directory)),
        **_embedding_routers(profile),
        "replicas": policies.RoundRobin(n),
        "random": policies.Random(n, profile.seed),
        "least_loaded": policies.LeastLoaded(n, lambda: [0] * n),
    }
    reasons = {name: router for name, router in entries.items() if isinstance(router, str)}
    code = provenance.code_digest("routing")
    settings = profile.routers
    what = (code, held_out.sha, directory.name, n, profile.seed, settings.model_dump())
    digest = cache.digest(*what, hardware.machine(), reasons)
    path = paths.run_dir(profile.name) / f"routers-{digest}.parquet"
    if (kept := cache.recalled(path, pd.read_parquet, "router comparison")) is not None:
        print(f"router comparison: reused {path.name} (same routers, texts, machine and code)")
        return kept
    table = compare(entries, held_out, profile.seed, settings.documents, settings.prompts)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    return table


def _embedding_routers(profile: Profile) -> dict[str, Router | str]:
    try:
        directory = embedding_export.build(profile)
    except clusterer.RouterError as reason:
        return dict.fromkeys(("embeddings", "neighbours"), str(reason))
    embed = embeddings.Embedder(directory)
    made: dict[str, Router | str] = {"embeddings": embeddings.nearest_centre(directory, embed)}
    try:
        made["neighbours"] = embeddings.neighbours(directory, embed)
    except clusterer.RouterError as reason:
        made["neighbours"] = str(reason)
    return made
