"""The router as c-BTM publishes it: a pickled scikit-learn pipeline and the nearest centre, at a realistic vocabulary.

It decides like :class:`erlib.routing.clusterer.Clusterer`, whose weights it takes, and is slower for a reason that has
nothing to do with the prompt: c-BTM's pickle holds the components as an array (d, V), ``TruncatedSVD`` multiplies by
its transpose, and scipy copies that into row order first, all of it, for every call. Only a vocabulary of realistic
size shows it. c-BTM's is that of a C4 shard, which our corpus is too small to have; it is filled up with made-up terms.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import sklearn
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from erlib import cache, config, paths, provenance
from erlib.machine.progress import say
from erlib.routing import building
from erlib.routing.clusterer import Clusterer, ClustererError, Floats, Spans

TERMS = 500_000
"""Vocabulary of one C4 shard, c-BTM's training set, by extrapolation: 0.5 to 0.8 million."""

_FILE, _SHA256 = "stock.pkl", "stock.pkl.sha256"
_LENGTH = 8  # of a made-up term


class NumberNormalizingVectorizer(TfidfVectorizer):
    """c-BTM's vectoriser, by the name that its pickles give it."""

    def build_tokenizer(self) -> Callable[[str], list[str]]:
        tokenize = super().build_tokenizer()
        return lambda text: ["#NUMBER" if token[0].isdigit() else token for token in tokenize(text)]


@dataclass(frozen=True)
class Router:
    """Pipeline (``tfidf``, ``svd``, ``normalizer``) and centres, float32 array (k, d)."""

    pipeline: Pipeline
    centres: Floats

    @property
    def n_clusters(self) -> int:
        return len(self.centres)

    def route(self, prompt: str) -> tuple[int, Spans]:
        """Classify one prompt; cluster and spans mean what :meth:`erlib.routing.clusterer.Clusterer.route` means by
        them."""
        vectorizer, svd, normalizer = (step for _, step in self.pipeline.steps)
        start = time.perf_counter_ns()
        weights = vectorizer.transform([prompt])
        vectorised = time.perf_counter_ns()
        vector = normalizer.transform(svd.transform(weights)).astype(np.float32)
        projected = time.perf_counter_ns()
        cluster = int(((self.centres - vector) ** 2).sum(axis=1).argmin())
        return cluster, Spans(vectorised - start, projected - vectorised, time.perf_counter_ns() - projected)

    def save(self, directory: Path) -> None:
        """Pickle it into `directory`, its sha256 beside it."""
        with (directory / _FILE).open("wb") as file:
            pickle.dump(self, file, protocol=pickle.HIGHEST_PROTOCOL)
        (directory / _SHA256).write_text(_sha256(directory / _FILE), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(directory: Path) -> bool:
    try:
        return _sha256(directory / _FILE) == (directory / _SHA256).read_text(encoding="utf-8")
    except OSError:
        return False


def load(directory: Path) -> Router:
    """Unpickle what :meth:`Router.save` wrote.

    Unpickling runs what a file says: use this for directories that :func:`build` made on this machine, and nothing
    else. Downloaded pickles are for :meth:`erlib.routing.training.from_pickles`.

    Raises
    ------
    ClustererError
        If `directory` holds no such file, or another one than was written, or what it holds is no number.
    """
    if not _is_whole(directory):
        raise ClustererError(f"{directory} holds no whole {_FILE}; sklearn_pipeline.build makes one")
    with (directory / _FILE).open("rb") as file:
        router = pickle.load(file)
    vectorizer, svd, normalizer = (step for _, step in router.pipeline.steps)
    row = {"mean": getattr(normalizer, "mean_", None), "scale": getattr(normalizer, "scale_", None)}
    Clusterer([*vectorizer.vocabulary_], vectorizer.idf_, svd.components_.T, router.centres, **row)  # or says why not
    return router


def pipeline(model: Clusterer) -> Pipeline:
    """The weights of `model` in the form in which c-BTM pickles them: float64, one row per component."""
    # Stop words are in no vocabulary. What a list other than scikit-learn's has let in is none.
    stop_words = [*sorted(ENGLISH_STOP_WORDS.difference(model.terms)), "#NUMBER"]
    vectorizer = NumberNormalizingVectorizer(stop_words=stop_words)
    vectorizer.vocabulary_ = {term: column for column, term in enumerate(model.terms)}
    vectorizer.idf_ = np.array(model.idf)
    svd = TruncatedSVD(model.n_components)
    svd.components_ = np.ascontiguousarray(model.components.T, dtype=np.float64)
    normalizer = Normalizer(copy=False)
    if model.mean is not None and model.scale is not None:
        normalizer = StandardScaler()
        normalizer.mean_, normalizer.scale_ = np.array(model.mean), np.array(model.scale)
    return Pipeline([("tfidf", vectorizer), ("svd", svd), ("normalizer", normalizer)])


def padded(model: Clusterer, n_terms: int, seed: int) -> Clusterer:
    """`model` with made-up terms up to a vocabulary of `n_terms`, which change no prompt's cluster.

    Parameters
    ----------
    model : Clusterer
    n_terms : int
        A model that has as many already is returned as it is.
    seed : int
        Draws the made-up terms and the real ones whose weights they get.
    """
    n_made_up = n_terms - len(model.terms)
    if n_made_up <= 0:
        return model
    rng = np.random.default_rng(seed)
    letters = np.unravel_index(rng.choice(26**_LENGTH, n_made_up, replace=False), (26,) * _LENGTH)
    # Capitalised: no prompt can hold one, because prompts are put into lower case.
    made_up = ["".join(word).capitalize() for word in np.array(list(ascii_lowercase))[np.transpose(letters)]]
    terms = [*model.terms, *made_up]
    source = np.concatenate([np.arange(len(model.terms)), rng.integers(len(model.terms), size=n_made_up)])
    # As scikit-learn does, so that a prompt's terms lie as far apart in memory as they would.
    order = sorted(range(n_terms), key=lambda i: terms[i].lower())
    source = source[order]
    return Clusterer(
        [terms[i] for i in order],
        model.idf[source],
        model.components[source],
        model.centres,
        mean=model.mean,
        scale=model.scale,
        facts={**model.facts, "made_up_terms": n_made_up},
    )


def build(profile: config.Profile, n_terms: int = TERMS) -> Path:
    """Fill up and pickle the profile's clusterer, unless the same one is in the cache.

    Returns
    -------
    Path
        Directory for both :func:`load` and :meth:`erlib.routing.clusterer.Clusterer.load`: one model in two forms. Its
        name is the content hash of the clusterer, the number of terms, the seed, scikit-learn's version and this code.

    Raises
    ------
    ClustererError, corpus.CorpusError
    """
    source = building.build_clusterer(profile)
    digest = cache.digest(
        provenance.code_digest("routing/sklearn_pipeline.py"), source.name, n_terms, profile.seed, sklearn.__version__
    )
    directory = paths.CACHE / "stock" / digest
    if cache.found(directory, "stock router") and _is_whole(directory):
        say(f"stock router: reused {digest} ({n_terms:,} terms around clusterer {source.name})")
        return directory
    print(f"stock router: making {digest} ({n_terms:,} terms around clusterer {source.name}; none like it yet)")
    model = padded(Clusterer.load(source), n_terms, profile.seed)
    with cache.building(directory) as partial:
        model.save(partial)
        Router(pipeline(model), np.array(model.centres)).save(partial)
        shutil.rmtree(directory, ignore_errors=True)  # where one was that is damaged
    return directory
