"""The c-BTM router's model: text to one of k clusters, trained as c-BTM's published code trains it.

Pipeline (paper 1, section III-A; ``metaseq/scripts/train_clusterer.py`` of kernelmachine/cbtm): words without stop
words and numbers, TF-IDF, truncated SVD to 100 dimensions, row-wise L2 normalisation, balanced k-means. A fitted
:class:`Clusterer` is numpy arrays and a word list only: loading one and classifying with it import neither
scikit-learn nor PyTorch, because each routing gateway is a process that does just that.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

NUMBER = "#NUMBER"

_words = re.compile(r"(?u)\b\w\w+\b").findall  # scikit-learn's default token pattern


class ClustererError(ValueError):
    """A clusterer cannot be fitted, read or applied; the message says what to do."""


class Spans(NamedTuple):
    """Where the time of one classification went."""

    vectorise_ns: int
    svd_ns: int
    kmeans_ns: int


class Clusterer:
    """A fitted router model; made by :func:`erlib.routing.training.fit`,
    :func:`erlib.routing.training.from_pickles` or :meth:`load`.

    Attributes
    ----------
    terms : list of str, length V
        Vocabulary in column order.
    idf : float array (V,)
    components : float32 array (V, d)
        Right singular vectors, one contiguous row per term: classifying gathers the prompt's rows only. scikit-learn
        keeps the transpose and copies the whole matrix for every call.
    centres : float32 array (k, d)
    mean, scale : float32 arrays (d,) or None
        Standardisation, where ``normalizer`` is ``standard``.
    facts : dict
        How it was made: ``normalizer``, ``stop_words``, ``seed``, ``train_sizes`` (documents per cluster in the
        balanced assignment) and ``nearest_sizes`` (documents nearest to each centre), or ``source``.

    Raises
    ------
    ClustererError
        If the parts do not fit together, or hold what is no number.
    """

    def __init__(
        self,
        terms: list[str],
        idf: npt.NDArray[np.float64],
        components: Floats,
        centres: Floats,
        *,
        mean: Floats | None = None,
        scale: Floats | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        n_terms, n_components = components.shape if components.ndim == 2 else (0, 0)
        fits = len(terms) == n_terms and idf.shape == (n_terms,) and centres.shape == (len(centres), n_components)
        if not fits or any(row is not None and row.shape != (n_components,) for row in (mean, scale)):
            raise ClustererError("the parts of the clusterer do not fit together; fit or convert it again")
        # A centre that is no number would be nearest to every prompt.
        for name, array in (
            ("idf", idf),
            ("components", components),
            ("centres", centres),
            ("mean", mean),
            ("scale", scale),
        ):
            if array is not None and not are_numbers(array, above_zero=name in ("idf", "scale")):
                raise ClustererError(f"{name} of the clusterer holds what is no number; fit or convert it again")
        self.terms = terms
        self.facts = facts or {}
        # Plain views: numpy.memmap's own indexing costs more than the arithmetic on one prompt.
        self.idf, self.components, self.centres = np.asarray(idf), np.asarray(components), np.asarray(centres)
        self.mean, self.scale = mean, scale
        columns = {term: i for i, term in enumerate(terms)}
        if len(columns) != n_terms or not all(isinstance(term, str) for term in terms):
            raise ClustererError("the terms of the clusterer are not different words; fit or convert it again")
        self._column = columns.get

    @property
    def n_clusters(self) -> int:
        return len(self.centres)

    @property
    def n_components(self) -> int:
        return self.components.shape[1]

    @property
    def digest(self) -> str:
        """Short content hash: two clusterers that share it route alike."""
        sha = hashlib.sha256("\n".join(self.terms).encode())
        for array in (self.idf, self.components, self.centres, self.mean, self.scale):
            if array is not None:
                sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()[:16]

    # --- classification ---

    def route(self, prompt: str) -> tuple[int, Spans]:
        """Classify one prompt and say where the time went.

        Returns
        -------
        cluster : int
            Nearest centre. A prompt without a known word is the zero vector, which has a nearest centre too.
        spans : Spans
        """
        start = time.perf_counter_ns()
        columns, weights = self._vectorise(prompt)
        vectorised = time.perf_counter_ns()
        vector = self._project(columns, weights)
        projected = time.perf_counter_ns()
        cluster = self._nearest(vector)
        return cluster, Spans(vectorised - start, projected - vectorised, time.perf_counter_ns() - projected)

    def predict(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Clusters of `texts`, int array (n,): the nearest centre, unbalanced, as c-BTM routes.

        Raises
        ------
        ClustererError
            If a text is not a str.
        """
        return np.array([self._nearest(row) for row in self.transform(texts)], dtype=np.int64)

    def transform(self, texts: Sequence[str]) -> Floats:
        """Normalised SVD vectors of `texts`, float array (n, d).

        Raises
        ------
        ClustererError
            If a text is not a str.
        """
        if isinstance(texts, str):
            raise ClustererError("expected a sequence of texts, got one text; use route() for a single prompt")
        rows = [self._project(*self._vectorise(text)) for text in texts]
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.n_components)

    def _vectorise(self, text: str) -> tuple[npt.NDArray[np.intp], Floats]:
        # Stop words and numbers are in no vocabulary, so the lookup drops them.
        counts = collections.Counter(map(self._column, _words(checked(text).lower())))
        counts.pop(None, None)
        columns = np.fromiter(counts, np.intp, len(counts))
        weights = np.fromiter(counts.values(), np.float64, len(counts)) * self.idf[columns]
        return columns, (weights / (np.sqrt(weights @ weights) or 1.0)).astype(np.float32)

    def _project(self, columns: npt.NDArray[np.intp], weights: Floats) -> Floats:
        # Not a matrix product: BLAS would share it out among threads, which then wait actively for the next prompt, for
        # tens of milliseconds of CPU time each.
        vector = np.einsum("i,ij->j", weights, self.components.take(columns, axis=0))
        if self.mean is not None and self.scale is not None:
            return (vector - self.mean) / self.scale
        return vector / (np.sqrt(vector @ vector) or np.float32(1.0))

    def _nearest(self, vector: Floats) -> int:
        return int(((self.centres - vector) ** 2).sum(axis=1).argmin())

    def top_terms(self, n: int = 10) -> list[list[str]]:
        """The `n` heaviest terms of each centre, mapped back through the SVD."""
        centres = self.centres
        if self.mean is not None and self.scale is not None:
            centres = centres * self.scale + self.mean
        order = np.argsort(-(centres @ self.components.T), axis=1, kind="stable")[:, :n]
        return [[self.terms[i] for i in row] for row in order]

    # --- storage ---

    def save(self, directory: Path | str) -> None:
        """Write ``clusterer.json`` and one ``.npy`` per array into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("idf", "components", "centres", "mean", "scale"):
            if getattr(self, name) is not None:
                np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)
        data = {"digest": self.digest, "standardised": self.mean is not None, "facts": self.facts, "terms": self.terms}
        (directory / "clusterer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path | str) -> Clusterer:
        """Open a saved clusterer; its arrays are memory-mapped, so that all gateways of a machine share them.

        Raises
        ------
        ClustererError
            If `directory` holds no complete clusterer, or not the one that was saved there.
        """
        directory = Path(directory)
        try:
            data = json.loads((directory / "clusterer.json").read_text(encoding="utf-8"))
            names = ["idf", "components", "centres"] + (["mean", "scale"] if data["standardised"] else [])
            arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
            model = cls(terms=data["terms"], facts=data["facts"], **arrays)
            if model.digest != data["digest"]:
                raise ClustererError("it is not the one that was saved there")
            return model
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ClustererError(f"{directory} holds no readable clusterer ({error}); build it again") from error


def are_numbers(array: npt.NDArray[Any], above_zero: bool = False) -> bool:
    """Whether `array` holds at least one float and finite ones only; without a copy: it may be memory-mapped."""
    if array.dtype.kind != "f" or not array.size:
        return False
    least, most = array.min(), array.max()  # NaN if one of the values is
    return bool(np.isfinite(least) and np.isfinite(most) and (least > 0 or not above_zero))


def checked(text: object) -> str:
    if not isinstance(text, str):
        raise ClustererError(f"a text must be a str, got {type(text).__name__}")
    return text


def words_of(text: str) -> list[str]:
    return [NUMBER if word[0].isdigit() else word for word in _words(text)]


class RouterError(ClustererError):
    """A router cannot be made or loaded; the message says what to do."""
