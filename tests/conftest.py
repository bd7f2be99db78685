"""What the tests of the serving path share: a small real engine, a small router, ports of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from erlib import config
from erlib.engines import build, checkpoint
from erlib.load import on_cores
from erlib.routing import building
from erlib.serving import stack, triton
from tests.support.ports import BASE_PORT, METRICS_PORT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the run of all notebooks: it takes as long as half of the rest, which goes on beside it."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(scope="session")
def profile() -> config.Profile:
    """The smoke profile on ports that a run of the user's own does not use."""
    return config.load_profile("smoke", {"serving.base_port": BASE_PORT, "serving.start_timeout_s": 60})


@pytest.fixture(scope="session")
def router(profile: config.Profile) -> Path:
    """Directory of a clusterer with eight clusters."""
    return building.build_clusterer(profile)


@pytest.fixture(scope="session")
def tokenizer(profile: config.Profile) -> Path:
    """``tokenizer.json`` of the engines."""
    return checkpoint.checkpoint(profile.engines) / "tokenizer.json"


@pytest.fixture(scope="session")
def llama2_like(tmp_path_factory) -> Path:
    """A tokenizer with Llama 2's parts (SentencePiece pieces, bytes for what it has no piece for), but few pieces."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = ["▁", "▁t", "he", "▁the", "▁c", "at", "▁cat"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in ("<unk>", "<s>", "</s>")])
    directory = tmp_path_factory.mktemp("llama-2")
    tokenizer.save(str(directory / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "</s>"}  # as Llama 2 writes it
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return directory


@pytest.fixture(scope="session")
def server_plan(profile: config.Profile) -> triton.ServerPlan:
    """One real engine (a one-layer sibling): four slots, room for sequences of 512 tokens."""
    engine = build.build_all(profile, [("small", "fp16")])[0]
    return on_cores.server_plan(engine.path, batch_size=4, kv_blocks=16, kv_cache="f16", threads=1)


@pytest.fixture(scope="module")
def expert_router(profile, router, server_plan, tmp_path_factory):
    """Eight experts behind two gateways and NGINX, up for the tests of one module."""
    logs = tmp_path_factory.mktemp("logs")
    with stack.Stack(
        "test", [server_plan] * 8, "expert_router", profile.serving, router, logs, metrics_port=METRICS_PORT
    ) as running:
        yield running
