"""CPU time of processes."""

import time


def process_cpu_s(pid: int) -> float:
    """CPU time of a process and its former threads, to the nanosecond: Linux' clock of that process."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) returns
