"""How long does it take to classify one prompt? The workbench's router beside the scikit-learn pipeline c-BTM pickled.

The model is the laptop profile's (100 components, 8 clusters), its vocabulary filled up with made-up terms to about the
size of one C4 shard's (400,000). The prompts are held-out text of 335 words. Both paths must name the same cluster.

    python -m benchmarks.router [--terms 400000] [--prompts 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import numpy as np

from erlib import config
from erlib.routing import sklearn_pipeline
from erlib.routing.clusterer import Clusterer
from erlib.routing.policies import Route
from erlib.workload import corpus

WORDS = 335


def times_ms(route: Route, prompts: list[str]) -> tuple[list[float], list[int]]:
    """Milliseconds and cluster of each prompt, after one that is not counted."""
    route(prompts[0])
    elapsed, clusters = [], []
    for prompt in prompts:
        start = time.perf_counter_ns()
        clusters.append(route(prompt)[0])
        elapsed.append((time.perf_counter_ns() - start) / 1e6)
    return elapsed, clusters


def main() -> None:
    """Measure, compare, print; exit with an error if the two paths disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terms", type=int, default=400_000)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    profile = config.load_profile("laptop")
    documents = corpus.load_corpus(profile.corpus, profile.seed, "holdout").texts
    long_enough = [words for text in documents if len(words := text.split()) >= WORDS]
    prompts = [" ".join(words[:WORDS]) for words in long_enough[: options.prompts]]
    router = sklearn_pipeline.build(profile, options.terms)
    warnings.filterwarnings("ignore", message="Your stop_words may be inconsistent")
    ours_ms, ours_clusters = times_ms(Clusterer.load(router).route, prompts)
    stock_ms, stock_clusters = times_ms(sklearn_pipeline.load(router).route, prompts)
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
