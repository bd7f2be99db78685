"""c-BTM's published clusterer, read without running what is in its pickles.

A pickle can call anything. This reader knows an allow-list: scikit-learn's, scipy's and c-BTM's classes become empty
shells that only keep their attributes, arrays and tensors come to the CPU, and everything else is refused. What is
allowed can still be put together so that it takes all memory, all time or the whole stack: the reader is a process of
its own, with as much of them as honest files of that size need.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import requests

if TYPE_CHECKING:
    import torch
from erlib.machine.progress import Bar

FILES = ("tfidf.pkl", "kmeans.pkl")
MOST_BYTES = 4 << 30
"""What is downloaded of a file; c-BTM's are smaller."""

_REFUSED = 3  # exit status of a reader that says why in the last line of its standard output
_ENDS: dict[int, str] = {
    signal.SIGXCPU: "takes more time to read than files of its size need",
    signal.SIGSEGV: "is nested so deeply that its reader crashes",
}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # each reserves memory


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
        If a file is missing, has another hash, is truncated, names anything outside the allow-list, takes more time or
        memory than its size explains, or is not c-BTM's pipeline.
    """
    with tempfile.TemporaryDirectory(prefix="erlib-pickles-") as scratch:
        files = [_fetch(path_or_url, name, Path(scratch)) for name in FILES]
        asked = {"files": files, "sha256": sha256 or (None, None), "source": path_or_url, "target": scratch}
        reader = subprocess.run(
            [sys.executable, "-m", "erlib.routing.pickles"],
            input=json.dumps(asked, default=str), capture_output=True, text=True, encoding="utf-8", check=False,
            env={**os.environ, **_ONE_THREAD, "PYTHONUTF8": "1"},
        )  # fmt: skip
        told = (reader.stdout.splitlines() or [""])[-1]
        if reader.returncode:
            why = _ENDS.get(-reader.returncode, f"ended its reader: {reader.stderr.strip()[-200:]}")
            raise PickleError(told if reader.returncode == _REFUSED else f"{told} of {path_or_url} {why}")
        terms = json.loads((Path(scratch) / "terms.json").read_text(encoding="utf-8"))
        arrays = (np.load(Path(scratch) / f"{name}.npy", allow_pickle=False) for name in Published._fields[1:])
        return Published(terms, *arrays)


# --- inside the reader ------------------------------------------------------------------------------------------


def _read_here(files: list[str], sha256: list[str | None], source: str, target: str) -> None:
    """Unpickle `files` and write what they consist of into `target`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parts = []
    for name, file, expected in zip(FILES, files, sha256, strict=True):
        print(name, flush=True)  # the last that is known of a reader that crashes
        blob = Path(file).read_bytes()
        found = hashlib.sha256(blob).hexdigest()
        if expected is not None and found != expected.lower():
            raise PickleError(f"{name} of {source} has sha256 {found}, expected {expected}; not read")
        if b"torch" in blob:
            import torch  # noqa: F401, PLC0415  (before there are limits: its libraries take gigabytes of addresses)
        with _limited(len(blob)):
            parts.append(_unpickle(blob, name))
    with _limited(sum(Path(file).stat().st_size for file in files)):
        try:
            published = _arrays(parts[0], parts[1], source)
        except Exception as error:  # parts that are no c-BTM pipeline can raise anything
            raise PickleError(f"{source} does not hold c-BTM's pipeline: {error!r}") from None
        Path(target, "terms.json").write_text(json.dumps(published.terms), encoding="utf-8")
        for array, value in list(published._asdict().items())[1:]:
            np.save(Path(target, f"{array}.npy"), value, allow_pickle=False)


@contextmanager
def _limited(size: int) -> Iterator[None]:
    """Leave this process, for a while, so much memory and time as honest files of `size` bytes need at the most."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + (1 << 30) + 8 * size,
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + 10 + size / 1e7),
    }
    before = {what: resource.getrlimit(what) for what in limits}
    for what, most in limits.items():
        hard = before[what][1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    yield
    for what, limit in before.items():
        resource.setrlimit(what, limit)


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

    def storage(data: bytes) -> Any:
        import torch  # noqa: PLC0415  (only where a pickle holds tensors)

        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def tensor(stored: Any, offset: int, size: Any, stride: Any, *_: object) -> torch.Tensor:
        import torch  # noqa: PLC0415

        return torch._utils._rebuild_tensor(stored, offset, size, stride)

    def device(*arguments: Any) -> torch.device:
        import torch  # noqa: PLC0415

        return torch.device(*arguments)

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
        "torch.device": device,
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
    except MemoryError:
        raise PickleError(f"{name} takes more memory to read than files of its size need") from None
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


# --- getting the files ------------------------------------------------------------------------------------------


def _fetch(prefix: str, name: str, scratch: Path) -> Path:
    """The file `name` of `prefix`, downloaded into `scratch` if that is a URL."""
    if not prefix.startswith(("http://", "https://")):
        path = Path(prefix) / name
        if not path.is_file():
            raise PickleError(f"no {path}; clusterer.pickles must be a directory or URL with tfidf.pkl, kmeans.pkl")
        return path
    url, path = f"{prefix.rstrip('/')}/{name}", scratch / name
    try:
        with requests.get(url, stream=True, timeout=20) as response, path.open("wb") as file:
            response.raise_for_status()
            total = int(response.headers.get("content-length", 0))
            with Bar(total=total, desc=name, unit="B", unit_scale=True, delay=2) as progress:
                for chunk in response.iter_content(1 << 20):
                    progress.update(file.write(chunk))
                    if file.tell() > MOST_BYTES:
                        raise PickleError(f"{url} is larger than {MOST_BYTES:,} bytes, which c-BTM's files are not")
    except requests.RequestException as error:
        raise PickleError(f"cannot download {url}: {error}") from error
    return path


def _main() -> int:
    try:
        _read_here(**json.load(sys.stdin))
    except PickleError as error:
        print(" ".join(str(error).split()))
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
