"""One question's answer: the two best designs side by side, and what all designs give for how early a first token."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from erlib import config
from erlib.paper_scale import decisions
from erlib.paper_scale.exploring import Answer
from erlib.paper_scale.questions import ADAPTERS, IN_TURN, ROUTED, Question
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, VERMILION

_KINDS = {IN_TURN: (BLUE, "o"), ROUTED: (VERMILION, "D"), ADAPTERS: (GREEN, "s")}


def two_best(answer: Answer, profile: config.Profile | None = None) -> Figure:
    """The two best designs: latencies, goodput, price and headroom, each with its 90 % interval and what is asked.

    Parameters
    ----------
    answer : Answer
    profile : Profile, optional
        Whose figure is saved; none: it is only drawn.
    """
    asked, best = answer.question, answer.best
    fig, axes = plt.subplots(1, 5, figsize=(9.6, 1.05 + 0.42 * len(best)), sharey=True)
    y = np.arange(len(best))[::-1]
    ttft, tpot, goodput, price, room = axes
    _marks(ttft, best, y, "ttft_mean_s", 1e3, 0.12, "mean")
    _marks(ttft, best, y, "ttft_p99_s", 1e3, -0.12, "p99", filled=False)
    _marks(tpot, best, y, "tpot_mean_s", 1e3, 0.12)
    _marks(tpot, best, y, "tpot_p99_s", 1e3, -0.12, filled=False)
    _marks(goodput, best, y, "goodput_per_s", 1.0)
    _marks(price, best, y, "price_per_million_tokens", 1.0)
    _marks(room, best, y, "headroom", 1.0)
    for ax, level_ms in ((ttft, 1e3 * asked.ttft_s), (tpot, 1e3 * asked.tpot_s)):
        _bound(ax, level_ms, f"bound {level_ms:,.4g}")
    if not asked.users:
        _bound(goodput, asked.rate_per_s, "asked")
    _bound(room, 1.0, "asked")
    ttft.set(title="TTFT", xlabel="ms")
    tpot.set(title="TPOT", xlabel="ms")
    goodput.set(title="Goodput", xlabel="requests/s within both")
    price.set(title="Price", xlabel="a million output tokens")
    room.set(title="Headroom", xlabel="times what is asked")
    ttft.set_yticks(y, [name.replace(", ", ",\n") for name in best["design"]])
    ttft.set_ylim(-0.5, len(best) - 0.5)
    for ax in axes:
        ax.set_xlim(0, 1.1 * ax.dataLim.x1)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.grid(axis="y", visible=False)
    canvas.legend(fig, ttft)
    caption = (
        f"The two best of {len(answer.table)} designs for {_asked(asked)}. "
        f"{' '.join(decisions.decision(answer))} {' '.join(decisions.limits(answer))}"
    )
    return _finished(fig, profile, "what_if_two_best", answer.table, caption, asked)


def frontier(table: pd.DataFrame, question: Question, profile: config.Profile | None = None) -> Figure:
    """Every design under growing load: goodput of each GPU against p99 TTFT; what no other design beats stands out.

    Parameters
    ----------
    table : DataFrame
        What :meth:`erlib.paper_scale.exploring.Explorer.frontier` returned.
    question : Question
    profile : Profile, optional
        Whose figure is saved; none: it is only drawn.
    """
    fig, ax = plt.subplots(figsize=(7.2, 3.6))
    best = table[table["on_frontier"]].sort_values("ttft_p99_s")
    for kind, (colour, marker) in _KINDS.items():
        for n, (_, its) in enumerate(table[table["kind"] == kind].groupby("design", sort=False)):
            label = kind if n == 0 else None
            ax.plot(
                1e3 * its["ttft_p99_s"],
                its["goodput_per_gpu"],
                color=colour,
                marker=marker,
                label=label,
                **canvas.FAINT,
            )
        its = best[best["kind"] == kind]
        ax.plot(1e3 * its["ttft_p99_s"], its["goodput_per_gpu"], color=colour, marker=marker, ms=5.5, ls="none")
    ax.step(1e3 * best["ttft_p99_s"], best["goodput_per_gpu"], where="post", color="black", lw=1, label="frontier")
    bound_ms = 1e3 * question.ttft_s
    ax.plot([], [], color=GREY, lw=0.8, ls=":", label=f"bound of TTFT, {bound_ms:,g} ms")
    ax.set(xlabel="p99 TTFT [ms]", ylabel="requests/s of each GPU\nwithin the service level", ylim=(0, None))
    for name, its in best.groupby("design", sort=False).last().iterrows():
        ax.annotate(
            name, (1e3 * its["ttft_p99_s"], its["goodput_per_gpu"]), (6, -3), textcoords="offset points",
            va="top", fontsize=6.5, bbox={"color": "white", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
    ax.set_xscale("log")
    if bound_ms < 4 * ax.dataLim.x1:  # what is beyond it counts for nothing
        ax.axvline(bound_ms, color=GREY, lw=0.8, ls=":")
        ax.set_xlim(None, 1.3 * bound_ms)
    else:
        ax.set_xlim(None, 1.6 * ax.dataLim.x1)
    canvas.log_axis(ax, "x")
    canvas.legend(fig, ax, columns=5)
    shares = ", ".join(f"{share:g}" for share in sorted({round(its, 2) for its in _shares(table)}))
    caption = (
        f"{table['design'].nunique()} designs for {_asked(question)}: how many requests per second each GPU serves "
        f"within both bounds, against p99 TTFT, under loads of {shares} times what arithmetic says is carried at "
        "most. Black: no design has more goodput and an earlier first token. One draw of prompts; engines only, and "
        "near saturation published latencies are several times as long as simulated ones (docs/results.md)."
    )
    return _finished(fig, profile, "what_if_frontier", table, caption, question)


def plan(table: pd.DataFrame, question: Question) -> Figure:
    """What every design carries at most, with its 90 % interval, beside what is asked.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.what_if.answered` returned.
    question : Question
    """
    shown = table[table["most"] > 0].iloc[::-1].reset_index(drop=True)
    fig, ax = plt.subplots(figsize=(7.2, 1.2 + 0.24 * len(shown)))
    for kind, (colour, marker) in _KINDS.items():
        its = shown[shown["kind"] == kind]
        ends = np.array([its["most"] - its["most_low"], its["most_high"] - its["most"]]).clip(min=0)
        if len(its):
            ax.errorbar(its["most"], its.index, xerr=ends, color=colour, marker=marker, ls="none", label=kind)
    ax.set_yticks(range(len(shown)), shown["design"])
    asked = question.users or question.rate_per_s
    ax.axvline(asked, color=GREY, lw=0.8, ls=":", label="asked")
    unit = "users" if question.users else "requests/s"
    ax.set(xlabel=f"most {unit} with p99 TTFT within {question.ttft_s:g} s and TPOT within {question.tpot_s:g} s")
    ax.set_xlim(0, None)
    ax.grid(axis="y", visible=False)
    canvas.legend(fig, ax, columns=4)
    said = f"{question.model} on {question.gpus} {question.its_gpu.said}, simulated"
    fig.text(0.005, -0.02, said, va="top", fontsize=6, color="#777777")
    plt.close(fig)
    return fig


def _shares(table: pd.DataFrame) -> pd.Series:
    """Loads as shares of each design's last one, which is all that it carries."""
    return table["load"] / table.groupby("design")["load"].transform("max")


def _marks(
    ax: Axes,
    best: pd.DataFrame,
    y: np.ndarray,
    metric: str,
    times: float,
    up: float = 0.0,
    label: str | None = None,
    filled: bool = True,
) -> None:
    for place, (_, row) in zip(y + up, best.iterrows(), strict=True):
        value, low, high = (times * row[f"{metric}{end}"] for end in ("", "_low", "_high"))
        ends = [[0.0], [0.0]] if math.isnan(low) else [[value - low], [high - value]]
        colour, marker = _KINDS[row["kind"]]
        ax.errorbar(
            [value], [place], xerr=ends, color=colour, marker=marker, markersize=4.5, elinewidth=1.3, ls="none",
            markerfacecolor=colour if filled else "white",
        )  # fmt: skip
    if label:
        ax.plot([], [], color=GREY, marker="o", ls="none", mfc=GREY if filled else "white", ms=4.5, label=label)


def _bound(ax: Axes, value: float, said: str) -> None:
    """A line at what is asked; where that is far beyond the marks, it is only said."""
    look: dict[str, Any] = {"va": "center", "fontsize": 6, "color": GREY}
    farthest = ax.dataLim.x1
    if value <= 4 * farthest:
        ax.axvline(value, color=GREY, lw=0.8, ls=":")
        side = "left" if value < farthest / 2 else "right"
        ax.text(value, 0.5, f" {said} ", ha=side, transform=ax.get_xaxis_transform(), **look)
    else:
        ax.text(1, 0.5, f"{said} →", ha="right", transform=ax.transAxes, **look)


def _asked(question: Question) -> str:
    """The question, in words."""
    own = f"a trace of {len(question.trace.arrival_s):,} requests" if question.trace is not None else ""
    lengths = own or f"paper {str(question.lengths)[1]}'s lengths"
    experts = f", {question.experts} experts" if question.experts else ""
    return (
        f"{question.model} on {question.gpus} GPUs ({question.its_gpu.said}), "
        f"{question.load}, {lengths}, the {question.spread} mix{experts}, p99 TTFT within {question.ttft_s:g} s and "
        f"TPOT within {question.tpot_s:g} s, {question.gpu_hour:g} for a GPU's hour"
    )


def _finished(
    fig: Figure, profile: config.Profile | None, slug: str, table: pd.DataFrame, caption: str, question: Question
) -> Figure:
    if profile is not None:
        canvas.save(
            *(fig, profile, "simulated-hardware", "workbench", slug, table, caption, NO_COUNTERPART),
            command=canvas.command(profile, "13_what_if"),
            host=f"{question.gpus} x {question.its_gpu.said}, in virtual time",
        )
    plt.close(fig)
    return fig
