"""A tool's measurement, laid over what a simulation of the same requests says."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erlib import config
from erlib.load import other_tools
from erlib.load.other_tools import Measured
from erlib.report import canvas
from erlib.report.canvas import BLUE, NO_COUNTERPART, VERMILION

_TITLES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "response_s": "response time"}


def measured_beside_simulated(
    measured: Measured, run: str, simulated: pd.DataFrame, profile: config.Profile, measured_on: str = "an unnamed host"
) -> Figure:
    """How many requests take how long, measured by a tool and simulated; a panel for every metric.

    Parameters
    ----------
    measured : Measured
    run : str
        One of the file's. Of a file with a summary only, median and p99 are marked.
    simulated : DataFrame
        As :func:`erlib.paper_scale.replay.replay` returns it.
    profile : Profile
    measured_on : str
        What served the tool, which its file does not say.
    """
    table = other_tools.beside(measured, run, simulated)
    fig, axes = plt.subplots(1, len(_TITLES), figsize=(7.2, 2.6), sharey=True)
    of_run = measured.requests[measured.requests["run"] == run]
    for ax, (metric, title) in zip(axes, _TITLES.items(), strict=True):
        known = table[table["metric"] == metric].set_index("statistic")
        for which, requests, colour in (("measured", of_run, VERMILION), ("simulated", simulated, BLUE)):
            _steps(ax, requests[metric].dropna().to_numpy(float), colour, which)
            if len(known):
                marks = known.loc[["median", "p99"], which].to_numpy(float)
                ax.plot(marks, [0.5, 0.99], "o", color=colour, markersize=4)
        ax.set(title=title, xlabel="seconds", xlim=(0, None), ylim=(0, 1.02))
    axes[0].set_ylabel("share of the requests")
    canvas.legend(fig, axes[0], columns=2)
    config_name = ", ".join(simulated["config"].unique())
    caption = (
        f"Requests that {measured.tool} sent to {measured_on} ({run}), and the same requests at the same moments "
        f"simulated for {config_name}. Points are medians and p99. TPOT is (last - first) / (n - 1) in both. Not taken "
        f"from the file: {', '.join(measured.left_out)}."
    )
    return canvas.save_and_close(
        *(fig, profile, "simulated-hardware", "workbench", "measured_beside_simulated", table, caption, NO_COUNTERPART),
        host=measured_on,
        evidence=f"measured by {measured.tool} on {measured_on}, beside {config_name} simulated",
    )


def _steps(ax: Axes, values: np.ndarray, colour: str, label: str) -> None:
    """Nothing but a name in the legend, where there are no values."""
    ordered = np.sort(values)
    ax.step(ordered, (np.arange(len(ordered)) + 1) / max(1, len(ordered)), where="post", color=colour, label=label)
