"""Figures of "metric over concurrent users": each is declared, and one function draws them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erlib import config
from erlib.config import Paper
from erlib.load import metrics
from erlib.report import canvas
from erlib.report.drawing import finish, load_records, summarised

Turn = Literal["base", "continuation"]


@dataclass(frozen=True)
class Panel:
    """One metric over users, a line per system: means over repeats."""

    metric: str
    """Of :data:`erlib.load.metrics.METRICS`."""
    title: str
    ylabel: str = ""
    turn: Turn = "base"
    bars: str | None = None
    """The metric whose mean over repeats is the bars, e.g. a spread over users. None: one sd between repeats."""


@dataclass(frozen=True)
class OverUsers:
    """A row of panels; routed systems under one mix, the others under the one that they are measured with."""

    paper: Paper
    slug: str
    panels: tuple[Panel, ...]
    caption: str
    mix: config.Mix = "uniform"
    log: bool = False
    sharey: bool = False
    dodge: bool = False
    """Lines are moved apart sideways where long bars would cover each other."""


def draw(
    figure: OverUsers, records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None
) -> Figure:
    """Draw a declared figure and save it; `summary` is that of all records, if it is known.

    Raises
    ------
    MissingRecords
        If the records of a point are missing; the message names the notebook that makes them.
    """
    turns = {panel.turn for panel in figure.panels}

    def choose(frame: pd.DataFrame) -> pd.DataFrame:
        mine = load_records(frame, profile, figure.paper, figure.mix)
        return mine[mine["turn"].isin(turns)]

    used, summary = summarised(choose, records, summary)
    fig, axes = plt.subplots(1, len(figure.panels), sharey=figure.sharey, squeeze=False)
    for ax, panel in zip(axes[0], figure.panels, strict=True):
        systems(ax, summary[summary["turn"] == panel.turn], panel.metric, panel.bars, dodge=figure.dodge)
        ax.set(title=panel.title, ylabel="" if figure.sharey and ax is not axes[0, 0] else panel.ylabel)
        canvas.user_axis(ax, sorted(summary["users"].unique()), profile)
    for ax in axes[0]:  # only now, because a limit set on one shared axis would cut off what the next panel draws
        canvas.log_axis(ax) if figure.log else canvas.from_zero(ax)
    canvas.legend(fig, axes[0, 0])
    configs = (profile.paper1 if figure.paper == "p1" else profile.paper2).configs
    caption = f"{figure.caption}{canvas.scale(profile)}{canvas.stand_ins(profile, configs)}"
    name = f"paper{figure.paper[-1]}"
    return finish(fig, means(summary, figure.panels), used, profile, name, figure.slug, caption=caption)


def means(summary: pd.DataFrame, panels: Sequence[Panel]) -> pd.DataFrame:
    """The numbers that are drawn: mean and spread over repeats of each panel's metric, the latter its bars.

    Parameters
    ----------
    summary : DataFrame
        What :func:`erlib.load.metrics.summarise` returned.
    panels : sequence of Panel
    """
    table = metrics.aggregate(summary)
    bars = {panel.metric: panel.bars for panel in panels}
    plain = table[table["metric"].isin([name for name, bar in bars.items() if bar is None])].reset_index(drop=True)
    parts = [plain] if len(plain) else []
    keys = ["config", "mix", "users", "turn"]
    for name, bar in bars.items():
        if bar is not None:
            spread = table.loc[table["metric"] == bar, [*keys, "mean"]].rename(columns={"mean": "sd"})
            drawn = table[table["metric"] == name].drop(columns=["sd", "ci95"])
            parts.append(drawn.merge(spread, on=keys, validate="one_to_one"))
    return pd.concat(parts, ignore_index=True)


def systems(ax: Axes, summary: pd.DataFrame, metric: str, bars: str | None = None, *, dodge: bool = False) -> None:
    """A line for each configuration."""
    step = 0.008 * (summary["users"].max() - summary["users"].min()) if dodge else 0.0
    names = sorted(summary["config"].unique())
    for i, name in enumerate(names):
        mine = summary[summary["config"] == name]
        shift = step * (i - (len(names) - 1) / 2)
        line(ax, mine, metric, canvas.look(name), canvas.name_of(name), bars=bars, shift=shift)


BENEATH: dict[str, Any] = {"linewidth": 4.5, "alpha": 0.4, "zorder": 1.5}
"""Looks of our own baseline, which often coincides with the system it is made from: broad and pale, both are seen."""


def line(
    ax: Axes,
    summary: pd.DataFrame,
    metric: str,
    look: tuple[str, str],
    label: str,
    *,
    bars: str | None = None,
    shift: float = 0,
    **looks: Any,
) -> None:
    """One system over users: mean over repeats of `metric`, with bars.

    Parameters
    ----------
    ax : Axes
    summary : DataFrame
        Rows of the system, one per point and repeat: ``users`` and metrics.
    metric, bars
        See :class:`Panel`.
    look : (str, str)
        Colour and marker.
    label : str
        For the legend; empty: none.
    shift : float
        Of all points to the right, in users.
    **looks
        Of matplotlib's lines.
    """
    colour, marker = look
    if colour == canvas.GREY:
        looks = BENEATH | looks
    moved = summary.assign(users=summary["users"] + shift)
    over_repeats = moved.groupby("users")[metric].mean()
    if over_repeats.isna().all():  # its name belongs into the legend all the same
        ax.plot(over_repeats.index, over_repeats, color=colour, marker=marker, label=label or "_", **looks)
        return
    before = len(ax.lines)
    sns.lineplot(
        *(moved,),
        x="users",
        y=metric,
        errorbar=None if bars else "sd",
        err_style="bars",
        err_kws={"elinewidth": 0.7},
        color=colour,
        marker=marker,
        markeredgecolor=colour,
        label=label or "_",
        legend=False,
        ax=ax,
        **looks,
    )
    # seaborn would draw through a level at which nothing was answered
    ax.lines[before].set_data(over_repeats.index, over_repeats)
    if bars:
        over = moved.groupby("users")[[metric, bars]].mean()
        above = np.nan_to_num(over[bars])
        below = np.minimum(above, np.nan_to_num(over[metric]))  # nothing that is drawn here can be less than zero
        ax.errorbar(over.index, over[metric], [below, above], color=colour, ls="", elinewidth=0.7)
    ax.set(xlabel="", ylabel="")
