"""Replicas of hot experts, in virtual time and in real time."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from erlib import config
from erlib.paper_scale import replicas
from erlib.report import canvas, drawing
from erlib.report.canvas import BLUE, GREY, NO_COUNTERPART, ORANGE, SKY, VERMILION

REPLICA_METRICS = {
    "response_p99_s": ("p99 response time", "seconds"),
    "session_tokens_per_s": ("Session throughput", "tokens/s"),
}

SIMULATED = {"simulated-hardware": "simulated", "simulated-replay": "simulated, arrivals as emulated"}


def replicas_simulated(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """p99 and throughput of the normal mix against GPUs added, beside the uniform mix without any.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.replicas.run_replicas` returned.
    profile : Profile
    """
    configs, levels = sorted(table["config"].unique()), sorted(table["users"].unique())
    means = table.groupby(["config", "mix", "users", "added"])[[*REPLICA_METRICS]].mean()
    needed = replicas.gpus_needed(table)
    fig, grid = plt.subplots(len(configs), len(REPLICA_METRICS), figsize=(7.2, 2.4 * len(configs)), squeeze=False)
    shades = plt.get_cmap("viridis")(np.linspace(0.75, 0.1, len(levels)))
    for axes, name in zip(grid, configs, strict=True):
        for ax, (metric, (title, ylabel)) in zip(axes, REPLICA_METRICS.items(), strict=True):
            for users, colour in zip(levels, shades, strict=True):
                normal = means.loc[name, "normal", users][metric]
                ax.axhline(means.loc[name, "uniform", users][metric].item(), color=colour, linestyle=":", linewidth=1)
                ax.plot(normal.index, normal, "o-", color=colour, ms=3.5, label=f"{users:,} users")
                enough = needed.loc[(name, users), metric]
                if not pd.isna(enough):
                    ax.plot(enough, normal[enough], "o", ms=9, mfc="none", mec=colour, mew=1.2)
            system = canvas.name_of(name).partition(" (")[0]
            ax.set(title=f"{system}: {title[0].lower()}{title[1:]}", ylabel=ylabel)
            canvas.from_zero(ax)
            ax.set_xticks(normal.index)
    for ax in grid[-1]:
        ax.set_xlabel("GPUs added for replicas of the hottest experts")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    ring = plt.Line2D([], [], marker="o", mfc="none", mec=GREY, ms=9, ls="")
    handles += [plt.Line2D([], [], color=GREY, linestyle=":"), ring]
    labels += ["uniform mix, 8 GPUs", "first as good as that"]
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    caption = (
        f"How many replicas of the hottest experts bring paper 2's normal mix (width {profile.workload.sigma:g} "
        "clusters) to what the uniform mix gets from eight GPUs: p99 response time and session throughput of "
        "simulated H100s against GPUs added, one more engine each, to the expert with the most demand per engine; a "
        "prompt goes to the replica with the fewest requests outstanding. Both papers propose such replicas and try "
        f"none. Means over {table['repeat'].nunique()} repeats; engines only, no harness. With few users the longest "
        "answers decide p99, and replicas cannot shorten them."
    )
    return canvas.save_and_close(
        *(fig, profile, "simulated-hardware", "workbench", "replicas", table, caption, NO_COUNTERPART),
        notebook="06_routing_overhead",
        host="8 x H100 and those added, in virtual time",
    )


def replicas_emulated(table: pd.DataFrame, emulated: pd.DataFrame, profile: config.Profile) -> Figure:
    """The normal mix against GPUs added, emulated points over the simulation of the same points.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.replicas.replicas_beside_simulation` returned.
    emulated : DataFrame
        The records behind it.
    profile : Profile
    """
    levels, settings = sorted(table["users"].unique()), profile.replicas
    panels = REPLICA_METRICS | {"ttft_mean_s": ("Mean TTFT", "seconds")}
    fig, grid = plt.subplots(len(levels), len(panels), figsize=(7.2, 0.5 + 2.3 * len(levels)), squeeze=False)
    keys = ["source", "users", "mix", "added"]
    means = table.groupby(keys)[[*panels]].mean()
    kept = table.groupby(keys)["kept_pace"].all()
    enough = replicas.gpus_needed(table[table["source"] == "emulated"]).loc[settings.config]
    for axes, users in zip(grid, levels, strict=True):
        for ax, (metric, (title, ylabel)) in zip(axes, panels.items(), strict=True):
            for source, style in (("simulated-hardware", "-"), ("simulated-replay", "--")):
                curve, even = (means.loc[source, users, mix][metric] for mix in ("normal", "uniform"))
                ax.plot(curve.index, curve, style, color=SKY, label=f"normal mix, {SIMULATED[source]}")
                if source == "simulated-hardware":
                    ax.axhline(even.item(), color=ORANGE, label=f"uniform mix, {SIMULATED[source]}")
            even = means.loc["emulated", users, "uniform"][metric].item()
            ax.axhline(even, color=VERMILION, ls=":", lw=1.2, label="uniform mix, emulated")
            for added, value in means.loc["emulated", users, "normal"][metric].items():
                face = BLUE if kept.loc["emulated", users, "normal", added] else "white"
                ax.plot(added, value, "o", mfc=face, mec=BLUE, zorder=3)
            ax.plot([], [], "o", color=BLUE, label="normal mix, emulated")
            if not pd.isna(first := enough.loc[users, metric]):
                best = means.loc["emulated", users, "normal", first][metric]
                ax.plot(first, best, "o", ms=9, mfc="none", mec=BLUE, mew=1.2, zorder=3)
            ax.set(title=f"{title}, {users:,} users", ylabel=ylabel, xticks=settings.added)
            canvas.from_zero(ax)
    for ax in grid[-1]:
        ax.set_xlabel("GPUs added")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    ring = plt.Line2D([], [], marker="o", mfc="none", mec=BLUE, ms=9, ls="")
    fig.legend([*handles, ring], [*labels, "first as good as uniform"], loc="outside upper center", ncols=3)
    system = config.load_configuration(settings.config)
    caption = (
        f"Replicas on the real serving stack: {system.id} ({system.title}) as emulated H100s, one Triton server each, "
        f"behind {profile.serving.gateways} gateways and NGINX, in slow motion ({settings.slow_motion:g} wall seconds "
        f"for one of theirs). Answers of {settings.output_tokens} tokens, {settings.repeats} repeat"
        f"{'s' * (settings.repeats > 1)}. Lines: the same points in virtual time, where one gateway knows what all "
        "replicas are busy with; on the stack each counts its own requests only. Dashed: requests arrive as late as "
        f"they did here. Hollow: the engines' pace was not kept. {replicas.replicas_finding(table)}"
    )
    return drawing.finish(
        *(fig, table, emulated, profile, "workbench", "replicas"), caption=caption, reference=NO_COUNTERPART
    )
