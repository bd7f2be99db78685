"""The workloads of both papers: real text of a given length in tokens, cut so that the router's decision is known.

A workload is a pool of prompts. Every length that it has, it has once per cluster, with the same length of the answer.
A *draw* gives N concurrent users a length each, and then a cluster each, by one of paper 2's two mixes (section IV-A):
so two mixes differ in nothing but whose experts have to answer.

What paper 1's users go on with (section IV-B: a prompt and its answer, 335 + 1,200 tokens) is the text of which their
prompt is the beginning, read on by as many tokens as the answer has. An engine's own answer would be another text, and
after encoding another length, in every system.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
from tokenizers import Tokenizer

from erlib import cache, config, paths, provenance
from erlib.machine.progress import Bar, say
from erlib.workload import corpus, lengths
from erlib.workload.lengths import Floats, Paper

MIN_PER_CLUSTER = 64
_MAX_PASSAGES = 2000  # tried for one prompt before giving up
_MIXES: tuple[config.Mix, ...] = get_args(config.Mix)


class WorkloadError(ValueError):
    """A workload cannot be made or drawn from; the message says what to do."""


class Prompt(NamedTuple):
    """One prompt of a draw; `end_id` None lets the engine end the answer, `follow_up` is the continuation prompt."""

    prompt: int
    cluster: int
    text: str
    input_tokens: int
    max_tokens: int
    end_id: int | None
    follow_up: str | None = None


class Classifies(Protocol):
    """A clusterer, as :class:`erlib.routing.clusterer.Clusterer` is one."""

    @property
    def n_clusters(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def predict(self, texts: Sequence[str]) -> npt.NDArray[np.int64]: ...
    def route(self, prompt: str) -> tuple[int, object]: ...


@dataclass(frozen=True)
class Workload:
    """A pool of prompts.

    Attributes
    ----------
    frame : pandas.DataFrame
        One row per prompt: ``prompt`` (int), ``paper``, ``cluster`` (the router's decision), ``text``,
        ``input_tokens`` (counted with the model's tokenizer), ``paper_input_tokens`` (the full-scale length that it
        stands for), ``max_tokens``, ``end_id`` (-1: forced length, missing: may end early), ``follow_up`` (the
        continuation prompt's text, ``input_tokens + max_tokens`` long; missing: there is none). The n-th prompts of all
        clusters have the same lengths.
    n_clusters : int
    sigma : float
        Width of the normal mix, in clusters.
    """

    frame: pd.DataFrame
    n_clusters: int
    sigma: float


# --- the pool ---------------------------------------------------------------------------------------------------


def build(
    profile: config.Profile, paper: Paper, tokenizer: Tokenizer, clusterer: Classifies, n: int | None = None
) -> Workload:
    """Cut a workload from held-out documents, or read it from the cache.

    Each prompt is the beginning of a document (or, once all have been used, a passage that begins at a word), carried
    on with further documents of the same cluster where it is too short. It counts for a cluster only if the router
    sends exactly this text there. There are `n` prompts, rounded up to a multiple of the number of clusters, or as many
    lengths as the largest draw has users, at least 64.
    """
    if paper not in ("p1", "p2", "preliminary"):
        raise WorkloadError(f"paper must be 'p1', 'p2' or 'preliminary', not {paper!r}")
    k = clusterer.n_clusters
    per_cluster = _pool_size(profile, paper) if n is None else math.ceil(n / k)
    if per_cluster < 1:
        raise WorkloadError("a workload needs at least one prompt")
    documents = corpus.load_corpus(profile.corpus, profile.seed, "holdout")
    settings = profile.workload
    scale = (profile.scale.inputs, profile.scale.tokens)
    content = (documents.sha, clusterer.digest, tokenizer.to_str(), settings.model_dump(), scale, profile.seed)
    code = provenance.code_digest("workload/prompts.py", "workload/lengths.py")
    digest = cache.digest(code, paths.FACTS / "mlperf_lengths.csv", paper, per_cluster, *content)
    path = paths.run_dir(profile.name) / "prompts" / f"{paper}-{digest}.parquet"
    if (kept := cache.recalled(path, lambda file: _read(file, k * per_cluster), f"workload {paper}")) is not None:
        say(f"workload {paper}: reused {path.name} (same texts, router, tokenizer, lengths and code)")
        return Workload(kept, k, settings.sigma)
    print(
        f"workload {paper}: cutting {k * per_cluster} prompts from {len(documents.texts)} documents (none cached yet)"
    )
    frame = _prompts(profile, paper, tokenizer, clusterer, documents, per_cluster)
    with cache.writing(path) as partial:
        frame.to_parquet(partial, compression="zstd")
    return Workload(frame, k, settings.sigma)


def _prompts(
    profile: config.Profile,
    paper: Paper,
    tokenizer: Tokenizer,
    clusterer: Classifies,
    documents: corpus.Corpus,
    per_cluster: int,
) -> pd.DataFrame:
    """As many prompts of each cluster as asked for, one row each."""
    k = clusterer.n_clusters
    rng = np.random.default_rng([profile.seed, *paper.encode()])
    inputs = rng.permutation(lengths.input_tokens(paper, profile.workload, per_cluster))
    home = clusterer.predict(documents.texts)
    answers, end_id = lengths.answer_tokens(paper, profile, per_cluster, rng)
    rows: list[tuple[object, ...]] = []
    with Bar(total=k * per_cluster, desc=f"prompts {paper}", delay=2, leave=False) as progress:
        for cluster in range(k):
            own = [text for text, c in zip(documents.texts, home, strict=True) if c == cluster]
            passages = _Passages(own or documents.texts, rng)
            for length, answer in zip(inputs, answers, strict=True):
                more = int(answer) if paper == "p1" else 0
                tokens = profile.scaled_input_tokens(length)
                text, follow_up = _find(passages, tokens, more, tokenizer, clusterer, cluster)
                rows.append((paper, cluster, text, len(tokenizer.encode(text)), length, answer, end_id, follow_up))
                progress.update()
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"end_id": "Int32"}).rename_axis("prompt").reset_index()


def _pool_size(profile: config.Profile, paper: Paper) -> int:
    """Prompts per cluster."""
    if paper == "preliminary":
        users = profile.preliminary.users
    else:
        users = [*(profile.paper1 if paper == "p1" else profile.paper2).users, *profile.overhead.users]
    # in steps, so that more users rarely change all prompts
    return int(2 ** math.ceil(math.log2(max(MIN_PER_CLUSTER, *users))))


class _Passages:
    """Places at which a prompt may begin: the documents' beginnings in random order, then words in their midst."""

    def __init__(self, texts: list[str], rng: np.random.Generator) -> None:
        self._texts = [texts[i] for i in rng.permutation(len(texts))]
        self._rng = rng
        self._starts = self._places()

    def _places(self) -> Iterator[tuple[int, int]]:
        yield from ((i, 0) for i in range(len(self._texts)))
        while True:
            i = int(self._rng.integers(len(self._texts)))
            yield i, self._texts[i].find(" ", int(self._rng.integers(len(self._texts[i])))) + 1

    def next(self, characters: int) -> str:
        """Text from the next place on, carried on with the following documents where one is too short."""
        i, start = next(self._starts)
        text = self._texts[i][start:].lstrip()
        for following in self._texts[i + 1 :] + self._texts[:i]:
            if len(text) >= characters:
                break
            text += "\n\n" + following
        return text[:characters]


def _find(
    passages: _Passages, tokens: int, more: int, tokenizer: Tokenizer, clusterer: Classifies, cluster: int
) -> tuple[str, str | None]:
    """A text of so many tokens, and, if `more` are asked for, the text of which it is the beginning."""
    for _ in range(_MAX_PASSAGES):
        passage = passages.next(_enough(tokens + more))
        text = _cut(passage[: _enough(tokens)], tokens, tokenizer)
        if text is None or not text.strip() or clusterer.route(text)[0] != cluster:
            continue
        follow_up = _cut(passage, tokens + more, tokenizer) if more else None
        if follow_up is not None or not more:
            return text, follow_up
    raise WorkloadError(
        f"found no held-out text of {tokens + more} tokens that the router sends to cluster {cluster}: "
        "raise corpus.documents or corpus.holdout, or lower clusterer.n_clusters"
    )


def _enough(tokens: int) -> int:
    """Characters that hold so many tokens."""
    return 64 + 16 * tokens


def _cut(passage: str, tokens: int, tokenizer: Tokenizer) -> str | None:
    """The beginning of `passage` that is exactly `tokens` long when encoded on its own; None if there is none."""
    offsets = tokenizer.encode(passage).offsets
    # A word that is cut in two may be encoded differently, so look a few tokens around.
    for last in (tokens - 1, tokens, tokens - 2, tokens + 1):
        if 0 <= last < len(offsets):
            text = passage[: offsets[last][1]]
            if len(tokenizer.encode(text)) == tokens:
                return text
    return None


_COLUMNS = ["paper", "cluster", "text", "input_tokens", "paper_input_tokens", "max_tokens", "end_id", "follow_up"]


def _read(path: Path, n: int) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    if list(frame) != ["prompt", *_COLUMNS] or len(frame) != n:
        raise ValueError(f"{len(frame)} rows, not {n}, or other columns")
    return frame


# --- mixes and draws --------------------------------------------------------------------------------------------


def mix_shares(mix: config.Mix, n_clusters: int, sigma: float) -> Floats:
    """Share of the requests that each cluster gets, float array (k,), sum 1.

    ``uniform``: 1/k. ``normal``: proportional to exp(-(i - (k - 1)/2)^2 / (2 sigma^2)) for cluster i; paper 2
    (section IV-A) says "a normal probability distribution" and leaves its width and the clusters' order open.
    """
    if mix not in _MIXES:
        raise WorkloadError(f"mix must be 'uniform' or 'normal', not {mix!r}")
    offsets = np.arange(n_clusters) - (n_clusters - 1) / 2
    weights = np.ones(n_clusters) if mix == "uniform" else np.exp(-(offsets**2) / (2 * sigma**2))
    return weights / weights.sum()


def partition(
    users: int, shares: Floats, rng: np.random.Generator, rather: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Split `users` by `shares`, int array (k,): largest remainders; of equal ones those that are `rather` to get one.

    Where that leaves a choice, it is made by lot. Both papers partition the requests rather than draw each user's
    cluster, so a mix is met as exactly as whole users allow, in every repeat.
    """
    exact = users * shares
    counts = np.floor(exact + 1e-9).astype(np.int64)
    remainders = (exact - counts).round(9)
    first = np.zeros(len(shares), bool) if rather is None else rather
    order = np.lexsort((rng.random(len(shares)), ~first, -remainders))
    counts[order[: users - counts.sum()]] += 1
    return counts


def spread(users: int, shares: Floats, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Each user's cluster, int array (users,): :func:`partition`, in random order."""
    return rng.permutation(np.repeat(np.arange(len(shares)), partition(users, shares, rng)))


def draw(workload: Workload, users: int, mix: config.Mix, seed: int, repeat: int) -> list[Prompt]:
    """The prompts of `users` concurrent users, one each, in random order.

    The same for all configurations, so that they answer the same prompts. Under both mixes a user's prompt and answer
    have the same lengths, and as many users as possible have the same prompt; the rest has one of another cluster. A
    prompt occurs twice only where there are more users than the pool has lengths.
    """
    if users < 1:
        raise WorkloadError(f"users must be at least 1, not {users}")
    mix_shares(mix, workload.n_clusters, workload.sigma)  # refuses an unknown one
    rng = np.random.default_rng([seed, repeat, users])
    of_cluster = [np.flatnonzero(workload.frame["cluster"] == cluster) for cluster in range(workload.n_clusters)]
    if not (n_lengths := min(map(len, of_cluster))):
        raise WorkloadError("a pool needs a prompt of every cluster")
    lengths = np.resize(rng.permutation(n_lengths), users)
    clusters = _clusters(workload, users, mix, rng)
    chosen = workload.frame.iloc[[of_cluster[cluster][n] for cluster, n in zip(clusters, lengths, strict=True)]]
    return [
        Prompt(
            *(int(row.prompt), int(row.cluster), row.text, int(row.input_tokens), int(row.max_tokens)),
            end_id=None if pd.isna(row.end_id) else int(row.end_id),
            follow_up=None if pd.isna(row.follow_up) else row.follow_up,
        )
        for row in chosen.itertuples()
    ]


def moments_s(users: int, window_s: float, seed: int, repeat: int) -> list[float]:
    """When each of `users` comes: moments of a Poisson process, given that so many come within `window_s`."""
    moments: list[float] = np.random.default_rng([seed, repeat, users]).uniform(0, window_s, users).tolist()
    return moments


def _clusters(workload: Workload, users: int, mix: config.Mix, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Each user's cluster, int array (users,): the normal mix moves as few users of the uniform one as it can."""
    k = workload.n_clusters
    normal = partition(users, mix_shares("normal", k, workload.sigma), rng)
    uniform = partition(users, mix_shares("uniform", k, workload.sigma), rng, rather=normal > users // k)
    clusters = rng.permutation(np.repeat(np.arange(k), uniform))
    if mix == "normal":
        leave = [
            rng.permutation(np.flatnonzero(clusters == cluster))[: max(0, too_many)]
            for cluster, too_many in enumerate(uniform - normal)
        ]
        clusters[np.concatenate(leave)] = rng.permutation(np.repeat(np.arange(k), np.maximum(0, normal - uniform)))
    return clusters


# --- what to look at --------------------------------------------------------------------------------------------


def input_lengths(workload: Workload) -> pd.DataFrame:
    """Data of paper 2's Fig. 2: one row per prompt, ``input_tokens`` as sent here and ``paper_input_tokens``."""
    return workload.frame[["cluster", "input_tokens", "paper_input_tokens"]].copy()


def mix_table(workload: Workload, users: int, seed: int) -> pd.DataFrame:
    """Users per cluster (rows) under each mix (columns) in the first repeat's draw of `users`."""
    drawn = {mix: [prompt.cluster for prompt in draw(workload, users, mix, seed, 0)] for mix in _MIXES}
    table = {mix: np.bincount(clusters, minlength=workload.n_clusters) for mix, clusters in drawn.items()}
    return pd.DataFrame(table).rename_axis("cluster")
