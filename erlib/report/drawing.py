"""From records to a finished figure: which records, axes in common, numbers and caption beside the picture."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erlib import config
from erlib.load import metrics
from erlib.provenance import MissingRecords
from erlib.report import canvas
from erlib.report.canvas import command, save


def select(
    records: pd.DataFrame, wanted: Iterable[tuple[str, str, int]], *, paper: str, experiment: str, notebook: str
) -> pd.DataFrame:
    """The records of the `wanted` (config, mix, users), all of them or an error."""
    wanted = list(wanted)
    if not (records["source"] == "measured").all():
        notebook = "07_paper_scale"
    mine = records[(records["paper"] == paper) & (records["experiment"] == experiment)]
    points = mine.groupby(["config", "mix", "users"], sort=False)
    found = list(points.groups)
    mine = mine[np.isin(points.ngroup(), [n for n, point in enumerate(found) if point in wanted])]
    missing = sorted(set(wanted) - set(found))
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


def load_records(records: pd.DataFrame, profile: config.Profile, paper: str, *mixes: config.Mix) -> pd.DataFrame:
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
        for mix in (mixes if is_routed(name) else settings.mixes[:1])
        for users in settings.users
    ]
    return select(records, wanted, paper=paper, experiment="load", notebook="05_load_sweep")


def summarised(
    choose: Callable[[pd.DataFrame], pd.DataFrame], records: pd.DataFrame, summary: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The chosen records and their summary, which is computed where `summary`, that of all records, is not known."""
    used = choose(records)
    return used, metrics.summarise(used) if summary is None else choose(summary).reset_index(drop=True)


def is_routed(name: str) -> bool:
    return config.load_configuration(name).routing == "expert_router"


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
    source = used["source"].iloc[0]
    in_order = source == "measured" or used["experiment"].iloc[0] == "replicas"
    again = command(profile, canvas.DRAWN_IN[paper] if in_order else "07_paper_scale")
    if source.startswith("simulated"):  # drawn at the papers' scale, whose settings are nobody's overrides
        again = f"./run_all.sh --profile {profile.name}  # draws it in 07_paper_scale"
    started = used["started"].dropna()
    saved = functools.partial(
        save,
        fig,
        profile,
        source,
        paper,
        slug,
        data,
        caption,
        reference,
        records=used["point_hash"].unique().tolist(),
        command=again,
        host=" and ".join(sorted(used["host"].unique())),
        note=canvas.precision_note(profile) if source == "measured" else None,
        extra={
            "requests": {"answered": len(used) - failed, "failed": failed},
            "measured_with": {
                "git_commits": sorted(used["git_commit"].unique()),
                "profile_hashes": sorted(used["profile_hash"].unique()),
                "versions": [json.loads(versions) for versions in sorted(used["versions"].unique())],
                "started": [started.min(), started.max()] if len(started) else [],
            },
        },
    )
    if _waiting:
        _waiting[-1].append((f"{paper}/{slug}", fig, saved))
    else:
        saved()
    plt.close(fig)
    return fig


_LEAST_FILLED = 1 / 3


def _of_similar_range(figures: Iterable[Figure]) -> list[list[Figure]]:
    """Figures that can share their y axes, the farthest-reaching first; on logarithmic axes all can."""
    groups: list[list[Figure]] = []
    for fig in sorted(figures, key=lambda fig: -max(ax.get_ylim()[1] for ax in fig.axes)):
        group = next((group for group in groups if _fills(fig, group[0])), None)
        if group is None:
            groups.append([fig])
        else:
            group.append(fig)
    return groups


def _fills(fig: Figure, other: Figure) -> bool:
    """Whether neither would leave much of the other's axes empty."""
    tops = [sorted(ax.get_ylim()[1] for ax in pair) for pair in _linear(fig, other)]
    return all(lower >= _LEAST_FILLED * higher for lower, higher in tops)


def _linear(*figures: Figure) -> Iterator[tuple[Axes, ...]]:
    """The panels of figures of one kind, but for those that are logarithmic or only hold a legend."""
    panels = zip(*(fig.axes for fig in figures), strict=True)
    return ((*same,) for same in panels if same[0].axison and same[0].get_yscale() != "log")


_waiting: list[list[tuple[str, Figure, Callable[[], object]]]] = []
"""What has been drawn inside of :func:`on_the_same_axes` and is not saved yet."""


@contextlib.contextmanager
def on_the_same_axes() -> Iterator[None]:
    """For sources on one scale: what they draw inside gets the same y axes; all is saved at the end.

    One of whose panels less than a third would be filled keeps a scale of its own, with others like it, and says so.
    """
    _waiting.append([])
    try:
        yield
    finally:
        drawn = _waiting.pop()
    for item in dict.fromkeys(name for name, *_ in drawn):
        groups = _of_similar_range(fig for name, fig, _ in drawn if name == item)
        for group in groups:
            for same in zip(*(fig.axes for fig in group), strict=True):
                lows, highs = zip(*(ax.get_ylim() for ax in same), strict=True)
                for ax in same:
                    ax.set_ylim(min(lows), max(highs))
        if len(groups) > 1:
            for (ax,) in (panel for group in groups for fig in group for panel in _linear(fig)):
                at = ax.transAxes
                ax.text(1, 1, "scale of its own", ha="right", va="top", transform=at, fontsize=6, color=canvas.GREY)
    for *_, saved in drawn:
        saved()
