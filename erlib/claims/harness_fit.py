"""Which numbers of the fitted harness make the claims hold that it was fitted to: a search over a grid.

The claims are those that ``data/claims.yaml`` calls fitted; whatever else the harness makes hold or fail is prediction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from typing import Any

import pandas as pd

from erlib.claims import verdicts
from erlib.claims.evidence import Evidence
from erlib.config import Paper, Profile
from erlib.machine import processes
from erlib.machine.progress import Bar
from erlib.paper_scale import batching, presets, simulation
from erlib.paper_scale.clock import Harness
from erlib.workload import prompts

SOURCE = "simulated-harness"
GRID: dict[Paper, dict[str, tuple[float, ...]]] = {
    "p1": {
        "client_tokens_per_s": (1000, 2000, 3000, 4000),
        "gateway_streams": (80, 160, 320),
        "client_knee": (100, 200),
        "client_slope": (400, 800, 1600),
    },
    "p2": {"gateway_streams": (16, 32, 48, 64, 96, 128)},
}
"""Fields of :class:`erlib.paper_scale.clock.Harness` by paper, and the values to try."""
USERS: dict[Paper, tuple[int, ...]] = {"p1": (1, 200, 500, 1000), "p2": (1, 200, 600, 1000)}
"""Levels at which the claims are judged: as few as they can be judged on."""


def fitted_claims(paper: Paper) -> list[verdicts.Claim]:
    """The claims that the harness was fitted to."""
    return [claim for claim in verdicts.load() if SOURCE in claim.fitted and claim.id.lower().startswith(paper)]


def fit(
    profile: Profile, paper: Paper, grid: Mapping[str, Sequence[float]] | None = None, workers: int = 2
) -> pd.DataFrame:
    """Judge the claims that the harness was fitted to at every point of a grid.

    Parameters
    ----------
    profile : Profile
        At the papers' scale; gives configurations and seed.
    paper : {"p1", "p2"}
    grid : mapping, optional
        Of :data:`GRID`'s form.
    workers : int
        Processes.

    Returns
    -------
    DataFrame
        One row per point: the grid's fields, a column per claim with its verdict ("fitted" where it holds), ``held``
        (how many do), and ``chosen`` (whether these are :data:`erlib.paper_scale.presets.HARNESS`'s numbers).
    """
    axes = GRID[paper] if grid is None else grid
    tried: list[dict[str, Any]] = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    used = presets.HARNESS[paper]
    rows: list[dict[str, Any]] = []
    with processes.pool(workers) as pool, Bar(total=len(tried), unit="harness", desc=f"fit {paper}") as progress:
        jobs = {pool.submit(_judged, profile, paper, replace(used, **numbers)): numbers for numbers in tried}
        for job in as_completed(jobs):
            said = job.result()
            chosen = all(getattr(used, field) == value for field, value in jobs[job].items())
            held = sum(verdict == verdicts.FITTED for verdict in said.values())
            rows.append({**jobs[job], **said, "held": held, "chosen": chosen})
            progress.update()
    return pd.DataFrame(rows).sort_values(list(axes), ignore_index=True)


def _judged(profile: Profile, paper: Paper, around: Harness) -> dict[str, verdicts.Verdict]:
    evidence = Evidence(SOURCE, _points(profile, paper, around), profile)
    return {claim.id: verdicts.judge(claim, evidence).verdict for claim in fitted_claims(paper)}


def _points(profile: Profile, paper: Paper, around: Harness) -> Iterator[pd.DataFrame]:
    workload = simulation.textless_workload(profile, paper)
    settings = profile.paper1 if paper == "p1" else profile.paper2
    limit = profile.workload.p2_max_output_tokens if paper == "p2" else None
    about = {"source": SOURCE, "profile": profile.name, "profile_hash": profile.digest, "point_hash": "fit"}
    for users in USERS[paper]:
        drawn = prompts.draw(workload, users, "uniform", profile.seed, 0)
        for name in (name for name in settings.configs if not name.endswith("R")):  # of which no paper says a word
            system = batching.paper_system(name, answer_limit=limit)
            yield simulation.simulate(
                system, drawn, paper=paper, around=around.around(system), seed=profile.seed, columns=about
            ).to_pandas()
