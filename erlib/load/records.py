"""One parquet schema for everything that was measured, emulated or simulated: one row per request.

Metrics, figures and claims read records and nothing else. A *point* (experiment, configuration, mix, users, repeat) is
one file, written under a temporary name and renamed when complete: a file that exists is complete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import dataset

from erlib import cache
from erlib.serving import spans

SCHEMA = pa.schema(
    [
        # which point
        ("source", pa.string()),  # measured | emulated | simulated
        ("paper", pa.string()),  # p1 | p2
        ("experiment", pa.string()),  # load | preliminary | overhead | ablation | replicas
        ("config", pa.string()),  # p1.A ... p2.R; preliminary: p2.fp8-tp4-bs100
        ("mix", pa.string()),  # uniform | normal
        ("users", pa.int32()),
        ("repeat", pa.int32()),
        # which request
        ("user", pa.int32()),
        ("turn", pa.string()),  # base | continuation
        ("cluster", pa.int32()),  # the cluster that the prompt was drawn from
        ("expert", pa.int32()),  # the server that answered, 0-based
        ("prompt", pa.int32()),  # index in the workload
        ("input_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        # client clock, monotonic, comparable within a point
        ("t_send_ns", pa.int64()),
        ("t_first_ns", pa.int64()),
        ("t_last_ns", pa.int64()),
        ("token_ns", pa.list_(pa.int64())),
        ("status", pa.string()),  # ok, or what went wrong
        # what the gateway did with it (null where there is none)
        *((spans.column(span), pa.int64()) for span in spans.SPANS),
        # who asks (null where nobody is real), who classifies, and who relays the tokens (null where nobody does)
        ("client", pa.string()),  # asyncio | threads
        ("classifier", pa.string()),  # ours | stock
        ("relay", pa.string()),  # front | gateway
        # emulated engines: wall seconds for one second of theirs; steps, those over 5 % late, and the time so lost
        ("slow_motion", pa.float64()),
        ("steps", pa.int64()),
        ("late_steps", pa.int64()),
        ("lost_time", pa.float64()),  # share of what all steps should have taken
        # the run: did the harness itself keep up?
        ("client_lag_p99_ms", pa.float64()),
        ("client_lag_max_ms", pa.float64()),
        ("client_cpu_cores", pa.float64()),
        ("network_us_mean", pa.float64()),  # a TCP connection to what the users ask: one round trip
        ("network_us_sd", pa.float64()),
        ("server_tokens", pa.int64()),  # tokens that the servers counted during the point, all requests
        # which CPU cores the servers' processes were bound to (null where that cannot be seen)
        ("server_cores", pa.int32()),  # of the server with the fewest
        ("server_cpus", pa.string()),  # e.g. "0-111 x 8", or where something binds eight servers: "0 x 8"
        # provenance
        ("point_hash", pa.string()),
        ("profile", pa.string()),
        ("profile_hash", pa.string()),
        ("git_commit", pa.string()),
        ("host", pa.string()),  # e.g. "2 x AMD EPYC 7763, 24 GB"
        ("versions", pa.string()),  # JSON
        ("seed", pa.int64()),
        ("started", pa.string()),  # ISO 8601, UTC
    ]
)


_WRITTEN_AS: dict[str, Any] = {
    # Most columns repeat a few values: a dictionary makes them smaller in no time, compressing them takes too long.
    "use_dictionary": [name for name in SCHEMA.names if name != "token_ns"],
    # Tokens' timestamps differ in their low bytes: with all bytes of a kind side by side, in one page, steps that many
    # requests share are found again, and a simulated point takes a quarter of the room.
    "compression": {"token_ns.list.element": "zstd"},
    "column_encoding": {"token_ns.list.element": "BYTE_STREAM_SPLIT"},
    "data_page_size": 16 << 20,
}


def of_columns(n: int, columns: Mapping[str, Any]) -> pa.Table:
    """Rows from whole columns.

    Parameters
    ----------
    n : int
        Rows.
    columns : mapping
        By name: `n` values as a list or an array, or one value that all rows have. What is not named is missing.

    Raises
    ------
    KeyError
        If the schema has no such column.
    """
    if unknown := set(columns) - set(SCHEMA.names):
        raise KeyError(f"records have no column {min(unknown)}")
    parts = []
    for field in SCHEMA:
        value = columns.get(field.name)
        if isinstance(value, list | np.ndarray | pa.Array):
            parts.append(pa.array(value, field.type))
        else:
            parts.append(pa.repeat(pa.scalar(value, field.type), n))
    return pa.Table.from_arrays(parts, schema=SCHEMA)


def frame(parts: Iterable[pa.Table]) -> pd.DataFrame:
    """Tables of records as one frame, as :func:`read_files` has it; an empty one if there are none."""
    return pa.concat_tables([SCHEMA.empty_table(), *parts]).to_pandas()


def write(rows: Iterable[dict[str, Any]] | pa.Table, path: Path) -> None:
    """Write one complete point; if the disk is full or not writable, nothing that looks complete is left behind."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=SCHEMA)
    with cache.writing(path) as temporary:
        pq.write_table(table, temporary, **_WRITTEN_AS)


class DamagedRecords(RuntimeError):
    """A point's file is not what was written; the message says what to do."""


def damage(path: Path) -> str:
    """What is wrong with a point's file, judged by its ends and its columns of few values; empty if nothing is.

    It can be read, it holds the point whose hash its name ends with, and every user has a row for each turn.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=_JUDGED)
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        return f"it cannot be read ({type(error).__name__})"
    missing = set(_JUDGED) - set(table.column_names)
    return f"it cannot be read (no column {min(missing)})" if missing else _wrong(table, [path])


_JUDGED = ["point_hash", "users", "user", "turn"]


def _wrong(table: pa.Table, files: Sequence[Path]) -> str:
    """What is wrong with the rows of one or more points' files; empty if nothing is."""
    rows = table.to_pandas()
    if rows.empty:
        return "it has no rows"
    if set(rows["point_hash"]) != set(map(_named, files)):
        return "it holds another point than its name says"
    expected = rows.drop_duplicates(["point_hash", "turn"])["users"].sum()
    everybody = len(rows) == expected and not rows.duplicated(["point_hash", "turn", "user"]).any()
    if rows.isna().any(axis=None) or not (everybody and rows["user"].between(0, rows["users"] - 1).all()):
        return "rows of some users are missing, or there twice"
    return ""


def found(path: Path, what: str) -> bool:
    """Whether a point has been measured and its file is whole; a damaged one is said and removed.

    Parameters
    ----------
    path : Path
    what : str
        What the line begins with, e.g. ``sweep``.
    """
    if not path.exists():
        return False
    if reason := damage(path):
        print(f"{what}: {path.name} of {path.parent.name} is made again: {reason}")
        path.unlink()
    return not reason


def read(directory: Path) -> pd.DataFrame:
    """All records below `directory`; see :func:`read_files`."""
    return read_files(sorted(path for path in directory.rglob("*.parquet") if not path.name.startswith(".")))


def read_files(files: Sequence[Path]) -> pd.DataFrame:
    """Records of complete points as one frame; ``token_ns`` is a column of int64 arrays.

    An empty frame with the schema's columns if there are no files.

    Raises
    ------
    DamagedRecords
        If a file is not what was written; names it.
    """
    if not files:
        return SCHEMA.empty_table().to_pandas()
    if len(set(map(_named, files))) == len(files):  # else one that is empty would not be missed beside its double
        with contextlib.suppress(OSError, ValueError):  # which file it is, is asked below
            table = _table(files)
            if not _wrong(table.select(_JUDGED), files):
                return table.to_pandas()
    tables = []
    for path in files:
        reason = damage(path)
        try:
            tables += [] if reason else [_table([path])]
        except (OSError, ValueError) as error:  # in its midst
            reason = f"it cannot be read ({error})"
        if reason:
            raise DamagedRecords(f"{path} is damaged: {reason}; remove it, and the next run measures it again")
    return pa.concat_tables(tables).to_pandas()


def _named(path: Path) -> str:
    """The hash of the point that a file holds, by its name."""
    return path.stem.rpartition("-")[2]


def _table(files: Sequence[Path]) -> pa.Table:
    """What the files say, in their order, and not what folders are called, which pyarrow would take for columns."""
    return dataset.dataset([str(path) for path in files], schema=SCHEMA, format="parquet").to_table()
