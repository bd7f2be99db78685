"""Children never outlive us, and ports in use are named."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from erlib import processes


def test_a_killed_parent_takes_its_children_along(tmp_path):
    code = (
        "import sys; from pathlib import Path; from erlib import processes;"
        "child = processes.spawn(['sleep', '60'], Path(sys.argv[1]));"
        "print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "log"], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def test_stop_ends_a_process_that_ignores_sigterm_and_its_children(tmp_path):
    stubborn = processes.spawn(["bash", "-c", "trap '' TERM; sleep 60 & wait; sleep 60"], tmp_path / "log")
    time.sleep(0.3)
    family = [psutil.Process(stubborn.pid), *psutil.Process(stubborn.pid).children(recursive=True)]
    assert len(family) == 2
    processes.stop([stubborn], grace_s=0.3)
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def test_ports_in_use_are_named_with_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(processes.StartError, match=rf"port in use: {port}.*serving\.base_port"):
            processes.require_free_ports([port])
    processes.require_free_ports([port])


def test_waiting_for_a_process_that_dies_quotes_its_log(tmp_path):
    log = tmp_path / "log"
    process = processes.spawn(["bash", "-c", "echo out of luck >&2; exit 3"], log)
    with pytest.raises(processes.StartError, match=r"code 3[\s\S]*out of luck"):
        processes.wait_until(lambda: False, process, "it", log, 5)


def test_waiting_ends_at_the_deadline(tmp_path):
    process = processes.spawn(["sleep", "60"], tmp_path / "log")
    try:
        with pytest.raises(processes.StartError, match="not ready after"):
            processes.wait_until(lambda: False, process, "it", tmp_path / "log", 0.2)
    finally:
        processes.stop([process])


def test_niceness_counts_among_processes_of_different_sessions(tmp_path):
    core = min(os.sched_getaffinity(0))
    busy = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    rivals = [processes.spawn(processes.python("-c", busy), tmp_path / "log", niceness=n) for n in (0, 10)]
    try:
        time.sleep(0.5)
        before = [sum(psutil.Process(rival.pid).cpu_times()[:2]) for rival in rivals]
        time.sleep(2)
        first, second = (
            sum(psutil.Process(rival.pid).cpu_times()[:2]) - ago for rival, ago in zip(rivals, before, strict=True)
        )
    finally:
        processes.stop(rivals, grace_s=0)
    assert first > 2 * second
