"""The load balancer in front of the gateways: real NGINX, gRPC, round robin (papers, section III-A).

Where it knows the experts, too, it relays the tokens of complete requests itself, and gateways only decide: see
:mod:`erlib.gateway.handover`.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from erlib.machine import processes
from erlib.machine.processes import StartError
from erlib.machine.runfolder import RunFolder
from erlib.serving import wire

TEMPLATE = Path(__file__).with_name("nginx.conf.j2")
_CONFIG = jinja2.Template(
    TEMPLATE.read_text(encoding="utf-8"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def find() -> Path:
    """The nginx executable of this environment or of the system.

    Raises
    ------
    StartError
        If there is none; says how to install it.
    """
    beside_python = Path(sys.executable).parent / "nginx"
    for candidate in (beside_python, shutil.which("nginx"), "/usr/sbin/nginx"):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    raise StartError("nginx is missing: apt-get install nginx-light, or conda env create -f environment.yml")


_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 10)}
"""Buffers of so many bytes go back to the system when they are freed. A request that NGINX relays has one of a
megabyte, of which it touches a few pages. Left alone, glibc soon takes such buffers from its heap, where those of many
requests at once touch ever more pages: the slow test of broken messages, 500 at a time, shows how many megabytes."""


class Nginx:
    """Round robin over `gateways` on one port; see :meth:`start`.

    Parameters
    ----------
    port : int
    gateways : sequence of str
        Addresses; gateway i has index i.
    work_dir : Path
        Of its log and configuration.
    host : str
        Where it listens.
    experts : sequence of str
        As the gateways know them: one per cluster, in order, replicas joined by ``|``. Complete requests are relayed to
        them without a gateway between, and their servers told which expert each is for; empty: all go through the
        gateways.
    questions : sequence of str
        Where the gateways are asked about those; as many, in the same order.
    """

    title = "NGINX"

    def __init__(
        self,
        port: int,
        gateways: Sequence[str],
        work_dir: Path,
        host: str = "127.0.0.1",
        experts: Sequence[str] = (),
        questions: Sequence[str] = (),
    ):
        self.host, self.port = host, port
        self.log = work_dir / "nginx.log"
        self._run_folder: RunFolder | None = None
        self._settings = {
            "host": host,
            "port": port,
            "open_files": min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
            "gateways": gateways,
            "questions": questions,
            "experts": [replicas.split("|") for replicas in experts],
            "stream_infer": wire.STREAM_INFER,
            "withheld": [
                *("content-length", "er-sent-ns"),
                *(wire.COMPLETE[0], wire.FAILED, wire.STATUS_ON_ERROR),
            ],
            "named": wire.EXPERT,
            "told": wire.TOLD,
            "body_bytes": wire.BODY_BYTES,
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """``host:port`` that clients connect to."""
        return f"{self.host}:{self.port}"

    def start(self, timeout_s: float = 10) -> None:
        """Start and wait until the port answers.

        Raises
        ------
        StartError
            If NGINX is missing, refuses its configuration or does not listen within `timeout_s`.
        """
        binary = find()
        self.log.unlink(missing_ok=True)
        self.clean_up()
        self._run_folder = RunFolder()
        run = self._run_folder.path
        run.chmod(0o711)  # started by root, it works as a user who may do less
        (run / "nginx.conf").write_text(_CONFIG.render(run=run, **self._settings), encoding="utf-8")
        self.process = processes.spawn([binary, "-p", run, "-c", run / "nginx.conf"], self.log, env=_MEMORY)
        processes.wait_until(
            lambda: processes.listening(self.port, self.host), self.process, "NGINX", self.log, timeout_s
        )

    def clean_up(self) -> None:
        """Remove what it needed while it ran."""
        if self._run_folder:
            self._run_folder.remove()
            self._run_folder = None
