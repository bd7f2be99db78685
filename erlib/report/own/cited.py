"""Published measurements beside the same conditions, simulated."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from erlib import config
from erlib.paper_scale import cited
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, ORANGE

LOOKS: dict[str, dict[str, Any]] = {
    "throughput": dict(color=GREEN, marker="^"),
    "TPOT": dict(color=BLUE, marker="o"),
    "p99 of TPOT": dict(color=BLUE, marker="o", mfc="white"),
    "TTFT": dict(color=ORANGE, marker="D"),
    "p99 of TTFT": dict(color=ORANGE, marker="D", mfc="white"),
}

MANY = 20
"""An interval that was tested on fewer predictions counts as untested."""


def published_points(beside: pd.DataFrame, profile: config.Profile) -> Figure:
    """Ratio of simulated to published for every point, a row per kind of load.

    Parameters
    ----------
    beside : DataFrame
        What :func:`erlib.paper_scale.cited.beside_published` returned.
    profile : Profile
        Whose figures this one stands beside.
    """
    order = [kind + more for kind in cited.KINDS.values() for more in ("", ", roofline")]
    kinds = sorted(beside["kind"].unique(), key=order.index)
    fig, ax = plt.subplots(figsize=(7.2, 0.45 * len(kinds) + 1))
    ax.axvspan(0.9, 1.1, color="#e9e9e9", linewidth=0, zorder=0)
    ax.axvline(1, color=GREY, linewidth=0.6, zorder=0)
    above = np.linspace(-0.3, 0.3, len(LOOKS))
    for (metric, look), shift in zip(LOOKS.items(), above, strict=True):
        mine = beside[beside["metric"] == metric]
        places = mine["kind"].map(kinds.index) + shift
        ax.plot(mine["ratio"], places, linestyle="", ms=3.5, mew=0.7, alpha=0.8, label=metric, **look)
    names = beside.groupby("kind")["benchmark"].unique()
    labels = [f"{kind}\n{' · '.join(names[kind])}" for kind in kinds]
    ax.set_yticks(range(len(kinds)), labels, fontsize=6.5)
    ax.set(xscale="log", ylim=(len(kinds) - 0.5, -0.5), xlabel="simulated over published (log scale)")
    ax.set_xticks([0.2, 0.3, 0.5, 0.7, 0.9, 1.1, 1.4], ["0.2", "0.3", "0.5", "0.7", "0.9", "1.1", "1.4"])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", visible=False)
    canvas.legend(fig, ax, columns=len(LOOKS))
    return canvas.save_and_close(
        *(fig, profile, "simulated-hardware", "workbench", "published_points"),
        beside,
        _caption(beside),
        NO_COUNTERPART,
        notebook="07_paper_scale",
        host="virtual time",
        evidence="simulated in virtual time, beside published measurements",
    )


def _caption(beside: pd.DataFrame) -> str:
    opened = beside[(beside["load"] == "open") & (beside["metric"] == "TPOT")]
    crowd = beside[(beside["load"] == "in flight") & (beside["metric"] == "TPOT")]
    tested = cited.intervals(beside, "group", "benchmark")
    text = (
        f"What others measured ({len(beside)} comparisons with {beside['benchmark'].nunique()} benchmarks: "
        "data/published_points.csv and data/h100_published_throughput.csv) and the same conditions simulated. Grey: "
        "±10 %. Hollow: p99. Roofline: A100 and H200, priced from data sheets and not from measured kernels."
    )
    if len(opened):
        too_good = 1 / opened["ratio"]
        text += (
            f" Latency in an open loop near saturation is {too_good.min():.1f} to {too_good.max():.1f} times too good "
            "(TPOT); all the host time per token that the same machines' throughput leaves room for does not explain "
            f"it. With as many requests in flight as there were, TPOT is {_percent(1 - crowd['ratio'].max())} to "
            f"{_percent(1 - crowd['ratio'].min())} too short: where arrivals do not wait for answers, a small error of "
            "capacity becomes a large one of how many are there."
        )
    for group, row in tested[tested["tested"] >= MANY].iterrows():
        text += (
            f" {str(group).capitalize()}: 90 % of truths are expected between {row['low']:.2f} and {row['high']:.2f} "
            f"times the prediction; {_percent(row['covered'])} of {row['tested']:.0f} were inside such an interval of "
            "the other benchmarks."
        )
    silent = tested.index[tested["tested"] < MANY].str.cat(sep="; ")
    return text + (f" Too few points for a tested interval: {silent}." if silent else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
