"""What this machine has, as the programs and files say that are asked."""

import os

import psutil
import pytest

from erlib.machine import hardware


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts an ``nvidia-smi`` on PATH that runs a shell script."""

    def install(script):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return install


def test_gpus_are_those_that_the_driver_names(driver):
    driver(
        """case "$1" in
        *memory.used*) echo 4; echo 2048 ;;
        *) echo "NVIDIA H100 80GB HBM3, 81559, 590.44.01, 9.0"; echo "NVIDIA A100-SXM4-80GB, 81920, 590.44.01, 8.0" ;;
        esac"""
    )
    h100, a100 = hardware.gpus()
    assert (h100.name, h100.driver) == ("NVIDIA H100 80GB HBM3", "590.44.01")
    assert h100.memory_bytes == 81_559 * 2**20
    assert h100.usable_bytes == pytest.approx(84.9e9, rel=1e-3)  # what TensorRT-LLM sees of it
    assert (h100.has_fp8, a100.has_fp8) == (True, False)
    assert hardware.gpu_bytes_in_use() == [4 * 2**20, 2**31]


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found >&2; exit 6"])
def test_a_driver_that_fails_has_no_gpus(driver, script):
    driver(script)
    assert hardware.gpus() == hardware.gpu_bytes_in_use() == []


def test_without_a_driver_there_are_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.gpus() == []


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/job/step", {"job/memory.max": "3000", "job/memory.current": "1000", "job/step/memory.max": "max"}),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "3000", "memory/job/memory.usage_in_bytes": "1000"}),
    ],
    ids=["version 2", "version 1"],
)
def test_the_nearest_limit_of_a_control_group_counts(tmp_path, monkeypatch, line, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    (tmp_path / "own").write_text(f"9:cpu:/elsewhere\n{line}\n")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "own")
    assert hardware.free_memory_bytes() == 2000


def test_without_limits_the_kernel_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "absent")
    assert 0 < hardware.free_memory_bytes() <= psutil.virtual_memory().total


def test_disk_and_cores_of_what_is_not_there_yet(tmp_path):
    missing = tmp_path / "not" / "yet"
    assert hardware.file_system(missing) == hardware.file_system(tmp_path) == os.stat(tmp_path).st_dev
    assert hardware.free_disk_bytes(missing) > 0
    assert not missing.exists()
    assert 1 <= hardware.cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA H200", True),
        ("NVIDIA L40S", True),
        ("NVIDIA GH200 480GB", True),
        ("Tesla T4", True),
        ("Tesla V100-SXM2-32GB", True),
        ("NVIDIA GeForce RTX 4090", False),
        ("NVIDIA RTX A6000", False),
        ("NVIDIA RTX A500 Laptop GPU", False),
        ("NVIDIA T400 4GB", False),
        ("NVIDIA TITAN V", False),
        ("Quadro RTX 8000", False),
    ],
)
def test_gpus_of_data_centres_are_known_by_their_names(name, expected):
    assert hardware.Gpu(name, 2**30, "535.86", 8.0).is_for_data_centres is expected


@pytest.mark.parametrize(
    ("numbers", "expected"), [([], ""), ([0], "0"), ([1, 0], "0-1"), ([0, 1, 2, 5, 8, 9, 7], "0-2,5,7-9")]
)
def test_numbers_of_cores_are_written_as_ranges(numbers, expected):
    assert hardware.ranges(numbers) == expected
