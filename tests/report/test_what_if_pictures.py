"""Pictures of an answer, and the controls that change it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from erlib import config, paths
from erlib.paper_scale.exploring import Explorer
from erlib.paper_scale.questions import Question
from erlib.report import controls, frontier, plan, style, two_best


@pytest.fixture(scope="module")
def explorer() -> Iterator[Explorer]:
    with Explorer(config.load_profile("smoke")) as its:
        yield its


QUESTION = Question("llama-3-8b", 1, 5.0, formats=("fp16", "fp8"))


def test_both_pictures_are_saved_with_their_numbers(
    explorer: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    answer, table = explorer.answer(QUESTION), explorer.frontier(QUESTION, (0.3, 1.0))
    style()
    assert [ax.get_title(loc="left") for ax in two_best(answer, explorer.profile).axes] == [
        *("TTFT", "TPOT", "Goodput", "Price", "Headroom")
    ]
    frontier(table, QUESTION, explorer.profile)
    folder = tmp_path / "smoke" / "simulated-hardware" / "workbench"
    for name, numbers in (("what_if_two_best", answer.table), ("what_if_frontier", table)):
        assert list(pd.read_csv(folder / f"{name}.csv")["design"]) == list(numbers["design"])
        about = json.loads((folder / f"{name}.json").read_text())
        assert "llama-3-8b on 1 GPUs" in about["caption"] and about["host"].endswith("in virtual time")
        assert (folder / f"{name}.png").stat().st_size > 10_000
    caption = json.loads((folder / "what_if_two_best.json").read_text())["caption"]
    assert "Too good near saturation" in caption and "carries 5 requests/s" in caption


def test_a_plan_has_a_row_for_each_design_that_serves() -> None:
    rows = {"design": ["one", "two", "three"], "kind": ["one model", "routed experts", "adapters"]}
    table = pd.DataFrame({**rows, "most": [9.0, 4.0, 0.0], "most_low": [8.0, 3.0, 0], "most_high": [10.0, 5.0, 0]})
    ax = plan(table, QUESTION).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["two", "one"]
    drawn = {its.get_label(): its[0].get_xydata().tolist() for its in ax.containers}
    assert drawn == {"one model": [[9.0, 1.0]], "routed experts": [[4.0, 0.0]]}


def test_without_ipywidgets_a_line_says_so(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    assert controls(explorer, QUESTION) is None
    assert capsys.readouterr().out.startswith("controls: there is no ipywidgets")


def test_a_control_changes_the_picture_and_what_is_said(explorer: Explorer) -> None:
    pytest.importorskip("ipywidgets")
    box = controls(explorer, QUESTION)
    grid, picture, said, button, drawn = box.children
    parts: dict[str, Any] = {part.description: part for part in grid.children}
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG") and "carries 5 requests/s" in said.value
    parts["how much"].value = 20.0
    assert "carries 20 requests/s" in said.value and bytes(picture.value) != before
    parts["load"].value = "users"
    assert "20 users" in said.value
    parts["GPU, or table"].value = "v100"
    assert "no step times of GPU &#x27;v100&#x27;" in said.value and picture.layout.display == "none"
    parts["GPU, or table"].value = "h200-pytorch"
    assert picture.layout.display == "" and "20 users" in said.value
    button.click()
    assert bytes(drawn.value).startswith(b"\x89PNG") and drawn.layout.display == ""
