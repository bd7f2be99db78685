"""The router's model against scikit-learn, scipy's exact assignment, c-BTM's file layout, and bad input."""

from __future__ import annotations

import contextlib
import functools
import http.server
import itertools
import os
import pickle
import resource
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import threadpoolctl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from erlib import config, paths
from erlib.routing import building, evaluate, training
from erlib.routing import pickles as reader
from erlib.routing.clusterer import Clusterer, ClustererError
from tests.support import texts

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your stop_words"),  # c-BTM's list holds "#NUMBER", which sklearn splits
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


class NumberNormalizingVectorizer(TfidfVectorizer):
    """The vectoriser as c-BTM subclasses it, for comparison and for pickles in its layout."""

    def build_tokenizer(self) -> Callable[[str], list[str]]:
        tokenize = super().build_tokenizer()
        return lambda text: ["#NUMBER" if token[0].isdigit() else token for token in tokenize(text)]


def plain_pipeline(documents: list[str], last: Any, n_components: int = 100) -> Pipeline:
    stop_words = [*ENGLISH_STOP_WORDS, "#NUMBER"]
    pipeline = Pipeline(
        [
            ("tfidf", NumberNormalizingVectorizer(stop_words=stop_words)),
            ("svd", TruncatedSVD(n_components, random_state=0)),
            ("normalizer", last),
        ]
    )
    return pipeline.fit(documents)


@pytest.fixture(scope="module")
def c4() -> list[str]:
    return texts.c4()


@pytest.fixture(scope="module")
def c4_model(c4: list[str]) -> Clusterer:
    return training.fit(c4[:1999])


@pytest.fixture(scope="module")
def small() -> Clusterer:
    documents, _ = texts.topical(203)
    return training.fit(documents, n_clusters=4, n_components=8)


# --- c-BTM's pipeline to the letter ---


def test_matches_plain_sklearn_on_c4(c4: list[str], c4_model: Clusterer) -> None:
    reference = plain_pipeline(c4[:1999], Normalizer(copy=False))
    assert c4_model.terms == reference["tfidf"].get_feature_names_out().tolist()
    assert not [term for term in c4_model.terms if term[0].isdigit() or term in ENGLISH_STOP_WORDS]
    probes = [
        *c4,
        *(text[:200] for text in c4),
        "",
        "the of and 2019 3rd",
        "IPHONE11 Zürich naïve 日本語 x",
        *c4[:1] * 2,
    ]
    vectors = reference.transform(probes)
    assert np.abs(c4_model.transform(probes) - vectors).max() < 1e-5
    nearest = ((vectors[:, None] - c4_model.centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    assert (c4_model.predict(probes) == nearest).all()


def test_train_sizes_on_c4(c4_model: Clusterer) -> None:
    assert sorted(c4_model.facts["train_sizes"]) == [249] + [250] * 7


def test_standard_normalizer_matches_sklearn() -> None:
    documents, _ = texts.topical(203)
    model = training.fit(documents, n_clusters=4, n_components=8, normalizer="standard")
    reference = plain_pipeline(documents, StandardScaler(), n_components=8)
    np.testing.assert_allclose(model.transform([*documents, ""]), reference.transform([*documents, ""]), atol=1e-5)
    assert len(model.top_terms(3)) == 4


def test_newsgroups_quality() -> None:
    train, test = texts.newsgroups("train"), texts.newsgroups("holdout")
    model = training.fit(train.texts)
    assert set(model.facts["train_sizes"]) <= {1411, 1412}
    assert sum(model.facts["train_sizes"]) == 11293
    result = evaluate.evaluate(model.predict(test.texts), 8, test.labels)
    assert result["nmi"] >= 0.42
    assert result["purity"] >= 0.30
    assert result["largest"] < 2


def test_topics_become_clusters() -> None:
    documents, labels = texts.topical(400)
    unseen, unseen_labels = texts.topical(200, seed=1)
    model = training.fit(documents, n_clusters=4, n_components=8)
    result = evaluate.evaluate(model.predict(unseen), 4, unseen_labels)
    assert result["nmi"] > 0.95
    assert result["purity"] > 0.98
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    assert evaluate.evaluate(model.predict(documents), 4, shuffled)["nmi"] < 0.1
    for words in model.top_terms(5):
        assert len({word[5] for word in words if word.startswith("topic")}) == 1


def test_same_seed_same_model() -> None:
    documents, _ = texts.topical(203)
    fits = [training.fit(documents, n_clusters=4, n_components=8, seed=seed) for seed in (0, 0, 1)]
    assert fits[0].digest == fits[1].digest != fits[2].digest


def test_batches_replace_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH_DOCUMENTS", 100)
    documents, _ = texts.topical(205)
    sizes = training.fit(documents, n_clusters=4, n_components=8).facts["train_sizes"]
    assert sum(sizes) == 205
    assert max(sizes) - min(sizes) <= 2  # at most one per batch


# --- the balanced assignment ---


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 9), extra=st.integers(0, 60), levels=st.integers(0, 4), seed=st.integers(0, 999))
def test_balanced_assignment_is_balanced(k: int, extra: int, levels: int, seed: int) -> None:
    n = k + extra
    distances = torch.rand(k, n, generator=torch.Generator().manual_seed(seed))
    if levels:  # many equal distances: the auction's hard case
        distances = (distances * levels).round()
    sizes = np.bincount(training.balanced_assignment(distances).numpy(), minlength=k)
    assert set(sizes) <= {n // k, -(-n // k)}
    assert sizes.sum() == n


@pytest.mark.parametrize("n", [800, 801, 807])
def test_balanced_assignment_is_nearly_optimal(n: int) -> None:
    documents, _ = texts.topical(n, topics=11)
    vectors = training.fit(documents, n_components=20).transform(documents)
    distances = ((vectors[None] - vectors[:8, None]) ** 2).sum(axis=2)
    clusters = training.balanced_assignment(torch.from_numpy(distances)).numpy()
    slots = np.repeat(distances, np.bincount(clusters), axis=0)
    best = slots[linear_sum_assignment(slots)].sum()
    assert distances[clusters, np.arange(n)].sum() <= 1.005 * best


def test_auction_that_runs_out_of_rounds_is_settled() -> None:
    distances = torch.rand(5, 83, generator=torch.Generator().manual_seed(0))
    sizes = torch.bincount(training.balanced_assignment(distances, max_rounds=1), minlength=5)
    assert sorted(sizes.tolist()) == [16, 16, 17, 17, 17]


# --- classification ---


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(st.sampled_from([*texts.COMMON, "topicaa", "topicbb", "the", "2019", "unseen", "é"]), max_size=40)
)
def test_case_and_batching_do_not_matter(small: Clusterer, words: list[str]) -> None:
    text = " ".join(words)
    batch = small.predict([text, "topiccc", text.upper(), text.title()])
    assert batch[0] == batch[2] == batch[3] == small.route(text)[0] == small.predict([text])[0]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=300))
def test_any_text_has_a_cluster(small: Clusterer, text: str) -> None:
    cluster, spans = small.route(text)
    assert 0 <= cluster < 4
    assert min(spans) >= 0
    assert np.isfinite(small.transform([text])).all()


def test_unknown_words_go_to_the_zero_vectors_cluster(small: Clusterer) -> None:
    expected = (small.centres**2).sum(axis=1).argmin()
    assert (small.predict(["", "   ", "the and of", "1984 3rd", "zzzz qqqq", "\x00", "\ud800"]) == expected).all()
    assert small.predict([]).shape == (0,)
    assert small.transform([]).shape == (0, 8)


def test_huge_prompts(c4: list[str], c4_model: Clusterer) -> None:
    huge = " ".join(c4)[:1_000_000]
    cluster, spans = c4_model.route(huge)
    assert cluster == c4_model.route(huge.upper())[0]
    assert sum(spans) < 2e9
    assert c4_model.route("a" * 1_000_000)[0] == c4_model.route("")[0]


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["list"]])
def test_wrong_types(small: Clusterer, text: Any) -> None:
    with pytest.raises(ClustererError, match="must be a str"):
        small.route(text)
    with pytest.raises(ClustererError, match="must be a str"):
        small.predict([text])
    with pytest.raises(ClustererError, match="must be a str"):
        training.fit([text] * 200)
    with pytest.raises(ClustererError, match="sequence of texts"):
        small.predict("one text")


def test_bad_fits() -> None:
    documents, _ = texts.topical(203)
    with pytest.raises(ClustererError, match="3 non-empty documents are too few for 8 clusters"):
        training.fit([*documents[:3], "", "  "], n_components=2)
    with pytest.raises(ClustererError, match="different words are too few for 200 components"):
        training.fit(documents, n_components=200)
    with pytest.raises(ClustererError, match="no words but stop words"):
        training.fit(["the 2019 of and"] * 200)
    with pytest.raises(ClustererError, match="normalizer must be"):
        training.fit(documents, normalizer="minmax")
    with pytest.raises(ClustererError, match="stop_words must be"):
        training.fit(documents, stop_words="spacy")
    with pytest.raises(ClustererError, match="at least 1"):
        training.fit(documents, n_clusters=0)


def test_as_many_documents_as_clusters() -> None:
    documents, _ = texts.topical(4)
    model = training.fit(documents, n_clusters=4, n_components=3)
    assert model.facts["train_sizes"] == [1, 1, 1, 1]


def test_nltk_stop_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    documents = [f"{text} zwischen shan't" for text in texts.topical(50)[0]]
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    with pytest.raises(ClustererError, match=r"clusterer\.stop_words=sklearn"):
        training.fit(documents, n_clusters=4, n_components=3, stop_words="nltk")

    def download(*_: object, **__: object) -> bool:
        (tmp_path / "corpora" / "stopwords").mkdir(parents=True)
        (tmp_path / "corpora" / "stopwords" / "english").write_text("the\nzwischen\n")
        return True

    monkeypatch.setattr(nltk, "download", download)
    model = training.fit(documents, n_clusters=4, n_components=3, stop_words="nltk")
    assert "zwischen" not in model.terms


# --- storage ---


@pytest.mark.parametrize("normalizer", ["l2", "standard"])
def test_save_and_load(tmp_path: Path, normalizer: str) -> None:
    documents, _ = texts.topical(203)
    model = training.fit(documents, n_clusters=4, n_components=8, normalizer=normalizer)
    model.save(tmp_path / "model")
    loaded = Clusterer.load(tmp_path / "model")
    assert isinstance(loaded.components.base, np.memmap)
    assert loaded.digest == model.digest
    assert loaded.facts == model.facts
    assert (loaded.transform(documents) == model.transform(documents)).all()
    assert not list((tmp_path / "model").glob("*.pkl"))


def test_incomplete_directories_are_refused(small: Clusterer, tmp_path: Path) -> None:
    with pytest.raises(ClustererError, match="build it again"):
        Clusterer.load(tmp_path / "missing")
    for name in ("clusterer.json", "idf.npy", "components.npy", "centres.npy"):
        small.save(tmp_path / name)
        file = tmp_path / name / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ClustererError, match="build it again"):
            Clusterer.load(tmp_path / name)
    small.save(tmp_path / "mixed")
    np.save(tmp_path / "mixed" / "idf.npy", small.idf[:-1])
    with pytest.raises(ClustererError, match="do not fit together"):
        Clusterer.load(tmp_path / "mixed")


def _planted(part: str, array: np.ndarray) -> dict[str, Any]:
    """The parts of a clusterer of two words and clusters, one of them replaced."""
    parts = {
        "idf": np.ones(2),
        "components": np.eye(2, dtype=np.float32),
        "centres": np.eye(2, dtype=np.float32),
        "mean": np.zeros(2, np.float32),
        "scale": np.ones(2, np.float32),
    }
    return {"terms": ["car", "road"], **parts, part: array}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("centres", [[1, 0], [NAN, NAN]]),
        ("centres", [[1, 0], [0, INF]]),
        ("centres", []),
        ("centres", [1, 0]),
        ("components", [[1, 0], [0, NAN]]),
        ("components", [[[1, 0], [0, 1]]]),
        ("idf", [1, NAN]),
        ("idf", [1, 0]),
        ("idf", [-INF, 1]),
        ("mean", [0, NAN]),
        ("scale", [1, 0]),
        ("scale", [[1, 1]]),
    ],
)
def test_parts_that_are_no_numbers_or_do_not_fit_make_no_clusterer(part: str, values: list[Any]) -> None:
    with pytest.raises(ClustererError, match=r"do not fit together|holds what is no number"):
        Clusterer(**_planted(part, np.array(values, np.float32)))
    whole = _planted("idf", np.ones(2))
    for array in (whole[part].astype(object), whole[part].astype(int)):
        with pytest.raises(ClustererError, match=f"{part} of the clusterer holds what is no number"):
            Clusterer(**_planted(part, array))


@pytest.mark.parametrize("terms", [["car", "car"], ["car", 5], ["car"]])
def test_terms_are_different_words(terms: list[Any]) -> None:
    with pytest.raises(ClustererError, match=r"different words|do not fit"):
        Clusterer(**{**_planted("idf", np.ones(2)), "terms": terms})


@pytest.mark.parametrize("part", ["idf", "components", "centres", "mean", "scale"])
def test_a_saved_clusterer_is_loaded_as_it_was_saved_or_not_at_all(tmp_path: Path, part: str) -> None:
    Clusterer(**_planted("idf", np.ones(2))).save(tmp_path)
    saved = np.load(tmp_path / f"{part}.npy")
    np.save(tmp_path / f"{part}.npy", np.full_like(saved, NAN))
    with pytest.raises(ClustererError, match=f"{tmp_path} holds no readable clusterer .{part} of the clusterer"):
        Clusterer.load(tmp_path)
    np.save(tmp_path / f"{part}.npy", saved * 2 + 1)  # numbers, but others
    with pytest.raises(ClustererError, match="not the one that was saved"):
        Clusterer.load(tmp_path)


def test_a_clusterer_without_some_of_its_centres_is_refused(small: Clusterer, tmp_path: Path) -> None:
    small.save(tmp_path)
    np.save(tmp_path / "centres.npy", small.centres[:3])
    with pytest.raises(ClustererError, match="not the one that was saved"):
        Clusterer.load(tmp_path)


def test_the_number_of_cores_makes_no_other_clusterer() -> None:
    words = ["".join(letters) for letters in itertools.product("bcdfghklmnprst", repeat=3)]
    documents = [" ".join(np.random.default_rng(i).choice(words, 40)) for i in range(300)]
    models = []
    for threads in (1, 2, 4):
        with threadpoolctl.threadpool_limits(threads):
            models.append(training.fit(documents))
    assert len({model.digest for model in models}) == 1


def test_gateway_path_imports_numpy_only(small: Clusterer, tmp_path: Path) -> None:
    small.save(tmp_path)
    code = (
        "import sys; from erlib.routing.clusterer import Clusterer; m = Clusterer.load(sys.argv[1]); "
        "m.route('topicaa topicab'); m.predict(['topicbb']); "
        "print([n for n in ('sklearn', 'scipy', 'torch', 'pandas', 'pydantic', 'tqdm') if n in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"


# --- c-BTM's pickles ---


class KMeans:
    def __init__(self, centres: torch.Tensor) -> None:
        self.n_clusters = len(centres)
        self.cluster_centers = centres
        self.device = torch.device("cuda:0")
        self.balanced = True


@pytest.fixture
def pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Pipeline, np.ndarray]]:
    """tfidf.pkl and kmeans.pkl as c-BTM wrote them: old idf layout, ``__main__`` class, centres on a GPU."""
    monkeypatch.setattr(NumberNormalizingVectorizer, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "NumberNormalizingVectorizer", NumberNormalizingVectorizer, False)
    module = types.ModuleType("kmeans_pytorch")
    module.KMeans = KMeans  # type: ignore[attr-defined]
    monkeypatch.setattr(KMeans, "__module__", "kmeans_pytorch")
    monkeypatch.setitem(sys.modules, "kmeans_pytorch", module)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")

    documents, _ = texts.topical(203)
    pipeline = plain_pipeline(documents, Normalizer(copy=False), n_components=8)
    centres = torch.from_numpy(pipeline.transform(documents[:4])).float()
    transformer = pipeline["tfidf"]._tfidf
    idf = transformer.idf_
    del transformer.idf_
    transformer._idf_diag = scipy.sparse.diags(idf, format="csr")
    (tmp_path / "tfidf.pkl").write_bytes(pickle.dumps(pipeline))
    (tmp_path / "kmeans.pkl").write_bytes(pickle.dumps(KMeans(centres)))
    transformer.idf_ = idf
    yield tmp_path, pipeline, centres.numpy()


def test_pickles_route_as_the_pipeline_that_was_pickled(pickles: tuple[Path, Pipeline, np.ndarray]) -> None:
    directory, pipeline, centres = pickles
    assert b"cuda:0" in (directory / "kmeans.pkl").read_bytes()
    model = training.from_pickles(directory)
    probes, _ = texts.topical(60, seed=2)
    vectors = pipeline.transform(probes)
    np.testing.assert_allclose(model.transform(probes), vectors, atol=1e-5)
    assert (model.predict(probes) == ((vectors[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)).all()


def test_pickles_hash_and_options(pickles: tuple[Path, Pipeline, np.ndarray]) -> None:
    directory, pipeline, _ = pickles
    with pytest.raises(ClustererError, match=r"tfidf\.pkl .* has sha256"):
        training.from_pickles(directory, sha256=("0" * 64, "0" * 64))
    pipeline["tfidf"].ngram_range = (1, 2)
    pipeline["tfidf"]._tfidf.sublinear_tf = True
    (directory / "tfidf.pkl").write_bytes(pickle.dumps(pipeline))
    with pytest.raises(ClustererError, match="other options than c-BTM's: ngram_range, sublinear_tf"):
        training.from_pickles(directory)
    (directory / "tfidf.pkl").write_bytes(pickle.dumps({"steps": []}))
    with pytest.raises(ClustererError, match="does not hold c-BTM's pipeline"):
        training.from_pickles(directory)
    (directory / "kmeans.pkl").unlink()
    with pytest.raises(ClustererError, match=r"no .*kmeans\.pkl"):
        training.from_pickles(directory)


class _Call:
    """Unpickles to a call, as a malicious pickle does."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _hidden_in_torch(path: Path) -> bytes:
    """The call hidden in the inner pickle of a tensor's storage."""
    return pickle.dumps(_Call(torch.storage._load_from_bytes, pickle.dumps(_Call(Path.touch, path))))


@pytest.mark.parametrize("name", ["tfidf.pkl", "kmeans.pkl"])
def test_malicious_pickles_run_nothing(pickles: tuple[Path, Pipeline, np.ndarray], name: str) -> None:
    directory, _, _ = pickles
    touched = directory / "touched"
    attacks = [
        pickle.dumps(_Call(os.system, f"touch {touched}")),
        pickle.dumps(_Call(eval, f"open({str(touched)!r}, 'w')")),
        pickle.dumps(_Call(getattr, [], "append")),
        pickle.dumps({"steps": [("tfidf", _Call(subprocess.call, ["touch", str(touched)]))]}),
        b"cnumpy.core\nmultiarray.os.system\n(V" + f"touch {touched}".encode() + b"\ntR.",
        _hidden_in_torch(touched),
    ]
    for attack in attacks:
        (directory / name).write_bytes(attack)
        with pytest.raises(ClustererError, match=r"does not|do not contain|damaged"):
            training.from_pickles(directory)
        assert not touched.exists()


def _nested(depth: int, to_hash: bool) -> bytes:
    tuples = b")" + b"\x85" * depth  # (((...),),)
    return b"\x80\x04" + (b"}" + tuples + b"K\x01s." if to_hash else tuples + b".")


def _shared(levels: int) -> bytes:
    """A key of a dict that is 2 ** levels tuples deep down, each level twice the one before."""
    pairs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(levels))
    return b"\x80\x04K\x01\x94" + pairs + b"0}h" + bytes([levels]) + b"K\x01s."


BOMBS = [
    (_nested(500_000, to_hash=True), r"tfidf\.pkl of .* is nested so deeply that its reader crashes"),
    (_nested(500_000, to_hash=False), "does not hold c-BTM's pipeline"),
    (b"\x80\x02K\x01r" + (1 << 28).to_bytes(4, "little") + b".", r"tfidf\.pkl takes more memory"),
    (b"\x80\x04cnumpy\nndarray\n(\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"t\x85R.", "takes more memory"),
    (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.", "takes more memory"),
    pytest.param(_shared(40), r"tfidf\.pkl of .* takes more time", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("bomb", "message"), BOMBS, ids=["deep", "deep unhashed", "put", "array", "bytes", "shared"])
def test_pickles_that_would_take_everything_take_a_reader(tmp_path: Path, bomb: bytes, message: str) -> None:
    (tmp_path / "tfidf.pkl").write_bytes(bomb)
    (tmp_path / "kmeans.pkl").write_bytes(b"N.")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(ClustererError, match=message) as refused:
        training.from_pickles(tmp_path)
    assert "\n" not in str(refused.value)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # kB, of the largest child so far
    assert after <= max(before, 2_000_000)


def test_pickled_numbers_are_checked(pickles: tuple[Path, Pipeline, np.ndarray]) -> None:
    directory, pipeline, _ = pickles
    pipeline["svd"].components_[3, 5] = NAN
    (directory / "tfidf.pkl").write_bytes(pickle.dumps(pipeline))
    with pytest.raises(ClustererError, match=f"{directory}: components of the clusterer holds what is no number"):
        training.from_pickles(directory)


def test_a_download_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 20))

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(reader, "MOST_BYTES", 10 << 20)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClustererError, match="is larger than"):
            training.from_pickles(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_truncated_pickles(pickles: tuple[Path, Pipeline, np.ndarray]) -> None:
    directory, _, _ = pickles
    for name in ("tfidf.pkl", "kmeans.pkl"):
        whole = (directory / name).read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 1):
            (directory / name).write_bytes(whole[:size])
            with pytest.raises(ClustererError, match="damaged or not a pickle"):
                training.from_pickles(directory)
        (directory / name).write_bytes(whole)


def test_pickles_from_a_url(pickles: tuple[Path, Pipeline, np.ndarray]) -> None:
    directory, _, _ = pickles
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert training.from_pickles(url + "/").digest == training.from_pickles(directory).digest
        with pytest.raises(ClustererError, match=r"cannot download .*404"):
            training.from_pickles(f"{url}/c4")
        server.shutdown()
    with pytest.raises(ClustererError, match="cannot download"):
        training.from_pickles(url)


# --- building for a profile ---


def _profile(tmp_path: Path, **clusterer_settings: Any) -> config.Profile:
    documents, _ = texts.topical(400)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in documents))
    settings = {"n_clusters": 4, "n_components": 8, **clusterer_settings}
    overrides = {f"clusterer.{key}": value for key, value in settings.items()}
    return config.load_profile("smoke", {"corpus.name": "jsonl", "corpus.path": str(path), **overrides})


def test_build_is_cached_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    profile = _profile(tmp_path)
    first = building.build_clusterer(profile)
    assert "making" in capsys.readouterr().out
    assert building.build_clusterer(profile) == first
    assert "reused" in capsys.readouterr().out
    assert Clusterer.load(first).n_clusters == 4
    assert building.build_clusterer(profile.model_copy(update={"seed": 1})) != first
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    assert building.build_clusterer(profile) != first


def test_another_version_of_the_nltk_stop_words_makes_another_clusterer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    words = tmp_path / "corpora" / "stopwords" / "english"
    words.parent.mkdir(parents=True)
    built = []
    for version in ("the\n", "the\nzwischen\n", "the\n"):
        nltk.corpus.stopwords._unload() if hasattr(nltk.corpus.stopwords, "_unload") else None
        words.write_text(version)
        built.append(building.build_clusterer(_profile(tmp_path, stop_words="nltk")))
    assert built[0] == built[2] != built[1]


def test_a_damaged_clusterer_in_the_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    profile = _profile(tmp_path)
    made = building.build_clusterer(profile)
    whole = Clusterer.load(made).digest
    centres = np.load(made / "centres.npy")
    np.save(made / "centres.npy", np.where(centres == centres.max(), NAN, centres))  # of the same size
    capsys.readouterr()
    assert Clusterer.load(building.build_clusterer(profile)).digest == whole
    assert "is made again: it cannot be read" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_documents_that_are_all_alike_are_not_told_apart_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    profile = _profile(tmp_path)
    building.build_clusterer(profile)
    assert "warning" not in capsys.readouterr().out
    (text,) = texts.topical(1, words=60)[0]
    (tmp_path / "texts.jsonl").write_text(f'{{"text": "{text}"}}\n' * 100)
    for _ in range(2):  # made, and found
        model = Clusterer.load(building.build_clusterer(profile))
        assert len(set(model.predict([text, "something else", ""]))) < model.n_clusters
        assert "clusterer: warning: 3 of 4 clusters are nearest to no training document" in capsys.readouterr().out


def test_documents_without_a_topic_count_for_the_sizes_only() -> None:
    clusters = np.array([0, 0, 1, 1, 1, 0])
    known = evaluate.evaluate(clusters[:4], 2, [0, 0, 1, 0])
    with_unknown = evaluate.evaluate(clusters, 2, [0, 0, 1, 0, -1, -1])
    assert [with_unknown[name] for name in ("nmi", "purity")] == [known[name] for name in ("nmi", "purity")]
    assert with_unknown["largest"] == 1.0
    assert "nmi" not in evaluate.evaluate(clusters, 2, [-1] * 6)


def test_build_from_pickles(
    pickles: tuple[Path, Pipeline, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    model = Clusterer.load(building.build_clusterer(_profile(tmp_path, pickles=str(pickles[0]))))
    assert model.digest == training.from_pickles(pickles[0]).digest
    with pytest.raises(ClustererError, match="has 4 clusters"):
        building.build_clusterer(_profile(tmp_path, pickles=str(pickles[0]), n_clusters=8, pickles_sha256=None))


def test_compare_normalizers_and_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    profile = _profile(tmp_path)
    table = evaluate.compare_normalizers(profile)
    assert table.index.tolist() == ["l2", "standard"]
    assert (table["largest"] >= 1).all()
    assert (table["smallest"] <= 1).all()
    documents, _ = texts.topical(80)
    model = Clusterer.load(building.build_clusterer(profile))
    points = evaluate.map_2d(model, documents, sample=60)
    assert points.shape == (60, 3)
    assert np.isfinite(points[["x", "y"]]).all(axis=None)
    # A readable map: a point's nearest neighbour is nearly always of its own cluster.
    xy = points[["x", "y"]].to_numpy()
    distances = ((xy[:, None] - xy[None]) ** 2).sum(axis=2) + np.diag([np.inf] * 60)
    assert (points["cluster"].to_numpy()[distances.argmin(axis=1)] == points["cluster"]).mean() > 0.9
