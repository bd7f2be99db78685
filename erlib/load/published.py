"""Records that are published beside a profile's figures: who has no time to measure draws and judges these.

``figures/<profile>/records`` holds a few parquet files and ``manifest.json``, which says of each what its columns mean
(a hash of the schema) and what it contains (its sha256).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from erlib import cache, paths
from erlib.config import ConfigError, Paper, Profile
from erlib.load import experiments, records, sweep
from erlib.serving import spans
from erlib.workload import prompts

MEASURED = "measured"
CLUSTER_MAP = "clusterer_map"
INPUT_LENGTHS = "input_lengths"
"""Names of published tables; :mod:`erlib.claims.verdicts` has more."""
_MANIFEST = "manifest.json"


class Published(NamedTuple):
    """One table, and what its columns mean."""

    table: pa.Table
    schema: str


def of_records(frame: pd.DataFrame, without: tuple[str, ...] = ()) -> Published:
    """Records as a table of their schema, with or without some of its columns."""
    schema = pa.schema([field for field in records.SCHEMA if field.name not in without])
    return Published(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), _meaning(schema))


def of_frame(frame: pd.DataFrame) -> Published:
    """Any frame; its columns mean what their names and types say."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()
    return Published(table, _meaning(table.schema))


def schema_of_records(without: tuple[str, ...] = ()) -> str:
    """What :func:`of_records` says that its columns mean."""
    return of_records(records.SCHEMA.empty_table().to_pandas(), without).schema


def _meaning(schema: pa.Schema) -> str:
    return cache.digest([(field.name, str(field.type)) for field in schema])


def folder(profile: Profile) -> Path:
    """Where a profile's published records lie: always in the repository."""
    return paths.REFERENCE / profile.name / "records"


def write(profile: Profile, tables: Mapping[str, Published]) -> Path:
    """Replace a profile's published records; what is there when the manifest is, is complete."""
    target = folder(profile)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    manifest = {}
    for name, (table, schema) in tables.items():
        numbers = [field.name for field in table.schema if not pa.types.is_string(field.type)]
        # The bytes of alike numbers stand together and are pressed hard: a tenth of what a run's own files take.
        pq.write_table(
            table, target / f"{name}.parquet", compression="zstd", compression_level=19, row_group_size=1 << 20,
            use_dictionary=[field.name for field in table.schema if field.name not in _TIMES],
            column_encoding={path: "BYTE_STREAM_SPLIT" for column, path in _TIMES.items() if column in numbers},
        )  # fmt: skip
        manifest[name] = {"schema": schema, "sha256": cache.sha256(target / f"{name}.parquet")}
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return target


_TIMES = {
    **{name: name for name in ("t_send_ns", "t_first_ns", "t_last_ns", *map(spans.column, spans.SPANS))},
    "token_ns": "token_ns.list.element",
}
"""Columns in which hardly a number comes twice, and where parquet keeps them."""


DRAWING = ("08_figures_paper1", "09_figures_paper2", "10_scorecard")
"""Notebooks that read records and make none."""


def check(profile: Profile, notebooks: Sequence[str] = DRAWING) -> None:
    """Refuse published records that are missing, changed, or of another schema, or that a notebook does not read.

    Raises
    ------
    ConfigError
        In one line.
    """
    for notebook in notebooks:
        if notebook not in DRAWING:
            raise ConfigError(f"{notebook} makes records of its own: published ones are for --only {' '.join(DRAWING)}")
    for name in names(profile):
        read(profile, name)
    measured(profile)


def names(profile: Profile) -> list[str]:
    """Of all published tables."""
    return list(_manifest(profile))


def _manifest(profile: Profile) -> dict[str, Any]:
    file = folder(profile) / _MANIFEST
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"profile {profile.name!r} has no published records ({_short(file)} is missing)") from None
    except ValueError:
        raise ConfigError(f"{_short(file)} is damaged: git checkout {_short(file)}") from None
    return found


def read(profile: Profile, name: str, schema: str | None = None) -> pa.Table:
    """A published table; `schema` is what its columns should mean, None: whatever they do.

    Raises
    ------
    ConfigError
        If it is missing, its content is not what was published, or it is of another schema.
    """
    file, about = folder(profile) / f"{name}.parquet", _manifest(profile).get(name)
    if about is None or not file.is_file():
        raise ConfigError(f"{_short(file)} is not published: git checkout {_short(file.parent)}, or measure anew")
    if cache.sha256(file) != about["sha256"]:
        raise ConfigError(f"{_short(file)} is not what was published (wrong sha256): git checkout {_short(file)}")
    if schema not in (None, about["schema"]):
        raise ConfigError(f"{_short(file)} has another schema than this version of erlib reads: publish it anew")
    return pq.read_table(file, partitioning=None)


def _short(path: Path) -> Path:
    return path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path


# --- what notebooks read, own or published --------------------------------------------------------------------------


def load_records(profile: Profile, paper: Paper) -> pd.DataFrame:
    """Records of a paper's main experiment; MissingRecords or ConfigError where there are none."""
    if profile.records == "published":
        return _experiment(profile, "load", paper)
    return sweep.read(profile, experiments.load_sweep(profile, paper))


def preliminary_records(profile: Profile) -> pd.DataFrame:
    """Records of paper 2's search for its baselines; MissingRecords or ConfigError where there are none."""
    if profile.records == "published":
        return _experiment(profile, "preliminary", "p2")
    return sweep.read(profile, experiments.preliminary_sweep(profile))


def _experiment(profile: Profile, experiment: experiments.Experiment, paper: Paper) -> pd.DataFrame:
    frame = measured(profile)
    return frame[(frame["experiment"] == experiment) & (frame["paper"] == paper)].reset_index(drop=True)


def measured(profile: Profile) -> pd.DataFrame:
    """All published records that were measured: the main and the preliminary experiment."""
    return read(profile, MEASURED, schema_of_records()).to_pandas()


def input_lengths(profile: Profile) -> pd.DataFrame:
    """Lengths of paper 2's prompts, as :func:`erlib.workload.prompts.input_lengths` returns them."""
    if profile.records == "published":
        return read(profile, INPUT_LENGTHS).to_pandas()
    return prompts.input_lengths(experiments.build_workload(profile, "p2"))
