"""What is kept under the hash of its content is checked before it is believed."""

import ast
import os
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest

from erlib import cache, paths


@pytest.fixture
def kept(tmp_path):
    target = tmp_path / "0123456789abcdef"
    with cache.building(target) as partial:
        (partial / "inner").mkdir()
        (partial / "model.bin").write_bytes(b"weights")
        (partial / "inner" / "tokenizer.json").write_text("{}")
    return target


def test_what_is_whole_is_found_and_left_alone(kept, capsys):
    (kept / "written by somebody later").touch()
    assert cache.found(kept, "engines")
    assert cache.found(kept, "engines")
    assert capsys.readouterr().out == ""
    assert not cache.found(kept.with_name("other"), "engines")


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: (kept / "model.bin").unlink(),
        lambda kept: (kept / "inner" / "tokenizer.json").unlink(),
        lambda kept: shutil.rmtree(kept / "inner"),
        lambda kept: os.truncate(kept / "model.bin", 3),
        lambda kept: os.truncate(kept / "model.bin", 0),
        lambda kept: (kept / "sizes.json").unlink(),
        lambda kept: (kept / "sizes.json").write_text("[1]"),
        lambda kept: (kept / "sizes.json").write_bytes(b"\xff"),
    ],
    ids=["gone", "gone below", "folder gone", "cut", "empty", "no sizes", "other sizes", "unreadable sizes"],
)
def test_what_is_damaged_is_removed_with_one_line(kept, capsys, damage):
    damage(kept)
    assert not cache.found(kept, "engines")
    assert not kept.exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("engines: 0123456789abcdef is made again: ")


def test_what_is_not_kept_holds_nothing_else(tmp_path):
    with cache.building(tmp_path / "models", kept=False) as partial:
        (partial / "config.pbtxt").touch()
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["config.pbtxt"]


def test_a_file_in_the_place_of_a_folder_is_removed(tmp_path):
    (tmp_path / "kept").touch()
    assert not cache.found(tmp_path / "kept", "engines")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text"])
def test_a_cached_file_that_cannot_be_read_counts_as_none(tmp_path, capsys, content):
    file = tmp_path / "table.parquet"
    assert cache.recalled(file, pd.read_parquet, "router comparison") is None
    assert capsys.readouterr().out == ""
    pd.DataFrame({"x": [1]}).to_parquet(file)
    assert list(cache.recalled(file, pd.read_parquet, "router comparison")["x"]) == [1]
    file.write_bytes(content)
    assert cache.recalled(file, pd.read_parquet, "router comparison") is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("router comparison: table.parquet is made again: it cannot be read")


def test_no_file_is_read_or_written_in_the_encoding_of_whoever_runs_it():
    where = [
        f"{file.relative_to(paths.ROOT)}:{node.lineno}"
        for folder in ("erlib", "scripts", "benchmarks", "engines/triton")
        for file in (paths.ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in {"read_text", "write_text"}
        and "encoding" not in {word.arg for word in node.keywords}
    ]
    assert where == []


_HOLDS_IT = """
import sys, time
from pathlib import Path
from erlib import cache
with cache.scratch(Path(sys.argv[1])) as made:
    (made / "half.bin").write_bytes(b"x")
    print(made, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_leaves_goes_with_the_next_and_what_a_living_one_has_stays(tmp_path):
    command = [sys.executable, "-c", _HOLDS_IT, tmp_path]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=paths.ROOT) for _ in range(3)]
    try:
        killed, killed_just_now, alive = (tmp_path / process.stdout.readline().strip() for process in started)
        for process in started[:2]:
            process.kill()
            process.wait()
        elsewhere = tmp_path / ".partial-another-machine-x"
        elsewhere.mkdir()
        an_hour_ago = time.time() - 3600
        for made in (killed, alive, elsewhere):
            os.utime(made, (an_hour_ago, an_hour_ago))
        os.utime(killed_just_now)
        with cache.building(tmp_path / "kept") as partial:
            assert {killed_just_now, alive, elsewhere, partial.parent} == set(tmp_path.iterdir())
    finally:
        for process in started:
            process.kill()
            process.communicate()
