"""The engines of a machine without GPUs: what their formats cost and lose."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from erlib import config
from erlib.report import canvas
from erlib.report.canvas import BLUE


def engine_formats(measured: pd.DataFrame, profile: config.Profile) -> Figure:
    """Bits per weight, perplexity, and this CPU's tokens per second, by format.

    Parameters
    ----------
    measured : DataFrame
        What :func:`erlib.engines.measure_engines` returned.
    profile : Profile
    """
    sizes = profile.engines
    usual = measured[measured["kv_cache"] == "f16"]
    whole = usual[usual["perplexity"].notna()]
    serving = usual[usual["layers"].isin([sizes.large_layers, sizes.small_layers])]
    speeds = serving.set_index(serving["dtype"].str.upper() + ", " + serving["layers"].astype(str))
    speeds = speeds.filter(like="tokens_per_s_at_")
    speeds.columns = speeds.columns.str.replace("tokens_per_s_at_", "batch ")

    fig, (bits, loss, speed) = plt.subplots(1, 3, figsize=(7.2, 2.7), width_ratios=[1, 1, 1.7])
    formats = whole["dtype"].str.upper()
    bits.bar_label(bits.bar(formats, whole["bits_per_weight"], color=BLUE), fmt="%.1f")
    bits.set(title="Size on disk", ylabel="bits per weight, all included")
    above = 100 * (whole["perplexity_ratio"] - 1)
    loss.bar_label(loss.bar(formats, above, color=BLUE), fmt="%.1f")
    loss.set(title=f"Held-out text, {sizes.quality_layers} layers", ylabel="perplexity above FP16's [%]")
    speeds.plot.bar(ax=speed, rot=30, width=0.8)
    speed.set(title="This CPU's speed, not the formats'", ylabel="tokens/s", xlabel="format, layers")
    speed.set_ylim(0, 1.25 * speeds.max(axis=None))
    speed.legend(ncols=3, loc="upper left", fontsize=6, columnspacing=1)
    speed.set_xticks(range(len(speeds)), speeds.index, ha="right")
    for ax in (bits, loss):
        ax.margins(y=0.1)
    return canvas.save_and_close(
        *(fig, profile, "measured", "workbench", "engines", measured),
        caption="Laptop engines: bits per weight and perplexity against FP16 are the formats' own. A CPU stores low "
        "precision and computes in float32, so tokens per second (continuous batching, called directly, prefill "
        "included, one measurement each) are not the formats' speed.",
        reference="What stands for the models of both papers' Table I",
        notebook="03_engines",
        note="every engine computes in float32, whatever it stores: not the formats' speed",
    )
