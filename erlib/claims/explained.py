"""How many of the papers' claims hold under each hypothesis about what stood around their engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from erlib.claims import evidence, verdicts
from erlib.config import Paper, Profile
from erlib.config.choices import Preset
from erlib.paper_scale import presets, simulation
from erlib.paper_scale.clock import Harness
from erlib.workload import lengths
from erlib.workload.prompts import Workload

_ALONE = "simulated-hardware"
_TESTED = [verdicts.HOLDS, verdicts.FITTED, verdicts.UNTOLD, verdicts.FAILS]
CORE_SPEEDS = (0.7, 1.4)
"""Of the papers' Xeon 8480C, relative to the core on which the cost of a token was measured: not known better. Of a
core of the same speed, the scorecard has the verdicts."""
_OF_A_CORE: Mapping[Preset, Callable[[float], Harness]] = {
    "pinned-host": presets.pinned_host,
    "thread-client": presets.thread_client,
}
"""Presets with what a core does in some time, by how fast it is."""


def by_source(scorecard: pd.DataFrame) -> pd.DataFrame:
    """What each simulated source explains, of the claims that every one of them can decide.

    Parameters
    ----------
    scorecard : DataFrame
        What :func:`erlib.claims.verdicts.evaluate` returned.

    Returns
    -------
    DataFrame
        One row per source: ``claims`` (as many for each), how many hold, hold because numbers were chosen so, cannot be
        told, fail; ``only`` and ``lost``, the ids that hold here and not on the hardware alone, and the reverse.
    """
    mine = scorecard[scorecard["source"].str.startswith("simulated-")]
    table = mine.pivot(index="id", columns="source", values="verdict")
    verdict_of = table[table.isin(_TESTED).all(axis=1)]
    held = verdict_of.isin([verdicts.HOLDS, verdicts.FITTED])
    rows: dict[str, dict[str, int | str]] = {}
    for source in verdict_of if _ALONE in verdict_of else ():
        counted = {str(word): int((verdict_of[source] == word).sum()) for word in _TESTED}
        only, lost = held[source] & ~held[_ALONE], held[_ALONE] & ~held[source]
        about = {"only": " ".join(held.index[only]), "lost": " ".join(held.index[lost])}
        rows[source] = {"claims": len(verdict_of), **counted, **about}
    columns = ["claims", *_TESTED, "only", "lost"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("source")


def by_core_speed(
    profile: Profile,
    directory: Path,
    workloads: Mapping[lengths.Paper, Workload] | None = None,
    hypothesis: Preset = "pinned-host",
    speeds: Sequence[float] = CORE_SPEEDS,
) -> pd.DataFrame:
    """Verdicts under a hypothesis about what one core did, for the range in which that core's speed lies.

    Parameters
    ----------
    profile : Profile
        On the papers' scale, as for :func:`erlib.paper_scale.simulation.simulate_papers`.
    directory : Path
        Of simulated records.
    workloads : mapping, optional
        See :func:`erlib.paper_scale.simulation.simulate_papers`.
    hypothesis : {"pinned-host", "thread-client"}
    speeds : sequence of float

    Returns
    -------
    DataFrame
        How many claims have which verdict (columns), by the core's relative speed (rows).
    """
    counted, source = {}, f"simulated-{hypothesis}"
    for speed in speeds:
        outside = _OF_A_CORE[hypothesis](speed)
        around: dict[Paper, Harness] = {"p1": outside, "p2": outside}
        files = simulation.simulate_papers(profile, around, directory, workloads, columns={"source": source})
        scorecard = verdicts.evaluate({source: evidence.of_files(source, files, profile)}, profile)
        counted[speed] = scorecard.loc[scorecard["source"] == source, "verdict"].value_counts()
    table = pd.DataFrame(counted).T.reindex(columns=list(verdicts.VERDICTS)).fillna(0).astype(int)
    return table.rename_axis("core_speed")
