"""README's "What came out" is what the committed figures and the committed scorecard say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from erlib import paths
from erlib.report import conclusions

FIGURES = paths.ROOT / "figures" / "laptop"
README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w-])")
"""Not what belongs to a name: p99, 70B, H100, P1-R04, p1.B."""
SCALES = (1, 100, 1000)
"""Seconds may be said in milliseconds, shares in percent."""


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """A copy of the committed csvs, to be changed."""
    for file in FIGURES.rglob("*.csv"):
        copy = tmp_path / file.relative_to(FIGURES)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return tmp_path


def section() -> str:
    return README.partition(conclusions.BEGIN)[2].partition(conclusions.END)[0].strip()


def test_readme_says_what_the_committed_figures_say() -> None:
    made = conclusions.what_came_out(FIGURES, "figures/laptop")
    assert section() == made.strip(), "run .venv/bin/python scripts/publish.py"


@pytest.mark.parametrize("line", section().splitlines())
def test_every_number_stands_in_a_csv_that_its_sentence_names(line: str) -> None:
    files = [paths.ROOT / name for name in re.findall(r"\]\((.*?\.csv)\)", line)]
    words = re.sub(r"\[.*?\]\(.*?\)", "", re.sub(r"^\d+\. ", "", line))
    found = NUMBER.findall(words)
    assert bool(found) <= bool(files), f"no csv is named in {line!r}"
    assert not [number for number in found if not any(stands_in(number, file) for file in files)]


def stands_in(number: str, file: Path) -> bool:
    """Whether a csv holds a number, rounded as it is said: in a cell, a column's name, a claim, a count of verdicts."""
    table, value = pd.read_csv(file, keep_default_na=False, na_values=[""]), float(number.replace(",", ""))
    digits = len(number.partition(".")[2])
    cells = np.abs(table.select_dtypes("number").to_numpy(float)).ravel()
    half = 0.5000001 * 10.0**-digits  # of the last digit: a number half way may be said either way
    if any((np.abs(cells * scale - value) <= half).any() for scale in SCALES):
        return True
    names = " ".join(map(str, table.columns))
    scorecard = pd.read_csv(FIGURES / "scorecard.csv")
    counts = scorecard.groupby(["source", "verdict"]).size().to_list() if file.name == "scorecard.csv" else []
    return (
        number in re.findall(r"\d+", names) or value in counts or number in NUMBER.findall(" ".join(scorecard["claim"]))
    )


def test_another_number_in_a_csv_is_another_number_in_the_text(figures: Path) -> None:
    before = conclusions.what_came_out(figures, "x")
    for file in figures.rglob("*.csv"):
        if file.name == "scorecard.csv":
            continue
        table = pd.read_csv(file)
        counted = {"holds"} & set(table.columns)
        for column in counted | set(table.select_dtypes("float")) - {"added", "users"}:
            table[column] *= 1.7
        table.to_csv(file, index=False)
    after = conclusions.what_came_out(figures, "x")
    for old, new in zip(before.splitlines()[:14], after.splitlines()[:14], strict=True):
        assert old != new, "this sentence does not depend on its csv"


@pytest.mark.parametrize("word", ["holds", "cannot be told", "by construction", "fitted", "not run here"])
def test_verdicts_are_the_scorecards(figures: Path, word: str) -> None:
    scorecard = pd.read_csv(figures / "scorecard.csv", keep_default_na=False)
    scorecard.assign(verdict=word).to_csv(figures / "scorecard.csv", index=False)
    text = conclusions.what_came_out(figures, "x")
    named = re.findall(r"(?<=: |, )([a-z ]+?) (?:as measured|on simulated H100s|by arithmetic)", text)
    assert len(named) > 12
    assert set(named) == {word}


def test_two_systems_whose_intervals_touch_cannot_be_told_apart(figures: Path) -> None:
    file = figures / "measured" / "paper1" / "fig07_p99_response_time.csv"
    table = pd.read_csv(file)
    cases = {4.0: "cannot be told", 0.1: "C's is shorter"}
    for interval, words in cases.items():
        table.loc[table["config"] == "p1.C", "mean"], table.loc[table["config"] == "p1.R", "mean"] = 10.0, 12.0
        table.assign(ci95=interval).to_csv(file, index=False)
        assert words in conclusions.what_came_out(figures, "x")


def test_a_csv_without_what_a_sentence_is_about_is_named(figures: Path) -> None:
    file = figures / "measured" / "workbench" / "engines.csv"
    table = pd.read_csv(file)
    table[table["dtype"] != "int4"].to_csv(file, index=False)
    with pytest.raises(ValueError, match=r"engines\.csv has no row with .*int4"):
        conclusions.what_came_out(figures, "x")


def test_a_text_without_markers_is_left_alone() -> None:
    assert conclusions.replaced(README, section()) == README
    for text in ("", conclusions.BEGIN, conclusions.END + conclusions.BEGIN, README + README):
        with pytest.raises(ValueError, match="once each"):
            conclusions.replaced(text, "something")
