"""c-BTM's published clusterer, read without running what is in its pickles.

A pickle can call anything. This reader knows an allow-list: scikit-learn's, scipy's and c-BTM's classes become empty
shells that only keep their attributes, arrays and tensors come to the CPU, and everything else is refused.
"""

from __future__ import annotations

import collections
import hashlib
import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FILES = ("tfidf.pkl", "kmeans.pkl")


class PickleError(ValueError):
    """The files cannot be had, are not what they should be, or want something that is not allowed."""


class Published(NamedTuple):
    """What a clusterer consists of: V terms, idf (V,), components (V, dimensions), centres (k, dimensions)."""

    terms: list[str]
    idf: npt.NDArray[np.float64]
    components: npt.NDArray[np.float32]
    centres: npt.NDArray[np.float32]


def read(path_or_url: str, sha256: tuple[str, str] | None = None) -> Published:
    """Read ``tfidf.pkl`` and ``kmeans.pkl`` from a directory or below a URL.

    Parameters
    ----------
    path_or_url : str
        Directory or URL prefix of the two files.
    sha256 : (str, str), optional
        Their expected hashes.

    Raises
    ------
    PickleError
        If a file is missing, has another hash, is truncated, names anything outside the allow-list, or is not c-BTM's
        pipeline.
    """
    blobs = [_fetch(path_or_url, name) for name in FILES]
    for name, blob, expected in zip(FILES, blobs, sha256 or (None, None), strict=True):
        found = hashlib.sha256(blob).hexdigest()
        if expected is not None and found != expected.lower():
            raise PickleError(f"{name} of {path_or_url} has sha256 {found}, expected {expected}; not read")
    pipeline, kmeans = (_unpickle(blob, name) for name, blob in zip(FILES, blobs, strict=True))
    try:
        return _arrays(pipeline, kmeans, path_or_url)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise PickleError(f"{path_or_url} does not hold c-BTM's pipeline: {error!r}") from None


class _Shell:
    """Stands for a class of scikit-learn, scipy or c-BTM: keeps the pickled attributes and runs nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("an object's state is not a dict")
        self.__dict__.update(state)


_SHELLS = {
    "__main__.NumberNormalizingVectorizer",
    "metaseq.scripts.train_clusterer.NumberNormalizingVectorizer",
    "sklearn.pipeline.Pipeline",
    "sklearn.feature_extraction.text.TfidfTransformer",
    "sklearn.decomposition._truncated_svd.TruncatedSVD",
    "sklearn.preprocessing._data.Normalizer",
    "scipy.sparse._csr.csr_matrix",
    "scipy.sparse.csr.csr_matrix",
    "scipy.sparse._dia.dia_matrix",
    "scipy.sparse.dia.dia_matrix",
    "kmeans_pytorch.KMeans",
}


def _unpickle(blob: bytes, name: str) -> Any:
    """Unpickle with an allow-list; sklearn's classes become shells, CUDA tensors come to the CPU."""
    import torch

    def storage(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def tensor(stored: Any, offset: int, size: Any, stride: Any, *_: object) -> torch.Tensor:
        return torch._utils._rebuild_tensor(stored, offset, size, stride)

    array, scalar = (empty.__reduce__()[0] for empty in (np.zeros(0), np.float64(0)))
    allowed: dict[str, Any] = {
        "numpy.core.multiarray._reconstruct": array,
        "numpy._core.multiarray._reconstruct": array,
        "numpy.core.multiarray.scalar": scalar,
        "numpy._core.multiarray.scalar": scalar,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy.float64": np.float64,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch.storage._load_from_bytes": storage,
        "torch.device": torch.device,
        "collections.OrderedDict": collections.OrderedDict,
    }

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, attribute: str) -> Any:
            full = f"{module}.{attribute}"
            if full in _SHELLS:
                return type(attribute, (_Shell,), {})
            if full not in allowed:
                raise PickleError(f"{name} wants {full}, which c-BTM's pickles do not contain; it is not read")
            return allowed[full]

    try:
        return Reader(io.BytesIO(blob)).load()
    except PickleError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise PickleError(f"{name} is damaged or not a pickle ({type(error).__name__}: {error})") from error


def _arrays(pipeline: Any, kmeans: Any, source: str) -> Published:
    steps = dict(pipeline.steps)
    vectorizer, svd, normalizer = steps["tfidf"], steps["svd"], steps["normalizer"]
    transformer = vectorizer._tfidf
    expected = {"lowercase": True, "ngram_range": (1, 1), "analyzer": "word", "binary": False, "strip_accents": None}
    different = {name for name, value in expected.items() if getattr(vectorizer, name) != value}
    different |= {"norm"} if (transformer.norm, normalizer.norm) != ("l2", "l2") else set()
    different |= {"sublinear_tf"} if transformer.sublinear_tf or not transformer.use_idf else set()
    different |= {"stop_words"} if "#NUMBER" in vectorizer.vocabulary_ else set()
    if different:
        raise PickleError(f"{source} was made with other options than c-BTM's: {', '.join(sorted(different))}")
    # scikit-learn before 1.5 pickled idf as the diagonal of a sparse matrix; later versions do not look for it there,
    # and would classify without idf, silently.
    idf = vars(transformer)["idf_"] if "idf_" in vars(transformer) else transformer._idf_diag.data.ravel()
    terms = sorted(vectorizer.vocabulary_, key=vectorizer.vocabulary_.__getitem__)
    if [int(vectorizer.vocabulary_[term]) for term in terms] != list(range(len(terms))):
        raise PickleError(f"{source}: the vocabulary's columns are not 0 to {len(terms) - 1}")
    return Published(
        terms,
        np.asarray(idf, dtype=np.float64),
        np.ascontiguousarray(svd.components_.T, dtype=np.float32),
        kmeans.cluster_centers.float().numpy(),
    )


def _fetch(prefix: str, name: str) -> bytes:
    if not prefix.startswith(("http://", "https://")):
        path = Path(prefix) / name
        if not path.is_file():
            raise PickleError(f"no {path}; clusterer.pickles must be a directory or URL with tfidf.pkl, kmeans.pkl")
        return path.read_bytes()
    import requests
    from tqdm import tqdm

    url = f"{prefix.rstrip('/')}/{name}"
    try:
        with requests.get(url, stream=True, timeout=20) as response:
            response.raise_for_status()
            total = int(response.headers.get("content-length", 0))
            blob = bytearray()
            with tqdm(total=total, desc=name, unit="B", unit_scale=True, delay=2) as progress:
                for chunk in response.iter_content(1 << 20):
                    blob += chunk
                    progress.update(len(chunk))
    except requests.RequestException as error:
        raise PickleError(f"cannot download {url}: {error}") from error
    return bytes(blob)
