"""What c-BTM and both papers expect of experts trained on clusters, judged by the table of log-probabilities."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from erlib.claims import verdicts
from erlib.claims.uncertainty import Estimate, decide
from erlib.experts import worth
from erlib.experts.tables import DENSE, PROMPT, Judged
from erlib.experts.worth import (
    ALL_EXPERTS,
    LABELS,
    RANDOM_CLUSTERS,
    RANDOM_ROUTING,
    ROUTED,
    TWO_NEAREST,
    WRONG,
    routed_by_first,
)

NEAR = 0.01
"""Losses that differ by less are alike."""
BEST = 7 / 8
"""Of the clusters, how many have their own expert as the best, where experts are said to specialise."""


class Expectation(NamedTuple):
    """That the loss of `design`, over that of `reference`, less one, lies between two bounds."""

    id: str
    who: str
    claim: str
    design: str
    reference: str
    low: float = -math.inf
    high: float = math.inf
    after: int = 0
    """Only tokens beyond so many count."""

    @property
    def criterion(self) -> str:
        sides = [f"at least {self.low:+.0%}"] * math.isfinite(self.low)
        sides += [f"at most {self.high:+.0%}"] * math.isfinite(self.high)
        beyond = f", beyond the first {self.after} tokens" if self.after else ""
        return f"loss of {self.design} against {self.reference}: {' and '.join(sides)}{beyond}"


EXPECTED = [
    Expectation("E2", "c-BTM", "Clusters make better experts than chance does.", RANDOM_CLUSTERS, ROUTED, 0),
    Expectation("E3", "both papers", "A prompt's own expert answers it better than another.", WRONG, ROUTED, 0),
    Expectation("E4", "both papers", "Routing is better than chance.", RANDOM_ROUTING, ROUTED, 0),
    Expectation("E5", "c-BTM", "The two nearest experts do nearly as well as all.",
                TWO_NEAREST, ALL_EXPERTS, high=NEAR),
    Expectation("E6", "c-BTM", "Routed experts are no worse than one dense model of the same tokens.",
                LABELS[DENSE], ROUTED, 0),
    Expectation("E7", "both papers", "The beginning of a prompt is enough to route by.",
                routed_by_first(PROMPT), ROUTED, high=NEAR, after=PROMPT),
]  # fmt: skip


def judge_experts(judged: Judged, temperature: float, seed: int) -> pd.DataFrame:
    """Verdict on each expectation, as those on the papers' claims are made.

    Returns
    -------
    DataFrame
        ``id``, ``who`` expects it, ``claim``, ``criterion``, ``verdict``, ``effect`` (relative difference of losses;
        for E1 the share of the clusters), ``ci95_low``, ``ci95_high``, ``texts``.
    """
    designs = worth.Designs(judged, temperature)
    best = Estimate(*worth.share_best_on_own(designs, seed), len(judged.documents), "own expert")
    about = {
        "id": "E1",
        "who": "c-BTM",
        "claim": "Every expert is the best of all on its own cluster.",
        "criterion": f"on at least {BEST:.0%} of the clusters",
    }
    rows = [_verdict(about, best, BEST, math.inf)]
    for expected in EXPECTED:
        found = worth.against(designs, seed, expected.design, expected.reference, expected.after)
        number = Estimate(found["worse_by"], found["ci95_low"], found["ci95_high"], found["texts"], expected.design)
        about = {name: getattr(expected, name) for name in ("id", "who", "claim", "criterion")}
        rows.append(_verdict(about, number, expected.low, expected.high))
    return pd.DataFrame(rows)


def _verdict(about: dict[str, str], number: Estimate, low: float, high: float) -> dict[str, object]:
    verdict = verdicts.VERDICT_OF[decide([number], low, high).holds]
    numbers = {"effect": number.value, "ci95_low": number.low, "ci95_high": number.high, "texts": number.n}
    return {**about, "verdict": verdict, **numbers}
