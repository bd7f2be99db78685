"""What did the papers measure? Clients and classifiers, part by part."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erlib import config
from erlib.load import metrics
from erlib.paper_scale import ablation
from erlib.report import canvas, drawing
from erlib.report.canvas import BLUE, GREY, ORANGE, VERMILION
from erlib.report.own.overhead import PAPER_ROUTING_MS, SECTION_VI

ARM_LOOKS = {
    ("threads", "stock"): (VERMILION, "s", "-"),
    ("threads", "ours"): (VERMILION, "o", "--"),
    ("asyncio", "stock"): (BLUE, "s", "-"),
    ("asyncio", "ours"): (BLUE, "o", "--"),
}
"""Colour: the client. Marker and line: the router."""

PAPER_TPOT_MS = 100.0
"""What paper 1's Fig. 4 has for B to D at any number of users."""

PAPER_TOKENS_PER_S = (200.0, 2000.0)
"""Between these paper 1's Fig. 9 has B to D."""

CLIENTS = {"threads": "a thread per user", "asyncio": "asyncio"}

CLASSIFIERS = {"stock": "scikit-learn router", "ours": "this router"}


def harness_ablation(emulated: pd.DataFrame, engines_alone: pd.DataFrame, profile: config.Profile) -> Figure:
    """Gateway latency, TPOT and session throughput of four harnesses around the same engines, over users.

    Parameters
    ----------
    emulated : DataFrame
        Records of :func:`erlib.paper_scale.ablation.run_ablation`.
    engines_alone : DataFrame
        Records of the same points without a harness, in virtual time
        (:func:`erlib.paper_scale.emulation.simulated_beside`).
    profile : Profile
    """
    table = ablation.ablation_table(ablation.by_point(emulated))
    alone = metrics.aggregate(metrics.summarise(engines_alone)).assign(client="none", classifier="none", kept_pace=True)
    table = pd.concat([table, alone[alone["metric"].isin(ablation.METRICS)][table.columns]], ignore_index=True)
    panels = {
        "gateway_mean_s": ("Gateway latency", "mean [ms]", 1e3),
        "tpot_mean_s": ("TPOT", "mean [ms]", 1e3),
        "session_tokens_per_s": ("Session throughput", "tokens/s", 1.0),
        "client_cpu_us_per_token": ("Client's CPU per token", "µs", 1.0),
    }
    fig, grid = plt.subplots(2, 2, figsize=(7.2, 4.8))
    axes = grid.ravel()
    for ax, (metric, (title, ylabel, factor)) in zip(axes, panels.items(), strict=True):
        rows = table[table["metric"] == metric]
        for arm, look in ARM_LOOKS.items():
            _arm(ax, rows[(rows["client"] == arm[0]) & (rows["classifier"] == arm[1])], look, factor, _label(arm))
        ideal = rows[rows["client"] == "none"].sort_values("users")
        if len(ideal):
            ax.plot(ideal["users"], ideal["mean"] * factor, ":", color=GREY, label="the engines alone (simulated)")
        ax.set(title=title, ylabel=ylabel)
        canvas.user_axis(ax, sorted(table["users"].unique()), config.at_paper_scale(profile))
    mean, sd = PAPER_ROUTING_MS
    axes[0].axhspan(mean - sd, mean + sd, color=ORANGE, alpha=0.18, linewidth=0, label="papers: 442 ± 302 ms")
    canvas.log_axis(axes[0])
    unseen = "(clients with a thread per user see no spans)"
    axes[0].text(0.98, 0.04, unseen, transform=axes[0].transAxes, fontsize=6, ha="right")
    axes[1].axhline(PAPER_TPOT_MS, color=ORANGE, linewidth=1.2, label="papers: about 100 ms (paper 1, B to D)")
    axes[2].axhspan(
        *PAPER_TOKENS_PER_S, color=ORANGE, alpha=0.18, linewidth=0, label="papers: 200 to 2,000 tokens/s (B to D)"
    )
    canvas.from_zero(*axes[1:])
    handles: dict[str, Any] = {}
    for ax in (axes[1], axes[0], axes[2]):
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=3)
    settings = profile.ablation
    system = config.load_configuration(settings.config)
    caption = (
        f"What the harness does to {system.id} ({system.title}) on emulated H100s, in real time: one process with a "
        "thread and a tritonclient stream per user, as the papers describe, or asyncio processes; scikit-learn's "
        f"unpickled pipeline with {settings.terms:,} terms, or this workbench's router. Base prompts, answers of "
        f"{settings.output_tokens} tokens, {settings.gateways} gateways, {settings.repeats} repeats; bars: 95 % "
        "interval of the mean. Hollow: the machine did not keep the engines' pace, so that the lack of cores is part "
        "of what is seen. The gateway's spans are carried in metadata that tritonclient does not show."
    )
    return drawing.finish(
        fig, table, emulated, profile, "workbench", "harness_ablation", caption=caption, reference=SECTION_VI
    )


def _label(arm: tuple[str, str]) -> str:
    return f"{CLIENTS[arm[0]]}, {CLASSIFIERS[arm[1]]}"


def _arm(ax: Axes, rows: pd.DataFrame, look: tuple[str, str, str], factor: float, label: str) -> None:
    if rows.empty:
        return
    rows = rows.sort_values("users")
    colour, marker, style = look
    ax.errorbar(
        rows["users"], rows["mean"] * factor, rows["ci95"].fillna(0) * factor, c=colour, ls=style, elinewidth=0.7,
        marker="", label="_",
    )  # fmt: skip
    for kept, part in rows.groupby("kept_pace"):
        face = colour if kept else "white"
        ax.plot(part["users"], part["mean"] * factor, marker, mfc=face, mec=colour, label="_", ls="")
    ax.plot([], [], color=colour, marker=marker, ls=style, label=label)
