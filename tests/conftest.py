"""What the tests of the serving path share: a small real engine, a small router, ports of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from erlib import clusterer, config, openvino, stack, sweep, triton

BASE_PORT = int(os.environ.get("ERLIB_TEST_PORT", "27000"))  # another one lets two runs go side by side


@pytest.fixture(scope="session")
def profile() -> config.Profile:
    """The smoke profile on ports that a run of the user's own does not use."""
    return config.load_profile("smoke", {"serving.base_port": BASE_PORT, "serving.start_timeout_s": 60})


@pytest.fixture(scope="session")
def router(profile: config.Profile) -> Path:
    """Directory of a clusterer with eight clusters."""
    return clusterer.build(profile)


@pytest.fixture(scope="session")
def tokenizer(profile: config.Profile) -> Path:
    """``tokenizer.json`` of the engines."""
    return openvino.checkpoint(profile.engines) / "tokenizer.json"


@pytest.fixture(scope="session")
def server_plan(profile: config.Profile) -> triton.ServerPlan:
    """One real engine (a one-layer sibling): four slots, room for sequences of 512 tokens."""
    engine = openvino.build(profile, "small", "fp16")
    return sweep.server_plan(engine.path, batch_size=4, kv_blocks=16, kv_cache="f16", threads=1)


@pytest.fixture(scope="module")
def expert_router(profile, router, server_plan, tmp_path_factory):
    """Eight experts behind two gateways and NGINX, up for the tests of one module."""
    logs = tmp_path_factory.mktemp("logs")
    with stack.Stack("test", [server_plan] * 8, "expert_router", profile.serving, router, logs) as running:
        yield running
