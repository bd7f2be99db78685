"""Gateways as processes, and what they say of themselves."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from erlib.machine import processes
from tests.support.gateways import free_port


@contextlib.contextmanager
def gateway_process(log: Path, expert: str, *options: str | Path) -> Iterator[tuple[str, psutil.Process]]:
    """A gateway process in front of one expert; gives its address."""
    port = free_port()
    process = processes.spawn([*gateway_command(port), "--experts", expert, *options], log)
    try:
        processes.wait_until(lambda: processes.listening(port), process, "gateway", log, 60)
        yield f"127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        processes.stop([process])


async def metrics(port: int) -> dict[tuple[str, ...], float]:
    """A gateway's metrics by name and labels."""
    read = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with await asyncio.to_thread(read, f"http://127.0.0.1:{port}/metrics") as reply:
        families = text_string_to_metric_families(reply.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def gateway_command(port: int) -> list[str | Path]:
    return processes.python("-m", "erlib.gateway", "--port", str(port), "--clusterer", "", "--policy", "replicas")
