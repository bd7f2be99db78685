"""Where the commands of a plan run: as they are, or inside an image, by whatever runs containers on this machine."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from erlib import paths
from erlib.config import ConfigError, RunnerKind, read_yaml
from erlib.config.reading import Strict

Purpose = Literal["fetch", "convert", "quantise", "build", "check", "ask"]

IMAGES = paths.FACTS / "tensorrt_llm_images.yaml"
_OF_A_BATCH_SYSTEM = ("SLURM_", "PMI", "OMPI_COMM_WORLD_")
"""What begins so tells Open MPI that a batch system has started it, whose launcher, slots and nodes it would use."""


@dataclass(frozen=True)
class Places:
    """Directories, under the same names inside an image and outside; both exist before a plan starts."""

    checkpoints: Path
    """Downloaded checkpoints (named as on the hub) and calibration texts."""
    work: Path
    """Working directory of all commands; converted checkpoints and engines go below it, by flow and configuration."""

    @property
    def options(self) -> dict[str, str]:
        """As ``python -m erlib.dgx`` takes them."""
        return {"--checkpoints": str(self.checkpoints), "--work": str(self.work)}


@dataclass(frozen=True)
class Command:
    """One step of a plan."""

    purpose: Purpose
    program: tuple[str, ...]
    options: tuple[str, ...]
    makes: Path
    """What is there when the step has succeeded; for a check, what it looks at."""
    tool: str = ""
    """Name in the option tables; empty for what is no tool of an image's and runs beside it."""
    environment: tuple[str, ...] = ()
    """``NAME=VALUE`` of variables for it."""

    @property
    def argv(self) -> tuple[str, ...]:
        return (*(("env", *self.environment) if self.environment else ()), *self.program, *self.options)


class Image(Strict):
    """One entry of ``data/tensorrt_llm_images.yaml``."""

    image: str
    tag: str
    digest: str | None
    driver: str
    """The one of its CUDA, on which all that is newer runs it too."""
    compatible: tuple[str, ...]
    """Older branches of data-centre GPUs' drivers that run it, each with its first version that does."""
    size_gb: float
    """Of the download."""
    scripts: dict[str, tuple[str, ...]]
    """Places of example scripts by name, the likeliest first; relative paths are below the working directory."""

    @property
    def reference(self) -> str:
        """Name with tag, and with digest where one is pinned."""
        return f"{self.image}:{self.tag}" + (f"@{self.digest}" if self.digest else "")

    def programs(self, tool: str, work: Path) -> list[tuple[str, ...]]:
        """How a tool may be started: where its script is depends on who made the image."""
        return [("python3", str(work / place)) for place in self.scripts[tool]] if tool in self.scripts else [(tool,)]

    def comes_with(self, tool: str, work: Path) -> bool:
        """Whether a tool is part of the image, or has been fetched already."""
        places = [Path(place) for place in self.scripts.get(tool, ("/",))]
        return any(place.is_absolute() or (work / place).exists() for place in places)

    def is_made_for(self, driver: str) -> bool:
        """Whether a driver is as new as the image's CUDA."""
        return _version(driver) >= _version(self.driver)

    def is_compatible_with(self, driver: str) -> bool:
        """Whether a driver of a data-centre GPU is of an older branch that the image's compatibility package covers."""
        found = _version(driver)
        return any(found[:1] == first[:1] and found >= first for first in map(_version, self.compatible))


def load_image(version: str) -> Image:
    """The image for a version of TensorRT-LLM, by ``data/tensorrt_llm_images.yaml``."""
    images = _read(IMAGES)
    if version not in images:
        raise ConfigError(f"no image for TensorRT-LLM {version} in {IMAGES}; it has {', '.join(images)}")
    return Image(**images[version])


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


@functools.cache
def _read(file: Path) -> dict[str, Any]:
    return read_yaml(file)


@dataclass(frozen=True)
class Runner:
    """Makes a command run inside an image, or leaves it as it is (``bare``: the tools are installed here)."""

    kind: RunnerKind
    image: Image
    places: Places

    @property
    def setup(self) -> list[tuple[str, ...]]:
        """Commands that fetch the image, whose file has its name only when it is whole; enroot unpacks that."""
        partial = f"{self._file}.partial"
        complete = ("mv", partial, self._file)
        if self.kind == "docker":
            return [("docker", "pull", self.image.reference)]
        if self.kind == "apptainer":
            return [("apptainer", "pull", "--force", partial, f"docker://{self.image.reference}"), complete]
        if self.kind == "enroot":  # names images by tag only
            registry, _, name = self.image.image.partition("/")
            fetch = ("enroot", "import", "--output", partial, f"docker://{registry}#{name}:{self.image.tag}")
            return [("rm", "-f", partial), fetch, complete, ("enroot", "create", "--name", self._name, self._file)]
        return []

    @property
    def due(self) -> list[tuple[str, ...]]:
        """Those of :attr:`setup` that are still to be run on this machine."""
        if self.is_ready:
            return []
        return self.setup[-1:] if self.kind == "enroot" and Path(self._file).exists() else self.setup

    def argv(self, command: Command) -> tuple[str, ...]:
        """The command as this runner starts it in the working directory."""
        return self.start(command.argv) if command.tool else command.argv

    def start(
        self, argv: Sequence[str], environment: Mapping[str, str] | None = None, name: str = ""
    ) -> tuple[str, ...]:
        """How a program of the image is started in the working directory, without what a batch system says to ours.

        `environment`: not with ``bare``, where it is for whoever starts it to set. `name`: of the container, for
        :meth:`removal`.
        """
        if self.kind == "bare":
            told = sorted(variable for variable in os.environ if variable.startswith(_OF_A_BATCH_SYSTEM))
            return ("env", *_each("-u", told), *argv) if told else tuple(argv)
        directories = [f"{path}:{path}" for path in (self.places.checkpoints, self.places.work)]
        work = str(self.places.work)
        variables = [f"{key}={value}" for key, value in (environment or {}).items()]
        if self.kind == "docker":
            start = ["docker", "run", "--rm", *(["--name", name] if name else []), "--gpus", "all", "--net", "host"]
            start += ["--shm-size", "2g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864", "--workdir", work]
            start += [*_each("--env", variables), *_each("--volume", directories), self.image.reference]
        elif self.kind == "apptainer":
            # alone of the three it passes on what it inherits
            start = ["apptainer", "exec", "--cleanenv", "--nv", "--pwd", work, *_each("--env", variables)]
            start += [*_each("--bind", directories), self._file]
        else:
            # it starts in the image's own directory, wherever it was called
            start = ["enroot", "start", "--rw", *_each("--env", variables), *_each("--mount", directories), self._name]
            start += ["env", "--chdir", work]
        return (*start, *argv)

    def removal(self, name: str) -> tuple[str, ...]:
        """Command that ends what was started under `name` even if its starter was killed; empty if nothing is left."""
        return ("docker", "rm", "--force", name) if self.kind == "docker" else ()

    @property
    def is_ready(self) -> bool:
        """Whether the image is on this machine."""
        if self.kind == "docker":
            return bool(_output("docker", "image", "inspect", self.image.reference))
        if self.kind == "enroot":
            return self._name in _output("enroot", "list").split()
        return self.kind == "bare" or Path(self._file).exists()

    @property
    def _name(self) -> str:
        return f"{self.image.image.rpartition('/')[2]}-{self.image.tag}"

    @property
    def _file(self) -> str:
        return str(self.places.work / f"{self._name}.{'sif' if self.kind == 'apptainer' else 'sqsh'}")


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _output(*command: str) -> str:
    """What a command prints; nothing if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
