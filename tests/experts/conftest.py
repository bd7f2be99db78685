"""The tiny corpus and the tiny Llama that experts are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_experts, tiny_llama


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_experts.corpus(tmp_path_factory.mktemp("corpus") / "topics.jsonl")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("experts") / "llama")
