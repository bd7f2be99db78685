"""Every figure and table of both papers, drawn from records.

Each ``paper<n>_...`` function draws one item, saves it through :func:`save` and returns the figure. Whatever it needs
and does not find is an error that names the notebook to run first; nothing is drawn from part of the data.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from erlib import config, paths
from erlib.load import metrics
from erlib.provenance import MissingRecords
from erlib.report import canvas
from erlib.report.canvas import BLUE, GREY, SKY, VERMILION, cluster_colours, command, look, save, style

__all__ = ["cluster_colours", "command", "save", "style"]  # what notebooks want from the canvas

Turn = Literal["base", "continuation"]


# --- which records ----------------------------------------------------------------------------------------------


def select(
    records: pd.DataFrame, wanted: Iterable[tuple[str, str, int]], *, paper: str, experiment: str, notebook: str
) -> pd.DataFrame:
    """The records of the `wanted` (config, mix, users), all of them or an error."""
    wanted = list(wanted)
    if not (records["source"] == "measured").all():
        notebook = "07_paper_scale"
    mine = records[(records["paper"] == paper) & (records["experiment"] == experiment)]
    points = pd.MultiIndex.from_frame(mine[["config", "mix", "users"]])
    mine = mine[points.isin(wanted)]
    missing = sorted(set(wanted) - set(points))
    if missing:
        some = "; ".join(f"{name}, {mix} mix, {users} users" for name, mix, users in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise MissingRecords(
            f"no {experiment} records of {some}{more}: run {notebook} first (./run_all.sh --only {notebook})"
        )
    sources = sorted(mine["source"].unique())
    if len(sources) > 1:
        raise ValueError(f"records of {' and '.join(sources)} runs do not belong on one figure: select one source")
    return mine


def _load(records: pd.DataFrame, profile: config.Profile, paper: str, *mixes: config.Mix) -> pd.DataFrame:
    """Load-sweep records: routed systems under `mixes`, the others under the one mix that they are measured with."""
    settings = profile.paper1 if paper == "p1" else profile.paper2
    for mix in mixes:
        if mix not in settings.mixes:
            raise config.ConfigError(
                f"this figure needs the {mix} mix: add it to paper{paper[-1]}.mixes and measure again"
            )
    wanted = [
        (name, mix, users)
        for name in settings.configs
        for mix in (mixes if _is_routed(name) else settings.mixes[:1])
        for users in settings.users
    ]
    return select(records, wanted, paper=paper, experiment="load", notebook="05_load_sweep")


def _is_routed(name: str) -> bool:
    return config.load_configuration(name).routing == "expert_router"


def _metric(used: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Mean and spread over repeats of some metrics, as they are plotted."""
    table = metrics.aggregate(metrics.summarise(used))
    return table[table["metric"].isin(names)].reset_index(drop=True)


def finish(
    fig: Figure,
    data: pd.DataFrame,
    used: pd.DataFrame,
    profile: config.Profile,
    paper: str,
    slug: str,
    *,
    caption: str,
    reference: str = "",
) -> Figure:
    """Save a figure drawn from the records `used`, and close it so that a notebook shows it once."""
    failed = int((used["status"] != "ok").sum())
    if failed:
        caption += f" {failed} of {len(used)} requests failed and are left out."
    relays = used["relay"].dropna().unique()
    if len(relays) == 1:
        caption += canvas.RELAYED[relays[0]]
    number = re.match(r"(fig|table)0?(\d+)", slug)
    if number:
        reference = f"Paper {paper[-1]}, {number[1].capitalize()}{'.' * (number[1] == 'fig')} {number[2]}"
    notebook = {"paper1": "08_figures_paper1", "paper2": "09_figures_paper2", "workbench": "06_routing_overhead"}[paper]
    source = used["source"].iloc[0]
    in_order = source == "measured" or used["experiment"].iloc[0] == "replicas"
    again = command(profile, notebook if in_order else "07_paper_scale")
    if source.startswith("simulated"):  # drawn at the papers' scale, whose settings are nobody's overrides
        again = f"./run_all.sh --profile {profile.name} --only 07_paper_scale"
    saved = functools.partial(
        save,
        fig,
        profile.name,
        used["source"].iloc[0],
        paper,
        slug,
        data,
        caption,
        reference,
        records=used["point_hash"].unique().tolist(),
        command=again,
        host=" and ".join(sorted(used["host"].unique())),
        note=canvas.precision_note(profile) if used["source"].iloc[0] == "measured" else None,
        extra={
            "requests": {"answered": len(used) - failed, "failed": failed},
            "measured_with": {
                "git_commits": sorted(used["git_commit"].unique()),
                "profile_hashes": sorted(used["profile_hash"].unique()),
                "versions": [json.loads(versions) for versions in sorted(used["versions"].unique())],
            },
        },
    )
    if _waiting:
        _waiting[-1].append((f"{paper}/{slug}", fig, saved))
    else:
        saved()
    plt.close(fig)
    return fig


_waiting: list[list[tuple[str, Figure, Callable[[], object]]]] = []
"""What has been drawn inside of :func:`on_the_same_axes` and is not saved yet."""


@contextlib.contextmanager
def on_the_same_axes() -> Iterator[None]:
    """For two sources on one scale: what both draw inside gets the same y axes; all is saved at the end."""
    _waiting.append([])
    try:
        yield
    finally:
        drawn = _waiting.pop()
    for item in dict.fromkeys(name for name, *_ in drawn):
        panels = zip(*(fig.axes for name, fig, _ in drawn if name == item), strict=True)
        for same in panels:
            lows, highs = zip(*(ax.get_ylim() for ax in same), strict=True)
            for ax in same:
                ax.set_ylim(min(lows), max(highs))
    for *_, saved in drawn:
        saved()


# --- both papers: architecture and Table I ----------------------------------------------------------------------


def read_cluster_map(profile: config.Profile) -> pd.DataFrame:
    """The 2-D map of the profile's clusters that ``01_clusterer`` has written: ``x``, ``y``, ``cluster``."""
    path = paths.run_dir(profile.name) / "clusterer_map.parquet"
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # not there, cut off, or no parquet
        raise MissingRecords(
            f"{path} cannot be read ({type(error).__name__}): run ./run_all.sh --only 01_clusterer"
        ) from None


def architecture(clusters: pd.DataFrame, profile: config.Profile, paper: Literal["paper1", "paper2"]) -> Figure:
    """Fig. 1 of both papers: the architecture, with the clusters of this profile's own clusterer as dots.

    Parameters
    ----------
    clusters : DataFrame
        ``x``, ``y`` (a 2-D projection of documents) and ``cluster``, see :func:`read_cluster_map`.

    Raises
    ------
    ValueError
        If `clusters` has no rows or lacks a column.
    """
    if clusters.empty or not {"x", "y", "cluster"} <= set(clusters.columns):
        raise ValueError("the cluster map needs rows with x, y and cluster: run 01_clusterer first")
    n = int(clusters["cluster"].max()) + 1
    colours = cluster_colours(n)
    fig, ax = plt.subplots(figsize=(7.2, 3.3))
    ax.set(xlim=(0.5, 99.5), ylim=(2.5, 47.5))
    ax.axis("off")

    canvas.box(ax, 1, 12, 14, 24, "Users", "own node" if paper == "paper2" else "same node")
    for i, j in product(range(4), range(3)):
        canvas.person(ax, 3.6 + 2.9 * i, 16 + 4.6 * j)
    canvas.box(ax, 23, 12, 12, 24, "NGINX", "round robin")
    for y in (17.5, 21.5, 25.5, 29.5):
        ax.add_patch(
            FancyArrowPatch((26, 23.5), (32.5, y), arrowstyle="-|>", mutation_scale=6, color="#888888", lw=0.7)
        )

    for back in (2, 1, 0):  # a stack of identical gateways
        canvas.box(ax, 43 + back, 3 + back, 31, 41, "" if back else f"Routing gateway  × {profile.serving.gateways}")
    steps = ["numbers, stop words", "TF-IDF", f"SVD {profile.clusterer.n_components}", "normalise", f"k-means, k = {n}"]
    for i, step in enumerate(steps):
        y = 37 - 3.5 * i
        ax.text(58.5, y, step, ha="center", va="center", fontsize=6.5, color="#333333")
        if i:
            ax.add_patch(
                FancyArrowPatch(
                    (58.5, y + 2.7), (58.5, y + 0.8), arrowstyle="-|>", mutation_scale=5, lw=0.6, color="#888888"
                )
            )
    dots = clusters.sample(min(len(clusters), 1600), random_state=profile.seed).sort_values("cluster")
    inset = ax.inset_axes((46, 4.5, 25, 15), transform=ax.transData)
    inset.scatter(dots["x"], dots["y"], s=2.2, c=[colours[c] for c in dots["cluster"]], linewidths=0, alpha=0.75)
    inset.set(xticks=[], yticks=[])
    inset.grid(False)
    for spine in inset.spines.values():
        spine.set(visible=True, color="#cccccc", linewidth=0.6)

    height = 41 / n
    for expert, colour in enumerate(colours):
        y = 44 - height * (expert + 1)
        box = FancyBboxPatch(
            (84, y + 0.5), 15, height - 1, "round,pad=0,rounding_size=0.7", fc="white", ec=colour, lw=1.4
        )
        ax.add_patch(box)
        ax.text(91.5, y + height / 2, f"Triton {expert + 1}", ha="center", va="center", fontsize=6.5)
        start, end = (76.6, 24 + (expert - (n - 1) / 2) * -0.9), (83.7, y + height / 2)
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="<|-|>", mutation_scale=6, color=colour, lw=0.9))
    ax.text(91.5, 46.2, "experts", ha="center", va="center", fontsize=8, weight="bold")

    for x0, x1, there, back_number in ((15.4, 22.6, "1", "6"), (35.4, 42.6, "2", "5")):
        for y, (a, b), number in ((27, (x0, x1), there), (20, (x1, x0), back_number)):
            ax.add_patch(FancyArrowPatch((a, y), (b, y), arrowstyle="-|>", mutation_scale=9, color="#333333", lw=1.1))
            canvas.number(ax, (x0 + x1) / 2, y + 2.3, number)
    canvas.number(ax, 46.8, 37, "3")
    canvas.number(ax, 79.3, 38.4, "4")
    where = "on its own node in paper 2" if paper == "paper2" else "on the experts' node in paper 1"
    caption = (
        f"Architecture: users' prompts (1) reach one of {profile.serving.gateways} routing gateways through NGINX (2), "
        "are classified (3), and go to the one Triton server of their cluster (4); tokens stream back the same way as "
        f"they are made (5, 6). The user simulator runs {where} and on the same machine here. The dots are the "
        f"training documents of this profile's clusterer ({profile.corpus.name} corpus) projected to two dimensions "
        "and coloured by cluster; the papers draw dots for c-BTM's C4 clusters. Baselines go round NGINX and the "
        "gateways."
    )
    save(
        fig,
        profile.name,
        "measured",
        paper,
        "fig01_architecture",
        dots[["x", "y", "cluster"]],
        caption,
        f"Paper {paper[-1]}, Fig. 1",
        command=command(profile, f"{'08' if paper == 'paper1' else '09'}_figures_{paper}"),
        evidence="diagram; the dots are documents of this profile's corpus",
    )
    plt.close(fig)
    return fig


def table1_models(table: pd.DataFrame, profile: config.Profile, paper: Literal["paper1", "paper2"]) -> Figure:
    """Table I of a paper: the printed numbers, the recomputed ones, and where they disagree.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.engines.table1.table1` returned for this paper.
    """
    columns: list[tuple[float, str, Callable[[Any], str]]] = [  # right edge, head, cell
        (0.38, "Batch\nsize", lambda row: f"{row.batch_size}"),
        (0.49, "Weights [GB]\nprinted", lambda row: f"{row.weights_gb_printed:g}"),
        (0.58, "\nrecomputed", lambda row: f"{row.plain_gb:.1f}"),
        (0.67, "KV cache\n[GB]", lambda row: f"{row.kv_cache_gb_printed:g}"),
        (
            0.78,
            "KV tokens\nin the text",
            lambda row: "–" if pd.isna(row.kv_tokens_printed) else f"{row.kv_tokens_printed:,}",
        ),
        (0.88, "\nrecomputed", lambda row: f"{row.kv_tokens:,}"),
    ]
    remarks = [textwrap.wrap(text, 122) for text in table["discrepancy"]]
    lines = 2.4 + sum(1.55 + 0.95 * len(remark) for remark in remarks)
    fig, ax = plt.subplots(figsize=(7.2, 0.155 * lines))
    ax.set(xlim=(0, 0.88), ylim=(lines, 0))
    ax.axis("off")
    ax.text(0, 1.9, "Model", va="bottom", weight="bold", fontsize=7)
    for x, head, _ in columns:
        ax.text(x, 1.9, head, ha="right", va="bottom", weight="bold", fontsize=7)
    y = 2.2
    for rule, width in ((0.02, 1.0), (y, 0.6), (lines - 0.1, 1.0)):
        ax.axhline(rule, color="#333333", linewidth=width)
    for row, remark in zip(table.itertuples(), remarks, strict=True):
        y += 1.1
        ax.text(0, y, f"{row.config[-1]}) {row.title}".replace(" x ", " × "), fontsize=7.5)
        for x, _, cell in columns:
            ax.text(x, y, cell(row), ha="right", fontsize=7.5)
        for line in remark:
            y += 0.95
            ax.text(0.02, y, line, fontsize=6.2, color=VERMILION)
        y += 0.45
    caption = (
        "Table I, printed and recomputed: weights as parameters times bytes per value, KV tokens as the printed KV "
        "cache over the bytes that the architecture needs per token. Where print and arithmetic disagree, a coloured "
        "line says how. The csv holds further readings (GB, MiB, as loaded) and the full sequences that fit. The "
        "paper prints weights, KV cache and batch size only."
    )
    save(
        *(fig, profile.name, "measured", paper, "table1_models", table, caption, f"Paper {paper[-1]}, Table I"),
        command=command(profile, f"{'08' if paper == 'paper1' else '09'}_figures_{paper}"),
        evidence="arithmetic on the paper's numbers, nothing was timed",
    )
    plt.close(fig)
    return fig


# --- paper 1 ----------------------------------------------------------------------------------------------------

_P1_TTFT = (
    "The paper finds the tensor-parallel baseline A far below the routed systems B to D, for both prompts alike, and "
    "less variance for the continuation prompt."
)
_P1_TPOT = (
    "The paper's caption says median and its text average, so both are shown: A rises from about 0.1 s at 200 users to "
    "nearly 1 s at 1,000 while B to D stay near 0.1 s."
)


def paper1_ttft(records: pd.DataFrame, profile: config.Profile, turn: Turn) -> Figure:
    """Paper 1, Fig. 2 (base) and Fig. 3 (continuation): time to first token over concurrent users."""
    used = _load(records, profile, "p1", "uniform")
    used = used[used["turn"] == turn]
    table = _metric(used, "ttft_mean_s", "ttft_sd_s")
    mean, spread = (table[table["metric"] == name] for name in ("ttft_mean_s", "ttft_sd_s"))
    fig = canvas.panel_row(
        profile,
        [
            ("Mean", "time to first token [s]", mean),
            ("Spread over users (sd)", "sd of time to first token [s]", spread),
        ],
        log=True,
    )
    caption = (
        f"Time to first token of the {turn} prompt: mean over users (left) and standard deviation over users (right). "
        f"{_P1_TTFT}{canvas.REPEATS}{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper1.configs)}"
    )
    number = {"base": 2, "continuation": 3}[turn]
    return finish(fig, table, used, profile, "paper1", f"fig0{number}_ttft_{turn}", caption=caption)


def paper1_tpot(records: pd.DataFrame, profile: config.Profile, turn: Turn) -> Figure:
    """Paper 1, Fig. 4 (base) and Fig. 5 (continuation): time per output token over concurrent users."""
    used = _load(records, profile, "p1", "uniform")
    used = used[used["turn"] == turn]
    table = _metric(used, "gap_median_s", "tpot_mean_s")
    median, mean = (table[table["metric"] == name] for name in ("gap_median_s", "tpot_mean_s"))
    fig = canvas.panel_row(
        profile,
        [("Median over all gaps", "time per output token [s]", median), ("Mean over users", "", mean)],
        sharey=True,
    )
    caption = (
        f"Time per output token of the {turn} prompt: median of all gaps between consecutive tokens (left) and mean "
        "over users of (t_last - t_first) / (n - 1) (right). "
        f"{_P1_TPOT}{canvas.REPEATS}{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper1.configs)}"
    )
    number = {"base": 4, "continuation": 5}[turn]
    return finish(fig, table, used, profile, "paper1", f"fig0{number}_tpot_{turn}", caption=caption)


def _both_turns(table: pd.DataFrame, ylabel: str) -> list[tuple[str, str, pd.DataFrame]]:
    return [(f"{turn.capitalize()} prompt", ylabel, table[table["turn"] == turn]) for turn in ("base", "continuation")]


def paper1_user_throughput(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 1, Fig. 6: tokens per second as one user receives them, mean and sd over users."""
    used = _load(records, profile, "p1", "uniform")
    table = _over_users(used)
    fig = canvas.panel_row(profile, _both_turns(table, "user throughput [tokens/s]"), log=True, sharey=True, dodge=True)
    caption = (
        "User throughput, an answer's tokens over the time from request to last token: mean over users, bars one "
        "standard deviation over users (as the paper defines it), averaged over repeats. The paper sees no clear "
        "difference between A and B to D for more than one "
        f"user.{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper1.configs)}"
    )
    return finish(fig, table, used, profile, "paper1", "fig06_user_throughput", caption=caption)


def _over_users(used: pd.DataFrame) -> pd.DataFrame:
    """User throughput with its spread over users in the place of the spread over repeats."""
    table = _metric(used, "user_tokens_per_s_mean", "user_tokens_per_s_sd")
    is_sd = table["metric"] == "user_tokens_per_s_sd"
    keys = ["config", "mix", "users", "turn"]
    spread = table.loc[is_sd, [*keys, "mean"]].rename(columns={"mean": "sd"})
    return table[~is_sd].drop(columns=["sd", "ci95"]).merge(spread, on=keys, validate="one_to_one")


def paper1_p99_response_time(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 1, Fig. 7: 99th percentile of the response time."""
    used = _load(records, profile, "p1", "uniform")
    table = _metric(used, "response_p99_s")
    fig = canvas.panel_row(profile, _both_turns(table, "p99 response time [s]"), sharey=True)
    caption = (
        "Response time that 99 % of the answers do not exceed (nearest rank: with fewer than 100 users the slowest "
        "answer). The paper finds B to D below A between 200 and 900 "
        f"users.{canvas.REPEATS}{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper1.configs)}"
    )
    return finish(fig, table, used, profile, "paper1", "fig07_p99_response_time", caption=caption)


def paper1_session_throughput(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 1, Fig. 8: session throughput, Eq. 1-3."""
    used = _load(records, profile, "p1", "uniform")
    table = _metric(used, "session_tokens_per_s")
    fig = canvas.panel_row(profile, _both_turns(table, "session throughput [tokens/s]"), sharey=True)
    caption = (
        "Session throughput (Eq. 1-3): tokens of the users answered within the p99 response time, over the time from "
        "the first request to the last token among them. The paper finds B to D above A between 200 and 900 "
        f"users.{canvas.REPEATS}{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper1.configs)}"
    )
    return finish(fig, table, used, profile, "paper1", "fig08_session_throughput", caption=caption)


def paper1_bucket_throughput(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 1, Fig. 9: tokens per second over time, one panel per system, one line per number of users."""
    used = _load(records, profile, "p1", "uniform")
    used = used[used["turn"] == "base"]
    width_s = 60 / profile.scale.seconds
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
    rest = axes.flat[len(configs) :]
    for ax in rest:
        ax.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    rest[0].legend(handles, labels, loc="center left", title="Concurrent users", alignment="left")
    fig.supxlabel("time since the first request [s]", fontsize=8)
    fig.supylabel(f"tokens/s in buckets of {width_s:g} s", fontsize=8)
    caption = (
        f"Tokens per second in time buckets of {width_s:g} s (the paper's 60 s divided by {profile.scale.seconds:g}), "
        "base prompt, mean over repeats; the last bucket of a run is only partly filled. The paper's A has one peak "
        "and then declines, its B to D fluctuate between 200 and 2,000 tokens/s for longer, and all ramp up "
        f"first.{canvas.scale(profile)}{canvas.stand_ins(profile, configs)}"
    )
    return finish(fig, table, used, profile, "paper1", "fig09_bucket_throughput", caption=caption)


# --- paper 2 ----------------------------------------------------------------------------------------------------


def paper2_input_tokens(lengths: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 2: distribution of the number of input tokens.

    Parameters
    ----------
    lengths : DataFrame
        One row per prompt: ``input_tokens`` as sent here, ``paper_input_tokens`` the full-scale length it stands for.
    """
    if lengths.empty or not {"input_tokens", "paper_input_tokens"} <= set(lengths.columns):
        raise ValueError("input lengths need rows with input_tokens and paper_input_tokens: run 02_workload first")
    panels = [
        ("As in the paper (MLPerf Llama-2-70B)", "paper_input_tokens", 32, SKY),
        (f"On this machine (divided by {profile.scale.tokens:g})", "input_tokens", None, BLUE),
    ]
    fig, axes = plt.subplots(1, 2)
    counts = []
    for ax, (title, column, width, colour) in zip(axes, panels, strict=True):
        values = lengths[column].to_numpy()
        step = width or max(1, round(32 / profile.scale.tokens))
        count, edges = np.histogram(values, np.arange(values.min() - 0.5, values.max() + step + 0.5, step))
        ax.stairs(count, edges, fill=True, color=colour, alpha=0.85)
        median = float(np.median(values))
        ax.axvline(median, color="#222222", linewidth=0.9, linestyle="--")
        ax.text(median, ax.get_ylim()[1], f" median {median:g}, mean {values.mean():.0f}", va="top", fontsize=7)
        ax.set(title=title, xlabel="input tokens", ylabel="prompts", xlim=(0, None))
        counts.append(
            pd.DataFrame({"lengths": column, "from": edges[:-1] + 0.5, "to": edges[1:] + 0.5, "prompts": count})
        )
    caption = (
        f"Input tokens of {len(lengths)} prompts: lengths drawn from the empirical quantiles of MLPerf's Llama-2-70B "
        "data set, which is what the paper's test set mirrors (left), and what is sent on this machine, counted with "
        f"the tokenizer of the model under test (right).{canvas.scale(profile)}"
    )
    save(
        *(fig, profile.name, "measured", "paper2", "fig02_input_tokens", pd.concat(counts), caption, "Paper 2, Fig. 2"),
        command=command(profile, "09_figures_paper2"),
        evidence="token counts, nothing was timed",
    )
    plt.close(fig)
    return fig


_PRELIMINARY = re.compile(r"p2\.(fp16|fp8|int8|int4)-tp(\d+)-bs(\d+)")


def _preliminary(records: pd.DataFrame, profile: config.Profile) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean response time by configuration, `best` marking the fastest batch size of its data type, and the records."""
    sweep = profile.preliminary
    names = [f"p2.{d}-tp{t}-bs{b}" for d, t, b in product(sweep.dtypes, (4, 8), sweep.batch_sizes)]
    wanted = product(names, ["uniform"], sweep.users)
    used = select(records, wanted, paper="p2", experiment="preliminary", notebook="04_preliminary_sweep")
    table = _metric(used, "response_mean_s")
    parts = table["config"].str.extract(_PRELIMINARY.pattern)
    table = table.assign(dtype=parts[0], tensor_parallel=parts[1].astype(int), batch_size=parts[2].astype(int))
    top = table[table["users"] == table["users"].max()]
    best = top.loc[top.groupby(["dtype", "tensor_parallel"])["mean"].idxmin(), "config"]
    return table.assign(best=table["config"].isin(best)), used


def paper2_preliminary(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 3: response time over users, best batch size of each data type, TP=4 and TP=8."""
    table, used = _preliminary(records, profile)
    scaled = profile.scale.users != 1
    fig, axes = plt.subplots(1, 2, sharey=True)
    for ax, parallel in zip(axes, (4, 8), strict=True):
        for (dtype, batch, best), rows in table[table["tensor_parallel"] == parallel].groupby(
            ["dtype", "batch_size", "best"]
        ):
            label = f"{dtype.upper()}, batch {batch}" + f" (here {profile.scaled_users(batch)})" * scaled
            canvas.line(*(ax, rows, canvas.DTYPE_LOOKS[dtype], label if best else ""), **({} if best else canvas.FAINT))
        ax.set_title(f"TP={parallel}" + (" (one instance)" if parallel == 4 else ""))
        canvas.user_axis(ax, sorted(table["users"].unique()), profile)
        ax.legend(loc="upper left", title="best batch size", alignment="left")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("mean response time [s]")
    instance = {
        "openvino": "TP=8 stands here for one engine on all cores, TP=4 for one engine on half of them.",
        "tensorrt_llm": "TP=8 is one instance of the 70B model on eight GPUs, TP=4 one instance on four.",
    }[profile.serving.backend]
    caption = (
        "Preliminary experiment: mean response time by data type and batch size. Bold: each data type's best batch "
        f"size, the one with the lowest response time at the most users; faint: the others. {instance} In the paper "
        "FP8 has a slight lead at TP=4 (best batch size 100), and at TP=8 FP16 and FP8 meet at 500 users (batch size "
        f"200) while FP8 is faster below.{canvas.REPEATS}{canvas.scale(profile)}"
    )
    return finish(fig, table, used, profile, "paper2", "fig03_preliminary", caption=caption)


def paper2_ttft(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 4: median time to first token over users, and its distribution at the most users."""
    text = (
        "The paper finds C lowest throughout, A to C below the routed 70B system D, E close to the baselines, and "
        "higher minima for D and E because of the gateway."
    )
    return _median_and_box(
        *(records, profile, "ttft", "time to first token [s]", "fig04_ttft"), text="Time to first token. " + text
    )


def paper2_tpot(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 5: median time per output token over users, and its distribution at the most users."""
    text = (
        "Time per output token of an answer, (t_last - t_first) / (n - 1). The paper finds the routed 8B system E "
        "lowest, with the least variance, and the tensor-parallel baselines raised by communication."
    )
    return _median_and_box(records, profile, "tpot", "time per output token [s]", "fig05_tpot", text=text)


def _median_and_box(
    records: pd.DataFrame, profile: config.Profile, name: str, ylabel: str, slug: str, *, text: str
) -> Figure:
    used = _load(records, profile, "p2", "normal")
    table = _metric(used, f"{name}_median_s")
    most = max(profile.paper2.users)
    done = metrics.answers(used[used["users"] == most])
    boxes = {c: done.loc[done["config"] == c, f"{name}_s"].dropna().to_numpy() for c in profile.paper2.configs}

    fig, (left, right) = plt.subplots(1, 2, width_ratios=[3, 2], figsize=(7.2, 3.5))
    canvas.systems(left, table)
    left.set(title="Median over users", ylabel=ylabel)
    canvas.user_axis(left, sorted(profile.paper2.users), profile)
    drawn = right.boxplot(
        list(boxes.values()),
        whis=(0, 100),
        tick_labels=[c[-1] for c in boxes],
        patch_artist=True,
        widths=0.55,
        medianprops=dict(color="#222222", linewidth=1.1),
        whiskerprops=dict(color="#777777"),
        capprops=dict(color="#777777"),
    )
    for config_id, box in zip(boxes, drawn["boxes"], strict=True):
        box.set(facecolor=mpl.colors.to_rgba(look(config_id)[0], 0.45), edgecolor=look(config_id)[0])
    right.set_title(f"{most} users, min to max")
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
        f"{text} Left: median over users, normal mix; right: all answers at {most} users, box from quartile to "
        "quartile, whiskers from minimum to "
        f"maximum.{canvas.REPEATS}{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper2.configs)}"
    )
    return finish(fig, data, used, profile, "paper2", slug, caption=caption)


def paper2_user_throughput_p99(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 6: user throughput (I) and p99 response time (II), routed systems under both mixes."""
    configs = profile.paper2.configs
    used = _load(records, profile, "p2", "normal", "uniform")
    throughput, latency = _over_users(used), _metric(used, "response_p99_s")
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.6))
    panels = [("I) User throughput", "tokens/s per user", throughput), ("II) p99 response time", "seconds", latency)]
    for ax, (title, ylabel, table) in zip(axes, panels, strict=True):
        for name in configs:
            for mix, rows in table[table["config"] == name].groupby("mix"):
                uniform = _is_routed(name) and mix == "uniform"
                hollow: dict[str, Any] = dict(linestyle=":", markerfacecolor="white") if uniform else {}
                canvas.line(
                    ax, rows, look(name), canvas.name_of(name) + (f", {mix}" if _is_routed(name) else ""), **hollow
                )
        ax.set(title=title, ylabel=ylabel)
        canvas.user_axis(ax, sorted(profile.paper2.users), profile)
    canvas.log_axis(axes[0])
    axes[1].set_ylim(bottom=0)
    canvas.legend(fig, axes[0])
    data = pd.concat([throughput, latency])
    caption = (
        "I) user throughput, mean over users with bars of one standard deviation over users; II) response time that "
        "99 % of the answers do not exceed (nearest rank), bars one standard deviation between repeats. The routed "
        "systems D and E are shown under the normal and the uniform mix; to the others, which do not look at clusters, "
        "the mix is the same. In the paper the mix hardly matters, E leads user throughput up to 800 users, and C has "
        f"the lowest p99 at many users.{canvas.scale(profile)}{canvas.stand_ins(profile, configs)}"
    )
    return finish(fig, data, used, profile, "paper2", "fig06_user_throughput_p99", caption=caption)


def paper2_system_throughput(records: pd.DataFrame, profile: config.Profile) -> Figure:
    """Paper 2, Fig. 7: tokens per second over time at the levels that stand for 200, 600 and 1,000 users."""
    levels = sorted(
        {min(profile.paper2.users, key=lambda level: abs(level - p / profile.scale.users)) for p in (200, 600, 1000)}
    )
    used = _load(records, profile, "p2", "normal")
    used = used[used["users"].isin(levels)]
    width_s = 2 / profile.scale.seconds
    buckets = metrics.bucket_throughput(used, width_s)
    table = metrics.average_buckets(buckets)
    means = buckets.groupby(["config", "users", "repeat"])["tokens_per_s"].mean().groupby(["config", "users"]).mean()

    fig, axes = plt.subplots(1, len(levels), figsize=(7.2, 3.4), squeeze=False)
    for ax, users in zip(axes[0], levels, strict=True):
        here = table[table["users"] == users]
        window = max(1, round(here["bucket"].max() / 30))
        for name, rows in here.groupby("config"):
            colour, dashed = look(name)[0], "--" if look(name)[0] == GREY else "-"
            t_s = rows["t_s"] + width_s / 2
            smooth = rows["tokens_per_s"].rolling(window, center=True, min_periods=1).mean()
            ax.plot(t_s, rows["tokens_per_s"], color=colour, linewidth=0.4, alpha=0.25)
            ax.plot(t_s, smooth, color=colour, linestyle=dashed, label=canvas.name_of(name), linewidth=1.2)
            ax.plot(
                *(1.03, means[name, users]),
                marker="<",
                markersize=6.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                color=colour,
                clip_on=False,
                transform=ax.get_yaxis_transform(),
            )
        ax.set(xlabel="time since the first request [s]", xlim=(0, None), ylim=(0, None))
        ax.set_title(canvas.level(users, profile, unit=" users"))
    axes[0, 0].set_ylabel(f"tokens/s in buckets of {width_s:.2g} s")
    canvas.legend(fig, axes[0, 0])
    data = pd.concat([table.assign(what="bucket"), means.reset_index().assign(what="mean over buckets")])
    caption = (
        f"System throughput over time, normal mix: tokens in buckets of {width_s:.2g} s (the paper's 2 s divided by "
        f"{profile.scale.seconds:g}), mean over repeats (thin), their running mean over a thirtieth of the time shown "
        "(bold) and the mean over all buckets of a run (triangles on the right). The levels are those here that are "
        "nearest to the paper's 200, 600 and 1,000 users. In the paper E follows C at 200 and 600 users and falls "
        "behind at 1,000, and D has the lowest peak and "
        f"mean.{canvas.scale(profile)}{canvas.stand_ins(profile, profile.paper2.configs)}"
    )
    return finish(fig, data, used, profile, "paper2", "fig07_system_throughput", caption=caption)


def load_figures(records: pd.DataFrame, profile: config.Profile) -> list[Figure]:
    """All figures of both papers' load experiments and of the preliminary one, whatever source the records have."""
    mine = {paper: records[records["paper"] == paper] for paper in ("p1", "p2")}
    turns: list[Turn] = ["base", "continuation"]
    drawn = [draw(mine["p1"], profile, turn) for draw in (paper1_ttft, paper1_tpot) for turn in turns]
    rest1 = (paper1_user_throughput, paper1_p99_response_time, paper1_session_throughput, paper1_bucket_throughput)
    rest2 = (paper2_preliminary, paper2_ttft, paper2_tpot, paper2_user_throughput_p99, paper2_system_throughput)
    drawn += [draw(mine["p1"], profile) for draw in rest1]
    return drawn + [draw(mine["p2"], profile) for draw in rest2]
