"""Children of a nursery: what they get, how they end, and that none outlives it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from erlib.machine import processes
from erlib.machine.nursery import Nursery

PROGRAM = """
import os, sys, time
from erlib.machine.nursery import forked
loaded = os.getpid()
what, *more = forked()
print(what, loaded != os.getpid() and loaded == os.getppid(), os.nice(0), os.getsid(0) == os.getpid(), flush=True)
print("to standard error", file=sys.stderr, flush=True)
if what == "sleep":
    time.sleep(60)
raise SystemExit(int(more[0]))
"""


@contextlib.contextmanager
def nursery(directory: Path, program: str = PROGRAM) -> Iterator[Nursery]:
    path = directory / "program.py"
    path.write_text(program, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    made = Nursery([sys.executable, path], directory / "nursery.log", {"PYTHONPATH": root})
    try:
        yield made
    finally:
        processes.stop([made.process], grace_s=0)


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def wait_for(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_children_have_arguments_log_session_and_niceness_of_their_own(tmp_path: Path) -> None:
    own = os.nice(0)
    with nursery(tmp_path) as made:
        children = [made.fork(["tell", i], tmp_path / f"{i}.log", niceness=i) for i in (0, 3)]
        assert [child.wait(20) for child in children] == [0, 3]
        for i in (0, 3):
            assert (tmp_path / f"{i}.log").read_text().splitlines() == [
                f"tell True {own + i} True",
                "to standard error",
            ]
    assert not (tmp_path / "nursery.log").read_text()


def test_a_child_is_polled_signalled_and_reaped_as_one_of_ours(tmp_path: Path) -> None:
    with nursery(tmp_path) as made:
        killed, stopped = (made.fork(["sleep", 0], tmp_path / "log") for _ in range(2))
        assert killed.poll() is None and stopped.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            killed.wait(0.05)
        killed.kill()
        assert killed.wait(5) == -signal.SIGKILL and killed.poll() == -signal.SIGKILL
        killed.kill()  # is no other process by now
        assert made.how_ended(killed.pid) == -signal.SIGKILL  # another thread may have asked at the same time
        assert stopped.poll() is None
        processes.stop([stopped], grace_s=5)
        assert stopped.returncode == -signal.SIGTERM


def test_no_child_outlives_its_nursery(tmp_path: Path) -> None:
    with nursery(tmp_path) as made:
        child = made.fork(["sleep", 0], tmp_path / "log")
        wait_for(lambda: "sleep" in (tmp_path / "log").read_text())
        made.process.kill()
        wait_for(lambda: gone(child.pid))
        assert child.poll() == -signal.SIGKILL  # it has ended, as the nursery has
        with pytest.raises(processes.StartError, match=r"nursery exited with code -9"):
            made.fork(["tell", 0], tmp_path / "log")


def test_a_program_that_cannot_load_says_why(tmp_path: Path) -> None:
    why = pytest.raises(processes.StartError, match=r"code 1(?s:.)*error: no such model")
    with nursery(tmp_path, "raise SystemExit('error: no such model')") as made, why:
        made.fork([], tmp_path / "log")
