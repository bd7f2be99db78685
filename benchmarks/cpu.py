"""CPU time of processes, and the cores that they may use."""

import contextlib
import os
import time
from collections.abc import Iterator


def process_cpu_s(pid: int) -> float:
    """CPU time of a process and its former threads, to the nanosecond: Linux' clock of that process."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) returns


@contextlib.contextmanager
def bound(cores: set[int]) -> Iterator[None]:
    """What is started meanwhile inherits these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
