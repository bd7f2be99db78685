"""Gateways of one host, forked from a process that has loaded what they all need.

Run as ``python -m erlib.gateway.forks POLICY DIR`` by :class:`erlib.machine.nursery.Nursery`, which says what to fork.
Sixteen gateways that import everything themselves take seven seconds of two cores, and have sixteen copies of the
model and of Python's modules in memory and in the cores' caches.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from erlib.gateway import process
from erlib.machine import nursery
from erlib.routing import policies
from erlib.routing.clusterer import ClustererError


def main() -> None:
    """Entry point of the nursery, and of each gateway that it forks."""
    policy, directory = sys.argv[1:]
    if policy in policies.BY_CLUSTER:
        with contextlib.suppress(ClustererError, OSError):  # each gateway says so itself
            policies.by_cluster(policy, Path(directory))
    process.main(nursery.forked())


if __name__ == "__main__":
    main()
