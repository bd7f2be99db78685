"""c-BTM's fit: TF-IDF, truncated SVD and balanced k-means (papers, section III-A)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import nltk
import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.preprocessing import StandardScaler, normalize
from threadpoolctl import threadpool_limits

from erlib.machine.progress import Bar
from erlib.routing import pickles
from erlib.routing.clusterer import NUMBER, Clusterer, ClustererError, Floats, checked, words_of

BATCH_DOCUMENTS = 50_000

ITERATIONS = 20

TOLERANCE = 1e-3


def stop_words_of(name: str) -> list[str]:
    """c-BTM's stop words: the named list and the number token, so that numbers are deleted rather than kept."""
    if name == "sklearn":
        return [*sorted(ENGLISH_STOP_WORDS), NUMBER]
    if name == "nltk":
        try:
            nltk.data.find("corpora/stopwords")
        except LookupError:
            if not nltk.download("stopwords", quiet=True):
                raise ClustererError(
                    "cannot download NLTK's stop words; connect to the internet once "
                    "(python -m nltk.downloader stopwords) or set clusterer.stop_words=sklearn"
                ) from None
        return [*nltk.corpus.stopwords.words("english"), NUMBER]
    raise ClustererError(f"stop_words must be 'sklearn' or 'nltk', not {name!r}")


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


def from_pickles(path_or_url: Path | str, sha256: tuple[str, str] | None = None) -> Clusterer:
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
        return Clusterer(**published._asdict(), facts={"normalizer": "l2", "source": str(path_or_url)})
    except pickles.PickleError as error:
        raise ClustererError(str(error)) from error
    except ClustererError as error:
        raise ClustererError(f"{path_or_url}: {error}") from None


def _enough_texts(texts: Sequence[str], n_clusters: int, n_components: int) -> list[str]:
    """Those that are not empty, if they are enough."""
    if n_clusters < 1 or n_components < 1:
        raise ClustererError("n_clusters and n_components must be at least 1")
    found = [text for text in map(checked, texts) if text.strip()]
    if len(found) < max(n_clusters, n_components):
        raise ClustererError(
            f"{len(found)} non-empty documents are too few for {n_clusters} clusters of {n_components} components: "
            "take more documents or lower clusterer.n_clusters and clusterer.n_components"
        )
    return found


def _svd_of_tfidf(
    texts: Sequence[str], n_components: int, stop_words: str, seed: int
) -> tuple[TfidfVectorizer, TruncatedSVD, npt.NDArray[np.float64]]:
    """Both, fitted, and the documents' vectors (n, d)."""
    vectorizer = TfidfVectorizer(tokenizer=words_of, token_pattern=None, stop_words=stop_words_of(stop_words))
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
    return vectorizer, svd, vectors


def fit(
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

    texts = _enough_texts(texts, n_clusters, n_components)
    if normalizer not in ("l2", "standard"):
        raise ClustererError(f"normalizer must be 'l2' or 'standard', not {normalizer!r}")
    vectorizer, svd, vectors = _svd_of_tfidf(texts, n_components, stop_words, seed)
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
    return Clusterer(
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
