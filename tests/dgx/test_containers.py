"""Runners: how a command is started inside an image."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from erlib import config
from erlib.config import ConfigError
from erlib.dgx import containers, option_tables
from erlib.dgx.containers import Command, Places, Runner

PLACES = Places(Path("/data/checkpoints"), Path("/data/built"))
BUILD = Command("build", ("trtllm-build",), ("--workers", "8"), Path("/data/built/engine"), "trtllm-build")
CHECK = Command("check", ("python", "-m", "erlib.dgx"), ("check", "p1.A"), Path("/data/built/engine"))
VERSIONS = list(yaml.safe_load(containers.IMAGES.read_text()))


def runner(kind, digest=None):
    return Runner(kind, containers.load_image("1.2.1").model_copy(update={"digest": digest}), PLACES)


@pytest.mark.parametrize("kind", ["docker", "apptainer", "enroot"])
def test_a_container_sees_checkpoints_and_work_under_their_own_names(kind):
    words = runner(kind).argv(BUILD)
    assert words[-3:] == BUILD.argv
    for directory in ("/data/checkpoints", "/data/built"):
        assert f"{directory}:{directory}" in words
    assert "/data/built" in words  # where it runs


@pytest.mark.parametrize("kind", ["bare", "docker", "apptainer", "enroot"])
def test_what_is_no_tool_of_the_images_runs_beside_it(kind):
    assert runner(kind).argv(CHECK) == CHECK.argv


def test_bare_leaves_commands_alone_and_fetches_nothing():
    assert runner("bare").argv(BUILD) == BUILD.argv
    assert runner("bare").setup == []


def test_a_pinned_digest_is_used():
    digest = "sha256:" + "0" * 64
    assert runner("docker").setup == [("docker", "pull", "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3")]
    assert runner("docker", digest).setup[0][-1].endswith(f"26.07-trtllm-python-py3@{digest}")
    assert f"nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3@{digest}" in runner("docker", digest).argv(BUILD)
    assert runner("apptainer", digest).setup[0][-1].startswith("docker://nvcr.io/nvidia/tritonserver:26.07")


def test_what_setup_makes_is_what_commands_use():
    pull, complete = runner("apptainer").setup
    assert pull[3] == complete[1]
    assert complete[2] in runner("apptainer").argv(BUILD)
    remove, fetch, complete, create = runner("enroot").setup
    assert fetch[-1] == "docker://nvcr.io#nvidia/tritonserver:26.07-trtllm-python-py3"
    assert remove[-1] == fetch[3] == complete[1]  # a file has its name when it is whole
    assert complete[2] == create[-1]
    assert create[3] in runner("enroot").argv(BUILD)


OUTSIDE = {
    "SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "PMI_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0", "OMPI_COMM_WORLD_SIZE": "1",
}  # fmt: skip
"""What a job step of Slurm finds in its environment, of which Open MPI would make use."""

CONTAINERS = """#!{python}
# Environment as apptainer's and enroot's own manuals say: the first passes on what it inherits, unless told not to.
import os, sys
words = sys.argv[1:]
given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--env")
inherited = {{}} if "--cleanenv" in words or words[0] == "start" else dict(os.environ)
command = words[words.index("printenv") :]
os.execve("/usr/bin/printenv", command, {{**inherited, **given}})
"""


@pytest.mark.parametrize("kind", ["bare", "apptainer", "enroot"])
def test_no_batch_system_tells_mpirun_inside_what_to_do(kind, tmp_path, monkeypatch):
    for name in ("apptainer", "enroot"):
        (tmp_path / name).write_text(CONTAINERS.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, value in OUTSIDE.items():
        monkeypatch.setenv(name, value)
    argv = runner(kind).start(["printenv"], {"CUDA_VISIBLE_DEVICES": "3"})
    seen = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert not re.search("^(SLURM|PMI|OMPI_COMM_WORLD)", seen, re.MULTILINE)
    if kind == "bare":
        assert f"PATH={tmp_path}" in seen  # all else is as it was
    else:
        assert "CUDA_VISIBLE_DEVICES=3" in seen


def test_a_machine_runs_only_what_it_lacks_of_setup(tmp_path, monkeypatch):
    """enroot's file is shared, but each machine makes its own container of it."""
    (tmp_path / "enroot").write_text(f"#!/bin/sh\ncat {tmp_path}/made 2>/dev/null\n")
    (tmp_path / "enroot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    image = containers.load_image("1.2.1")
    enroot = Runner("enroot", image, Places(tmp_path, tmp_path))
    assert enroot.due == enroot.setup
    (tmp_path / "tritonserver-26.07-trtllm-python-py3.sqsh").touch()  # another machine has fetched it
    assert enroot.due == enroot.setup[-1:]
    (tmp_path / "made").write_text("tritonserver-26.07-trtllm-python-py3\n")
    assert enroot.due == []
    assert Runner("enroot", image, Places(tmp_path, tmp_path)).is_ready
    apptainer = Runner("apptainer", image, Places(tmp_path, tmp_path))
    (tmp_path / "tritonserver-26.07-trtllm-python-py3.sif.partial").touch()
    assert apptainer.due == apptainer.setup
    (tmp_path / "tritonserver-26.07-trtllm-python-py3.sif").touch()
    assert apptainer.due == []


def test_every_version_has_an_image():
    assert list(get_args(config.Version)) == VERSIONS  # in this order, too


@pytest.mark.parametrize("version", VERSIONS)
def test_every_image_has_a_tag_and_no_made_up_digest(version):
    image = containers.load_image(version)
    assert re.fullmatch(r"\d\d\.\d\d-trtllm-python-py3", image.tag)
    assert image.digest is None or re.fullmatch(r"sha256:[0-9a-f]{64}", image.digest)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tool_of_a_version_has_a_program(version):
    image, work = containers.load_image(version), Path("/work")
    for tool in option_tables.load_contract(version).tools:
        first, *others = image.programs(tool, work)
        assert first[0] in ("python3", "trtllm-build")
        assert all(other[0] == "python3" and other[1].startswith("/") for other in others)
    assert image.programs("quantize.py", work)[0] == ("python3", "/app/examples/quantization/quantize.py")


@pytest.mark.parametrize(
    ("version", "driver", "made_for", "compatible"),
    [
        ("1.2.1", "590.44.01", True, False),
        ("1.2.1", "600.1", True, False),
        ("1.2.1", "580.95.05", False, True),
        ("1.2.1", "535.183.06", False, True),
        ("1.2.1", "535.54.03", False, False),  # of the right branch, but too early
        ("1.2.1", "560.35.05", False, False),  # a branch that no compatibility package covers
        ("0.21.0", "580.95.05", True, False),
        ("0.21.0", "570.124.06", False, True),
        ("0.21.0", "470.256.02", False, False),
    ],
)
def test_an_image_knows_its_drivers(version, driver, made_for, compatible):
    image = containers.load_image(version)
    assert (image.is_made_for(driver), image.is_compatible_with(driver)) == (made_for, compatible)


def test_an_unknown_version_names_those_with_an_image():
    with pytest.raises(ConfigError, match=r"no image for TensorRT-LLM 0\.7\.1 .* it has 1\.2\.1, 0\.21\.0"):
        containers.load_image("0.7.1")
