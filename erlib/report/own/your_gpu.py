"""One GPU's step times beside an H100's, and eight such GPUs in virtual time."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from erlib import config
from erlib.paper_scale import your_gpu as measured
from erlib.paper_scale.steptimes import PARTS
from erlib.paper_scale.your_gpu import StepTable
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, ORANGE

_NAMES = {
    "dense": "matrices",
    "output": "output layer",
    "decode": "attention,\ndecoding",
    "prefill": "attention,\nprompts",
}
_PANELS = [
    ("tpot_mean_s", "TPOT [s]", "TPOT [s]"),
    ("session_tokens_per_s", "Throughput [tokens/s]", "tokens/s"),
]


def your_gpu(beside: pd.DataFrame, simulated: pd.DataFrame, table: StepTable, profile: config.Profile) -> Figure:
    """Every entry over the H100's, by part; TPOT and throughput of eight such GPUs over users, beside eight H100s.

    Parameters
    ----------
    beside, simulated : DataFrame
        What :func:`erlib.paper_scale.your_gpu.beside_h100` and :func:`~erlib.paper_scale.your_gpu.eight_of_them`
        returned.
    table : StepTable
        Whose step times these are.
    profile : Profile
        Whose figures this one stands beside.
    """
    name, short = profile.your_gpu.config, table.device.removeprefix("NVIDIA ")
    fig, (left, *right) = plt.subplots(1, 3, figsize=(7.2, 3.1), width_ratios=[1.5, 1, 1])
    _ratios(left, beside)
    left.set(title="Step times, by part", ylabel=f"{short} over H100")
    for ax, (metric, label, quantity) in zip(right, _PANELS, strict=True):
        printed = measured.reported().loc[quantity]
        low, high = float(printed["from"]), float(printed["to"])
        if low < high:
            ax.axhspan(low, high, color="#e9e9e9", linewidth=0, zorder=0)
        else:
            ax.axhline(low, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        ax.annotate("paper 1, B to D", (0.97, high), (0, -3), xycoords=("axes fraction", "data"),
                    textcoords="offset points", ha="right", va="top", fontsize=6.5, color=GREY)  # fmt: skip
        ax.plot(simulated["users"], simulated[metric], color=GREY, marker="s", mfc="white", label="8 × H100")
        ax.plot(simulated["users"], simulated[f"{metric}_measured"], color=GREEN, marker="o", label=f"8 × {short}")
        ax.set(xscale="log", yscale="log", xlabel="users", title=label)
        ax.xaxis.set_major_formatter(ScalarFormatter())
    right[0].yaxis.set_major_formatter("{x:g}")
    right[1].yaxis.set_major_formatter("{x:,.0f}")
    left.legend(loc="lower left", fontsize=6.5, title="beside", title_fontsize=6.5, alignment="left")
    right[0].legend(loc="center left", fontsize=6.5, title="simulated", title_fontsize=6.5, alignment="left")
    return canvas.save_and_close(
        *(fig, profile, "simulated-hardware", "workbench", "your_gpu"),
        simulated.assign(config=name),
        _caption(beside, simulated, table, name),
        NO_COUNTERPART,
        notebook="12_your_gpu",
        host="virtual time",
        evidence=f"step times: {table.label}; users in virtual time",
    )


def _ratios(ax: plt.Axes, beside: pd.DataFrame) -> None:
    """A column per part, every point in it, and the median as a line."""
    ax.axhline(1, color=GREY, linewidth=0.6, zorder=0)
    rng = np.random.default_rng(0)
    for against, colour, shift in zip(measured.H100_NAMES.values(), (BLUE, ORANGE), (-0.2, 0.2), strict=True):
        mine = beside[beside["beside"] == against]
        places = mine["part"].map(PARTS.index) + shift + rng.uniform(-0.12, 0.12, len(mine))
        ax.plot(places, mine["ratio"], linestyle="", marker="o", ms=2, alpha=0.35, mew=0, color=colour)
        ax.plot([], [], linestyle="", marker="o", ms=4, color=colour, label=against)
        for part, ratio in mine.groupby("part")["ratio"].median().items():
            place = PARTS.index(str(part)) + shift
            ax.plot([place - 0.16, place + 0.16], [ratio, ratio], color="black", linewidth=1.2)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_locator(NullLocator())
    low, high = min(0.35, beside["ratio"].min() * 0.6), max(2.0, beside["ratio"].max() * 1.1)
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_ylim(low, high)
    ax.set_xticks(range(len(PARTS)), [_NAMES[part] for part in PARTS], fontsize=6.5)
    ax.grid(axis="x", visible=False)


def _caption(beside: pd.DataFrame, simulated: pd.DataFrame, table: StepTable, name: str) -> str:
    medians = beside[beside["beside"] == measured.H100_NAMES["PyTorch"]].groupby("part")["ratio"].median()
    said = ", ".join(f"{_NAMES[part].replace(chr(10), ' ')} {medians[part]:.2f}" for part in PARTS if part in medians)
    most = simulated.loc[simulated["users"].idxmax()]
    own = "" if table.here else " It is not this machine's GPU."
    return (
        f"One GPU, and eight of it: {table.label}.{own} Left, every measured point over the H100's: against the same "
        f"script on an H100 (medians: {said}), and against NVIDIA's table, whose kernels are TensorRT-LLM's, so that "
        "kernels and cards differ; lines are medians. Attention of prompts is faster in the script than in the table, "
        f"on an H100, too. Right, {name} on eight such GPUs beside eight H100s of NVIDIA's table, simulated with "
        f"nothing but engines and users around; with {most['users']:,.0f} of these, TPOT is "
        f"{most['tpot_mean_s_ratio']:.2f} times and throughput {most['session_tokens_per_s_ratio']:.2f} times that of "
        "the H100s. Grey: what paper 1 prints of its routed systems on eight H100s with everything around them "
        "(TPOT of 0.1 s; 200 to 2,000 tokens/s); paper 2 prints no number for E."
    )
