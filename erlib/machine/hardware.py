"""What this machine has."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CONTEXT_BYTES = 620_000_000
"""Of a GPU's memory, what driver and CUDA keep: an H100 of 81,559 MiB leaves TensorRT-LLM 84.9 GB."""
_DATA_CENTRE = re.compile(r"(?:NVIDIA |Tesla )*(?:[ABHLP]\d{1,3}[A-Z]?|G[BH]\d{3}|T4|V100)(?: .*)?")
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_ANSWER_S = 20


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: float

    @property
    def usable_bytes(self) -> int:
        """What an engine can have of it."""
        return self.memory_bytes - CONTEXT_BYTES

    @property
    def is_for_data_centres(self) -> bool:
        """Whether NVIDIA lets newer CUDA run on its older drivers: H100, A100, L40S, T4 and their like, no GeForce."""
        return bool(_DATA_CENTRE.fullmatch(self.name.partition("-")[0]))

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores multiply FP8: Ada and Hopper do, Ampere does not."""
        return self.compute_capability >= 8.9


H100 = Gpu("NVIDIA H100 80GB HBM3", 81_559 * 2**20, "", 9.0)
"""One of the papers' eight."""


def gpus() -> list[Gpu]:
    """GPUs of this machine; none without a driver."""
    rows = _ask_driver("name,memory.total,driver_version,compute_cap")
    return [Gpu(name, int(mib) * 2**20, driver, float(capability)) for name, mib, driver, capability in rows]


def gpu_bytes_in_use() -> list[int]:
    """Memory that somebody has on each GPU, in bytes."""
    return [int(mib) * 2**20 for mib, *_ in _ask_driver("memory.used")]


def _ask_driver(columns: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ANSWER_S)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in reply.stdout.splitlines() if line.strip()]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ranges(numbers: Iterable[int]) -> str:
    """Numbers of CPU cores as one writes them, e.g. ``0-55,112-167``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def free_memory_bytes() -> int:
    """Host memory that can still be had: what the kernel calls available, or less where a control group has a limit."""
    free = [psutil.virtual_memory().available]
    for limit, used in _group_limits():
        try:
            free.append(int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return max(0, min(free))


def _group_limits() -> Iterator[tuple[Path, Path]]:
    """Files with limit and use of this process' control groups (versions 1 and 2) and of those around them."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUPS / controllers
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inside = root / group.lstrip("/")
        for directory in (inside, *inside.parents):
            yield directory / files[0], directory / files[1]
            if directory == root:
                break


def free_disk_bytes(directory: Path) -> int:
    """Free space for what will be written to `directory`, which need not exist yet."""
    return shutil.disk_usage(existing(directory)).free


def file_system(directory: Path) -> int:
    """Number of the file system that `directory` lies on, or will lie on."""
    return existing(directory).stat().st_dev


def existing(directory: Path) -> Path:
    """`directory`, or the nearest above it that is there."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def system() -> str:
    """Operating system and kernel, e.g. ``Debian GNU/Linux 12 (bookworm), Linux 6.1.0``."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = "unknown distribution"
    return f"{name}, {platform.system()} {platform.release()}"


def machine() -> str:
    """Cores, processor and memory, e.g. ``2 x AMD EPYC 7763, 24 GB``."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{cores()} x {model}, {psutil.virtual_memory().total / 2**30:.0f} GB"


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it (AVX-512 or AMX); any other is slower with it than with float32."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))
