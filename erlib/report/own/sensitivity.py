"""Which unknown flips which conclusion, and what each system serves within a service level."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from erlib import config
from erlib.claims import flips
from erlib.claims.verdicts import FAILS, HOLDS, UNTOLD
from erlib.paper_scale.setups import UNKNOWNS
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, SKY, VERMILION

_COLOURS = {HOLDS: GREEN, FAILS: VERMILION, UNTOLD: GREY}


def _pale(colour: str) -> tuple[float, float, float]:
    red, green, blue = (0.75 + 0.25 * part for part in to_rgb(colour))
    return red, green, blue


def flipped_verdicts(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """A cell for each headline conclusion under each value of each unknown; what is flipped stands out.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.claims.flips.sensitivity` returned.
    profile : Profile
    """
    claims = list(dict.fromkeys(sorted(table["id"])))
    tried = {name: unknown for name, unknown in UNKNOWNS.items() if name in set(table["unknown"])}
    widths = [len(unknown.values) for unknown in tried.values()]
    fig, axes = plt.subplots(1, len(tried), figsize=(10, 3.9), width_ratios=widths, sharey=True, squeeze=False)
    colours = [_pale(colour) for colour in _COLOURS.values()] + [to_rgb(colour) for colour in _COLOURS.values()]
    order = {verdict: place for place, verdict in enumerate(_COLOURS)}
    code = table["verdict"].map(order) + len(order) * table["flips"]
    for ax, (name, unknown) in zip(axes[0], tried.items(), strict=True):
        mine = table.assign(code=code)[table["unknown"] == name]
        cells = mine.pivot(index="id", columns="value", values="code").reindex(claims)
        sns.heatmap(
            cells,
            ax=ax,
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            cbar=False,
            linewidths=1,
            linecolor="white",
            xticklabels=[f"{value:g}" for value in cells],
        )
        ax.set_title(textwrap.fill(unknown.title, max(13, 4 * len(unknown.values))), fontsize=6.5, fontweight="normal")
        ax.tick_params(length=0, labelsize=6.5)
        ax.tick_params(axis="x", rotation=90)
        ax.grid(False)
        ax.set(xlabel="", ylabel="")
        usual = mine.groupby("value")["default"].any()
        for label, default in zip(ax.get_xticklabels(), usual, strict=True):
            label.set_fontweight("bold" if default else "normal")
    said = [f"{flips.HEADLINES[claim]} ({claim})" for claim in claims]
    axes[0, 0].set_yticklabels(said, rotation=0)
    handles = [Patch(color=_pale(colour), label=f"{verdict}, as usual") for verdict, colour in _COLOURS.items()]
    handles += [Patch(color=colour, label=f"flips to: {verdict}") for verdict, colour in _COLOURS.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    settings = profile.sensitivity
    levels = " and ".join(map(str, settings.users))
    stands = flips.robust(table).drop(columns=["headline", "verdict"]).isin(["all", ""]).all(axis=1)
    caption = (
        "Which unknown flips which conclusion. Each cell is a headline claim, judged as the scorecard judges it, on "
        "eight simulated H100s with nothing around them, one number changed that both papers leave open; bold: its "
        f"usual value. {levels} users, means over {settings.repeats} repeats. No value that was tried flips "
        f"{', '.join(stands.index[stands]) or 'none'}. White: the unknown does not concern the paper, or the claim was "
        "not run."
    )
    return _saved(fig, profile, "sensitivity", table, caption)


def service_levels(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """Users, and tokens per GPU and hour, that each system serves within a service level.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.service_levels.goodput` returned.
    profile : Profile
    """
    panels = {
        "users_per_gpu": ("Users per GPU, all at once", "users"),
        "tokens_per_gpu_hour": ("Goodput, Poisson arrivals", "million tokens per GPU-hour"),
    }
    papers = {"p1": "paper 1's prompts,\n1,200 tokens each", "p2": "paper 2's prompts,\nMLPerf's lengths"}
    drawn = table.assign(tokens_per_gpu_hour=table["tokens_per_gpu_hour"] / 1e6)
    heights = [drawn.loc[drawn["paper"] == paper, "system"].nunique() for paper in papers]
    fig, grid = plt.subplots(2, 2, figsize=(7.2, 4.6), height_ratios=heights, sharey="row")
    for axes, (paper, said) in zip(grid, papers.items(), strict=True):
        mine = drawn[drawn["paper"] == paper]
        mine = mine.assign(own=mine["system"].isin(config.config_ids()), system=mine["system"].map(_title))
        for ax, (metric, (title, xlabel)) in zip(axes, panels.items(), strict=True):
            sns.barplot(
                mine,
                x=metric,
                y="system",
                hue="own",
                palette={True: BLUE, False: SKY},
                legend=False,
                errorbar="sd",
                err_kws={"linewidth": 1},
                ax=ax,
            )
            ax.set(title=title, xlabel=xlabel, ylabel="")
            ax.grid(axis="y", visible=False)
        axes[0].set_ylabel(said)
    ttft_s, tpot_s = table[["ttft_s", "tpot_s"]].iloc[0]
    window_s = profile.sensitivity.window_s
    handles = [Patch(color=BLUE, label="the papers'"), Patch(color=SKY, label="left out")]
    fig.legend(handles=handles, loc="outside upper right", ncols=2)
    caption = (
        "What eight simulated H100s serve within a service level: 99 % of the requests have their first token within "
        f"{ttft_s:g} s, and 99 % a mean time of at most {tpot_s:g} s per token after that. Left: the most users that "
        "may all ask in the same moment. Right: output tokens at the highest rate of Poisson arrivals, over "
        f"{window_s:g} s in paper 1 and {window_s / 2:g} s in paper 2. In turn: without classification, a request goes "
        f"to the next GPU. Means and sd over {table['repeat'].nunique()} repeats; searches end within a factor of "
        f"{profile.sensitivity.precision:g}. Engines only, and beside MLPerf's server scenario the simulated "
        "TPOT near saturation is two to four times too short (docs/results.md): upper bounds, good for comparing."
    )
    return _saved(fig, profile, "service_levels", table, caption)


def systems_frontier(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """Each system under growing load: goodput of each GPU against p99 TTFT, and what no other with its model beats.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.service_levels.under_load` returned.
    profile : Profile
    """
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 4.2))
    added = dict(zip(_left_out(table), _LOOKS_LEFT_OUT, strict=False))  # who serves nobody is not there
    for ax, (paper, mine) in zip(axes, table.groupby("paper", sort=False), strict=True):
        for name, its in mine.groupby("system", sort=False):
            colour, marker = added.get(name) or canvas.look(name)
            ax.plot(
                its["ttft_p99_s"],
                its["goodput_per_gpu"],
                color=colour,
                marker=marker,
                ls="--" if name in added else "-",
                lw=0.9,
                ms=3.5,
                alpha=0.7,
                label=_title(name),
            )
        label: str | None = "frontier of a model"
        for _, best in mine[mine["on_frontier"]].sort_values("ttft_p99_s").groupby("model"):
            ax.step(best["ttft_p99_s"], best["goodput_per_gpu"], where="post", color="black", lw=1.2, label=label)
            label = None
        ax.set(title=f"Paper {paper[-1]}'s prompts", xlabel="p99 TTFT [s]")
        canvas.log_axis(ax, "x")
        canvas.log_axis(ax, "y")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1, fontsize=6.5, frameon=False)
    axes[0].set_ylabel("requests/s of each GPU\nwithin the service level")
    caption = (
        "What eight simulated H100s serve within the service level of the figure before, against p99 TTFT, as "
        "more and more requests come as a Poisson process: from a tenth to 1.3 times of what each system carries. "
        "Black: no system with the same model has more goodput and an earlier first token. Dashed: systems that the "
        "papers left out. One draw of prompts; engines only, and near saturation published latencies are several times "
        "as long as simulated ones (docs/results.md): good for comparing."
    )
    return _saved(fig, profile, "systems_frontier", table, caption)


_LOOKS_LEFT_OUT = [("#000000", "*"), ("#8c510a", "h"), ("#332288", "<"), ("#882255", ">"), ("#44aa99", "p"), (SKY, "8")]


def _left_out(table: pd.DataFrame) -> list[str]:
    """Systems that no configuration of the papers is, in their order."""
    return [name for name in table["system"].unique() if name not in config.config_ids()]


def _title(name: str) -> str:
    return canvas.name_of(name) if name in config.config_ids() else name


def _saved(fig: Figure, profile: config.Profile, slug: str, table: pd.DataFrame, caption: str) -> Figure:
    return canvas.save_and_close(
        *(fig, profile, "simulated-hardware", "workbench", slug, table, caption, NO_COUNTERPART),
        notebook="07_paper_scale",
        host="8 x H100 in virtual time, preset hardware",
    )
