"""The router as c-BTM publishes it: the same decisions, another evaluation, and a gateway that serves it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import sklearn

from erlib import config, paths
from erlib.machine import processes
from erlib.routing import building, sklearn_pipeline, training
from erlib.routing.clusterer import Clusterer, ClustererError
from erlib.serving import wire
from tests.support import texts
from tests.support.ports import BASE_PORT

pytestmark = pytest.mark.filterwarnings("ignore:Your stop_words")  # c-BTM's list holds "#NUMBER", which sklearn splits

PROMPTS = [*texts.topical(60, seed=1)[0], "", "the of and", "TOPICAA Topicab common1 3rd 2024 topicac", "topicbb\n!"]


@pytest.fixture(scope="module", params=["l2", "standard"])
def small(request: pytest.FixtureRequest) -> Clusterer:
    return training.fit(texts.topical(203)[0], n_clusters=4, n_components=8, normalizer=request.param)


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Profile:
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts.topical(203)[0]))
    corpus = {"corpus.name": "jsonl", "corpus.path": str(file)}
    return config.load_profile("smoke", {**corpus, "clusterer.n_clusters": 4, "clusterer.n_components": 8})


def test_the_pipeline_is_the_clusterer(small: Clusterer) -> None:
    pipeline = sklearn_pipeline.pipeline(small)
    assert list(pipeline.named_steps) == ["tfidf", "svd", "normalizer"]
    np.testing.assert_allclose(pipeline.transform(PROMPTS), small.transform(PROMPTS), atol=1e-5)


def test_terms_that_another_stop_word_list_lets_in_are_kept() -> None:
    """c-BTM's list has words that NLTK's lacks: a clusterer with NLTK's knows them."""
    documents = [f"{text} {word}" for text, word in zip(texts.topical(203)[0], ["system", "bill"] * 102, strict=False)]
    fitted = training.fit(documents, n_clusters=4, n_components=8)
    known = [*fitted.terms, "bill"]
    model = Clusterer(known, np.append(fitted.idf, 1.0), np.vstack([fitted.components, np.ones(8)]), fitted.centres)
    assert "bill" not in fitted.terms
    np.testing.assert_allclose(
        sklearn_pipeline.pipeline(model).transform(["bill"]), model.transform(["bill"]), atol=1e-5
    )


def test_padding_changes_the_size_only(small: Clusterer) -> None:
    padded = sklearn_pipeline.padded(small, 3000, seed=0)
    assert len(padded.terms) == len(set(padded.terms)) == 3000
    assert set(small.terms) < set(padded.terms)
    assert padded.terms == sorted(padded.terms, key=str.lower)
    assert (padded.predict(PROMPTS) == small.predict(PROMPTS)).all()
    np.testing.assert_allclose(padded.transform(PROMPTS), small.transform(PROMPTS), atol=1e-6)
    made_up = sorted(set(padded.terms) - set(small.terms))
    assert (padded.transform([" ".join(made_up)]) == small.transform([""])).all()
    assert (
        padded.digest
        == sklearn_pipeline.padded(small, 3000, seed=0).digest
        != sklearn_pipeline.padded(small, 3000, seed=1).digest
    )


def test_a_large_vocabulary_is_not_padded(small: Clusterer) -> None:
    assert sklearn_pipeline.padded(small, len(small.terms), seed=0) is small


def test_real_prompts_keep_their_cluster() -> None:
    c4 = texts.c4()
    model = training.fit(c4[:400], n_components=50)
    padded = sklearn_pipeline.padded(model, len(model.terms) + 5000, seed=0)
    router = sklearn_pipeline.Router(sklearn_pipeline.pipeline(padded), padded.centres)
    expected = model.predict(c4[400:600])
    assert len(set(expected)) == 8
    assert (padded.predict(c4[400:600]) == expected).all()
    assert [router.route(text)[0] for text in c4[400:600]] == list(expected)


def test_build_makes_one_model_in_two_forms_once(profile: config.Profile, capsys: pytest.CaptureFixture[str]) -> None:
    first = sklearn_pipeline.build(profile, 2000)
    assert "making" in capsys.readouterr().out
    assert sklearn_pipeline.build(profile, 2000) == first
    assert "reused" in capsys.readouterr().out
    assert sklearn_pipeline.build(profile, 2001) != first
    plain, ours, theirs = (
        Clusterer.load(building.build_clusterer(profile)),
        Clusterer.load(first),
        sklearn_pipeline.load(first),
    )
    assert len(ours.terms) == 2000
    for prompt in PROMPTS:
        cluster, spans = theirs.route(prompt)
        assert cluster == ours.route(prompt)[0] == plain.route(prompt)[0]
        assert all(ns > 0 for ns in spans)


def test_another_scikit_learn_gets_another_pickle(profile: config.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sklearn_pipeline.build(profile, 2000)
    monkeypatch.setattr(sklearn, "__version__", "0.0")
    assert sklearn_pipeline.build(profile, 2000) != first


def test_a_plain_clusterer_is_not_a_stock_router(profile: config.Profile) -> None:
    with pytest.raises(ClustererError, match=r"sklearn_pipeline\.build"):
        sklearn_pipeline.load(building.build_clusterer(profile))


def test_a_pickle_that_has_been_cut_or_changed_is_not_read_and_made_again(
    profile: config.Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sklearn_pipeline.build(profile, 2000)
    pickled = made / "stock.pkl"
    whole = pickled.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-200] + b"?" * 200, b""):
        pickled.write_bytes(damaged)
        with pytest.raises(ClustererError, match=r"no whole stock\.pkl; sklearn_pipeline\.build makes one"):
            sklearn_pipeline.load(made)
        sklearn_pipeline.build(profile, 2000)
        assert "stock router: making" in capsys.readouterr().out
        assert sklearn_pipeline.load(made).n_clusters == 4


def test_pickled_numbers_are_checked(small: Clusterer, tmp_path: Path) -> None:
    centres = np.array(small.centres)
    centres[1] = np.nan
    for centres_, message in ((centres, "centres of the clusterer holds what is no number"), (centres[:, 1:], "fit")):
        sklearn_pipeline.Router(sklearn_pipeline.pipeline(small), centres_).save(tmp_path)
        with pytest.raises(ClustererError, match=message):
            sklearn_pipeline.load(tmp_path)
    pipeline = sklearn_pipeline.pipeline(small)
    pipeline["svd"].components_[0, 0] = np.inf
    sklearn_pipeline.Router(pipeline, np.array(small.centres)).save(tmp_path)
    with pytest.raises(ClustererError, match="components of the clusterer"):
        sklearn_pipeline.load(tmp_path)


@pytest.mark.parametrize("policy", ["classify", "stock"])
def test_gateways_of_both_kinds_decide_alike_and_say_how_long_it_took(
    profile: config.Profile, tmp_path: Path, policy: str
) -> None:
    port, log = BASE_PORT + 300, tmp_path / "gateway.log"
    nobody = ",".join(f"127.0.0.1:{port + 1 + i}" for i in range(4))  # the decision is told before an expert is asked
    router = sklearn_pipeline.build(profile, 2000)
    command = ["--port", str(port), "--experts", nobody, "--clusterer", str(router), "--policy", policy]
    gateway = processes.spawn(processes.python("-m", "erlib.gateway", *command), log)

    async def decisions() -> list[dict[str, str]]:
        seen = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=wire.CHANNEL_OPTIONS) as channel:
            for prompt in PROMPTS[:20]:
                call = channel.stream_stream(wire.STREAM_INFER)(iter([wire.encode_request(prompt, 1)]), timeout=30)
                seen.append(dict(await call.initial_metadata()))
        return seen

    try:
        processes.wait_until(lambda: processes.listening(port), gateway, "gateway", log, 60)
        seen = asyncio.run(decisions())
    finally:
        processes.stop([gateway])
    assert [int(one["er-expert"]) for one in seen] == list(Clusterer.load(router).predict(PROMPTS[:20]))
    assert all(int(one[f"er-{span}-ns"]) > 0 for one in seen for span in ("vectorise", "svd", "kmeans"))


def test_only_a_stock_gateway_imports_scikit_learn() -> None:
    code = "import sys, erlib.gateway; print('sklearn' in sys.modules, 'pydantic' in sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=paths.ROOT)
    assert result.stdout.split() == ["False", "False"]
