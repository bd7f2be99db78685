"""One Triton server per engine: the real ``tritonserver`` of the ``nvidia-pytriton`` wheel, as a plain process.

The wheel is only the carrier of the binary and its Python backend (Triton 2.51); its own API is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from erlib import paths
from erlib.machine import leftovers, processes
from erlib.machine.processes import StartError
from erlib.machine.runfolder import RunFolder
from erlib.serving.wheel import backend_directory, environment, installed
from erlib.serving.wire import EXPERT, MODEL_NAME

_LINKED = re.compile(r"engine|adapter(-\d+)?|environment|steps")
"""Parameters of a model that are places: known by their content hash, and linked to from a server's folder."""
MODEL_CODE = paths.ENGINE_SPECS / "triton"

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
"""Asks a server on this machine, whatever proxies the environment names."""

UNTOLD = secrets.token_hex(16)
"""What would have to be sent to a server to be let do all it can."""

LOOPBACK = "127.0.0.1"

_ENDED_BY_ITS_BACKEND = "boost::interprocess::lock_exception"
_BEGUN = re.compile(r"TRITONBACKEND_ModelInstanceInitialize: (\S+)_\d+_\d+")
_LOADED = re.compile(r"successfully loaded '([^']+)'")
"""What Triton says when its Python backend, seldom and on busy machines, is lost while it loads a model.

The first ends the server (reported with and without load: triton-inference-server/server issue 8882,
tensorrtllm_backend issue 349). Or a model of which the second is said is never loaded, as the third would say: Triton
waits for ever for a process that has begun and not answered.
"""

_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch_size}
model_transaction_policy {{ decoupled: true }}
# Optional but for one, because Triton only counts: with stream in the place of max_tokens there are inputs enough. The
# model says what is missing. One must not be: a request without any input would be the server's end.
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true }},
  {{ name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }},
  {{ name: "end_id" data_type: TYPE_INT32 dims: [ 1 ] optional: true }}
]
output [
  {{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "output_ids" data_type: TYPE_INT32 dims: [ -1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
{parameters}
"""


def model_code(backend: str) -> list[Path]:
    """The Python files of which a backend's model consists."""
    return [*sorted((MODEL_CODE / backend).glob("*.py")), MODEL_CODE / "inflight.py"]


def python_backend_options(shm_prefix: str) -> list[str]:
    """Options for the processes of Python models.

    A model that needs more than the default 30 s to load, as on a busy machine, would make the server wait for ever.
    """
    return [
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--backend-config=python,stub-timeout-seconds=600",
    ]


def restrictions() -> list[str]:
    """Options that leave of a server's ports what is used of them: health by HTTP; requests and questions by gRPC.

    Anybody who reaches a port could otherwise register shared memory, this server's own included, and change what is
    logged and traced. The rest asks for a header whose value nobody is told.
    """
    both = "shared-memory,model-repository,trace,logging"
    return [
        f"--grpc-restricted-protocol={both}:expert-router={UNTOLD}",
        f"--http-restricted-api={both},metadata,inference,model-config,statistics:expert-router={UNTOLD}",
    ]


@dataclass(frozen=True)
class ServerPlan:
    """How one engine instance is served."""

    backend: str
    parameters: dict[str, str]
    max_batch_size: int
    niceness: int = 0
    """How far its process stands back behind what is around it where cores are short; negative: what is around it."""

    def server(self, label: str, port: int, work_dir: Path, host: str) -> TritonServer:
        """The server itself, not yet started; see :class:`TritonServer`."""
        niceness = max(0, self.niceness)
        return TritonServer(label, self.backend, self.parameters, self.max_batch_size, port, work_dir, host, niceness)

    @property
    def demand(self) -> dict[str, float]:
        """What it asks of its machine, by Ray's names of resources."""
        return {"CPU": float(self.parameters.get("threads", 1))}

    @property
    def description(self) -> dict[str, Any]:
        """What it is, wherever it lies: the engine by its content hash."""
        described = asdict(self)
        places = {name: Path(place).name for name, place in self.parameters.items() if _LINKED.fullmatch(name)}
        described["parameters"] |= places
        return described


class TritonServer:
    """A server process with one model, called ``ensemble``, whatever the engine.

    Parameters
    ----------
    label : str
        Name in messages and logs, e.g. ``"p1.D-3"``.
    backend : {"openvino", "vllm", "emulated"}
        Directory below ``engines/triton`` that holds ``model.py``.
    parameters : mapping of str to str
        Passed to the model through ``config.pbtxt``.
    max_batch_size : int
        Sequences in flight.
    port : int
        HTTP port, of this machine alone; gRPC is the next, metrics the one after.
    work_dir : Path
        Where the log goes.
    niceness : int
        How far the engine stands back where cores are short.
    """

    PORTS = 3
    turn = 0
    """Those of turn 1 start when those of turn 0 are ready, and so on."""

    def __init__(
        self, label: str, backend: str, parameters: Mapping[str, str], max_batch_size: int, port: int, work_dir: Path,
        host: str = "127.0.0.1", niceness: int = 0,
    ):  # fmt: skip
        self.label = label
        self.host, self.http_port, self.grpc_port, self.metrics_port = host, port, port + 1, port + 2
        self.log = work_dir / f"triton-{label}.log"
        self._backend = backend
        self._parameters = dict(parameters)
        self._max_batch_size = max_batch_size
        self._niceness = niceness
        self._run_folder: RunFolder | None = None
        self._claim: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"Triton server {self.label}"

    @property
    def url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return f"{self.host}:{self.grpc_port}"

    @property
    def shm_prefix(self) -> str:
        """Prefix of this server's shared-memory regions, unique per port."""
        return f"er{self.http_port}-"

    def start(self) -> None:
        """Write the model repository and start the process; see :meth:`wait_ready`.

        Raises
        ------
        StartError
            If there is no place for what it needs.
        """
        self._claim_shared_memory()
        self._run_folder = RunFolder()
        root = installed()
        self.log.unlink(missing_ok=True)
        self.process = processes.spawn(
            [
                root / "bin" / "tritonserver",
                f"--model-repository={self._write_repository(self._run_folder.path)}",
                f"--backend-directory={backend_directory(root, self._run_folder.path)}",
                f"--http-address={LOOPBACK}", f"--http-port={self.http_port}",
                f"--grpc-address={self.host}", f"--grpc-port={self.grpc_port}",
                f"--metrics-address={self.host}", f"--metrics-port={self.metrics_port}",
                "--grpc-http2-max-ping-strikes=0",  # users of a baseline ask it directly, some of them with pings
                "--disable-auto-complete-config",
                f"--grpc-header-forward-pattern={EXPERT}",  # for models that have several experts' adapters
                "--exit-timeout-secs=2",
                "--allow-gpu-metrics=false",
                "--pinned-memory-pool-byte-size=0",
                *restrictions(),
                *python_backend_options(self.shm_prefix),
            ],
            self.log,
            env=environment(),
            niceness=self._niceness,
        )  # fmt: skip

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server says that it is ready (a canary inference, which :class:`~erlib.serving.stack.Stack`
        sends, is what shows that it works: Triton goes on saying "ready" when the backend process is dead).

        One whose Python backend is lost while it loads, a known fault, is started a second time. Of several that were
        started together and hang, each has been given its time while those before it were waited for.

        Raises
        ------
        StartError
            If it exits or is not ready within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            self._wait_ready(timeout_s - self._age_s())
        except StartError:
            said = self.log.read_text(encoding="utf-8", errors="replace")
            waits = set(_BEGUN.findall(said)) - set(_LOADED.findall(said))
            is_alive = self.process is not None and self.process.poll() is None
            if _ENDED_BY_ITS_BACKEND in processes.tail(self.log) or (is_alive and waits):
                self._start_again()
                self._wait_ready(timeout_s)
            elif is_alive and (left_s := deadline_s - time.monotonic()) > 1:
                self._wait_ready(left_s)
            else:
                raise

    def _age_s(self) -> float:
        """For how long the process has been there; 0 if it has ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            return 0.0
        return time.time() - psutil.Process(self.process.pid).create_time()

    def _wait_ready(self, timeout_s: float) -> None:
        assert self.process is not None
        processes.wait_until(self._healthy, self.process, self.title, self.log, timeout_s)

    def _start_again(self) -> None:
        assert self.process is not None
        processes.stop([self.process], grace_s=0)
        self.clean_up()
        last_words = processes.keep_last_words(self.log)
        print(f"{self.title} has lost its Python backend while it loaded (see {last_words}): starting it again")
        self.start()

    def _healthy(self) -> bool:
        try:
            with _open(f"http://{LOOPBACK}:{self.http_port}/v2/health/ready", timeout=1) as reply:
                return reply.status == 200
        except OSError:
            return False

    def counters(self) -> dict[str, float]:
        """What the engine has counted since start, from the server's metrics endpoint.

        ``expert_generated_tokens``, and what else the backend counts under a name that begins with ``expert_``.

        Raises
        ------
        StartError
            If the server does not answer.
        """
        values = (line.rsplit(" ", 1) for line in self._metrics() if line.startswith("expert_"))
        return {name.partition("{")[0]: float(value) for name, value in values}

    def take_gpus(self, free: Iterator[int]) -> None:
        """Use the next of `free`, as many as it was planned for: here none."""

    def verify(self) -> None:
        """Check what shows only once the engine has answered.

        Raises
        ------
        StartError
            If it is not what was asked for.
        """

    def _metrics(self) -> list[str]:
        try:
            with _open(f"http://{self.host}:{self.metrics_port}/metrics", timeout=10) as reply:
                return reply.read().decode().splitlines()
        except OSError as error:
            raise StartError(f"Triton server {self.label} does not answer ({error}); see {self.log}") from None

    def has_backend(self) -> bool:
        """Whether the process that runs the engine lives: Triton itself goes on saying "ready" when it does not."""
        assert self.process is not None
        try:
            children = psutil.Process(self.process.pid).children()
            return any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        except psutil.NoSuchProcess:
            return False

    def clean_up(self) -> None:
        """Remove what a stopped server may leave: its shared memory and its model repository."""
        if self._claim is not None:
            leftovers.remove_shared_memory(self.shm_prefix)
            os.close(self._claim)
            self._claim = None
        if self._run_folder:
            self._run_folder.remove()
            self._run_folder = None

    def _claim_shared_memory(self) -> None:
        """Say that our regions are ours; what a predecessor that was killed has left goes."""
        path = leftovers.claim_of(self.shm_prefix)
        try:
            self._claim = leftovers.claim(path, make=True)
            deadline = time.monotonic() + 2
            while self._claim is None and time.monotonic() < deadline:  # whoever sweeps up has it for a moment
                time.sleep(0.02)
                self._claim = leftovers.claim(path, make=True)
        except OSError as error:
            raise StartError(f"{self.title} cannot have shared memory: {path}: {error.strerror}") from None
        if self._claim is None:
            raise StartError(f"{path} is locked: shared memory of that name belongs to a server that runs")
        leftovers.remove_shared_memory(self.shm_prefix, but=path)

    def _write_repository(self, folder: Path) -> Path:
        """Write a model repository below `folder`, where engine and adapters are linked to, whatever their names."""
        links = {name: folder / name for name in self._parameters if _LINKED.fullmatch(name)}
        for name, link in links.items():
            link.symlink_to(self._parameters[name])
        version = folder / "models" / MODEL_NAME / "1"
        version.mkdir(parents=True)
        parameters = "\n".join(
            f'parameters: {{ key: "{key}" value: {{ string_value: {json.dumps(value)} }} }}'
            for key, value in sorted({**self._parameters, **{name: str(link) for name, link in links.items()}}.items())
        )
        text = _CONFIG.format(name=MODEL_NAME, max_batch_size=self._max_batch_size, parameters=parameters)
        (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
        for source in model_code(self._backend):
            (version / source.name).symlink_to(source)
        return folder / "models"


def cores(servers: Sequence[TritonServer]) -> list[frozenset[int]]:
    """CPU cores that each server may use: those of its process, or of a child of it, that is bound to the fewest.

    Processes are known by the port on their command line, wherever they run: what we have started may be no more than
    what asks for a container. Empty where none can be seen.
    """
    found: dict[str, list[list[int]]] = {f"--http-port={server.http_port}": [] for server in servers}
    for process in psutil.process_iter(["cmdline"]):
        program, *words = process.info["cmdline"] or [""]
        if Path(program).name == "tritonserver":
            for mark in found.keys() & words:
                found[mark] += _affinities(process)
    return [frozenset(min(affinities, key=len, default=())) for affinities in found.values()]


def _affinities(process: psutil.Process) -> list[list[int]]:
    """Of a process and all that it has started."""
    found = []
    with contextlib.suppress(psutil.Error):
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                found.append(member.cpu_affinity())
    return found
