"""How many tokens prompts have: paper 2's Fig. 2, and the same for paper 1, which has no figure of it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from erlib import config
from erlib.report import canvas
from erlib.report.canvas import BLUE, SKY


def paper1_input_tokens(lengths: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 1's base prompts: distribution of the number of input tokens.

    Parameters
    ----------
    lengths : DataFrame
        See :func:`paper2_input_tokens`.
    profile : Profile
    """
    of, sd = profile.workload.p1_input_tokens, profile.workload.p1_input_sd
    fig, counts = _draw(lengths, profile, "As in the paper (section IV)", 8)
    caption = (
        f"Input tokens of {len(lengths)} base prompts: {of} ± {sd:g} tokens, as the paper states (left), and what is "
        "sent on this machine, counted with the tokenizer of the model under test (right)."
        f"{canvas.scale(profile)}"
    )
    return canvas.save_and_close(
        *(fig, profile, "measured", "workbench", "paper1_input_tokens", counts, caption),
        "Paper 1, section IV (stated in the text, no figure)",
        notebook="02_workload",
        evidence="token counts, nothing was timed",
    )


def paper2_input_tokens(lengths: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 2: distribution of the number of input tokens.

    Parameters
    ----------
    lengths : DataFrame
        One row per prompt: ``input_tokens`` as sent here, ``paper_input_tokens`` the full-scale length it stands for.
    profile : Profile
    """
    fig, counts = _draw(lengths, profile, "As in the paper (MLPerf Llama-2-70B)", 32)
    caption = (
        f"Input tokens of {len(lengths)} prompts: lengths drawn from the empirical quantiles of MLPerf's Llama-2-70B "
        "data set, which is what the paper's test set mirrors (left), and what is sent on this machine, counted with "
        f"the tokenizer of the model under test (right).{canvas.scale(profile)}"
    )
    return canvas.save_and_close(
        *(fig, profile, "measured", "paper2", "fig02_input_tokens", counts, caption, "Paper 2, Fig. 2"),
        notebook="09_figures_paper2",
        evidence="token counts, nothing was timed",
    )


def _draw(lengths: pd.DataFrame, profile: config.Profile, title: str, width: int) -> tuple[Figure, pd.DataFrame]:
    """Histograms of the papers' lengths, `width` tokens a bar, and of this machine's; and the counts in them."""
    if lengths.empty or not {"input_tokens", "paper_input_tokens"} <= set(lengths.columns):
        raise ValueError("input lengths need rows with input_tokens and paper_input_tokens: run 02_workload first")
    divided = profile.scale.inputs
    panels = [
        (title, "paper_input_tokens", width, SKY),
        (f"On this machine (divided by {divided:g})", "input_tokens", max(1, round(width / divided)), BLUE),
    ]
    fig, axes = plt.subplots(1, 2)
    counts = []
    for ax, (name, column, step, colour) in zip(axes, panels, strict=True):
        values = lengths[column].to_numpy()
        count, edges = np.histogram(values, np.arange(values.min() - 0.5, values.max() + step + 0.5, step))
        sns.histplot(x=values, bins=edges, color=colour, alpha=0.85, linewidth=0, ax=ax)
        median = float(np.median(values))
        ax.axvline(median, color="#222222", linewidth=0.9, linestyle="--")
        ax.set(title=name, xlabel="input tokens", ylabel="prompts", xlim=(0, None))
        side = "right" if median > ax.get_xlim()[1] / 2 else "left"
        said = f" median {median:g}, mean {values.mean():.0f} "
        ax.text(median, ax.get_ylim()[1], said, va="top", ha=side, fontsize=7)
        counts.append(
            pd.DataFrame({"lengths": column, "from": edges[:-1] + 0.5, "to": edges[1:] + 0.5, "prompts": count})
        )
    return fig, pd.concat(counts)
