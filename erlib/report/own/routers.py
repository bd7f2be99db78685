"""Other routers beside the clusterer."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from erlib import config
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, ORANGE, PURPLE, SKY, VERMILION
from erlib.routing import comparison

CHANGE_LOOKS = {
    "dropped_words": ("a tenth of the words dropped", BLUE, "o"),
    "reordered": ("passages reordered", SKY, "s"),
    "typos": ("typing errors in a tenth of the words", GREEN, "^"),
    "growth": ("prompt and answer, 250 to 1,150 words", VERMILION, "D"),
    "growth_short": ("prompt and answer, 35 to 935 words", ORANGE, "v"),
}


def _caption(table: pd.DataFrame, profile: config.Profile) -> str:
    n_experts = profile.clusterer.n_clusters
    missing = table.loc[table["reason"] != "", "reason"].unique()
    tried = table[table["reason"] == ""].iloc[0]
    return (
        f"Routers behind the same gateway, {n_experts} experts, {tried['documents']:.0f} held-out documents. Agreement "
        "with the corpus' topics, which cannot be complete where topics are more than experts; nearest examples have "
        "been told the topics of training documents, k-means has not. Stability: the same text changed by rule, no "
        "model paraphrases; passages are "
        f"{comparison.PASSAGE_WORDS} words long; an answer is the text by which the document goes on "
        f"({tried['conversations_growth']:.0f} conversations that begin with 250 words, "
        f"{tried['conversations_growth_short']:.0f} that begin with 35). Dotted: chance. The sentence embedding reads "
        "256 word pieces and no more, so that a long prompt cannot move it by growing. Latency: one thread, one prompt "
        f"at a time, {profile.routers.prompts} prompts each, without network or queue; for least loaded all experts "
        f"are equally idle.{' Not there: ' + '; '.join(missing) + '.' if len(missing) else ''}"
    )


def router_comparison(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """Routers beside each other: agreement with topics, balance, stability, latency.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.routing.comparison.compare_routers` returned.
    profile : Profile
    """
    fig, grid = plt.subplots(2, 2, figsize=(7.2, 5.2), sharey=True)
    agreement, balanced, kept, latency = grid.ravel()
    place = np.arange(len(table))
    for shift, (metric, label, colour) in zip(
        (-0.19, 0.19), (("nmi", "NMI", BLUE), ("purity", "purity", SKY)), strict=True
    ):
        values = table[metric] if metric in table else np.full(len(table), np.nan)
        agreement.barh(place + shift, values, height=0.36, color=colour, label=label)
    agreement.set(title="Agreement with topics", xlim=(0, 1))
    agreement.legend(loc="lower right")

    balanced.axvline(1, color=GREY, linewidth=0.8, zorder=0)
    balanced.hlines(place, table["smallest"], table["largest"], color=PURPLE, linewidth=2)
    balanced.plot(table["smallest"], place, "<", color=PURPLE, label="smallest")
    balanced.plot(table["largest"], place, ">", color=PURPLE, label="largest")
    balanced.set(title="Balance: requests over the mean", xlim=(0, None))
    balanced.legend(loc="lower left")

    n_experts = profile.clusterer.n_clusters
    kept.axvline(100 / n_experts, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    for change, (label, colour, marker) in CHANGE_LOOKS.items():
        kept.plot(100 * table[change], place, marker, color=colour, label=label, ls="", clip_on=False)
    kept.set(title="Stability: prompts that stay [%]", xlim=(0, 100))
    kept.legend(loc="lower right", fontsize=6.5, title="under", title_fontsize=6.5)  # where chance leaves room

    dodge = dict(zip(comparison.LATENCY_WORDS, (-0.25, 0.0, 0.25), strict=True))
    for (words, shift), colour in zip(dodge.items(), (SKY, BLUE, PURPLE), strict=True):
        middle, most = table[f"p50_ms_{words}"], table[f"p99_ms_{words}"]
        latency.hlines(place + shift, middle, most, color=colour, linewidth=1.1)
        latency.plot(middle, place + shift, "o", color=colour, label=f"{words:,} words", ms=4)
    latency.set(title="Latency of a decision, p50 to p99 [ms]", xscale="log")
    latency.legend(loc="lower right")

    for ax in grid.ravel():
        for row in place[table["reason"] != ""]:
            ax.text(0.03, row, "not there", transform=ax.get_yaxis_transform(), va="center", color=GREY, fontsize=6.5)
        ax.grid(axis="y", visible=False)
    agreement.set_yticks(place, [comparison.NAMES[name].replace(", ", ",\n", 1) for name in table["router"]])
    agreement.set_ylim(len(table) - 0.5, -0.5)
    caption = _caption(table, profile)
    return canvas.save_and_close(
        *(fig, profile, "measured", "workbench", "router_comparison", table, caption, NO_COUNTERPART),
        notebook="06_routing_overhead",
    )
