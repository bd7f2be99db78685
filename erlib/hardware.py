"""What this machine has."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: float


def gpus() -> list[Gpu]:
    """GPUs of this machine; none without a driver."""
    asked = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        reply = subprocess.run(
            ["nvidia-smi", asked, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in reply.stdout.splitlines() if line.strip()]
    return [Gpu(name, int(mib) * 2**20, driver, float(capability)) for name, mib, driver, capability in rows]
