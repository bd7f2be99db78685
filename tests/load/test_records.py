"""A record file that exists is complete, and checked before it is believed."""

import ast
import errno
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from erlib import paths
from erlib.load import records


def _row(**changes):
    row = {name: None for name in records.SCHEMA.names} | {"point_hash": "hash", "users": 2, "turn": "base"}
    return row | {"config": "p1.A", "user": 1, "token_ns": [1, 2, 5], "status": "ok"} | changes


ROWS = [_row(user=0), _row(user=1, token_ns=[])]


def test_what_is_written_is_read(tmp_path):
    records.write(ROWS, tmp_path / "a" / "point-hash.parquet")
    frame = records.read(tmp_path)
    assert list(frame["user"]) == [0, 1]
    assert [list(times) for times in frame["token_ns"]] == [[1, 2, 5], []]
    assert list(frame.columns) == records.SCHEMA.names


def test_columns_are_the_rows_that_they_stand_for(tmp_path):
    columns = {
        "user": [0, 1],
        "token_ns": [[1, 2, 5], []],
        "input_tokens": np.array([3, 4]),
        "repeat": 7,
        "status": "ok",
    }
    rows = [
        _row(**{"user": user, "token_ns": stamps, "input_tokens": tokens, "repeat": 7, "status": "ok"})
        for user, stamps, tokens in ((0, [1, 2, 5], 3), (1, [], 4))
    ]
    shared = {"point_hash": "hash", "users": 2, "turn": "base", "config": "p1.A"}
    table = records.of_columns(2, columns | shared)
    assert table.to_pylist() == rows
    records.write(table, tmp_path / "columns" / "point-hash.parquet")
    records.write(rows, tmp_path / "rows" / "point-hash.parquet")
    pd.testing.assert_frame_equal(*(records.read(tmp_path / name) for name in ("columns", "rows")))
    assert len(records.frame([])) == 0 and list(records.frame([table])["user"]) == [0, 1]
    with pytest.raises(KeyError, match="no column usr"):
        records.of_columns(2, {"usr": 1})


def test_no_table_is_read_by_the_names_of_its_folders():
    calls = [
        node
        for file in paths.STYLE.parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("read_table")
    ]
    assert calls
    for call in calls:  # whose default is what arrow calls hive partitioning
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}.get("partitioning") == "None"


def test_no_files_give_an_empty_frame(tmp_path):
    assert list(records.read(tmp_path).columns) == records.SCHEMA.names


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.write([_row()], tmp_path / "point.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_does_not_fit_the_schema_is_refused(tmp_path):
    with pytest.raises(Exception, match=r"int|convert"):
        records.write([_row(user="nobody")], tmp_path / "point.parquet")
    assert list(tmp_path.iterdir()) == []


def test_half_written_files_are_not_read(tmp_path):
    (tmp_path / ".point.parquet.123.tmp").write_bytes(b"half")
    assert records.read(tmp_path).empty


def test_folders_named_like_columns_say_nothing(tmp_path):
    records.write(ROWS, tmp_path / "users=7" / "status=bad" / "point-hash.parquet")
    assert set(records.read(tmp_path)["status"]) == {"ok"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path, 0), "cannot be read"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "cannot be read"),
        (lambda path: os.truncate(path, 100), "cannot be read"),
        (lambda path: path.write_text("user,turn"), "cannot be read"),
        (lambda path: records.write([], path), "no rows"),
        (lambda path: records.write([row | {"point_hash": "other"} for row in ROWS], path), "another point"),
        (lambda path: records.write([row | {"point_hash": None} for row in ROWS], path), "another point"),
        (lambda path: records.write(ROWS[:1], path), "rows of some users"),
        (lambda path: records.write([*ROWS, ROWS[0]], path), "rows of some users"),
        (lambda path: records.write([*ROWS, ROWS[0] | {"turn": "continuation"}], path), "rows of some users"),
        (lambda path: pd.DataFrame({"users": ["x"]}).to_parquet(path), "cannot be read"),
    ],
)
@pytest.mark.parametrize("other", ["other", "hash"], ids=["beside another point", "beside its double"])
def test_a_damaged_point_is_named_and_never_read(tmp_path, capsys, damage, reason, other):
    path, whole = tmp_path / "p1.A" / "point-hash.parquet", tmp_path / "p1.A" / f"whole-{other}.parquet"
    records.write(ROWS, path)
    records.write([row | {"point_hash": other} for row in ROWS], whole)
    assert records.found(path, "sweep") and records.found(whole, "sweep")
    assert len(records.read(tmp_path)) == 4
    damage(path)
    with pytest.raises(records.DamagedRecords, match=f"point-hash.parquet is damaged.*{reason}"):
        records.read(tmp_path)
    assert capsys.readouterr().out == ""
    assert not records.found(path, "sweep")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("sweep: point-hash.parquet of p1.A is made again: ") and reason in line
    assert not records.found(path, "sweep")
    assert len(records.read(tmp_path)) == 2


def test_a_point_that_is_damaged_in_its_midst_is_named(tmp_path):
    path = tmp_path / "point-hash.parquet"
    records.write([_row(user=user, users=200, token_ns=list(range(user, user + 200))) for user in range(200)], path)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(17).data_page_offset
    assert "token_ns" in pq.ParquetFile(path).metadata.row_group(0).column(17).path_in_schema
    content[start : start + 300] = b"x" * 300
    path.write_bytes(content)
    with pytest.raises(records.DamagedRecords, match="point-hash"):
        records.read_files([path])
