"""What routing costs, span by span."""

from __future__ import annotations

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from erlib import config
from erlib.load import metrics
from erlib.provenance import MissingRecords
from erlib.report import canvas, drawing
from erlib.report.canvas import BLUE, GREEN, GREY, ORANGE, SKY

PAPER_ROUTING_MS = (442.0, 302.0)
"""Mean and sd of the routing latency that both papers state in section VI."""

SECTION_VI = "Papers 1 and 2, section VI (stated in the text, no figure)"

SPAN_NAMES = {
    "queue": "client to gateway",
    "vectorise": "vectorise (TF-IDF)",
    "svd": "SVD",
    "kmeans": "normalise, k-means",
    "forward": "forward to the expert",
}

RELAYS = {"front": ("NGINX relays", BLUE, ""), "gateway": ("gateway relays", GREEN, "////")}


def routing_overhead(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """What the gateway adds to a request, by number of users and span, beside the papers' 442 +- 302 ms."""
    sweep = profile.overhead
    wanted = product([sweep.config], ["uniform"], sweep.users)
    paper = config.paper_of(sweep.config)
    used = drawing.select(records, wanted, paper=paper, experiment="overhead", notebook="06_routing_overhead")
    table = metrics.routing_overhead(used)
    if table.empty:
        raise MissingRecords(
            f"no answered request of {sweep.config} went through a gateway: run 06_routing_overhead again"
        )
    levels = sorted(table["users"].unique())

    fig, (left, right) = plt.subplots(1, 2)
    mean, sd = PAPER_ROUTING_MS
    left.axhspan(mean - sd, mean + sd, color=ORANGE, alpha=0.18, linewidth=0)
    left.axhline(mean, color=ORANGE, linewidth=1.2, label=f"papers: {mean:.0f} ± {sd:.0f} ms")
    place, width = np.arange(len(levels)), 0.8 / len(RELAYS)
    for i, (relay, (who, colour, hatch)) in enumerate(RELAYS.items()):
        mine = table[table["relay"] == relay].set_index(["span", "users"])
        total = mine.loc["gateway"].reindex(levels)
        left.fill_between(levels, total["median_ms"], total["p99_ms"], color=colour, alpha=0.15, linewidth=0)
        left.plot(levels, total["mean_ms"], "o-", color=colour, label=f"{who}: mean")
        left.plot(levels, total["p99_ms"], ":", color=colour, linewidth=0.9, label=f"{who}: p99")
        bottom = np.zeros(len(levels))
        for (span, label), shade in zip(SPAN_NAMES.items(), (GREY, BLUE, SKY, GREEN, ORANGE), strict=True):
            height = mine.loc[span].reindex(levels)["mean_ms"].to_numpy()
            at = place + (i - (len(RELAYS) - 1) / 2) * width
            right.bar(at, height, 0.9 * width, bottom, color=shade, hatch=hatch, label="" if i else label)
            bottom += height
    left.set(title="Per request", ylabel="routing overhead [ms]")
    canvas.user_axis(left, levels, profile)
    canvas.log_axis(left)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    right.set(title="Mean, by span (hatched: the gateway relays)", ylabel="routing overhead [ms]")
    right.set_xlabel("concurrent users")
    right.set_xticks(place, [str(users) for users in levels])
    right.grid(axis="x", visible=False)
    fig.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    caption = (
        f"Routing overhead of {sweep.config}: what a request spends between the client's send and the prompt leaving "
        "the gateway for its expert, by number of users (left; the band reaches from median to p99) and split into "
        "spans (right), where NGINX relays the tokens and a gateway only decides, and where the gateway relays, as in "
        "the papers. Waiting for the expert's first token is not part of it, nor what relaying costs each token. Both "
        "papers state 442 ms with a standard deviation of 302 ms; paper 2 adds that it does not depend on the number "
        f"of users. Requests: {int(table[table['span'] == 'gateway']['requests'].sum())}."
    )
    return drawing.finish(
        fig, table, used, profile, "workbench", "routing_overhead", caption=caption, reference=SECTION_VI
    )
