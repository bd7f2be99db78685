"""How the figures look and what is written down beside them: one style, fixed colours, axes, provenance."""

from __future__ import annotations

import json
import math
import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from erlib import config, paths, provenance
from erlib.engines import laptop
from erlib.load import metrics
from erlib.machine import hardware
from erlib.report import origin

# Okabe and Ito's, but for their yellow: too light for white paper, and lost where a page is dark and inverts pictures.
OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000"]
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, _, _ = OKABE_ITO
GREY = "#7a7a7a"

LOOKS = {
    "p1.A": (BLUE, "o"),
    "p1.B": (VERMILION, "D"),
    "p1.C": (GREEN, "v"),
    "p1.D": (PURPLE, "P"),
    "p1.R": (GREY, "X"),
    "p2.A": (BLUE, "o"),
    "p2.B": (SKY, "s"),
    "p2.C": (ORANGE, "^"),
    "p2.D": (VERMILION, "D"),
    "p2.E": (GREEN, "v"),
    "p2.R": (GREY, "X"),
    "x1.F": ("#44aa99", "p"),
    "x1.S": ("#999933", "8"),
}
"""Colour and marker of a configuration, the same on all figures; related systems of the two papers share a colour."""
_SPARE_LOOKS = [("#000000", "*"), ("#8c510a", "h"), ("#332288", "<"), ("#882255", ">")]


def look(config_id: str) -> tuple[str, str]:
    """Colour and marker of a configuration; those that a reader has added take spare ones in order of their names."""
    if config_id in LOOKS:
        return LOOKS[config_id]
    added = [name for name in config.config_ids() if name not in LOOKS]
    return _SPARE_LOOKS[added.index(config_id) % len(_SPARE_LOOKS)]


FAINT: dict[str, Any] = dict(linewidth=0.8, alpha=0.3, markersize=3)
DTYPE_LOOKS = {"fp16": (BLUE, "o"), "fp8": (ORANGE, "^"), "int8": (PURPLE, "P"), "int4": (VERMILION, "D")}


def style() -> None:
    """Use the workbench's one style file for everything drawn from now on, and nothing of the reader's own settings."""
    mpl.rcdefaults()
    plt.style.use(paths.STYLE)


# --- saving -----------------------------------------------------------------------------------------------------


def save(
    fig: Figure,
    profile: config.Profile,
    source: str,
    paper: str,
    slug: str,
    data: pd.DataFrame,
    caption: str,
    reference: str,
    records: list[str] | None = None,
    command: str | None = None,
    *,
    host: str | None = None,
    evidence: str | None = None,
    note: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``figures/<profile>/<source>/<paper>/<slug>.{png,svg,csv,json}``.

    Parameters
    ----------
    fig : Figure
        A small footer with source, machine, profile and `note` is put below it.
    profile : Profile
        Whose it is; what its systems are made of is written down.
    source, paper, slug : str
        Where it goes. `source` is measured, emulated or simulated; `paper` is paper1, paper2 or workbench.
    data : DataFrame
        The plotted numbers, written as csv without the index.
    caption, reference : str
        What it shows, and which figure of which paper it stands beside.
    records : list of str, optional
        Point hashes of the records that went in.
    command : str, optional
        What regenerates it.
    host : str, optional
        The machine that the data come from; default is this one.
    evidence : str, optional
        Said in the footer in the place of source and machine, where nothing on the picture was timed.
    note : str, optional
        One more statement for the footer.
    extra : mapping, optional
        Further entries of the json, e.g. under which versions the records were measured.

    Returns
    -------
    Path
        The png.
    """
    directory = paths.FIGURES / profile.name / source / paper
    directory.mkdir(parents=True, exist_ok=True)
    host = host or hardware.machine()
    footer = " · ".join(part for part in (evidence or f"{source} on {host}", f"profile {profile.name}", note) if part)
    lines = textwrap.fill(footer, width=int(fig.get_figwidth() * 23))
    fig.text(0.005, -0.02, lines, va="top", ha="left", fontsize=6, color="#777777")
    hashes = sorted(set(records or []))
    about = {
        "caption": caption,
        "reference": reference,
        "source": source,
        "profile": profile.name,
        "host": host,
        "footer": footer,
        "command": command,
        "git_commit": provenance.git_commit(),
        "drawn": origin.drawn(),
        "made_of": origin.inputs(profile),
        "versions": {name: metadata.version(name) for name in ("matplotlib", "numpy", "pandas", "scipy", "seaborn")}
        | {"python": platform.python_version()},
        "records": {"points": len(hashes), "point_hashes": hashes},
        **(extra or {}),
    }
    return _write(fig, directory / slug, data, about)


def save_and_close(
    fig: Figure,
    profile: config.Profile,
    source: str,
    paper: str,
    slug: str,
    data: pd.DataFrame,
    caption: str,
    reference: str,
    notebook: str | None = None,
    **about: Any,
) -> Figure:
    """:func:`save` what `notebook` draws, and close it so that it is shown once."""
    again = command(profile, notebook) if notebook else None
    save(fig, profile, source, paper, slug, data, caption, reference, command=again, **about)
    plt.close(fig)
    return fig


def _write(fig: Figure, target: Path, data: pd.DataFrame, about: Mapping[str, Any]) -> Path:
    with mpl.rc_context({"svg.hashsalt": target.name}):  # element ids and dates must not differ between two runs
        fig.savefig(target.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
        fig.savefig(target.with_suffix(".png"), bbox_inches="tight")
    data.to_csv(target.with_suffix(".csv"), index=False)
    target.with_suffix(".json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target.with_suffix(".png")


def command(profile: config.Profile, notebook: str) -> str:
    """The command that makes a notebook's figures again on a fresh clone, with the overrides that were in force."""
    if profile.records == "published":
        return f"./run_all.sh --profile {profile.name} --records published --only {notebook}"
    draws = f"  # draws it in {notebook}"
    try:
        plain = _flat(config.load_profile(profile.name).model_dump(mode="json"))
    except config.ConfigError:  # a profile from a file elsewhere: its values are the overrides' base
        return f"./run_all.sh --profile {profile.name}.yaml{draws}"
    changed = {key: value for key, value in _flat(profile.model_dump(mode="json")).items() if plain[key] != value}
    overrides = "".join(f" --set '{key}={json.dumps(value)}'" for key, value in changed.items())
    return f"./run_all.sh --profile {profile.name}{overrides}{draws}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# --- wording ----------------------------------------------------------------------------------------------------


def name_of(config_id: str) -> str:
    spec = config.load_configuration(config_id)
    title = spec.title.replace(" x ", " × ")
    return f"{config_id[-1]} {title}" + ("" if spec.paper else " (not in the paper)")


def stand_ins(profile: config.Profile, configs: Iterable[str]) -> str:
    """What stands for the papers' models on this machine, as a sentence."""
    if profile.serving.backend == "tensorrt_llm":
        return ""
    if profile.vllm.checkpoint and profile.serving.backend == "vllm":
        return f" On this machine vLLM serves {Path(profile.vllm.checkpoint).name}, whatever the papers' model."
    layers = {"large": profile.engines.large_layers, "small": profile.engines.small_layers, "whole": "all"}
    parts = []
    for name in configs:
        plan = laptop.laptop_system(profile, config.load_configuration(name))
        many = f"{plan.instances} × " if plan.instances > 1 else ""
        slots = f"{plan.batch_size} slot{'s' * (plan.batch_size > 1)}, {plan.kv_tokens} KV tokens in {plan.kv_cache}"
        parts.append(f"{name[-1]} {many}{layers[plan.size]} layers {plan.dtype.upper()}, {slots}")
    by = " (vLLM)" if profile.serving.backend == "vllm" else ""
    return f" On this machine Llama-architecture stand-ins cut from SmolLM2-135M serve{by}: {'; '.join(parts)}."


def scale(profile: config.Profile) -> str:
    s = profile.scale
    if s.users == s.tokens == 1:
        return ""
    return (
        f" Users and batch sizes are the papers' divided by {s.users:g}, answers by {s.tokens:g}, prompts by "
        f"{s.inputs:g}, then rounded."
    )


def buckets(records: pd.DataFrame, paper_s: float, profile: config.Profile) -> tuple[float, str]:
    """Width of time buckets in seconds, and what the caption says of it, where the paper has `paper_s`."""
    scaled_s = paper_s / profile.scale.seconds
    width_s = metrics.bucket_width_s(records, scaled_s)
    divided = f"the paper's {paper_s:g} s" + (f" divided by {profile.scale.seconds:g}" if scaled_s != paper_s else "")
    if width_s == scaled_s:
        return width_s, f"{width_s:.2g} s ({divided})"
    return width_s, f"{width_s:.2g} s ({divided} would not resolve the runs)"


DRAWN_IN = {"paper1": "08_figures_paper1", "paper2": "09_figures_paper2", "workbench": "06_routing_overhead"}
"""Notebooks of what is measured, by paper."""


REPEATS = " Points are means over repeats, bars one standard deviation between repeats."


RELAYED = {
    "front": " NGINX relays the tokens; the gateways only decide.",
    "gateway": " The gateways relay the tokens, as in the papers.",
}
"""Who does, for captions."""


def precision_note(profile: config.Profile) -> str | None:
    on_cpu = profile.serving.backend == "openvino"
    return "engine precision is stored, not computed, on a CPU: sizes are real, speed-ups are not" if on_cpu else None


# --- shared drawing ---------------------------------------------------------------------------------------------


def user_axis(ax: Axes, levels: Sequence[int], profile: config.Profile) -> None:
    """Ticks at the measured levels and, below each, how many users of the papers it stands for."""
    step = math.ceil(len(levels) / 6)
    shown = sorted(sorted(levels, reverse=True)[::step])
    same = profile.scale.users == 1
    stand_for = [profile.scale.paper_users(n) for n in shown]
    labels = [f"{n}" if paper == n else f"{n}\n({paper:.0f})" for n, paper in zip(shown, stand_for, strict=True)]
    ax.set_xticks(shown, labels, linespacing=1.3)
    ax.set_xlabel("concurrent users" + ("" if same else " (on the papers' scale)"))
    margin = 0.05 * (max(levels) - min(levels)) or 0.5
    ax.set_xlim(min(levels) - margin, max(levels) + margin)


def level(users: int, profile: config.Profile, unit: str = "") -> str:
    """A number of users and the papers' number that it stands for."""
    paper = profile.scale.paper_users(users)
    return f"{users}{unit}" + ("" if paper == users else f" (papers: {paper:.0f})")


def log_axis(ax: Axes, which: Literal["x", "y"] = "y") -> None:
    axis = ax.yaxis if which == "y" else ax.xaxis
    (ax.set_yscale if which == "y" else ax.set_xscale)("log")
    low, high = ax.get_ylim() if which == "y" else ax.get_xlim()
    subs = next((subs for reach, subs in _LOG_TICKS.items() if high / low < reach), (1,))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


_LOG_TICKS: dict[float, tuple[float, ...]] = {8: (1, 1.5, 2, 3, 4, 5, 6, 8), 300: (1, 2, 5)}
"""Ticks of a decade on an axis that reaches over less than a factor."""


def from_zero(*axes: Axes) -> None:
    """Axes that begin at zero, with room above the highest mark for all of it."""
    for ax in axes:
        top = max(same.dataLim.y1 for same in ax.get_shared_y_axes().get_siblings(ax))
        ax.set_ylim(0, 1.07 * top if 0 < top < math.inf else None)


def legend(fig: Figure, ax: Axes, columns: int = 3) -> None:
    """One legend for all panels, above them."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)))


def cluster_colours(n: int) -> list[Any]:
    """A colour for each of `n` clusters and its expert."""
    if n <= len(OKABE_ITO):
        return OKABE_ITO[:n]
    return [(*0.75 * colour[:3], 1.0) for colour in plt.get_cmap("turbo")(np.linspace(0.05, 0.95, n))]


def box(ax: Axes, x: float, y: float, width: float, height: float, title: str, subtitle: str = "") -> None:
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=1.2", fc="white", ec="#555555", lw=0.9)
    )
    ax.text(x + width / 2, y + height - 2.2, title, ha="center", va="center", fontsize=8, weight="bold")
    ax.text(x + width / 2, y + height - 5, subtitle, ha="center", va="center", fontsize=6.5, color="#666666")


def person(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(Circle((x, y + 1.5), 0.55, color="#777777", lw=0))
    ax.add_patch(FancyBboxPatch((x - 0.75, y - 0.6), 1.5, 1.2, "round,pad=0,rounding_size=0.5", color="#777777", lw=0))


def number(ax: Axes, x: float, y: float, number: str) -> None:
    ax.text(
        *(x, y, number),
        ha="center",
        va="center",
        fontsize=6.5,
        color="white",
        bbox=dict(boxstyle="circle,pad=0.2", fc="#333333", ec="none"),
    )


NO_COUNTERPART = "Workbench: the papers have no counterpart"
