"""Routers behind the gateway's one door: the papers' clusterer, sentence embeddings, and policies that read nothing.

Each is a :class:`Router`: a prompt goes in, an expert and the time that it took come out. Sentence embeddings are those
of all-MiniLM-L6-v2 from the PyPI wheel :data:`erlib.routing.embeddings.WHEEL` (the extra ``embeddings``), exported to
OpenVINO once by :func:`erlib.routing.embedding_export.build`, so that a gateway starts in a second and imports neither
PyTorch nor transformers. As the model's own configuration says, it reads the first 256 word pieces of a text and no
more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from erlib.routing.clusterer import Clusterer, RouterError, Spans
from erlib.routing.embeddings import Embedder, nearest_centre, neighbours

if TYPE_CHECKING:
    from erlib.routing import sklearn_pipeline


Route = Callable[[str], tuple[int, Sequence[int]]]
"""Prompt -> expert and (vectorise, svd, k-means) ns."""

Outstanding = Callable[[], Sequence[int]]
"""Requests under way at each expert, now."""

POLICIES = ("classify", "stock", "embeddings", "neighbours", "replicas", "random", "least_loaded")

BY_CLUSTER = ("classify", "stock")
"""Policies of one and the same model, which gateways of one host can share."""

SLOW = ("embeddings", "neighbours")
"""Policies that take ten milliseconds and more, most of them outside Python: others' tokens need not wait for that."""


class Router(Protocol):
    """What a gateway asks."""

    @property
    def n_experts(self) -> int:
        """Experts that it chooses from."""
        ...

    def route(self, prompt: str) -> tuple[int, Spans]:
        """Expert of one prompt, and ns of the three parts of the decision: reading, embedding, choosing."""
        ...


@dataclass(frozen=True)
class ByCluster:
    """The papers' policy: the expert of the prompt's c-BTM cluster."""

    model: Clusterer | sklearn_pipeline.Router

    @property
    def n_experts(self) -> int:
        return self.model.n_clusters

    def route(self, prompt: str) -> tuple[int, Spans]:
        return self.model.route(prompt)


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


def load(
    policy: str, directory: Path, n_experts: int, index: int = 0, outstanding: Outstanding | None = None
) -> Router:
    """What gateway `index` asks for each prompt.

    Parameters
    ----------
    policy : str
        One of :data:`POLICIES`: ``classify`` (c-BTM's clusterer), ``stock`` (the same, as scikit-learn's pipeline),
        ``embeddings`` (:class:`erlib.routing.embeddings.NearestCentre`), ``neighbours``
        (:class:`erlib.routing.embeddings.Neighbours`), ``replicas`` (:class:`RoundRobin`), ``random``,
        ``least_loaded``.
    directory : Path
        Of :func:`erlib.routing.building.build_clusterer`, :func:`erlib.routing.sklearn_pipeline.build` or, for the
        embeddings' two, :func:`erlib.routing.embedding_export.build`; policies that read nothing ignore it.
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
        "classify": lambda: by_cluster(policy, directory),
        "stock": lambda: by_cluster(policy, directory),
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


@functools.cache
def by_cluster(policy: str, directory: Path) -> ByCluster:
    """The router of ``classify`` or ``stock``, read once in this process and those that it forks.

    Raises
    ------
    ClustererError
        If `directory` holds no such model.
    """
    if policy == "classify":
        return ByCluster(Clusterer.load(directory))
    from erlib.routing import sklearn_pipeline  # noqa: PLC0415  (scikit-learn, which others do without)

    return ByCluster(sklearn_pipeline.load(directory))


def _counted(outstanding: Outstanding | None) -> Outstanding:
    if outstanding is None:
        raise RouterError("least_loaded needs the gateway's counts of requests under way")
    return outstanding
