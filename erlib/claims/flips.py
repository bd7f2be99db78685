"""Which unknown flips which conclusion: headline claims, judged as the scorecard judges them, on simulated records.

One number that both papers leave open (:class:`erlib.paper_scale.setups.Setup`) is changed at a time; all others stay
as they are simulated elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from erlib import cache, config, paths, provenance
from erlib.claims import verdicts
from erlib.claims.evidence import Evidence, Key
from erlib.claims.uncertainty import Value
from erlib.config import Profile
from erlib.machine import processes
from erlib.machine.progress import Bar
from erlib.paper_scale import setups
from erlib.paper_scale.setups import UNKNOWNS, Setup

HEADLINES = {
    "P1-R04": "A answers first",
    "P1-R09": "A streams slower than B to D above 200 users",
    "P1-R18": "B to D have a lower p99 than A",
    "P1-R19": "B to D have a higher throughput than A",
    "P1-R26": "the experts' size does not hurt",
    "P2-R13": "E streams fastest",
    "P2-R19": "E has the highest user throughput",
    "P2-R21": "C has the lowest p99 under many users",
    "P2-R24": "C's throughput exceeds E's at 1,000 users",
    "P2-R27": "the load need not be balanced",
}
"""Claims that stand for a paper's conclusions, in a few words each."""
Values = dict[Key, Value]


def sensitivity(profile: Profile, workers: int = 2) -> pd.DataFrame:
    """Judge the headline claims under every value of every unknown.

    Parameters
    ----------
    profile : Profile
        Gives the seed, and ``sensitivity``: levels of users and repeats.
    workers : int
        Processes.

    Returns
    -------
    DataFrame
        One row per unknown, value and headline claim of a paper that the unknown concerns: ``unknown``, ``value``,
        ``default`` (whether it is what is simulated elsewhere), ``id``, ``headline``, ``verdict``, ``flips`` (whether
        the verdict is another than with the default), ``numbers``, and where the verdict counts comparisons ``held``,
        ``compared``, and of the one that is closest to failing ``effect``, ``ci95_low``, ``ci95_high``.
    """
    default = replace(Setup(), sigma=profile.workload.sigma)
    wanted = {("", 0.0): default}
    for field in profile.sensitivity.unknowns:
        wanted |= {(field, value): replace(default, **{field: value}) for value in UNKNOWNS[field].values}
    changed = {key: setup for key, setup in wanted.items() if key == ("", 0.0) or setup != default}
    files = {key: _file(profile, key[0], setup) for key, setup in changed.items()}
    todo = [key for key, file in files.items() if cache.recalled(file, pd.read_parquet, "sensitivity") is None]
    print(f"sensitivity: {len(files) - len(todo)} of {len(files)} setups found by content hash")
    with processes.pool(workers) as pool, Bar(total=len(todo), unit="setup", desc="sensitivity") as progress:
        jobs = [pool.submit(_write, profile, key[0], changed[key], files[key]) for key in todo]
        for job in as_completed(jobs):
            job.result()
            progress.update()
    known = _read(files["", 0.0])
    rows = []
    for (name, value), setup in wanted.items():
        if name:
            values = known if setup == default else known | _read(files[name, value])
            rows += list(_judged(name, value, setup == default, values, profile))
    table = pd.DataFrame(rows)
    usual = table[table["default"]].set_index(["unknown", "id"])["verdict"]
    was = pd.Series([usual[name, claim] for name, claim in zip(table["unknown"], table["id"], strict=True)])
    return table.assign(flips=table["verdict"] != was)


def _judged(name: str, value: float, default: bool, values: Values, profile: Profile) -> Iterator[dict[str, object]]:
    papers = {config.paper_of(concerned).upper() for concerned in UNKNOWNS[name].configs}
    evidence = Evidence.of_values("simulated-hardware", values, profile)
    for claim in verdicts.load():
        if claim.id in HEADLINES and claim.id[:2] in papers:
            row = verdicts.judge(claim, evidence)
            yield {
                **{"unknown": name, "value": value, "default": default, "id": claim.id},
                **{"headline": HEADLINES[claim.id], "verdict": row.verdict, "numbers": row.numbers},
                **verdicts.hangs_on(row.decision),
            }


def robust(table: pd.DataFrame) -> pd.DataFrame:
    """Over which range of each unknown a conclusion's verdict stays what it is with the default.

    Parameters
    ----------
    table : DataFrame
        What :func:`sensitivity` returned.

    Returns
    -------
    DataFrame
        One row per headline claim: its ``verdict``, and a column per unknown: "all" where no value that was tried flips
        it, otherwise the values that do; empty where the unknown does not concern it.
    """
    rows = []
    for (claim, headline), mine in table.groupby(["id", "headline"]):
        row = {"id": claim, "headline": headline, "verdict": mine.loc[mine["default"], "verdict"].iloc[0]}
        for name, tried in mine.groupby("unknown", sort=False):
            flips = tried[tried["flips"]]
            by = [f"{v:g} {verdict}" for v, verdict in zip(flips["value"], flips["verdict"], strict=True)]
            row[str(name)] = ", ".join(by) or "all"
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=["id", "headline", "verdict", *UNKNOWNS]).fillna("").set_index("id")


# --- what is kept of each setup -----------------------------------------------------------------------------------


def _configs(unknown: str) -> tuple[str, ...]:
    return UNKNOWNS[unknown].configs if unknown else setups.CONFIGS


def _file(profile: Profile, unknown: str, setup: Setup) -> Path:
    """Where the numbers of a setup are, under a hash of what they are computed from."""
    numbers = provenance.code_digest("load/metrics.py", "claims/evidence.py")
    levels = [*profile.sensitivity.users, profile.sensitivity.repeats]
    inputs = [setups.given(profile), numbers, asdict(setup), _configs(unknown), levels]
    name = f"{unknown}-{getattr(setup, unknown):g}" if unknown else "default"
    return paths.run_dir(profile.name) / "simulated" / "sensitivity" / f"{name}-{cache.digest(*inputs)}.parquet"


def _write(profile: Profile, unknown: str, setup: Setup, file: Path) -> None:
    """Simulate a setup and keep its numbers."""
    settings = profile.sensitivity
    frames = [
        setups.simulated(setup, its, profile, settings.users, settings.repeats, _QUIETLY)
        for paper in ("p1", "p2")
        if (its := [name for name in _configs(unknown) if config.paper_of(name) == paper])
    ]
    values = Evidence("simulated-hardware", frames, profile).values
    rows = [("load", *key[1:], *value) for key, value in values.items()]
    with cache.writing(file) as partial:
        pd.DataFrame(rows, columns=_COLUMNS).to_parquet(partial)


_QUIETLY = "sensitivity"
"""An experiment that, unlike ``load``, is not counted in buckets over time: no headline claim looks at these."""
_COLUMNS = ["experiment", "config", "mix", "users", "turn", "metric", *Value._fields]


def _read(file: Path) -> Values:
    rows = pd.read_parquet(file)[_COLUMNS].itertuples(index=False, name=None)
    return {row[:6]: Value(*row[6:]) for row in rows}
