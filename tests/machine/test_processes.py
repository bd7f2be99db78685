"""Children never outlive us, and ports in use are named."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from erlib.machine import leftovers, processes


def test_a_killed_parent_takes_its_children_along(tmp_path):
    code = (
        "import sys; from pathlib import Path; from erlib.machine import processes;"
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


def _is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _ended(pids: list[int], within_s: float = 5.0) -> list[int]:
    """Those that still run after so long."""
    deadline = time.monotonic() + within_s
    while (left := [pid for pid in pids if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


KILLED_PARENT = """
import signal, subprocess, sys, time
from pathlib import Path
from erlib.machine import leftovers, processes
log = Path(sys.argv[1])
{before}
child = processes.spawn(["bash", "-c", sys.argv[2]], log, stdout=subprocess.PIPE)
pids = [child.pid, *map(int, child.stdout.readline().split())]
{after}
print(*pids, flush=True)
time.sleep(60)
"""
GRANDCHILD = "sleep 60 & echo $!; wait"


STATES = {
    "signals are blocked": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})",
        GRANDCHILD,
        "",
    ),
    "signals are ignored": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", GRANDCHILD, ""),
    "deaf": ("", f"trap '' TERM; {GRANDCHILD}; sleep 60", ""),
    "stopped": ("", GRANDCHILD, "child.send_signal(signal.SIGSTOP)"),
    "a zombie": ("", GRANDCHILD, "child.kill(); time.sleep(0.1)"),
    "dead": ("", GRANDCHILD, "child.kill(); child.wait()"),
    "crashed, its child deaf": ("", f"(trap '' TERM; {GRANDCHILD})", "child.send_signal(signal.SIGSEGV); child.wait()"),
}
"""How a process may be when its parent is killed: what the parent had done before, what it runs, what is done to it."""


def test_nothing_outlives_a_killed_parent_whatever_the_state_of_its_children(tmp_path):
    with contextlib.ExitStack() as parents:
        families = {}
        for state, (before, child, after) in STATES.items():
            code = KILLED_PARENT.format(before=before, after=after)
            command = [sys.executable, "-c", code, tmp_path / "log", child]
            families[state] = parents.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        pids = {state: [int(pid) for pid in one.stdout.readline().split()] for state, one in families.items()}
        for parent in families.values():
            parent.kill()
    assert {len(family) for family in pids.values()} == {2}
    assert {state: left for state, family in pids.items() if (left := _ended(family))} == {}


def test_a_number_that_somebody_else_has_by_now_is_not_taken_for_ours():
    """As after all numbers have been given out once."""
    ours = leftovers.started(os.getpid())
    assert leftovers.still_those_of({os.getpid(): ours}) == {os.getpid()}
    assert leftovers.still_those_of({os.getpid(): ours - 1}) == set()
    assert leftovers.still_those_of({os.getpid(): None}) == set()


def test_a_guard_that_is_killed_is_replaced(tmp_path):
    code = KILLED_PARENT.format(
        before="processes.spawn(['true'], log); import psutil\n"
        "guard = next(p for p in psutil.Process().children() if 'leftovers.py' in ' '.join(p.cmdline()))\n"
        "guard.kill(); time.sleep(0.1)",
        after="child.send_signal(signal.SIGSTOP)",
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "log", GRANDCHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        os.kill(parent.pid, signal.SIGKILL)
    assert _ended(pids) == []


def test_stop_ends_the_children_of_a_process_that_has_crashed(tmp_path):
    crashed = processes.spawn(["bash", "-c", GRANDCHILD], tmp_path / "log", stdout=subprocess.PIPE)
    orphan = int(crashed.stdout.readline())
    crashed.send_signal(signal.SIGSEGV)
    crashed.wait()
    assert _is_running(orphan)
    processes.stop([crashed])
    assert not _is_running(orphan)


def test_forked_workers_die_with_their_parent():
    code = (
        "import os, time; from erlib.machine import processes\n"
        "with processes.pool(2) as pool:\n"
        "    print(*{job.result() for job in [pool.submit(os.getpid) for _ in range(20)]}, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert workers
        os.kill(parent.pid, signal.SIGKILL)
    assert _ended(workers) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_us_lets_us_clean_up_even_if_it_comes_twice(number):
    code = (
        "import os, signal, sys, time; from erlib.machine import processes\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); processes.end_on_signals()\n"
        "try:\n"
        "    print(flush=True); time.sleep(60)\n"
        "finally:\n"
        "    os.kill(os.getpid(), int(sys.argv[1])); time.sleep(0.1); print('cleaned up', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(int(number))], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.stdout.readline() == "cleaned up\n"
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_clean_up_is_finished_before_a_signal_has_its_way(number):
    code = (
        "import os, signal, sys; from erlib.machine import processes\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); processes.end_on_signals()\n"
        "try:\n"
        "    with processes.undisturbed():\n"
        "        os.kill(os.getpid(), int(sys.argv[1])); print('cleaned up', flush=True)\n"
        "    print('too late')\n"
        "except (KeyboardInterrupt, SystemExit) as end:\n"
        "    print(type(end).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int(number))], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["cleaned up", {2: "KeyboardInterrupt", 15: "SystemExit"}[number]]


def test_what_nohup_ignores_stays_ignored():
    code = "import os, signal; from erlib.machine import processes; processes.end_on_signals(); os.kill(os.getpid(), 1)"
    assert subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


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
