"""What some notebooks would refuse is said before the first notebook runs."""

from __future__ import annotations

import importlib.util

import pytest

from erlib import config
from erlib.machine import hardware
from erlib.paper_scale import asked_in_vain

_OTHER_CORPUS = {"experts.corpus.name": "jsonl", "experts.corpus.path": "/nowhere.jsonl"}
_SERVED = {"experts.layers": None, "experts.users": [4]}


@pytest.mark.parametrize(
    ("notebook", "given", "said"),
    [
        ("13_what_if", {"what_if.model": "llama-3-80b"}, "no shape for 'llama-3-80b'"),
        ("13_what_if", {"what_if.gpu": "b200"}, "no step times of GPU 'b200'"),
        ("13_what_if", {"what_if.trace": "/nowhere.csv"}, "there is no trace /nowhere.csv"),
        ("12_your_gpu", {"your_gpu.models": ["llama-9"]}, "no shape for 'llama-9'"),
        ("12_your_gpu", {"your_gpu.steps": "/nowhere.csv"}, "nowhere.csv was measured on, cannot be read"),
        ("12_your_gpu", {"your_gpu.config": "p1.D"}, "PyTorch alone measures attention in FP16"),
        ("07_paper_scale", {"emulation.steps": "/nowhere.csv"}, "emulation.configs: [Errno 2] No such file"),
        ("11_experts", _OTHER_CORPUS, "experts.corpus: no corpus file /nowhere.jsonl"),
        ("11_experts", {"experts.checkpoint": "/tmp"}, "experts.checkpoint: /tmp/config.json cannot be read"),
        ("11_experts", {**_SERVED, "clusterer.n_clusters": 4}, "8 servers need an expert each"),
        ("11_experts", {**_SERVED, "experts.adapters": "/tmp"}, "/tmp/expert-0 holds no adapter of PEFT"),
    ],
)
def test_a_line_says_which_notebook_and_why(notebook: str, given: dict[str, object], said: str) -> None:
    profile = config.load_profile("smoke", given)
    (problem,) = asked_in_vain.problems(profile, ["01_clusterer", notebook])
    assert problem.startswith(f"{notebook}: ") and said in problem and len(problem.splitlines()) == 1
    assert asked_in_vain.problems(profile, ["01_clusterer"]) == []


def test_what_is_not_here_is_said_before_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(hardware, "gpus", list)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for key, value, said in (
        ("dtype", "bfloat16", "does not multiply"),
        ("router", "embeddings", "extra `embeddings`"),
        ("answer_tokens", 100, "only 15 tokens after a prompt of 32"),
    ):
        profile = config.load_profile("smoke", {f"experts.{key}": value})
        (problem,) = asked_in_vain.problems(profile, ["11_experts"])
        assert said in problem and f"experts.{key}={value}" in problem and len(problem.splitlines()) == 1


def test_profiles_ask_for_what_can_be() -> None:
    for name in ("smoke", "laptop"):
        profile = config.load_profile(name)
        assert asked_in_vain.problems(profile, ["07_paper_scale", "11_experts", "12_your_gpu", "13_what_if"]) == []
