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
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from erlib import cache, paths
from erlib.routing import pickles

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from erlib import config

Floats = npt.NDArray[np.float32]

BATCH_DOCUMENTS = 50_000
ITERATIONS = 20
TOLERANCE = 1e-3
_NUMBER = "#NUMBER"
_words = re.compile(r"(?u)\b\w\w+\b").findall  # scikit-learn's default token pattern


class ClustererError(ValueError):
    """A clusterer cannot be fitted, read or applied; the message says what to do."""


class Spans(NamedTuple):
    """Where the time of one classification went."""

    vectorise_ns: int
    svd_ns: int
    kmeans_ns: int


class Clusterer:
    """A fitted router model; make one with :meth:`fit`, :meth:`load` or :meth:`from_pickles`.

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

    # --- training ---

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        n_clusters: int = 8,
        n_components: int = 100,
        *,
        normalizer: str = "l2",
        stop_words: str = "sklearn",
        seed: int = 0,
    ) -> Clusterer:
        """Fit on `texts` as c-BTM's code does.

        Parameters
        ----------
        texts : sequence of str
            Empty ones are skipped, as c-BTM skips them.
        n_clusters, n_components : int
        normalizer : {"l2", "standard"}
            ``l2``: rows to unit length, what c-BTM's code does. ``standard``: columns to mean 0 and variance 1, what
            both papers' text says (paper 1, section III-A).
        stop_words : {"sklearn", "nltk"}
            c-BTM's own list, or NLTK's English one.
        seed : int

        Raises
        ------
        ClustererError
            If there are fewer documents or terms than clusters or components, or an option is unknown.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import StandardScaler, normalize
        from threadpoolctl import threadpool_limits

        from erlib.machine.progress import Bar

        if normalizer not in ("l2", "standard"):
            raise ClustererError(f"normalizer must be 'l2' or 'standard', not {normalizer!r}")
        if n_clusters < 1 or n_components < 1:
            raise ClustererError("n_clusters and n_components must be at least 1")
        texts = [text for text in map(_checked, texts) if text.strip()]
        if len(texts) < max(n_clusters, n_components):
            raise ClustererError(
                f"{len(texts)} non-empty documents are too few for {n_clusters} clusters of {n_components} components: "
                "take more documents or lower clusterer.n_clusters and clusterer.n_components"
            )
        vectorizer = TfidfVectorizer(tokenizer=_tokens, token_pattern=None, stop_words=_stop_words(stop_words))
        svd = TruncatedSVD(n_components, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Your stop_words may be inconsistent")
            try:
                weights = vectorizer.fit_transform(Bar(texts, desc="TF-IDF", unit="doc", delay=2))
            except ValueError as error:
                raise ClustererError(f"the documents hold no words but stop words and numbers ({error})") from None
        if weights.shape[1] < n_components:
            raise ClustererError(
                f"{weights.shape[1]} different words are too few for {n_components} components: "
                "take more documents or lower clusterer.n_components"
            )
        with threadpool_limits(1, "blas"):  # several threads add up in another order: a model for each number of cores
            vectors = svd.fit_transform(weights)
        mean = scale = None
        if normalizer == "l2":
            vectors = normalize(vectors)
        else:
            scaler = StandardScaler().fit(vectors)
            vectors = scaler.transform(vectors)
            mean, scale = scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)
        vectors = vectors.astype(np.float32)
        centres, assignment = balanced_kmeans(vectors, n_clusters, seed)
        nearest = np.argmin([((vectors - centre) ** 2).sum(axis=1) for centre in centres], axis=0)
        return cls(
            vectorizer.get_feature_names_out().tolist(),
            vectorizer.idf_,
            np.ascontiguousarray(svd.components_.T, dtype=np.float32),
            centres,
            mean=mean,
            scale=scale,
            facts={
                "normalizer": normalizer,
                "stop_words": stop_words,
                "seed": seed,
                "train_sizes": np.bincount(assignment, minlength=n_clusters).tolist(),
                "nearest_sizes": np.bincount(nearest, minlength=n_clusters).tolist(),
            },
        )

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
        counts = collections.Counter(map(self._column, _words(_checked(text).lower())))
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

    @classmethod
    def from_pickles(cls, path_or_url: Path | str, sha256: tuple[str, str] | None = None) -> Clusterer:
        """Read c-BTM's published ``tfidf.pkl`` and ``kmeans.pkl`` without running what is in them.

        Parameters
        ----------
        path_or_url : Path or str
            Directory or URL prefix of the two files, e.g.
            ``https://dl.fbaipublicfiles.com/cbtm/clusterers/c4/8``.
        sha256 : (str, str), optional
            Expected hashes of ``tfidf.pkl`` and ``kmeans.pkl``.

        Raises
        ------
        ClustererError
            If a file is missing, has another hash, is truncated, names anything outside the allow-list, or is not
            c-BTM's pipeline.
        """
        try:
            published = pickles.read(str(path_or_url), sha256)
            return cls(**published._asdict(), facts={"normalizer": "l2", "source": str(path_or_url)})
        except pickles.PickleError as error:
            raise ClustererError(str(error)) from error
        except ClustererError as error:
            raise ClustererError(f"{path_or_url}: {error}") from None


def are_numbers(array: npt.NDArray[Any], above_zero: bool = False) -> bool:
    """Whether `array` holds at least one float and finite ones only; without a copy: it may be memory-mapped."""
    if array.dtype.kind != "f" or not array.size:
        return False
    least, most = array.min(), array.max()  # NaN if one of the values is
    return bool(np.isfinite(least) and np.isfinite(most) and (least > 0 or not above_zero))


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise ClustererError(f"a text must be a str, got {type(text).__name__}")
    return text


def _tokens(text: str) -> list[str]:
    return [_NUMBER if word[0].isdigit() else word for word in _words(text)]


def _stop_words(name: str) -> list[str]:
    """c-BTM's stop words: the named list and the number token, so that numbers are deleted rather than kept."""
    if name == "sklearn":
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        return [*sorted(ENGLISH_STOP_WORDS), _NUMBER]
    if name == "nltk":
        import nltk

        try:
            nltk.data.find("corpora/stopwords")
        except LookupError:
            if not nltk.download("stopwords", quiet=True):
                raise ClustererError(
                    "cannot download NLTK's stop words; connect to the internet once "
                    "(python -m nltk.downloader stopwords) or set clusterer.stop_words=sklearn"
                ) from None
        return [*nltk.corpus.stopwords.words("english"), _NUMBER]
    raise ClustererError(f"stop_words must be 'sklearn' or 'nltk', not {name!r}")


# --- balanced k-means -------------------------------------------------------------------------------------------


def balanced_kmeans(vectors: Floats, n_clusters: int, seed: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """c-BTM's balanced k-means: Lloyd's algorithm in which every cluster gets an equal share of each batch.

    As in c-BTM, the rows are split into batches of at least 50,000 that each start from the previous one's centres and
    replace them; at most 20 iterations per batch, fewer once the centres' summed shift, squared, is below 1e-3.

    Parameters
    ----------
    vectors : float32 array (n, d)
    n_clusters : int
    seed : int
        Draws the rows that are the first centres.

    Returns
    -------
    centres : float32 array (k, d)
    assignment : int array (n,)
        In every batch the cluster sizes differ by at most one.
    """
    import torch

    from erlib.machine.progress import Bar

    batches = torch.tensor_split(torch.from_numpy(vectors), max(1, len(vectors) // BATCH_DOCUMENTS))
    first = np.random.default_rng(seed).choice(len(batches[0]), n_clusters, replace=False)
    centres = batches[0][first]
    assignment = []
    for number, batch in enumerate(batches, 1):
        for _ in Bar(range(ITERATIONS), desc=f"balanced k-means {number}/{len(batches)}", delay=2, leave=False):
            # Squared, and from differences: |x|^2 - 2xc + |c|^2 would lose the small distances to rounding.
            distances = torch.stack([((batch - centre) ** 2).sum(dim=1) for centre in centres])
            clusters = balanced_assignment(distances)
            previous = centres
            centres = torch.stack([batch[clusters == i].mean(dim=0) for i in range(n_clusters)])
            if (centres - previous).norm(dim=1).sum() ** 2 < TOLERANCE:
                break
        assignment.append(clusters)
    return centres.numpy(), torch.cat(assignment).numpy()


def balanced_assignment(distances: torch.Tensor, max_rounds: int = 1000) -> torch.Tensor:
    """Assign documents to clusters of equal size at a near-minimal total distance, by auction.

    The auction is c-BTM's (after BASE layers): in each round every cluster bids for the documents that it wants most,
    up to its capacity, and the highest bid raises a document's price. c-BTM gives each cluster ``n // k`` bids, which
    cannot cover all documents unless k divides n, and then runs for a thousand rounds and puts the rest into cluster 0.
    Here the capacities add up to n: the clusters nearest to most documents take the remainder, one each.

    Parameters
    ----------
    distances : float tensor (k, n)
    max_rounds : int
        After this many rounds the documents still contested are placed greedily.

    Returns
    -------
    int tensor (n,)
        Cluster of each document; every cluster has ``floor(n / k)`` or ``ceil(n / k)`` of them.
    """
    import torch

    k, n = distances.shape
    scores = -distances
    demand = torch.bincount(distances.argmin(dim=0), minlength=k)
    capacity = torch.full((k,), n // k)
    capacity[demand.argsort(descending=True, stable=True)[: n % k]] += 1
    if k == 1:
        return torch.zeros(n, dtype=torch.int64)
    epsilon = max(1e-4, float(scores.max() - scores.min()) / 50)
    documents = torch.arange(n)
    prices = torch.zeros(n)
    wanted = torch.arange(int(capacity.max()))[None, :] < capacity[:, None]
    held = None
    for round_number in range(max_rounds):
        best, order = (scores - prices).topk(int(capacity.max()) + 1, dim=1)
        margins = best[:, :-1] - best.gather(1, capacity[:, None]) + epsilon
        bids = torch.zeros(k, n).scatter_(1, order[:, :-1], torch.where(wanted, margins, 0.0))
        if held is not None and round_number < 100:
            # A winner keeps its document at the least bid unless another cluster bids for it.
            bids[held] = epsilon
        high, winner = bids.max(dim=0)
        sold = high > 0
        if bool(sold.all()):
            break
        prices += high
        held = (winner[sold], documents[sold])
    return _settle(distances, torch.where(sold, winner, -1), capacity)


def _settle(distances: torch.Tensor, clusters: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """Place what the auction left without a cluster, or beyond a cluster's capacity, at the least extra distance."""
    import torch

    clusters = clusters.clone()
    for i, size in enumerate(capacity.tolist()):
        members = (clusters == i).nonzero().squeeze(1)
        nearest_first = members[distances[i, members].argsort(stable=True)]
        clusters[nearest_first[size:]] = -1
    room = capacity - torch.bincount(clusters[clusters >= 0], minlength=len(capacity))
    for document in (clusters < 0).nonzero().squeeze(1).tolist():
        clusters[document] = torch.where(room > 0, distances[:, document], float("inf")).argmin()
        room[clusters[document]] -= 1
    return clusters


# --- a profile's clusterer, and how good it is ------------------------------------------------------------------


def build(profile: config.Profile) -> Path:
    """Fit or convert the profile's clusterer, unless the same one is in the cache.

    Returns
    -------
    Path
        Directory for :meth:`Clusterer.load`; its name is the content hash of corpus, settings, seed and code.

    Raises
    ------
    ClustererError, corpus.CorpusError
    """
    from erlib.machine.progress import say
    from erlib.workload import corpus

    settings = profile.clusterer
    code = [Path(__file__), Path(pickles.__file__)] if settings.pickles else [Path(__file__)]
    if settings.pickles:
        source = settings.pickles
        local = [path for name in pickles.FILES if (path := Path(source) / name).is_file()]
        digest = cache.digest(*code, settings.model_dump(mode="json"), *local)
        train = None
    else:
        train = corpus.load(profile.corpus, profile.seed, "train")
        source = f"{len(train.texts)} documents of {train.name}"
        # NLTK's list is downloaded, whatever version there is.
        words = _stop_words("nltk") if settings.stop_words == "nltk" else []
        digest = cache.digest(*code, train.sha, settings.model_dump(mode="json"), profile.seed, *words)
    directory = paths.CACHE / "clusterers" / digest
    if cache.found(directory, "clusterer") and (kept := cache.recalled(directory, Clusterer.load, "clusterer")):
        say(f"clusterer: reused {digest} ({source}, same settings and code)")
        _warn(kept)
        return directory
    print(f"clusterer: making {digest} from {source} (none with these settings, code and seed yet)")
    if train is None:
        model = Clusterer.from_pickles(source, settings.pickles_sha256)
        if model.n_clusters != settings.n_clusters:
            raise ClustererError(f"{source} has {model.n_clusters} clusters; set clusterer.n_clusters to that")
    else:
        options = settings.model_dump(exclude={"pickles", "pickles_sha256"})
        model = Clusterer.fit(train.texts, seed=profile.seed, **options)
    with cache.building(directory) as partial:
        model.save(partial)
        shutil.rmtree(directory, ignore_errors=True)  # where one was that cannot be read
    _warn(model)
    return directory


def _warn(model: Clusterer) -> None:
    """Say so if the training documents did not tell the clusters apart, as when all of them are alike."""
    unused = model.facts.get("nearest_sizes", []).count(0)
    if unused:
        print(
            f"clusterer: warning: {unused} of {model.n_clusters} clusters are nearest to no training document: their "
            "experts will hardly be asked: take documents that differ more, or fewer clusters"
        )


def evaluate(clusters: npt.NDArray[np.int64], n_clusters: int, labels: Sequence[int] | None = None) -> dict[str, float]:
    """How evenly and how purely `clusters` fall.

    Parameters
    ----------
    clusters : int array (n,)
    n_clusters : int
    labels : sequence of int, length n, optional
        True topics; documents without one (negative) count for the sizes only.

    Returns
    -------
    dict
        ``smallest``, ``largest``: sizes over the mean size (1 is perfect balance). With labels also ``nmi``
        (normalised mutual information) and ``purity``, the share of documents whose topic is their cluster's most
        frequent one; with more topics than clusters it cannot reach 1.
    """
    sizes = np.bincount(clusters, minlength=n_clusters) / (len(clusters) / n_clusters)
    result = {"smallest": float(sizes.min()), "largest": float(sizes.max())}
    known = np.asarray(labels if labels is not None else []) >= 0
    if known.any():
        from sklearn.metrics import normalized_mutual_info_score
        from sklearn.metrics.cluster import contingency_matrix

        topics, found = np.asarray(labels)[known], clusters[known]
        result["nmi"] = float(normalized_mutual_info_score(topics, found))
        result["purity"] = float(contingency_matrix(topics, found).max(axis=0).sum() / len(found))
    return result


def compare_normalizers(profile: config.Profile) -> pd.DataFrame:
    """c-BTM's row-wise L2 beside the papers' standardisation: held-out balance and agreement with the topics.

    Returns
    -------
    pandas.DataFrame
        One row per normalizer; columns of :func:`evaluate`.
    """
    import pandas as pd

    from erlib.workload import corpus

    held_out = corpus.load(profile.corpus, profile.seed, "holdout")
    rows = {}
    for normalizer in ("l2", "standard"):
        settings = profile.clusterer.model_copy(update={"normalizer": normalizer, "pickles": None})
        model = Clusterer.load(build(profile.model_copy(update={"clusterer": settings})))
        rows[normalizer] = evaluate(model.predict(held_out.texts), model.n_clusters, held_out.labels)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("normalizer")


def map_2d(model: Clusterer, texts: Sequence[str], sample: int = 1500, seed: int = 0) -> pd.DataFrame:
    """A sample of `texts` in the plane, neighbours in the router's space kept together (t-SNE): paper 1's Fig. 1 dots.

    Returns
    -------
    pandas.DataFrame
        Columns ``x``, ``y`` (no unit) and ``cluster``; at most `sample` rows.
    """
    import pandas as pd
    from sklearn.manifold import TSNE

    chosen = np.random.default_rng(seed).permutation(len(texts))[:sample]
    vectors = model.transform([texts[i] for i in chosen])
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    x, y = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(vectors).T
    return pd.DataFrame({"x": x, "y": y, "cluster": [model._nearest(row) for row in vectors]})
