"""Runners: how a command is started inside an image."""

import re
from pathlib import Path

import pytest
import yaml

from erlib import containers
from erlib.config import ConfigError
from erlib.containers import Command, Places, Runner

PLACES = Places(Path("/data/checkpoints"), Path("/data/built"))
BUILD = Command("build", ("trtllm-build",), ("--workers", "8"), Path("/data/built/engine"), "trtllm-build")
CHECK = Command("check", ("python", "-m", "erlib.tensorrt_llm"), ("check", "p1.A"), Path("/data/built/engine"))
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
    (pull,) = runner("apptainer").setup
    assert pull[2] in runner("apptainer").argv(BUILD)
    fetch, create = runner("enroot").setup
    assert fetch[-1] == "docker://nvcr.io#nvidia/tritonserver:26.07-trtllm-python-py3"
    assert fetch[3] == create[-1]
    assert create[3] in runner("enroot").argv(BUILD)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_image_has_a_tag_and_no_made_up_digest(version):
    image = containers.load_image(version)
    assert re.fullmatch(r"\d\d\.\d\d-trtllm-python-py3", image.tag)
    assert image.digest is None or re.fullmatch(r"sha256:[0-9a-f]{64}", image.digest)


def test_an_unknown_version_names_those_with_an_image():
    with pytest.raises(ConfigError, match=r"no image for TensorRT-LLM 0\.7\.1 .* it has 1\.2\.1"):
        containers.load_image("0.7.1")
