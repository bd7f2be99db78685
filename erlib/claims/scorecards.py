"""The scorecard's files: every claim with every source's verdict, for people and for programs."""

from __future__ import annotations

import html

import pandas as pd

from erlib import paths
from erlib.claims import explained
from erlib.claims.verdicts import (
    AMBIGUOUS,
    CONSTRUCTION,
    FAILS,
    FITTED,
    HOLDS,
    NOT_RUN,
    UNTOLD,
    counts,
    inconsistencies,
)
from erlib.config import Profile


def write_scorecard(scorecard: pd.DataFrame, profile: Profile) -> None:
    """Write ``figures/<profile>/scorecard.{csv,md}`` and ``hypotheses.csv`` (:func:`erlib.claims.explained.by_source`).

    The page is :func:`erlib.report.gallery.write_gallery`'s.
    """
    directory = paths.FIGURES / profile.name
    directory.mkdir(parents=True, exist_ok=True)
    scorecard.to_csv(directory / "scorecard.csv", index=False)
    explained.by_source(scorecard).to_csv(directory / "hypotheses.csv")
    (directory / "scorecard.md").write_text(_markdown(scorecard, profile), encoding="utf-8")


SIGNS: dict[str, str] = {
    **{HOLDS: "✓", FAILS: "✗", UNTOLD: "≈", CONSTRUCTION: "=", FITTED: "~", NOT_RUN: "–", AMBIGUOUS: "?"},
}
TITLES = {"paper1": "Paper 1", "paper2": "Paper 2", "both": "Across the papers"}
TYPES = {
    "arith": "arithmetic",
    "setup": "setup",
    "num": "number",
    "ord": "ordering",
    "shape": "shape",
    "concl": "conclusion",
}
"""What a claim's type is called."""


def _markdown(scorecard: pd.DataFrame, profile: Profile) -> str:
    parts = [
        f"# Scorecard of both papers' claims, profile {profile.name}",
        ", ".join(f"{sign} {verdict}" for verdict, sign in SIGNS.items()) + ". The thresholds are ours.",
        counts(scorecard).to_markdown(),
    ]
    for paper, title in TITLES.items():
        lines = [f"## {title}\n", "| claim | | source | verdict | numbers |", "|---|---|---|---|---|"]
        for row in scorecard[scorecard["paper"] == paper].itertuples():
            cells = [
                row.id,
                f"{row.claim} ({row.where})",
                row.source,
                f"{SIGNS[row.verdict]} {row.verdict}",
                row.numbers,
            ]
            figure = f" ([figure]({row.figure}))" if row.figure else ""
            lines.append(f"| {' | '.join(map(_plain, cells))}{figure} |")
        parts.append("\n".join(lines))
    contradictions = [
        f"- **{row.id}** ({_plain(row.where)}): {_plain(row.conflict)}"
        for row in inconsistencies(scorecard).itertuples()
    ]
    return "\n\n".join([*parts, "## Where the papers contradict themselves", "\n".join(contradictions)]) + "\n"


def _plain(text: str) -> str:
    """Text that stays text, and in its cell, wherever Markdown is shown."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "/")


def changed(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Verdicts that differ between two scorecards, of those that both have.

    Parameters
    ----------
    before, after : DataFrame
        What :func:`erlib.claims.verdicts.evaluate` returned, or the csv that it was written to.

    Returns
    -------
    DataFrame
        One row per claim and source: ``id``, ``source``, ``before``, ``after`` (verdicts), ``turned`` (from holds to
        fails, or back), ``claim``.
    """
    keys = ["id", "source"]
    one, other = (table.set_index(keys)["verdict"] for table in (before, after))
    both = pd.concat({"before": one, "after": other}, axis=1, join="inner").reset_index()
    differ = both[both["before"] != both["after"]].merge(after[[*keys, "claim"]], on=keys)
    turned = [{HOLDS, FAILS} == {*pair} for pair in zip(differ["before"], differ["after"], strict=True)]
    return differ.assign(turned=pd.Series(turned, dtype=bool))[[*keys, "before", "after", "turned", "claim"]]
