"""Every claim of both papers, checked against each source of records and against arithmetic.

The claims are ``data/claims.yaml``; what decides one is a *predicate* with parameters from there. A predicate either
computes from the papers' own numbers (source ``arithmetic``) or looks at one source's records through
:class:`~erlib.claims.evidence.Evidence`, at the papers' scale of users. What a source has
no record of is not testable there, never guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from erlib import config, paths
from erlib.claims import arithmetic, evidence, predicates, protocol, publication
from erlib.claims.evidence import Evidence, NotTestable, Records
from erlib.claims.finding import PREDICATES
from erlib.claims.uncertainty import Decision
from erlib.config import ConfigError, Profile
from erlib.load import published, records
from erlib.paper_scale import emulation

Verdict = Literal[
    "holds", "fails", "cannot be told", "by construction", "fitted", "not run here", "ambiguous in the paper"
]
_FAMILIES = (arithmetic, predicates, protocol)
"""Modules whose predicates are known by name once they are imported."""

HOLDS: Verdict = "holds"
FAILS: Verdict = "fails"
UNTOLD: Verdict = "cannot be told"
"""The interval of what decides covers the threshold."""
CONSTRUCTION: Verdict = "by construction"
"""It holds, and could hardly do otherwise: a setting of the workbench, an input, an identity."""
FITTED: Verdict = "fitted"
"""It holds where the source's own numbers were chosen so that it does."""
NOT_RUN: Verdict = "not run here"
AMBIGUOUS: Verdict = "ambiguous in the paper"
VERDICTS = (HOLDS, FAILS, UNTOLD, CONSTRUCTION, FITTED, NOT_RUN, AMBIGUOUS)

ARITHMETIC = "arithmetic"
"""The source of claims that the papers' own numbers decide."""


class Claim(BaseModel):
    """One entry of ``data/claims.yaml``, which explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    where: str
    type: Literal["arith", "setup", "num", "ord", "shape", "concl"]
    claim: str
    figure: str = ""
    checks: list[dict[str, dict[str, Any]]] = []
    also: list[str] = []
    ambiguous: str = ""
    untestable: str = ""
    construction: str = ""
    given: dict[str, str] = {}
    fitted: dict[str, str] = {}
    conflict: str = ""

    @model_validator(mode="after")
    def _decidable(self) -> Claim:
        if sum(map(bool, (self.checks, self.also, self.untestable))) > 1:
            raise ValueError(f"{self.id}: give one of checks, also, untestable")
        if not (self.checks or self.also or self.untestable or self.ambiguous):
            raise ValueError(f"{self.id}: give checks, or why there are none")
        for name, parameters in self._calls():
            if name not in PREDICATES:
                raise ValueError(f"{self.id}: no predicate {name!r}{config.nearest(name, list(PREDICATES))}")
            try:
                PREDICATES[name].bind(parameters)
            except TypeError as error:
                raise ValueError(f"{self.id}: {name}: {error}") from None
        if len({PREDICATES[name].arithmetic for name, _ in self._calls()}) > 1:
            raise ValueError(f"{self.id}: arithmetic and records decide different claims")
        return self

    def _calls(self) -> list[tuple[str, dict[str, Any]]]:
        return [call for check in self.checks for call in check.items()]

    @property
    def paper(self) -> str:
        """``paper1``, ``paper2`` or, across them, ``both``."""
        return {"P1": "paper1", "P2": "paper2"}.get(self.id[:2], "both")

    @property
    def by_arithmetic(self) -> bool:
        return any(PREDICATES[name].arithmetic for name, _ in self._calls())

    @property
    def criterion(self) -> str:
        """What is tested, in words, thresholds included."""
        if self.also:
            return f"{' and '.join(self.also)} hold"
        return "; ".join(PREDICATES[name].words(parameters) for name, parameters in self._calls())

    @property
    def picture(self) -> str:
        """``<paper>/<slug>`` of its figure, empty if it has none."""
        return self.figure if "/" in self.figure or not self.figure else f"{self.paper}/{self.figure}"


@functools.cache
def load() -> list[Claim]:
    """All claims, in the papers' order.

    Raises
    ------
    ConfigError
        If an entry is malformed, names an unknown predicate or claim, or gives a predicate wrong parameters.
    """
    path = paths.FACTS / "claims.yaml"
    try:
        claims = [Claim(**entry) for entry in config.read_yaml(path)]
    except ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    known = [claim.id for claim in claims]
    for name in [*known, *(other for claim in claims for other in claim.also)]:
        if known.count(name) != 1:
            raise ConfigError(f"{path}: there must be exactly one claim {name!r}, there are {known.count(name)}")
    return claims


# --- the scorecard ----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A verdict, the numbers or the reason behind it, and what it hangs on, if on one number."""

    verdict: Verdict
    numbers: str
    decision: Decision | None = None


def judge(claim: Claim, evidence: Evidence | None) -> Row:
    """Verdict on one claim, and the numbers or the reason behind it; `evidence` None: by arithmetic."""
    if claim.untestable:
        return Row(NOT_RUN, claim.untestable)
    if reason := _about(claim.given, evidence):
        return Row(CONSTRUCTION, reason)
    row = _conjunction(claim, evidence)
    if row.verdict == HOLDS:  # what was to be so, and is not, fails as anything else does
        if reason := _about(claim.fitted, evidence):
            row = row._replace(verdict=FITTED, numbers=f"{row.numbers}; {reason}")
        elif claim.construction:
            row = row._replace(verdict=CONSTRUCTION, numbers=f"{row.numbers}; {claim.construction}")
    if claim.ambiguous:
        if not claim.checks:
            return Row(AMBIGUOUS, claim.ambiguous)
        reading = "" if all("report" in check for check in claim.checks) else f"as read here: {row.verdict}: "
        return Row(AMBIGUOUS, f"{claim.ambiguous}; {reading}{row.numbers}", row.decision)
    return row


def _about(reasons: Mapping[str, str], evidence: Evidence | None) -> str:
    """What is said of a source, by the beginning of its name."""
    return next((reason for name, reason in reasons.items() if evidence and evidence.source.startswith(name)), "")


def _conjunction(claim: Claim, evidence: Evidence | None) -> Row:
    """All must hold; one that fails decides, one that cannot be told or was not run leaves the claim open."""
    parts: list[Row] = []
    for other in (other for other in load() if other.id in claim.also):
        row = judge(other, evidence)
        parts.append(Row(row.verdict, f"{other.id} {row.verdict}"))
    for name, parameters in claim._calls():
        predicate = PREDICATES[name]
        try:
            finding = predicate.function(*(() if predicate.arithmetic else (evidence,)), **parameters)
            parts.append(Row(VERDICT_OF[finding.holds], finding.numbers, finding.decision))
        except NotTestable as reason:
            parts.append(Row(NOT_RUN, str(reason)))
    order = (FAILS, NOT_RUN, UNTOLD, AMBIGUOUS, FITTED, CONSTRUCTION, HOLDS)
    decides = min(parts, key=lambda part: order.index(part.verdict), default=Row(HOLDS, ""))
    return Row(decides.verdict, "; ".join(dict.fromkeys(part.numbers for part in parts)), decides.decision)


VERDICT_OF: dict[bool | None, Verdict] = {True: HOLDS, False: FAILS, None: UNTOLD}


FULL_SCALE_SOURCES = {
    "emulated": "emulated/load",
    "simulated-hardware": "simulated/hardware",
    "simulated-harness": "simulated/harness",
    "simulated-pinned-host": "simulated/pinned-host",
    "simulated-thread-client": "simulated/thread-client",
}
"""Sources on the papers' own scale, and where their records lie in a run's directory."""


def read_sources(profile: Profile) -> dict[str, Records]:
    """The records of every source that this profile has run, summarised but for the measured; or the published ones.

    ``measured`` is the sweep's; of the others (:data:`FULL_SCALE_SOURCES`), where a point was made more than once (its
    inputs changed), the newest counts. Emulated points whose engines did not keep pace are left out, and named.

    Raises
    ------
    MissingRecords
        If points of the sweep have not been measured; the message names the notebook to run.
    ConfigError
        If published records are missing, damaged, or of another schema.
    """
    if profile.records == "published":
        return {**publication.read(profile)}
    load = [published.load_records(profile, "p1"), published.load_records(profile, "p2")]
    measured = pd.concat([*load, published.preliminary_records(profile)], ignore_index=True)
    found: dict[str, Records] = {"measured": measured}
    for source, folder in FULL_SCALE_SOURCES.items():
        newest: dict[tuple[Path, str], Path] = {}
        directory = paths.run_dir(profile.name) / folder
        for path in sorted(directory.rglob("[!.]*.parquet"), key=lambda path: path.stat().st_mtime_ns):
            newest[path.parent, path.stem.rpartition("-")[0]] = path
        for key, path in list(newest.items()):
            if damage := records.damage(path):
                print(f"claims: left out {path.relative_to(directory)}: {damage}")
                del newest[key]
        late = [path for path in newest.values() if not _kept_pace(path)]
        for path in late:
            print(f"claims: left out {path.relative_to(directory)}: the emulated engines did not keep pace")
        if files := sorted(set(newest.values()) - set(late)):
            found[source] = evidence.of_files(source, files, profile)
    return found


def _kept_pace(path: Path) -> bool:
    """Whether a point's engines, if they were emulated, lost no more time than they may."""
    with pq.ParquetFile(path) as file:
        lost = file.read(columns=["lost_time"]).to_pandas().reindex(columns=["lost_time"])
    return not (lost["lost_time"] > emulation.KEPT_PACE).any()


COLUMNS = [
    *("id", "paper", "where", "type", "claim", "source", "verdict", "numbers", "criterion", "figure", "conflict"),
    *("held", "open", "compared", "effect", "ci95_low", "ci95_high", "repeats", "threshold_low", "threshold_high"),
]
"""Columns of :func:`evaluate`'s frame."""


def evaluate(records_by_source: Mapping[str, Records], profile: Profile) -> pd.DataFrame:
    """Every claim against every source.

    Parameters
    ----------
    records_by_source : mapping
        Source (``measured`` and :data:`FULL_SCALE_SOURCES`; those that exist) to its records, as
        :func:`erlib.load.records.read` returns them, whole or in parts, or summarised
        (:func:`erlib.claims.evidence.of_files`). ``measured`` is on the scale of `profile`, all others on the papers'.
    profile : Profile

    Returns
    -------
    DataFrame
        One row per claim and source, claims of arithmetic once with source ``arithmetic``: ``id``, ``paper``,
        ``where``, ``type``, ``claim``, ``source``, ``verdict``, ``numbers`` (behind the verdict, or the reason why
        there is none), ``criterion`` (what was tested), ``figure`` (relative to the profile's figures, empty where not
        drawn), ``conflict`` (what the claim contradicts inside the papers). Where a verdict counts comparisons:
        ``held`` for certain, ``open`` (their intervals cover the threshold), ``compared`` (all); of the one that is
        closest to failing ``effect``, its 95 % interval ``ci95_low`` to ``ci95_high`` (missing for one run),
        ``repeats``, and the thresholds between which it should lie, ``threshold_low`` and ``threshold_high``.

    Raises
    ------
    ValueError
        If a source has no records, or its records are damaged.
    """
    sources = {name: Evidence(name, frame, profile) for name, frame in records_by_source.items()}
    rows = []
    for claim in load():
        where: Mapping[str, Evidence | None] = {ARITHMETIC: None} if claim.by_arithmetic else sources
        for source, seen in where.items():
            row = judge(claim, seen)
            rows.append(
                {
                    **{name: getattr(claim, name) for name in ("id", "paper", "where", "type", "claim")},
                    "source": source,
                    "verdict": row.verdict,
                    "numbers": row.numbers,
                    "criterion": claim.criterion,
                    "figure": _figure(profile, source, claim.picture),
                    "conflict": claim.conflict,
                    **hangs_on(row.decision),
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def hangs_on(decision: Decision | None) -> dict[str, float]:
    if decision is None:
        return {}
    at = decision.closest
    interval = {"ci95_low": at.low, "ci95_high": at.high} if at.n > 1 else {}
    counted = {"held": decision.held, "open": decision.open, "compared": decision.of}
    bounds = {"threshold_low": decision.low, "threshold_high": decision.high}
    return {**counted, "effect": at.value, **interval, "repeats": at.n, **bounds}


def _figure(profile: Profile, source: str, picture: str) -> str:
    """Relative path of the claim's figure as this source drew it; Table I is the same for all, drawn as measured."""
    link = f"{'measured' if source == ARITHMETIC else source}/{picture}.png"
    return link if picture and (paths.FIGURES / profile.name / link).exists() else ""


def counts(scorecard: pd.DataFrame) -> pd.DataFrame:
    """Verdicts (columns) by source (rows)."""
    table = scorecard.groupby(["source", "verdict"]).size().unstack(fill_value=0)
    order = sorted(scorecard["source"].unique(), key=lambda source: source == ARITHMETIC)  # which comes last
    return table.reindex(index=order, columns=VERDICTS, fill_value=0)


def inconsistencies(scorecard: pd.DataFrame) -> pd.DataFrame:
    """The claims that contradict other numbers or statements of the same papers, once each."""
    return scorecard[scorecard["conflict"] != ""].drop_duplicates("id")
