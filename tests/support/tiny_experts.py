"""A corpus of four topics that share no word, and a profile that trains experts of a tiny Llama on it in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from erlib import config

TOPICS = 4
SETTINGS = {
    **{"clusterer.n_clusters": TOPICS, "clusterer.n_components": TOPICS},
    **{"experts.tokens": 1024, "experts.seed_tokens": 256, "experts.sequence": 64, "experts.documents": 2},
    **{
        "experts.layers": None,
        "experts.rank": 4,
        "experts.learning_rate": 0.02,
        "experts.dtype": "float32",
        "experts.corpus.name": "jsonl",
    },
}


def corpus(file: Path) -> Path:
    """Write it to `file`, which is returned; the field ``topic`` has the topics."""
    rng = np.random.default_rng(0)
    lines = []
    for topic in np.tile(np.arange(TOPICS), 80):
        words = [f"w{10 + 60 * topic + int(word)}" for word in rng.zipf(1.3, 90) % 60]
        lines.append(json.dumps({"text": " ".join(words), "topic": f"topic {topic}"}))
    file.write_text("\n".join(lines))
    return file


def load(corpus_file: Path, llama: Path, **changed: Any) -> config.Profile:
    """The profile; `changed` are keys below ``experts``."""
    given = {"experts.corpus.path": str(corpus_file), "experts.checkpoint": str(llama)}
    return config.load_profile("smoke", {**SETTINGS, **given, **{f"experts.{k}": v for k, v in changed.items()}})
