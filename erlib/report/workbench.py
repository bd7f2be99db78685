"""The workbench's own experiments, drawn: what routing costs, what the papers' harness does, what to trust.

As in :mod:`erlib.report.figures`, a function draws one item from records, saves it and returns it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erlib import config
from erlib.load import metrics
from erlib.paper_scale import ablation, replicas, validation
from erlib.provenance import MissingRecords
from erlib.report import canvas, figures
from erlib.report.canvas import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from erlib.routing import comparison

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
    paper = sweep.config.split(".")[0]
    used = figures.select(records, wanted, paper=paper, experiment="overhead", notebook="06_routing_overhead")
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
    return figures.finish(
        fig, table, used, profile, "workbench", "routing_overhead", caption=caption, reference=SECTION_VI
    )


# --- other routers, more replicas --------------------------------------------------------------------------------

NO_COUNTERPART = "Workbench: the papers have no counterpart"
CHANGE_LOOKS = {
    "dropped_words": ("a tenth of the words dropped", BLUE, "o"),
    "reordered": ("passages reordered", SKY, "s"),
    "typos": ("typing errors in a tenth of the words", GREEN, "^"),
    "growth": ("prompt and answer, 250 to 1,150 words", VERMILION, "D"),
    "growth_short": ("prompt and answer, 35 to 935 words", ORANGE, "v"),
}


def router_comparison(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """Routers beside each other: agreement with topics, balance, stability, latency.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.routing.comparison.of_profile` returned.
    profile : Profile
    """
    fig, grid = plt.subplots(2, 2, figsize=(7.2, 5.2), sharey=True)
    agreement, balanced, kept, latency = grid.ravel()
    place = np.arange(len(table))
    for shift, (metric, label, colour) in zip(
        (-0.19, 0.19), (("nmi", "NMI", BLUE), ("purity", "purity", SKY)), strict=True
    ):
        values = table[metric] if metric in table else np.full(len(table), np.nan)
        agreement.barh(place + shift, values, height=0.36, color=colour, label=label)
    agreement.set(title="Agreement with topics", xlim=(0, 1))
    agreement.legend(loc="lower right")

    balanced.axvline(1, color=GREY, linewidth=0.8, zorder=0)
    balanced.hlines(place, table["smallest"], table["largest"], color=PURPLE, linewidth=2)
    balanced.plot(table["smallest"], place, "<", color=PURPLE, label="smallest")
    balanced.plot(table["largest"], place, ">", color=PURPLE, label="largest")
    balanced.set(title="Balance: requests over the mean", xlim=(0, None))
    balanced.legend(loc="lower left")

    n_experts = profile.clusterer.n_clusters
    kept.axvline(100 / n_experts, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    for change, (label, colour, marker) in CHANGE_LOOKS.items():
        kept.plot(100 * table[change], place, marker, color=colour, label=label, ls="", clip_on=False)
    kept.set(title="Stability: prompts that stay [%]", xlim=(0, 100))

    dodge = dict(zip(comparison.LATENCY_WORDS, (-0.25, 0.0, 0.25), strict=True))
    for (words, shift), colour in zip(dodge.items(), (SKY, BLUE, PURPLE), strict=True):
        middle, most = table[f"p50_ms_{words}"], table[f"p99_ms_{words}"]
        latency.hlines(place + shift, middle, most, color=colour, linewidth=1.1)
        latency.plot(middle, place + shift, "o", color=colour, label=f"{words:,} words", ms=4)
    latency.set(title="Latency of a decision, p50 to p99 [ms]", xscale="log")
    latency.legend(loc="lower right")

    for ax in grid.ravel():
        for row in place[table["reason"] != ""]:
            ax.text(0.03, row, "not there", transform=ax.get_yaxis_transform(), va="center", color=GREY, fontsize=6.5)
        ax.grid(axis="y", visible=False)
    agreement.set_yticks(place, [comparison.NAMES[name].replace(", ", ",\n", 1) for name in table["router"]])
    agreement.set_ylim(len(table) - 0.5, -0.5)
    fig.legend(*kept.get_legend_handles_labels(), title="Stability under", loc="outside upper center", ncols=3)
    missing = table.loc[table["reason"] != "", "reason"].unique()
    tried = table[table["reason"] == ""].iloc[0]
    caption = (
        f"Routers behind the same gateway, {n_experts} experts, {tried['documents']:.0f} held-out documents. Agreement "
        "with the corpus' topics, which cannot be complete where topics are more than experts; nearest examples have "
        "been told the topics of training documents, k-means has not. Stability: the same text changed by rule, no "
        "model paraphrases; passages are "
        f"{comparison.PASSAGE_WORDS} words long; an answer is the text by which the document goes on "
        f"({tried['conversations_growth']:.0f} conversations that begin with 250 words, "
        f"{tried['conversations_growth_short']:.0f} that begin with 35). Dotted: chance. The sentence embedding reads "
        "256 word pieces and no more, so that a long prompt cannot move it by growing. Latency: one thread, one prompt "
        f"at a time, {profile.routers.prompts} prompts each, without network or queue; for least loaded all experts "
        f"are equally idle.{' Not there: ' + '; '.join(missing) + '.' if len(missing) else ''}"
    )
    canvas.save(
        *(fig, profile.name, "measured", "workbench", "router_comparison", table, caption, NO_COUNTERPART),
        command=canvas.command(profile, "06_routing_overhead"),
    )
    plt.close(fig)
    return fig


REPLICA_METRICS = {
    "response_p99_s": ("P99 response time", "seconds"),
    "session_tokens_per_s": ("Session throughput", "tokens/s"),
}
SIMULATED = {"simulated-hardware": "simulated", "simulated-replay": "simulated, arrivals as emulated"}


def replicas_simulated(table: pd.DataFrame, profile: config.Profile) -> Figure:
    """p99 and throughput of the normal mix against GPUs added, beside the uniform mix without any.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.replicas.run` returned.
    profile : Profile
    """
    configs, levels = sorted(table["config"].unique()), sorted(table["users"].unique())
    means = table.groupby(["config", "mix", "users", "added"])[[*REPLICA_METRICS]].mean()
    needed = replicas.needed(table)
    fig, grid = plt.subplots(len(configs), len(REPLICA_METRICS), figsize=(7.2, 2.4 * len(configs)), squeeze=False)
    shades = plt.get_cmap("viridis")(np.linspace(0.75, 0.1, len(levels)))
    for axes, name in zip(grid, configs, strict=True):
        for ax, (metric, (title, ylabel)) in zip(axes, REPLICA_METRICS.items(), strict=True):
            for users, colour in zip(levels, shades, strict=True):
                normal = means.loc[name, "normal", users][metric]
                ax.axhline(means.loc[name, "uniform", users][metric].item(), color=colour, linestyle=":", linewidth=1)
                ax.plot(normal.index, normal, "o-", color=colour, ms=3.5, label=f"{users:,} users")
                enough = needed.loc[(name, users), metric]
                if not pd.isna(enough):
                    ax.plot(enough, normal[enough], "o", ms=9, mfc="none", mec=colour, mew=1.2)
            system = canvas.name_of(name).partition(" (")[0]
            ax.set(title=f"{system}: {title[0].lower()}{title[1:]}", ylabel=ylabel, ylim=(0, None))
            ax.set_xticks(normal.index)
    for ax in grid[-1]:
        ax.set_xlabel("GPUs added for replicas of the hottest experts")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    ring = plt.Line2D([], [], marker="o", mfc="none", mec=GREY, ms=9, ls="")
    handles += [plt.Line2D([], [], color=GREY, linestyle=":"), ring]
    labels += ["uniform mix, 8 GPUs", "first as good as that"]
    fig.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    caption = (
        f"How many replicas of the hottest experts bring paper 2's normal mix (width {profile.workload.sigma:g} "
        "clusters) to what the uniform mix gets from eight GPUs: p99 response time and session throughput of "
        "simulated H100s against GPUs added, one more engine each, to the expert with the most demand per engine; a "
        "prompt goes to the replica with the fewest requests outstanding. Both papers propose such replicas and try "
        f"none. Means over {table['repeat'].nunique()} repeats; engines only, no harness. With few users the longest "
        "answers decide p99, and replicas cannot shorten them."
    )
    canvas.save(
        *(fig, profile.name, "simulated-hardware", "workbench", "replicas", table, caption, NO_COUNTERPART),
        command=canvas.command(profile, "06_routing_overhead"),
        host="8 x H100 and those added, in virtual time",
    )
    plt.close(fig)
    return fig


def replicas_emulated(table: pd.DataFrame, emulated: pd.DataFrame, profile: config.Profile) -> Figure:
    """The normal mix against GPUs added, emulated points over the simulation of the same points.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.paper_scale.replicas.beside_simulation` returned.
    emulated : DataFrame
        The records behind it.
    profile : Profile
    """
    levels, settings = sorted(table["users"].unique()), profile.replicas
    panels = REPLICA_METRICS | {"ttft_mean_s": ("Mean TTFT", "seconds")}
    fig, grid = plt.subplots(len(levels), len(panels), figsize=(7.2, 0.5 + 2.3 * len(levels)), squeeze=False)
    keys = ["source", "users", "mix", "added"]
    means = table.groupby(keys)[[*panels]].mean()
    kept = table.groupby(keys)["kept_pace"].all()
    enough = replicas.needed(table[table["source"] == "emulated"]).loc[settings.config]
    for axes, users in zip(grid, levels, strict=True):
        for ax, (metric, (title, ylabel)) in zip(axes, panels.items(), strict=True):
            for source, style in (("simulated-hardware", "-"), ("simulated-replay", "--")):
                curve, even = (means.loc[source, users, mix][metric] for mix in ("normal", "uniform"))
                ax.plot(curve.index, curve, style, color=SKY, label=f"normal mix, {SIMULATED[source]}")
                if source == "simulated-hardware":
                    ax.axhline(even.item(), color=ORANGE, label=f"uniform mix, {SIMULATED[source]}")
            even = means.loc["emulated", users, "uniform"][metric].item()
            ax.axhline(even, color=VERMILION, ls=":", lw=1.2, label="uniform mix, emulated")
            for added, value in means.loc["emulated", users, "normal"][metric].items():
                face = BLUE if kept.loc["emulated", users, "normal", added] else "white"
                ax.plot(added, value, "o", mfc=face, mec=BLUE, zorder=3)
            ax.plot([], [], "o", color=BLUE, label="normal mix, emulated")
            if not pd.isna(first := enough.loc[users, metric]):
                best = means.loc["emulated", users, "normal", first][metric]
                ax.plot(first, best, "o", ms=9, mfc="none", mec=BLUE, mew=1.2, zorder=3)
            ax.set(title=title, ylabel=ylabel, ylim=(0, None), xticks=settings.added)
        axes[-1].set_title(f"{users:,} users", loc="right", fontweight="normal", color=GREY)
    for ax in grid[-1]:
        ax.set_xlabel("GPUs added")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    ring = plt.Line2D([], [], marker="o", mfc="none", mec=BLUE, ms=9, ls="")
    fig.legend([*handles, ring], [*labels, "first as good as uniform"], loc="outside upper center", ncols=3)
    system = config.load_configuration(settings.config)
    caption = (
        f"Replicas on the real serving stack: {system.id} ({system.title}) as emulated H100s, one Triton server each, "
        f"behind {profile.serving.gateways} gateways and NGINX, in slow motion ({settings.slow_motion:g} wall seconds "
        f"for one of theirs). Answers of {settings.output_tokens} tokens, {settings.repeats} repeat"
        f"{'s' * (settings.repeats > 1)}. Lines: the same points in virtual time, where one gateway knows what all "
        "replicas are busy with; on the stack each counts its own requests only. Dashed: requests arrive as late as "
        f"they did here. Hollow: the engines' pace was not kept. {replicas.finding(table)}"
    )
    return figures.finish(
        *(fig, table, emulated, profile, "workbench", "replicas"), caption=caption, reference=NO_COUNTERPART
    )


# --- what did the papers measure? -------------------------------------------------------------------------------

ARM_LOOKS = {
    ("threads", "stock"): (VERMILION, "s", "-"),
    ("threads", "ours"): (VERMILION, "o", "--"),
    ("asyncio", "stock"): (BLUE, "s", "-"),
    ("asyncio", "ours"): (BLUE, "o", "--"),
}
"""Colour: the client. Marker and line: the router."""
CLIENTS = {"threads": "a thread per user", "asyncio": "asyncio"}
CLASSIFIERS = {"stock": "scikit-learn router", "ours": "this router"}


def harness_ablation(emulated: pd.DataFrame, engines_alone: pd.DataFrame, profile: config.Profile) -> Figure:
    """Gateway latency, TPOT and session throughput of four harnesses around the same engines, over users.

    Parameters
    ----------
    emulated : DataFrame
        Records of :func:`erlib.paper_scale.ablation.run`.
    engines_alone : DataFrame
        Records of the same points without a harness, in virtual time (:func:`erlib.paper_scale.emulation.simulated`).
    profile : Profile
    """
    table = ablation.table(ablation.by_point(emulated))
    alone = metrics.aggregate(metrics.summarise(engines_alone)).assign(client="none", classifier="none", kept_pace=True)
    table = pd.concat([table, alone[alone["metric"].isin(ablation.METRICS)][table.columns]], ignore_index=True)
    panels = {
        "gateway_mean_s": ("Gateway latency", "mean [ms]", 1e3),
        "tpot_mean_s": ("TPOT", "mean [ms]", 1e3),
        "session_tokens_per_s": ("Session throughput", "tokens/s", 1.0),
        "client_cpu_us_per_token": ("Client's CPU per token", "µs", 1.0),
    }
    fig, grid = plt.subplots(2, 2, figsize=(7.2, 4.8))
    axes = grid.ravel()
    for ax, (metric, (title, ylabel, factor)) in zip(axes, panels.items(), strict=True):
        rows = table[table["metric"] == metric]
        for arm, look in ARM_LOOKS.items():
            _arm(ax, rows[(rows["client"] == arm[0]) & (rows["classifier"] == arm[1])], look, factor, _label(arm))
        ideal = rows[rows["client"] == "none"].sort_values("users")
        if len(ideal):
            ax.plot(ideal["users"], ideal["mean"] * factor, ":", color=GREY, label="the engines alone (simulated)")
        ax.set(title=title, ylabel=ylabel)
        canvas.user_axis(ax, sorted(table["users"].unique()), config.at_paper_scale(profile))
    mean, sd = PAPER_ROUTING_MS
    axes[0].axhspan(mean - sd, mean + sd, color=ORANGE, alpha=0.18, linewidth=0, label="papers: 442 ± 302 ms")
    canvas.log_axis(axes[0])
    for ax in axes[1:]:
        ax.set_ylim(bottom=0)
    handles = dict(zip(*reversed(axes[1].get_legend_handles_labels()), strict=True))
    handles |= dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    fig.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=3)
    settings = profile.ablation
    system = config.load_configuration(settings.config)
    caption = (
        f"What the harness does to {system.id} ({system.title}) on emulated H100s, in real time: one process with a "
        "thread and a tritonclient stream per user, as the papers describe, or asyncio processes; scikit-learn's "
        f"unpickled pipeline with {settings.terms:,} terms, or this workbench's router. Base prompts, answers of "
        f"{settings.output_tokens} tokens, {settings.gateways} gateways, {settings.repeats} repeats; bars: 95 % "
        "interval of the mean. Hollow: the machine did not keep the engines' pace, so that the lack of cores is part "
        "of what is seen. The gateway's spans are carried in metadata that tritonclient does not show."
    )
    return figures.finish(
        fig, table, emulated, profile, "workbench", "harness_ablation", caption=caption, reference=SECTION_VI
    )


def _label(arm: tuple[str, str]) -> str:
    return f"{CLIENTS[arm[0]]}, {CLASSIFIERS[arm[1]]}"


def _arm(ax: Axes, rows: pd.DataFrame, look: tuple[str, str, str], factor: float, label: str) -> None:
    if rows.empty:
        return
    rows = rows.sort_values("users")
    colour, marker, style = look
    ax.errorbar(
        rows["users"], rows["mean"] * factor, rows["ci95"].fillna(0) * factor, c=colour, ls=style, elinewidth=0.7,
        marker="", label="_",
    )  # fmt: skip
    for kept, part in rows.groupby("kept_pace"):
        face = colour if kept else "white"
        ax.plot(part["users"], part["mean"] * factor, marker, mfc=face, mec=colour, label="_", ls="")
    ax.plot([], [], color=colour, marker=marker, ls=style, label=label)


# --- how far can the simulation be trusted? ---------------------------------------------------------------------

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
    published, aisimulate : DataFrame
        What the functions of these names in :mod:`erlib.paper_scale.validation` return.
    predictions : DataFrame
        What :func:`erlib.paper_scale.validation.calibrated` returns; empty if too few loads were measured.
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
    middle.set_xscale("symlog", linthresh=0.02, linscale=0.8)
    middle.set_xticks([-0.25, -0.02, 0, 0.02, 0.25], ["−25", "−2", "0", "+2", "+25"])
    middle.set(title="AISimulate, 200 users", xlabel="difference from AISimulate [%]", xlim=(-0.7, 0.7))

    held_out = _listed(predictions["users"])
    bars = dict.fromkeys(measured["config"].unique(), validation.BAR)
    _errors(right, predictions.replace({"metric": validation.METRICS}), bars)
    reach = 1.15 * max(0.3, predictions["error"].abs().max()) if len(predictions) else 0.3
    right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}".replace("+0", "0").replace("-", "−"))
    right.set(
        title=f"Measured engines, {held_out or 'no'} users", xlabel="error of the prediction [%]", xlim=(-reach, reach)
    )
    if predictions.empty:
        right.text(0, (len(bars) - 1) / 2, "needs four user levels", ha="center", va="center", color=GREY)

    fig.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    fig.legend(*middle.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    known = _listed(set(measured["users"]) - set(predictions["users"]))
    off = 100 * published.groupby("weights")["ratio"].agg(validation.mape)
    hosts = " and ".join(sorted(measured["host"].unique()))
    caption = (
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
    data = [
        published.assign(panel="published"),
        aisimulate.assign(panel="aisimulate"),
        predictions.assign(panel="predicted"),
    ]
    canvas.save(
        *(fig, profile.name, "simulated-hardware", "workbench", "simulation_trust"),
        pd.concat(data, ignore_index=True),
        caption,
        NO_COUNTERPART,
        records=measured["point_hash"].unique().tolist(),
        command=canvas.command(profile, "07_paper_scale"),
        host=hosts,
        evidence=f"simulated, beside published numbers, AISimulate and engines measured on {hosts}",
    )
    plt.close(fig)
    return fig


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
