"""Figures that are no statistics: both papers' architecture and Table I."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from erlib import config, paths
from erlib.load import published
from erlib.provenance import MissingRecords
from erlib.report import canvas
from erlib.report.canvas import VERMILION, cluster_colours


def read_cluster_map(profile: config.Profile) -> pd.DataFrame:
    """The 2-D map of the profile's clusters: ``x``, ``y``, ``cluster``; ``01_clusterer`` has written it."""
    if profile.records == "published":
        return published.read(profile, published.CLUSTER_MAP).to_pandas()
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

    dots = _gateways(ax, clusters, profile, colours)
    _experts(ax, colours)
    _numbered_arrows(ax)
    where = "on its own node in paper 2" if paper == "paper2" else "on the experts' node in paper 1"
    caption = (
        f"Architecture: users' prompts (1) reach one of {profile.serving.gateways} routing gateways through NGINX (2), "
        "are classified (3), and go to the one Triton server of their cluster (4); tokens stream back the same way as "
        f"they are made (5, 6). The user simulator runs {where} and on the same machine here. The dots are the "
        f"training documents of this profile's clusterer ({profile.corpus.name} corpus) projected to two dimensions "
        "and coloured by cluster; the papers draw dots for c-BTM's C4 clusters. Baselines go round NGINX and the "
        "gateways."
    )
    return canvas.save_and_close(
        fig,
        profile,
        "measured",
        paper,
        "fig01_architecture",
        dots[["x", "y", "cluster"]],
        caption,
        f"Paper {paper[-1]}, Fig. 1",
        notebook=canvas.DRAWN_IN[paper],
        evidence="diagram; the dots are documents of this profile's corpus",
    )


def _numbered_arrows(ax: Axes) -> None:
    """The way of a prompt and of its answer."""
    for x0, x1, there, back_number in ((15.4, 22.6, "1", "6"), (35.4, 42.6, "2", "5")):
        for y, (a, b), number in ((27, (x0, x1), there), (20, (x1, x0), back_number)):
            ax.add_patch(FancyArrowPatch((a, y), (b, y), arrowstyle="-|>", mutation_scale=9, color="#333333", lw=1.1))
            canvas.number(ax, (x0 + x1) / 2, y + 2.3, number)
    canvas.number(ax, 46.8, 37, "3")
    canvas.number(ax, 79.3, 38.4, "4")


def _gateways(ax: Axes, clusters: pd.DataFrame, profile: config.Profile, colours: Sequence[Any]) -> pd.DataFrame:
    """The routing gateways, with their pipeline and the clusters' documents; returns the dots."""
    n = len(colours)
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
    return dots


def _experts(ax: Axes, colours: Sequence[Any]) -> None:
    """One Triton server per cluster, in its colour."""
    n = len(colours)
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


def table1_models(table: pd.DataFrame, profile: config.Profile, paper: Literal["paper1", "paper2"]) -> Figure:
    """Table I of a paper: the printed numbers, the recomputed ones, and where they disagree.

    Parameters
    ----------
    table : DataFrame
        What :func:`erlib.engines.table1.recomputed_table1` returned for this paper.
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
    if table["kv_tokens_printed"].isna().all():  # paper 2's text names none
        columns[-2:] = [(0.88, "KV tokens\nrecomputed", columns[-1][2])]
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
    return canvas.save_and_close(
        *(fig, profile, "measured", paper, "table1_models", table, caption, f"Paper {paper[-1]}, Table I"),
        notebook=canvas.DRAWN_IN[paper],
        evidence="arithmetic on the paper's numbers, nothing was timed",
    )
