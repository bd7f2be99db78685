"""Quality and load in one picture: what each way to serve experts loses in language, and what it carries."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from erlib import config
from erlib.machine import hardware
from erlib.paper_scale import adapter_steps, service_levels
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREEN, GREY, NO_COUNTERPART, VERMILION

_SPREADS = {
    "uniform": (GREEN, "o", "evenly"),
    "normal": (BLUE, "s", "as paper 2's normal mix"),
    "measured": (VERMILION, "D", "as the router spreads held-out texts"),
}


def quality_and_load(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """A row for every way to serve: language that it loses, requests that a GPU carries, p99 TTFT under most users.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.quality_and_load` returned.
    profile : Profile
    """
    users = int(table["users"].max())
    shown = table[table["users"] == users]
    names = list(dict.fromkeys(shown["design"]))
    place = {name: len(names) - 1 - i for i, name in enumerate(names)}
    fig, (lost, carried, late) = plt.subplots(1, 3, figsize=(9.6, 0.3 * len(names) + 1.3), sharey=True)
    for shift, (spread, (colour, marker, label)) in zip((0.2, 0, -0.2), _SPREADS.items(), strict=True):
        its = shown[shown["spread"] == spread]
        y = np.array([place[name] for name in its["design"]]) + shift
        ends = 100 * np.array([its["worse_by"] - its["ci95_low"], its["ci95_high"] - its["worse_by"]]).clip(min=0)
        look = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none"}
        lost.errorbar(100 * its["worse_by"], y, xerr=ends, elinewidth=1.2, **look, label=label)
        carried.plot(its["requests_per_s"] / its["gpus"], y, **look)
        late.plot(its["ttft_p99_s"], y, **look)
    lost.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
    lost.set_yticks(list(place.values()), list(place))
    lost.set(xlabel="bits per byte lost against\nexperts by prompt [%]", title="Language, measured")
    carried.set(xlabel="requests/s of each GPU\nwithin the service level", title="Load, simulated", xlim=(0, None))
    late.set(xlabel=f"p99 TTFT [s],\n{users:,} users at once", title="Latency, simulated", xlim=(0, None))
    for ax in (lost, carried, late):
        ax.grid(axis="y", visible=False)
    canvas.legend(fig, lost, columns=3)
    caption = (
        "What each way to serve eight experts trades. Left, measured with trained experts of the notebook's small "
        "model: loss of what follows a prompt of 32 tokens, by which the expert is chosen; requests that go elsewhere "
        "lose what another expert loses; bars are 95 % intervals. Middle and right, simulated: Llama 3 8B FP16 on "
        "eight H100s (paper 2's E), its prompts and answers, requests spread over the experts evenly, as in paper 2's "
        f"normal mix, or as the router spreads the held-out texts; p99 within MLPerf's {service_levels.TTFT_S:g} s "
        f"(TTFT) and {service_levels.TPOT_S:g} s (TPOT). Both sides are of different models: read orders, not "
        "products. With PyTorch's kernels, what adapters cost a step was measured on an H100 (rank "
        f"{adapter_steps.RANK}); engines have kernels of their own, for which factors of a step are assumed. One draw "
        "of prompts, one training seed."
    )
    return canvas.save_and_close(
        *(fig, profile, "simulated-hardware", "workbench", "quality_and_load", table, caption, NO_COUNTERPART),
        notebook="11_experts",
        host=f"8 x H100 in virtual time, preset hardware; language: {hardware.machine()}",
    )
