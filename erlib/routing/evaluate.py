"""How good a clusterer is: balance, agreement with topics, a map in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from erlib.routing.building import build_clusterer
from erlib.routing.clusterer import Clusterer
from erlib.workload import corpus

if TYPE_CHECKING:
    import pandas as pd

    from erlib import config


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
    held_out = corpus.load_corpus(profile.corpus, profile.seed, "holdout")
    rows = {}
    for normalizer in ("l2", "standard"):
        settings = profile.clusterer.model_copy(update={"normalizer": normalizer, "pickles": None})
        model = Clusterer.load(build_clusterer(profile.model_copy(update={"clusterer": settings})))
        rows[normalizer] = evaluate(model.predict(held_out.texts), model.n_clusters, held_out.labels)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("normalizer")


def map_2d(model: Clusterer, texts: Sequence[str], sample: int = 1500, seed: int = 0) -> pd.DataFrame:
    """A sample of `texts` in the plane, neighbours in the router's space kept together (t-SNE): paper 1's Fig. 1 dots.

    Returns
    -------
    pandas.DataFrame
        Columns ``x``, ``y`` (no unit) and ``cluster``; at most `sample` rows.
    """
    chosen = np.random.default_rng(seed).permutation(len(texts))[:sample]
    vectors = model.transform([texts[i] for i in chosen])
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    x, y = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(vectors).T
    return pd.DataFrame({"x": x, "y": y, "cluster": [model._nearest(row) for row in vectors]})
