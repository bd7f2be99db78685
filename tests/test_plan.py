"""The command that answers one question: what it prints, writes and refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from erlib.paper_scale.questions import Question
from scripts import plan

Run = Callable[..., tuple[int, str, str]]
LITTLE = ("--model", "llama-3-8b", "--gpus", "1", "--formats", "fp8", "--users", "6", "--slots", "4")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its status, and what it printed."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        try:
            status = plan.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return call


def test_a_plan_is_printed_with_intervals_written_and_drawn(run: Run, tmp_path: Path) -> None:
    csv, figure = tmp_path / "plan.csv", tmp_path / "plan.png"
    status, out, _ = run(*LITTLE, "--csv", str(csv), "--figure", str(figure))
    table = pd.read_csv(csv)
    assert status == 0
    assert list(table["design"]) == ["1 × FP8 TP1, one model"] and figure.read_bytes().startswith(b"\x89PNG")
    row = next(line for line in out.splitlines() if line.startswith("1 × FP8 TP1"))
    most, low, high = table.loc[0, ["most", "most_low", "most_high"]]
    assert f"{most:.3g} ({low:.3g} to {high:.3g})" in row
    assert "No design carries 6 users" in out and "Of users who wait" in out and "(0.85 to 1.14" in out


def test_what_a_data_sheet_says_is_known_for_it(run: Run) -> None:
    a100 = (
        "--model",
        "llama-3-8b",
        "--gpus",
        "1",
        "--formats",
        "int8",
        "--users",
        "6",
        "--slots",
        "4",
        "--gpu",
        "a100",
    )
    status, out, err = run(*a100)
    assert status == 0, err
    said = " ".join(out.split())
    assert "on 1 A100s, priced from the data sheet" in said and "A data sheet knows no kernels" in said
    assert "(0.76 to 1.14 times)" in said and f"steps {Question.adapters_slower:g} times as long" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--gpu", "h100-pytorch"), "on 1 H100s, measured with PyTorch's kernels"),
        (("--gpu", "h100-pytorch"), "with other step times nothing is known of them"),
        (("--gpu-gb", "40"), "kernel times that NVIDIA published, with 40 GB each"),
    ],
)
def test_what_is_not_known_of_other_gpus_is_said(run: Run, more: tuple[str, ...], said: str) -> None:
    status, out, err = run(*LITTLE, *more)
    assert status == 0, err
    assert said in " ".join(out.split())


def test_an_answer_is_told_even_if_its_file_cannot_be_written(run: Run) -> None:
    status, out, err = run(*LITTLE, "--csv", "/proc/plan.csv")
    assert status == 2 and "No design carries 6 users" in out
    assert "/proc/plan.csv cannot be written" in err.splitlines()[-1]


def test_ones_own_requests_are_planned_for(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:{i // 60:02}:{i % 60:02}.{i:07},{100 + i},{20 + i}" for i in range(60)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    given = ("--model", "llama-3-8b", "--gpus", "1", "--formats", "fp8", "--slots", "4", "--trace", str(file))
    status, out, err = run(*given)
    assert status == 0, err
    assert f"Prompts and answers of {file}; 1 requests/s, as its trace has them" in " ".join(out.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--csv", "nowhere/plan.csv"), "--csv: there is no folder"),
        (("--csv", "."), "--csv: . is a folder"),
        (("--ttft", "inf"), "ttft_s is 1e-06 to 1e+06, not inf"),
        (("--figure", "nowhere/plan.png"), "--figure: there is no folder"),
        (("--figure", "plan.xlsx"), "--figure: plan.xlsx ends in none of .png, .svg, .pdf"),
        (("--requests-per-s", "3"), "not allowed with argument"),
        (("--gpu", "v100"), "no step times of GPU 'v100'"),
        (("--gpus", "9"), "1 to 8 GPUs, not 9"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_what_cannot_be_is_refused_at_once(run: Run, given: tuple[str, ...], said: str) -> None:
    status, out, err = run(*LITTLE, *given)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1]
