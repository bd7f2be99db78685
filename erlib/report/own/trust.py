"""How far can the simulation be trusted?"""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erlib import config
from erlib.paper_scale import validation
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, ORANGE, PURPLE, SKY, VERMILION

PUBLISHED_LOOKS = {
    ("llama-3.1-8b", 1): ("8B, 1 GPU", GREEN, "v"),
    ("llama-3.1-70b", 1): ("70B, 1 GPU", VERMILION, "D"),
    ("llama-3.1-70b", 2): ("70B, 2 GPUs", ORANGE, "^"),
    ("llama-3.1-70b", 4): ("70B, 4 GPUs", SKY, "s"),
    ("llama-3.1-70b", 8): ("70B, 8 GPUs", BLUE, "o"),
}

ERROR_LOOKS = {
    "TTFT": (ORANGE, "D"),
    "TPOT": (BLUE, "o"),
    "p99 response time": (PURPLE, "s"),
    "throughput": (GREEN, "^"),
}


def _signed_percent(value: float, _: int) -> str:
    return f"{100 * value:+.0f}".replace("+0", "0").replace("-", "−")


def simulation_trust(
    published: pd.DataFrame,
    aisimulate: pd.DataFrame,
    predictions: pd.DataFrame,
    measured: pd.DataFrame,
    profile: config.Profile,
) -> Figure:
    """The simulation beside published throughputs, beside NVIDIA's simulator, and beside engines measured here.

    Parameters
    ----------
    published, aisimulate, predictions : DataFrame
        What ``published``, ``aisimulate`` and ``calibrated`` of :mod:`erlib.paper_scale.validation` return.
    measured : DataFrame
        The records behind `predictions`.
    profile : Profile
    """
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(7.2, 3.6), width_ratios=(1.2, 1, 1))
    _published(left, published)

    differences = aisimulate.rename(columns={"difference": "error"})
    bars = {
        name: 0.02 if same else 0.25 for name, same in zip(aisimulate["config"], aisimulate["same_prices"], strict=True)
    }
    _errors(middle, differences.replace({"metric": validation.AISIMULATE_METRICS}), bars)
    reach = 1.15 * max(0.3, differences["error"].abs().max())
    middle.xaxis.set_major_formatter(_signed_percent)
    middle.set(title="AISimulate, 200 users", xlabel="difference from AISimulate [%]", xlim=(-reach, reach))

    held_out = _listed(predictions["users"])
    bars = dict.fromkeys(measured["config"].unique(), validation.BAR)
    _errors(right, predictions.replace({"metric": validation.METRICS}), bars)
    reach = 1.15 * max(0.3, predictions["error"].abs().max()) if len(predictions) else 0.3
    right.xaxis.set_major_formatter(_signed_percent)
    right.set(
        title=f"Measured engines, {held_out or 'no'} users", xlabel="error of the prediction [%]", xlim=(-reach, reach)
    )
    if predictions.empty:
        right.text(0, (len(bars) - 1) / 2, "needs four user levels", ha="center", va="center", color=GREY)

    fig.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    fig.legend(*middle.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    hosts = " and ".join(sorted(measured["host"].unique()))
    caption = _caption(published, predictions, measured)
    panels = {"published": published, "aisimulate": aisimulate, "predicted": predictions}
    data = [frame.assign(panel=name) for name, frame in panels.items()]
    return canvas.save_and_close(
        *(fig, profile, "simulated-hardware", "workbench", "simulation_trust"),
        pd.concat(data, ignore_index=True),
        caption,
        NO_COUNTERPART,
        records=measured["point_hash"].unique().tolist(),
        notebook="07_paper_scale",
        host=hosts,
        evidence=f"simulated, beside published numbers, AISimulate and engines measured on {hosts}",
    )


def _caption(published: pd.DataFrame, predictions: pd.DataFrame, measured: pd.DataFrame) -> str:
    held_out = _listed(predictions["users"])
    known = _listed(set(measured["users"]) - set(predictions["users"]))
    off = 100 * published.groupby("weights")["ratio"].agg(validation.mape)
    return (
        "How far the simulation can be trusted. Left: output tokens per second of the whole system, simulated and as "
        "NVIDIA published them for TensorRT-LLM 0.17 on H100s (FP8, all requests at once). Mean absolute error over "
        f"{(published['weights'] == 'parameters').sum()} points: {off['parameters']:.1f} % if weights take a byte per "
        f"parameter, {off['loaded']:.1f} % if embedding and output layer are FP16 (hollow, where it matters). On one "
        "GPU, 70B leaves so little for the KV cache that an unpublished gigabyte decides. Middle: the papers' systems, "
        "200 users at once, relative to AISimulate, which prices steps with the same kernel measurements except for "
        f"{' and '.join(validation.OTHER_PRICES)}; grey: ±2 %, for these two ±25 %. Right: step times fitted to "
        f"{known} users of each configuration as measured here, then {held_out or 'no other'} users predicted; a mark "
        f"for every turn, mix and metric; grey: ±{100 * validation.BAR:.0f} %, line: by how much two repeats of a "
        "measurement differ, mean of the metrics."
    )


def _listed(levels: Iterable[int]) -> str:
    return ", ".join(str(level) for level in sorted(set(levels)))


def _published(ax: Axes, published: pd.DataFrame) -> None:
    """Simulated over published throughput, both readings of the weights' size."""
    keys = ["model", "tensor_parallel", "input_tokens", "output_tokens"]
    simulated = published.pivot_table(
        index=[*keys, "output_tokens_per_s"], columns="weights", values="simulated_tokens_per_s"
    )
    simulated = simulated.reset_index("output_tokens_per_s")
    for system, (label, colour, marker) in PUBLISHED_LOOKS.items():
        rows = simulated.loc[system]
        moved = rows[(rows["loaded"] / rows["parameters"] - 1).abs() > 0.01]
        ax.vlines(moved["output_tokens_per_s"], moved["loaded"], moved["parameters"], color=colour, linewidth=0.7)
        ax.plot(moved["output_tokens_per_s"], moved["loaded"], marker, mfc="white", mec=colour, ms=3.5, mew=0.7)
        ax.plot(rows["output_tokens_per_s"], rows["parameters"], marker, color=colour, ms=4, label=label)
    ends = [0.7 * published["output_tokens_per_s"].min(), 1.4 * published["output_tokens_per_s"].max()]
    ax.plot(ends, ends, color=GREY, linewidth=0.8, zorder=0)
    ax.set(
        xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="published [tokens/s]", ylabel="simulated [tokens/s]"
    )
    mape = published[published["weights"] == "parameters"]["ratio"].pipe(validation.mape)
    ax.set_title(f"Published throughput: {100 * mape:.0f} % off")


def _errors(ax: Axes, rows: pd.DataFrame, bars: dict[str, float]) -> None:
    """Errors of each metric, a row per configuration, over how large they may be."""
    names = sorted(bars)
    for place, name in enumerate(names):
        ax.barh(place, 2 * bars[name], left=-bars[name], height=0.8, color="#e9e9e9", linewidth=0, zorder=0)
        mine = rows[rows["config"] == name]
        if "between_repeats" in mine and len(mine):
            spread = mine["between_repeats"].mean()
            ax.hlines(place, -spread, spread, color=GREY, linewidth=0.9, zorder=1)
    above = np.linspace(-0.27, 0.27, len(ERROR_LOOKS))
    for (metric, (colour, marker)), shift in zip(ERROR_LOOKS.items(), above, strict=True):
        mine = rows[rows["metric"] == metric]
        ax.plot(mine["error"], mine["config"].map(names.index) + shift, marker, color=colour, ms=3, label=metric)
    ax.axvline(0, color=GREY, linewidth=0.6, zorder=0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
