"""Trained experts: who is best on what, what routing to them is worth, how much of a prompt the router has to see."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from erlib import config
from erlib.experts.worth import ROUTED, best_on_own
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, VERMILION

_NOTEBOOK = "11_experts"


_CLUSTERS = {
    "classify": "c-BTM's clusters",
    "embeddings": "clusters of sentence embeddings",
    "neighbours": "clusters by a vote of labelled examples",
    "topics": "topics instead of clusters",
}


def _made_of(profile: config.Profile) -> str:
    settings = profile.experts
    name = "a checkpoint of your own" if settings.checkpoint else "SmolLM2-135M"
    name += f" (its first {settings.layers} layers alone)" if settings.layers else ""
    return (
        f"{name}, LoRA of rank {settings.rank} at all layers; corpus {settings.corpus.name}, "
        f"{_CLUSTERS[settings.router]}; seed adapted to "
        f"{settings.seed_tokens:,} tokens, each expert to {settings.tokens:,} more; {settings.documents} held-out "
        "texts per cluster. One training seed."
    )


def expert_matrix(matrix: pd.DataFrame, profile: config.Profile) -> Figure:
    """Every expert on every cluster, against the best of the experts there.

    Parameters
    ----------
    matrix : DataFrame
        What :func:`erlib.experts.matrix` returned.
    profile : Profile
    """
    clusters = list(matrix.columns)
    rows = [f"expert-{cluster}" for cluster in clusters]
    best = matrix.loc[rows].min()
    excess = 100 * (matrix / best - 1)
    others = [arm for arm in ("dense", "average", "random-0", "adapted", "seed") if arm in matrix.index]
    shown = excess.loc[[*rows, *others]]
    fig, ax = plt.subplots(figsize=(5.2, 0.29 * len(shown) + 1.1))
    most = float(np.abs(excess.loc[rows].to_numpy()).max()) or 1.0
    sns.heatmap(
        shown,
        ax=ax,
        cmap="RdBu_r",
        center=0,
        vmin=-most,
        vmax=most,
        annot=True,
        fmt=".1f",
        annot_kws={"fontsize": 6},
        cbar_kws={"label": "bits per byte, % above the best expert's"},
        linewidths=0.5,
        linecolor="white",
    )
    for cluster in clusters:
        ax.add_patch(Rectangle((cluster, cluster), 1, 1, fill=False, edgecolor="#222222", linewidth=1.4))
    ax.axhline(len(rows), color="#222222", linewidth=0.8)
    ax.set(xlabel="held-out texts of cluster", ylabel="", title="Own expert framed; below the line, not experts")
    ax.tick_params(length=0, rotation=0)
    ax.grid(False)
    caption = (
        f"Loss of every expert on every cluster, relative to the best of the {len(rows)} experts there (0: the best). "
        f"The own expert is the best on {best_on_own(matrix)} of {len(rows)} clusters. {_made_of(profile)}"
    )
    return canvas.save_and_close(
        *(fig, profile, "measured", "workbench", "expert_matrix", matrix.reset_index(), caption, NO_COUNTERPART),
        notebook=_NOTEBOOK,
    )


def routing_worth(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """Every way to answer, by how much greater its loss is than that of routed experts.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.experts.compare` returned.
    profile : Profile
    """
    shown = table[table["design"] != ROUTED].sort_values("worse_by", ascending=False, ignore_index=True)
    fig, ax = plt.subplots(figsize=(7.2, 0.24 * len(shown) + 0.9))
    place = np.arange(len(shown))
    effect, low, high = (100 * shown[column] for column in ("worse_by", "ci95_low", "ci95_high"))
    colours = [GREEN if up < 0 else VERMILION if down > 0 else GREY for down, up in zip(low, high, strict=True)]
    ax.axvline(0, color=BLUE, linewidth=1.2, label=ROUTED)
    ax.hlines(place, low, high, colors=colours, linewidth=2)
    ax.scatter(effect, place, c=colours, s=22, zorder=3)
    ax.set_yticks(place, list(shown["design"]))
    ax.set(xlabel=f"loss against experts {ROUTED} [%], 95 % interval", ylim=(-0.6, len(shown) - 0.4))
    ax.legend(loc="upper right")
    caption = (
        "What it is worth to be routed: loss of language (bits per byte) of every way to answer, relative to that of "
        "the expert of a text's own cluster; green is better than that, red is worse, grey cannot be told. Paired "
        f"bootstrap over texts within clusters. {_made_of(profile)}"
    )
    return canvas.save_and_close(
        *(fig, profile, "measured", "workbench", "routing_worth", table, caption, NO_COUNTERPART),
        notebook=_NOTEBOOK,
    )


def router_sees(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """The loss of what follows against how many tokens the router has seen when it decides.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.experts.by_seen_tokens` returned.
    profile : Profile
    """
    fig, (ax, same) = plt.subplots(1, 2, figsize=(7.2, 2.9), width_ratios=[1.5, 1])
    once = table[table["seen"].notna()]
    tops = sorted(once["experts"].unique())
    for shift, top, colour in zip((0.96, 1.0, 1.04), tops, (BLUE, GREEN, VERMILION), strict=False):
        mine = once[once["experts"] == top].sort_values("seen")
        ends = mine["worse_by"] - mine["ci95_low"], mine["ci95_high"] - mine["worse_by"]
        spread = [100 * end.clip(lower=0) for end in ends]  # of one text per cluster, an interval is a point
        name = "one expert" if top == 1 else f"ensemble of {top}"
        ax.errorbar(mine["seen"] * shift, 100 * mine["worse_by"], spread, marker="o", color=colour, label=name)
        again = table[(table["design"] == "every token") & (table["experts"] == top)]
        ax.axhline(100 * again["worse_by"].iloc[0], color=colour, linewidth=0.9, linestyle="--")
    oracle = table[table["design"] == "best expert per text"]
    ax.axhline(100 * oracle["worse_by"].iloc[0], color=GREY, linewidth=0.9, linestyle=":", label="best expert per text")
    ax.plot([], [], color=GREY, linestyle="--", linewidth=0.9, label="routed again at every token")
    ax.set(xscale="log", xlabel="tokens that the router has seen", title="Loss of what follows")
    ax.set_ylabel("against the whole text's expert [%]")
    canvas.legend(fig, ax, columns=5)
    first = once[once["experts"] == 1].sort_values("seen")
    same.plot(first["seen"], 100 * first["agrees"], marker="o", color=BLUE)
    same.axhline(100 / profile.clusterer.n_clusters, color=GREY, linewidth=0.8, linestyle=":")
    same.set(xscale="log", ylim=(0, 100), xlabel="tokens that the router has seen", title="Texts at their expert [%]")
    ticks = [int(n) for n in first["seen"]]
    for one in (ax, same):
        one.set_xticks(ticks, [str(n) for n in ticks])
        one.minorticks_off()
    caption = (
        "How much of a prompt the router has to see. Left: bits per byte of the tokens beyond the first "
        f"{ticks[-1]}, relative to the expert that the whole text belongs to; Expert Router decides once, c-BTM again "
        "at every token (dashed), weights of ensembles as in c-BTM. Right: share of the texts that go where the whole "
        f"text goes; dotted: chance. {_made_of(profile)}"
    )
    return canvas.save_and_close(
        *(fig, profile, "measured", "workbench", "router_sees", table, caption, NO_COUNTERPART),
        notebook=_NOTEBOOK,
    )
