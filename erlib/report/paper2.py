"""Paper 2's figures."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from erlib import config
from erlib.load import metrics
from erlib.report import canvas
from erlib.report.canvas import GREY, look
from erlib.report.drawing import finish, is_routed, load_records, select, summarised
from erlib.report.over_users import BENEATH, Panel, line, means, systems


def _preliminary(
    records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Mean response time by configuration, `best` marking the fastest batch size of its data type; points; records."""
    sweep = profile.preliminary
    names = [f"p2.{d}-tp{t}-bs{b}" for d, t, b in product(sweep.dtypes, (4, 8), sweep.batch_sizes)]
    wanted = set(product(names, ["uniform"], sweep.users))
    about = {"paper": "p2", "experiment": "preliminary", "notebook": "04_preliminary_sweep"}
    used, summary = summarised(lambda frame: select(frame, wanted, **about), records, summary)
    table = means(summary, [Panel("response_mean_s", "")])
    parts = table["config"].str.extract(r"p2\.(\w+)-tp(\d+)-bs(\d+)")
    table = table.assign(dtype=parts[0], tensor_parallel=parts[1].astype(int), batch_size=parts[2].astype(int))
    top = table[table["users"] == table["users"].max()]
    best = top.loc[top.groupby(["dtype", "tensor_parallel"])["mean"].idxmin(), "config"]
    return table.assign(best=table["config"].isin(best)), summary, used


def paper2_preliminary(records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None) -> Figure:
    """Paper 2, Fig. 3: response time over users, best batch size of each data type, TP=4 and TP=8."""
    table, summary, used = _preliminary(records, profile, summary)
    scaled = profile.scale.users != 1
    fig, axes = plt.subplots(1, 2, sharey=True)
    for ax, parallel in zip(axes, (4, 8), strict=True):
        for (dtype, batch, best, name), _ in table[table["tensor_parallel"] == parallel].groupby(
            ["dtype", "batch_size", "best", "config"]
        ):
            label = f"{dtype.upper()}, batch {batch}" + f" (here {profile.scaled_users(batch)})" * scaled
            mine, colours = summary[summary["config"] == name], canvas.DTYPE_LOOKS[dtype]
            line(ax, mine, "response_mean_s", colours, label if best else "", **({} if best else canvas.FAINT))
        ax.set_title(f"Mean response time, TP={parallel}" + (" (one instance)" if parallel == 4 else ""))
        canvas.user_axis(ax, sorted(table["users"].unique()), profile)
        ax.legend(loc="upper left", title="best batch size", alignment="left")
    canvas.from_zero(axes[0])
    axes[0].set_ylabel("mean response time [s]")
    instance = "TP=8 stands here for one engine on all cores, TP=4 for one engine on half of them."
    if profile.serving.backend == "tensorrt_llm":
        instance = "TP=8 is one instance of the 70B model on eight GPUs, TP=4 one instance on four."
    caption = (
        "Preliminary experiment: mean response time by data type and batch size. Bold: each data type's best batch "
        f"size, the one with the lowest response time at the most users; faint: the others. {instance} In the paper "
        "FP8 has a slight lead at TP=4 (best batch size 100), and at TP=8 FP16 and FP8 meet at 500 users (batch size "
        f"200) while FP8 is faster below.{canvas.REPEATS}{canvas.scale(profile)}"
    )
    return finish(fig, table, used, profile, "paper2", "fig03_preliminary", caption=caption)


def paper2_ttft(records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None) -> Figure:
    """Paper 2, Fig. 4: median time to first token over users, and its distribution at the most users."""
    text = (
        "Time to first token. The paper finds C lowest throughout, A to C below the routed 70B system D, E close to "
        "the baselines, and higher minima for D and E because of the gateway."
    )
    return _median_and_box(*(records, profile, summary, "ttft", "time to first token [s]", "fig04_ttft"), text=text)


def paper2_tpot(records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None) -> Figure:
    """Paper 2, Fig. 5: median time per output token over users, and its distribution at the most users."""
    text = (
        "Time per output token of an answer, (t_last - t_first) / (n - 1). The paper finds the routed 8B system E "
        "lowest, with the least variance, and the tensor-parallel baselines raised by communication."
    )
    return _median_and_box(*(records, profile, summary, "tpot", "time per output token [s]", "fig05_tpot"), text=text)


def _median_and_box(
    records: pd.DataFrame,
    profile: config.Profile,
    summary: pd.DataFrame | None,
    name: str,
    ylabel: str,
    slug: str,
    *,
    text: str,
) -> Figure:
    used, summary = summarised(lambda frame: load_records(frame, profile, "p2", "normal"), records, summary)
    table = means(summary, [Panel(f"{name}_median_s", "")])
    most = max(profile.paper2.users)
    done = metrics.answers(used[used["users"] == most])
    boxes = {c: done.loc[done["config"] == c, f"{name}_s"].dropna().to_numpy() for c in profile.paper2.configs}

    fig, (left, right) = plt.subplots(1, 2, width_ratios=[3, 2], figsize=(7.2, 3.5), sharey=True)
    systems(left, summary, f"{name}_median_s")
    left.set(title=f"Median {name.upper()} over users", ylabel=ylabel)
    canvas.user_axis(left, sorted(profile.paper2.users), profile)
    colours = {c: look(c)[0] for c in boxes}
    with warnings.catch_warnings():  # seaborn 0.13.2 calls boxes by a name that matplotlib 3.11 asks to give up
        warnings.simplefilter("ignore", mpl.MatplotlibDeprecationWarning)
        sns.boxplot(
            done,
            x="config",
            y=f"{name}_s",
            hue="config",
            order=list(boxes),
            palette=colours,
            saturation=1,
            whis=(0, 100),
            width=0.55,
            medianprops=dict(color="#222222", linewidth=1.1),
            whiskerprops=dict(color="#777777"),
            capprops=dict(color="#777777"),
            ax=right,
        )
    for system, drawn in zip((c for c in boxes if len(boxes[c])), right.patches, strict=True):
        drawn.set(facecolor=mpl.colors.to_rgba(colours[system], 0.45), edgecolor=colours[system])
    right.set_xticks(range(len(boxes)), [c[-1] for c in boxes])
    right.set(xlabel="", ylabel="")
    right.set_title(f"{name.upper()}, {most} users, min to max")
    right.grid(axis="x", visible=False)
    for ax in (left, right):
        canvas.log_axis(ax)
    canvas.legend(fig, left)

    spread = [
        dict(config=c, users=most, metric=f"{name}_s", statistic=statistic, value=float(np.quantile(values, q)))
        for c, values in boxes.items()
        if len(values)
        for statistic, q in zip(("min", "q1", "median", "q3", "max"), np.linspace(0, 1, 5), strict=True)
    ]
    data = pd.concat([table.assign(panel="median over users"), pd.DataFrame(spread).assign(panel="box")])
    caption = (
        f"{text} Left: median over users, normal mix; right: all answers of all repeats at {most} users, box "
        "from quartile to quartile, whiskers from minimum to "
        f"maximum.{canvas.REPEATS}{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper2.configs)}"
    )
    return finish(fig, data, used, profile, "paper2", slug, caption=caption)


def paper2_user_throughput_p99(
    records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame | None = None
) -> Figure:
    """Paper 2, Fig. 6: user throughput (I) and p99 response time (II), routed systems under both mixes."""
    configs = profile.paper2.configs
    panels = [
        Panel("user_tokens_per_s_mean", "I) User throughput", "tokens/s per user", bars="user_tokens_per_s_sd"),
        Panel("response_p99_s", "II) p99 response time", "seconds"),
    ]
    used, summary = summarised(lambda frame: load_records(frame, profile, "p2", "normal", "uniform"), records, summary)
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.6))
    for ax, panel in zip(axes, panels, strict=True):
        lines = [
            (name, mix) for name in configs for mix in sorted(summary.loc[summary["config"] == name, "mix"].unique())
        ]
        for i, (name, mix) in enumerate(lines):
            rows = summary[(summary["config"] == name) & (summary["mix"] == mix)]
            shift = 0.008 * (i - (len(lines) - 1) / 2) * max(profile.paper2.users) if panel.bars else 0
            uniform = is_routed(name) and mix == "uniform"
            hollow: dict[str, Any] = dict(linestyle=":", markerfacecolor="white") if uniform else {}
            label = canvas.name_of(name) + (f", {mix}" if is_routed(name) else "")
            line(ax, rows, panel.metric, look(name), label, bars=panel.bars, shift=shift, **hollow)
        ax.set(title=panel.title, ylabel=panel.ylabel)
        canvas.user_axis(ax, sorted(profile.paper2.users), profile)
    canvas.from_zero(*axes)
    canvas.legend(fig, axes[0])
    data = pd.concat([means(summary, [panel]) for panel in panels])
    caption = (
        "I) user throughput, mean over users with bars of one standard deviation over users, cut at zero; II) response "
        "time that 99 % of the answers do not exceed (nearest rank), bars one standard deviation between repeats. The "
        "routed systems D and E are shown under the normal and the uniform mix; to the others, which do not look at "
        "clusters, the mix is the same. In the paper the mix hardly matters, E leads user throughput up to 800 users, "
        f"and C has the lowest p99 at many users.{canvas.scale(profile)}{canvas.stand_ins(profile, configs)}"
    )
    return finish(fig, data, used, profile, "paper2", "fig06_user_throughput_p99", caption=caption)


MEAN: dict[str, Any] = {"marker": "<", "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.5}
"""Looks of a mean over time, at the right edge."""


def paper2_system_throughput(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 7: tokens per second over time at the levels that stand for 200, 600 and 1,000 users."""
    levels = sorted(
        {min(profile.paper2.users, key=lambda level: abs(level - p / profile.scale.users)) for p in (200, 600, 1000)}
    )
    used = load_records(records, profile, "p2", "normal")
    used = used[used["users"].isin(levels)]
    width_s, widths = canvas.buckets(used, 2, profile)
    buckets = metrics.bucket_throughput(used, width_s)
    table = metrics.average_buckets(buckets)
    means = buckets.groupby(["config", "users", "repeat"])["tokens_per_s"].mean().groupby(["config", "users"]).mean()

    fig, axes = plt.subplots(1, len(levels), figsize=(7.2, 3.4), squeeze=False)
    for ax, users in zip(axes[0], levels, strict=True):
        here = table[table["users"] == users]
        window = max(1, round(here["bucket"].max() / 30))
        for name, rows in here.groupby("config"):
            colour = look(name)[0]
            looks = BENEATH if colour == GREY else {"linewidth": 1.2}
            t_s = np.append(rows["t_s"] + width_s / 2, rows["t_s"].max() + width_s)  # when it has ended
            smooth = rows["tokens_per_s"].rolling(window, center=True, min_periods=1).mean()
            ax.plot(t_s[:-1], rows["tokens_per_s"], color=colour, linewidth=0.4, alpha=0.25)
            ax.plot(t_s, np.append(smooth, 0), color=colour, label=canvas.name_of(name), **looks)
            ax.plot(*(0.97, means[name, users]), color=colour, transform=ax.get_yaxis_transform(), **MEAN)
        ax.plot([], [], color=GREY, label="mean over the run's buckets", linestyle="", **MEAN)
        ax.set(xlabel="time since the first request [s]", xlim=(0, None), ylim=(0, None))
        ax.set_title(f"Throughput,\n{canvas.level(users, profile, unit=' users')}")
    axes[0, 0].set_ylabel(f"tokens/s in buckets of {width_s:.2g} s")
    canvas.legend(fig, axes[0, 0])
    data = pd.concat([table.assign(what="bucket"), means.reset_index().assign(what="mean over buckets")])
    caption = (
        f"System throughput over time, normal mix: tokens in buckets of {widths}, mean over repeats (thin), their "
        "running mean over a thirtieth of the time shown "
        "(bold), down to zero where it ends, and the mean over all buckets of a run (triangles on the right). The "
        "levels are those here that are nearest to the paper's 200, 600 and 1,000 users. In the paper E follows C at "
        "200 and 600 users and falls behind at 1,000, and D has the lowest peak and "
        f"mean.{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper2.configs)}"
    )
    return finish(fig, data, used, profile, "paper2", "fig07_system_throughput", caption=caption)
