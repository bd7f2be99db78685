"""Processes that are given jobs, with a module of the test's own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from erlib import paths
from erlib.engines import worker

MODULE = """
import os, time
from erlib.engines.worker import do_jobs

def work(jobs):
    loaded = os.getpid()
    for job in jobs:
        if job.get("fail"):
            raise SystemExit("no such thing")
        time.sleep(job.get("s", 0))
        print("a library says something")
        for i in range(job.get("results", 1)):
            yield {"of": job["name"], "i": i, "pid": loaded}

do_jobs(work)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_jobs.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{paths.ROOT}")
    monkeypatch.setattr(paths, "ENGINE_BUILDS", tmp_path / "logs")


def test_children_take_their_next_job_when_they_have_done_one() -> None:
    """One long job and many short: the short ones are done by the other child meanwhile."""
    jobs = [{"name": 0, "s": 1.0}, *({"name": i, "s": 0.01} for i in range(1, 9))]
    with worker.Workers("its_jobs", 2) as workers:
        found = list(workers.do(jobs))
    assert sorted(row["of"] for row in found) == list(range(9))
    of_long = next(row["pid"] for row in found if row["of"] == 0)
    assert sum(row["pid"] != of_long for row in found) == 8


def test_children_are_kept_between_batches_and_die_with_the_block() -> None:
    with worker.Workers("its_jobs", 2) as workers:
        first = list(workers.do([{"name": "alone", "results": 3}]))
        assert [row["i"] for row in first] == [0, 1, 2]
        assert list(workers.do([])) == []
        second = list(workers.do([{"name": i, "s": 0.2} for i in range(4)]))
    pids = {row["pid"] for row in first} | {row["pid"] for row in second}
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_fails_says_why_and_the_others_end() -> None:
    jobs = [{"name": 0, "s": 30}, {"name": 1, "fail": True}]
    began_s = time.monotonic()
    with worker.Workers("its_jobs", 2) as workers, pytest.raises(RuntimeError, match=r"exit code 1; .*\nno such thing"):
        list(workers.do(jobs))
    assert time.monotonic() - began_s < 25


def test_a_child_that_ends_before_its_work_has_failed(tmp_path: Path) -> None:
    (tmp_path / "its_jobs.py").write_text("import sys; sys.exit(0)")
    with pytest.raises(RuntimeError, match="its_jobs failed with exit code 0"):
        list(worker.in_own_process("its_jobs", [{"name": 0}]))
