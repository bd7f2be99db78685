"""How long does it take to classify one prompt? The workbench's router beside the scikit-learn pipeline c-BTM pickled.

The model has the vocabulary of one C4 shard in size (400,000 terms, 100 components, 8 clusters), with the words of real
text first and made-up terms after them; its numbers are random, since only time is measured. The prompts are real text
of 335 words. Both paths must name the same cluster.

    python -m benchmarks.router [--terms 400000] [--prompts 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfTransformer, TfidfVectorizer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer

from erlib import config, corpus
from erlib.clusterer import Clusterer

COMPONENTS, CLUSTERS, WORDS = 100, 8, 335


class NumberNormalizingVectorizer(TfidfVectorizer):
    """c-BTM's vectoriser."""

    def build_tokenizer(self) -> Callable[[str], list[str]]:
        tokenize = super().build_tokenizer()
        return lambda text: ["#NUMBER" if token[0].isdigit() else token for token in tokenize(text)]


def models(texts: list[str], n_terms: int) -> tuple[Clusterer, Pipeline]:
    """The same model in both forms; the pipeline has been through pickle, as the published one has."""
    rng = np.random.default_rng(0)
    warnings.filterwarnings("ignore", message="Your stop_words may be inconsistent")
    vectorizer = NumberNormalizingVectorizer(stop_words=[*ENGLISH_STOP_WORDS, "#NUMBER"]).fit(texts)
    real = vectorizer.get_feature_names_out().tolist()[:n_terms]
    terms = real + [f"madeup{i}" for i in range(n_terms - len(real))]
    idf = rng.uniform(1, 10, n_terms)
    components = rng.standard_normal((COMPONENTS, n_terms)) / np.sqrt(n_terms)
    centres = rng.standard_normal((CLUSTERS, COMPONENTS)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)

    vectorizer.vocabulary_ = {term: i for i, term in enumerate(terms)}
    vectorizer._tfidf = TfidfTransformer()
    vectorizer._tfidf.idf_ = idf
    svd = TruncatedSVD(COMPONENTS)
    svd.components_ = components
    stock = Pipeline([("tfidf", vectorizer), ("svd", svd), ("normalizer", Normalizer(copy=False))])
    ours = Clusterer(terms, idf, np.ascontiguousarray(components.T, dtype=np.float32), centres)
    return ours, pickle.loads(pickle.dumps(stock))


def times_ms(classify: Callable[[str], int], prompts: list[str]) -> tuple[list[float], list[int]]:
    """Milliseconds and cluster of each prompt, after one that is not counted."""
    classify(prompts[0])
    elapsed, clusters = [], []
    for prompt in prompts:
        start = time.perf_counter_ns()
        clusters.append(classify(prompt))
        elapsed.append((time.perf_counter_ns() - start) / 1e6)
    return elapsed, clusters


def main() -> None:
    """Measure, compare, print; exit with an error if the two paths disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terms", type=int, default=400_000)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    documents = corpus.load(config.CorpusSettings(), 0, "holdout").texts
    long_enough = [words for text in documents if len(words := text.split()) >= WORDS]
    prompts = [" ".join(words[:WORDS]) for words in long_enough[: options.prompts]]
    ours, stock = models(documents, options.terms)

    def classify_stock(prompt: str) -> int:
        vector = stock.transform([prompt]).astype(np.float32)
        return int(((ours.centres - vector) ** 2).sum(axis=1).argmin())

    with tempfile.TemporaryDirectory() as directory:
        ours.save(directory)
        loaded = Clusterer.load(directory)
        ours_ms, ours_clusters = times_ms(lambda prompt: loaded.route(prompt)[0], prompts)
        stock_ms, stock_clusters = times_ms(classify_stock, prompts)
    if ours_clusters != stock_clusters:
        raise SystemExit("the two paths name different clusters")
    result = {
        "terms": options.terms,
        "prompts": len(prompts),
        "ours_p50_ms": float(np.median(ours_ms)),
        "ours_p99_ms": float(np.percentile(ours_ms, 99)),
        "stock_p50_ms": float(np.median(stock_ms)),
        "stock_p99_ms": float(np.percentile(stock_ms, 99)),
        "ratio_p50": float(np.median(stock_ms) / np.median(ours_ms)),
    }
    print(f"{len(prompts)} prompts of {WORDS} words, {options.terms:,} terms, same cluster for each")
    for name in ("ours", "stock"):
        print(f"  {name:5}  p50 {result[f'{name}_p50_ms']:9.3f} ms   p99 {result[f'{name}_p99_ms']:9.3f} ms")
    print(f"  ratio  {result['ratio_p50']:.0f} x")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
