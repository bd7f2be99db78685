"""The tiny corpus and the tiny Llama that experts are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from erlib import experts, paths
from erlib.config import Profile
from erlib.experts import arms
from erlib.experts.tables import Judged
from tests.support import tiny_experts, tiny_llama


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_experts.corpus(tmp_path_factory.mktemp("corpus") / "topics.jsonl")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("experts") / "llama")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def judged(profile: Profile, home: Path) -> Judged:
    """What the module's own `profile` trains and judges, kept below `home`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "_KEPT", home / "experts")
        patch.setattr(paths, "RUNS", home / "runs")
        return experts.judged(profile)
