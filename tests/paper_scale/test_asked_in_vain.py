"""What notebooks 12 and 13 would refuse is said before the first notebook runs."""

from __future__ import annotations

import pytest

from erlib import config
from erlib.paper_scale import asked_in_vain


@pytest.mark.parametrize(
    ("notebook", "given", "said"),
    [
        ("13_what_if", {"what_if.model": "llama-3-80b"}, "no shape for 'llama-3-80b'"),
        ("13_what_if", {"what_if.gpu": "b200"}, "no step times of GPU 'b200'"),
        ("13_what_if", {"what_if.trace": "/nowhere.csv"}, "there is no trace /nowhere.csv"),
        ("12_your_gpu", {"your_gpu.models": ["llama-9"]}, "no shape for 'llama-9'"),
        ("12_your_gpu", {"your_gpu.steps": "/nowhere.csv"}, "nowhere.csv was measured on, cannot be read"),
        ("12_your_gpu", {"your_gpu.config": "p1.D"}, "PyTorch alone measures attention in FP16"),
    ],
)
def test_a_line_says_which_notebook_and_why(notebook: str, given: dict[str, object], said: str) -> None:
    profile = config.load_profile("smoke", given)
    (problem,) = asked_in_vain.problems(profile, ["01_clusterer", notebook])
    assert problem.startswith(f"{notebook}: ") and said in problem and len(problem.splitlines()) == 1
    assert asked_in_vain.problems(profile, ["01_clusterer"]) == []


def test_profiles_ask_for_what_can_be() -> None:
    for name in ("smoke", "laptop"):
        assert asked_in_vain.problems(config.load_profile(name), ["12_your_gpu", "13_what_if"]) == []
