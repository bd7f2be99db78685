"""Paper 1's figures."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from erlib import config
from erlib.load import metrics
from erlib.report import canvas
from erlib.report.canvas import GREY
from erlib.report.drawing import finish, load_records
from erlib.report.over_users import OverUsers, Panel, Turn, draw


def _ttft(turn: Turn, number: int) -> OverUsers:
    return OverUsers(
        "p1",
        f"fig0{number}_ttft_{turn}",
        (
            Panel("ttft_mean_s", f"Mean TTFT, {turn} prompt", "time to first token [s]", turn),
            Panel("ttft_sd_s", "TTFT: spread over users (sd)", "sd of time to first token [s]", turn),
        ),
        f"Time to first token of the {turn} prompt: mean over users (left) and standard deviation over users (right). "
        "The paper finds the tensor-parallel baseline A far below the routed systems B to D, for both prompts alike, "
        f"and less variance for the continuation prompt.{canvas.REPEATS}",
        log=True,
    )


def _tpot(turn: Turn, number: int) -> OverUsers:
    return OverUsers(
        "p1",
        f"fig0{number}_tpot_{turn}",
        (
            Panel("gap_median_s", f"Median TPOT (all gaps), {turn} prompt", "time per output token [s]", turn),
            Panel("tpot_mean_s", "Mean TPOT over users", turn=turn),
        ),
        f"Time per output token of the {turn} prompt: median of all gaps between consecutive tokens (left) and mean "
        "over users of (t_last - t_first) / (n - 1) (right). The paper's caption says median and its text average, so "
        "both are shown: A rises from about 0.1 s at 200 users to nearly 1 s at 1,000 while B to D stay near 0.1 "
        f"s.{canvas.REPEATS}",
        sharey=True,
    )


def _both_turns(metric: str, title: str, unit: str, bars: str | None = None) -> tuple[Panel, ...]:
    turns: tuple[Turn, ...] = ("base", "continuation")
    ylabel = f"{title[0].lower()}{title[1:]} [{unit}]"
    return tuple(Panel(metric, f"{title}, {turn} prompt", ylabel, turn, bars) for turn in turns)


TTFT: dict[Turn, OverUsers] = {"base": _ttft("base", 2), "continuation": _ttft("continuation", 3)}
TPOT: dict[Turn, OverUsers] = {"base": _tpot("base", 4), "continuation": _tpot("continuation", 5)}
USER_THROUGHPUT = OverUsers(
    "p1",
    "fig06_user_throughput",
    _both_turns("user_tokens_per_s_mean", "User throughput", "tokens/s", "user_tokens_per_s_sd"),
    "User throughput, an answer's tokens over the time from request to last token: mean over users, bars one standard "
    "deviation over users (as the paper defines it), averaged over repeats and cut at zero. The paper sees no clear "
    "difference between A and B to D for more than one user.",
    sharey=True,
    dodge=True,
)
P99_RESPONSE_TIME = OverUsers(
    "p1",
    "fig07_p99_response_time",
    _both_turns("response_p99_s", "p99 response time", "s"),
    "Response time that 99 % of the answers do not exceed (nearest rank: with fewer than 100 users the slowest "
    f"answer). The paper finds B to D below A between 200 and 900 users.{canvas.REPEATS}",
    sharey=True,
)
SESSION_THROUGHPUT = OverUsers(
    "p1",
    "fig08_session_throughput",
    _both_turns("session_tokens_per_s", "Session throughput", "tokens/s"),
    "Session throughput (Eq. 1-3): tokens of the users answered within the p99 response time, over the time from the "
    "first request to the last token among them. The paper finds B to D above A between 200 and 900 "
    f"users.{canvas.REPEATS}",
    sharey=True,
)


def paper1_ttft(
    records: pd.DataFrame, profile: config.Profile, turn: Turn, summary: pd.DataFrame | None = None
) -> Figure:
    """Paper 1, Fig. 2 (base) and Fig. 3 (continuation): time to first token over concurrent users."""
    return draw(TTFT[turn], records, profile, summary)


def paper1_tpot(
    records: pd.DataFrame, profile: config.Profile, turn: Turn, summary: pd.DataFrame | None = None
) -> Figure:
    """Paper 1, Fig. 4 (base) and Fig. 5 (continuation): time per output token over concurrent users."""
    return draw(TPOT[turn], records, profile, summary)


def paper1_user_throughput(
    records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None
) -> Figure:
    """Paper 1, Fig. 6: tokens per second as one user receives them, mean and sd over users."""
    return draw(USER_THROUGHPUT, records, profile, summary)


def paper1_p99_response_time(
    records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None
) -> Figure:
    """Paper 1, Fig. 7: 99th percentile of the response time."""
    return draw(P99_RESPONSE_TIME, records, profile, summary)


def paper1_session_throughput(
    records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None
) -> Figure:
    """Paper 1, Fig. 8: session throughput, Eq. 1-3."""
    return draw(SESSION_THROUGHPUT, records, profile, summary)


def paper1_bucket_throughput(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 1, Fig. 9: tokens per second over time, one panel per system, one line per number of users."""
    used = load_records(records, profile, "p1", "uniform")
    used = used[used["turn"] == "base"]
    width_s, widths = canvas.buckets(used, 60, profile)
    table = metrics.average_buckets(metrics.bucket_throughput(used, width_s))
    configs, levels = profile.paper1.configs, sorted(profile.paper1.users)
    colours = dict(zip(levels, plt.get_cmap("viridis_r")(np.linspace(0.12, 1, len(levels))), strict=True))
    columns = 3
    fig, axes = plt.subplots(
        math.ceil((len(configs) + 1) / columns), columns, sharex=True, sharey=True, figsize=(7.2, 4.6), squeeze=False
    )
    for ax, name in zip(axes.flat, configs, strict=False):
        for users, rows in table[table["config"] == name].groupby("users"):
            edges = width_s * np.arange(len(rows) + 1)
            ax.stairs(
                rows["tokens_per_s"], edges, color=colours[users], linewidth=1.4, label=canvas.level(users, profile)
            )
        colour = "black" if config.load_configuration(name).paper else GREY
        ax.set_title(canvas.name_of(name).replace(" (not in the paper)", ""), color=colour, fontsize=7.5)
        ax.tick_params(labelbottom=True)
    axes[0, 0].set(xlim=(0, None), ylim=(0, None))
    buckets = table.groupby(["config", "users"])["bucket"].max() + 1
    short = int((buckets < metrics.LEAST_BUCKETS).sum())
    unresolved = (
        f" {short} of {len(buckets)} runs last fewer than {metrics.LEAST_BUCKETS} buckets and show no course."
        if short
        else ""
    )
    rest = axes.flat[len(configs) :]
    for ax in rest:
        ax.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    rest[0].legend(handles, labels, loc="center left", title="Concurrent users", alignment="left")
    fig.supxlabel("time since the first request [s]", fontsize=8)
    fig.supylabel(f"tokens/s in buckets of {width_s:g} s", fontsize=8)
    caption = (
        f"Tokens per second in time buckets of {widths}, base prompt, mean over repeats; the last bucket of a run is "
        f"only partly filled.{unresolved} The paper's A has one peak and then declines, its B to D fluctuate between "
        "200 and 2,000 tokens/s for longer, and all ramp up first."
        f"{canvas.scale(profile)}{canvas.stand_ins(profile, configs)}"
    )
    return finish(fig, table, used, profile, "paper1", "fig09_bucket_throughput", caption=caption)
