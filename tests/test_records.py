"""A record file that exists is complete."""

import errno
import os

import pytest

from erlib import records


def _row(**changes):
    row = {name: None for name in records.SCHEMA.names}
    return row | {"config": "p1.A", "user": 1, "token_ns": [1, 2, 5], "status": "ok"} | changes


def test_what_is_written_is_read(tmp_path):
    records.write([_row(user=0), _row(user=1, token_ns=[])], tmp_path / "a" / "point.parquet")
    frame = records.read(tmp_path)
    assert list(frame["user"]) == [0, 1]
    assert [list(times) for times in frame["token_ns"]] == [[1, 2, 5], []]
    assert list(frame.columns) == records.SCHEMA.names


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
