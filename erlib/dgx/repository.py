"""Triton model repositories of TensorRT-LLM engines, as the papers served them, and the servers that load them.

For an engine, a repository has the four models of NVIDIA's ``inflight_batcher_llm``: preprocessing, tensorrt_llm,
postprocessing and the ensemble of them, which speaks :mod:`erlib.serving.wire`. For the ``llmapi`` flow it has one
model, under the ensemble's name, around TensorRT-LLM's LLM API. The texts under ``engines/triton/tensorrt_llm`` are our
own. Like the first author's, they hand token ids to the client, so that one response is one token and nobody has to
guess the count from text.

What later versions of TensorRT-LLM do by default and the papers' did not is switched off: reuse of KV blocks, which
would turn a continuation's prefill into a cache hit, chunked context, and attention of one sequence split over several
blocks of threads.

With an engine, a cancelled request keeps its slot: an ensemble does not pass cancellation on to a step that is running,
so the engine writes the answer to its end. With the LLM API, it is aborted.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from erlib import cache, paths
from erlib.config import ConfigError, Flow, RunnerKind
from erlib.dgx import builds
from erlib.dgx.adapters import ADAPTERS_SHARE, Adapters
from erlib.dgx.containers import Runner, load_image
from erlib.dgx.tensorrt_llm import Plan
from erlib.engines import llama
from erlib.machine import processes
from erlib.machine.processes import StartError
from erlib.serving import triton, wire

TEMPLATES = paths.ENGINE_SPECS / "triton" / "tensorrt_llm"
ENGINE_MODEL = "tensorrt_llm"
MODELS = ("preprocessing", ENGINE_MODEL, "postprocessing", wire.MODEL_NAME)
"""Of an engine's repository; that of the ``llmapi`` flow has the last one alone."""
_KV_METRIC = "nv_trt_llm_kv_cache_block_metrics"
_KV_CACHE = re.compile(rf'^{_KV_METRIC}\{{.*kv_cache_block_type="(\w+)".*\}} (\S+)')
PROCESSES = 16
"""Of preprocessing and of postprocessing each, over all servers: every system under test has as many."""
_EXIT_TIMEOUT = "--exit-timeout-secs=60"
_PUBLISHED_WITHIN_S = 5.0
"""TensorRT-LLM's backend looks at its engine's statistics ten times a second."""


def render(plan: Plan, tokenizer: Path, target: Path, n_processes: int | None = None) -> Path:
    """Write the model repository that all servers of a configuration load to `target`, replacing what is there.

    `tokenizer`: directory with ``tokenizer.json`` and ``tokenizer_config.json``, as the server sees it. `n_processes`:
    of preprocessing and of postprocessing per server, by default their share of :data:`PROCESSES`.
    """
    models = {wire.MODEL_NAME: "llmapi"} if plan.flow == "llmapi" else {model: model for model in MODELS}
    values = {
        "batch_size": plan.system.batch_size,
        "tokenizer": str(tokenizer),
        "max_input_tokens": plan.lengths[0],
        wire.CONTEXT: plan.lengths[1],
        "processes": n_processes or max(1, PROCESSES // plan.system.instances),
        "parameters": _engine_parameters(plan),
        "llm_args": llm_args(plan),
        "adapters": [str(folder) for folder in plan.adapters.folders] if plan.adapters else [],
    }
    shutil.rmtree(target, ignore_errors=True)
    with cache.building(target, kept=False) as partial:
        for model, source in models.items():
            version = partial / model / "1"
            version.mkdir(parents=True)
            text = _templates().get_template(f"{source}/config.pbtxt.j2").render(values)
            (partial / model / "config.pbtxt").write_text(text, encoding="utf-8")
            if (code := TEMPLATES / source / "1" / "model.py").exists():
                for file in (code, TEMPLATES / "texts.py"):
                    shutil.copy(file, version)  # copied, because a container does not see this repository
    return target


def _engine_parameters(plan: Plan) -> dict[str, str]:
    """What TensorRT-LLM's backend is told; everything is a string."""
    adapters = {} if plan.adapters is None else {
        # All are read when the engine starts, into memory of the host that has room for all; a request then names one.
        "lora_prefetch_dir": str(plan.prefetched),
        "lora_cache_optimal_adapter_size": str(plan.adapters.rank),
        "lora_cache_max_adapter_size": str(plan.adapters.rank),
        "lora_cache_host_memory_bytes": str(max(1 << 30, 2 * plan.adapters.bytes)),
        "lora_cache_gpu_memory_fraction": str(ADAPTERS_SHARE),
    }  # fmt: skip
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(plan.served),
        "batch_scheduler_policy": "guaranteed_no_evict",
        # Table I's KV cache, if the share of memory allows it: the smaller of the two counts. The share is of what is
        # free when the engine has its weights: after others that share its GPU, what they have left.
        "max_tokens_in_paged_kv_cache": str(llama.kv_tokens(plan.system)),
        "kv_cache_free_gpu_mem_fraction": str(llama.KV_SHARE),
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "false",
        "multi_block_mode": "false",
        "max_beam_width": "1",
        "exclude_input_in_output": "true",
        "cancellation_check_period_ms": "100",
        # The backend reads these without a default. Empty: no guided decoding.
        "tokenizer_dir": "",
        "guided_decoding_backend": "",
        "xgrammar_tokenizer_info_path": "",
        **adapters,
    }


def llm_args(plan: Plan) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's ``LLM`` class, for the ``llmapi`` flow.

    The KV cache is pinned to the tokens that the printed one holds; the share of free memory, which others that share
    the GPU have left, is only a limit. The
    PyTorch backend computes in what the checkpoint's ``config.json`` names, whatever `dtype` says; for Llama 3 that
    is bfloat16, which has float16's size and is what ModelOpt leaves there too. The flow ``engine`` converts.
    """
    return {
        "model": str(plan.served),
        "backend": "pytorch",
        "dtype": "float16",
        "tensor_parallel_size": plan.system.tensor_parallel,
        "max_batch_size": plan.system.batch_size,
        "max_input_len": plan.lengths[0],
        "max_seq_len": plan.lengths[1],
        "max_num_tokens": plan.step_tokens,
        "enable_chunked_prefill": False,
        "kv_cache_config": {
            "enable_block_reuse": False,
            "dtype": "fp8" if plan.system.kv_dtype == "fp8" else "auto",
            "max_tokens": llama.kv_tokens(plan.system),
            "free_gpu_memory_fraction": llama.KV_SHARE,
        },
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        **({"lora_config": _lora_config(plan.adapters)} if plan.adapters else {}),
    }


def _lora_config(adapters: Adapters) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's ``LoraConfig``: it reads from the first adapter which matrices are changed."""
    n = len(adapters.folders)
    return {
        "lora_dir": [str(adapters.folders[0])],
        "max_lora_rank": adapters.rank,
        "max_loras": n,
        "max_cpu_loras": n,
    }


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters["quote"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment


@dataclass(frozen=True)
class Launch:
    """How a server's process is started."""

    command: list[str]
    environment: dict[str, str]
    """Beside what is inherited."""

    def __str__(self) -> str:
        """As one would type it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


@dataclass(frozen=True)
class RepositoryPlan(triton.ServerPlan):
    """How one instance of a TensorRT-LLM engine is served; the repository's name says what is in it."""

    repository: Path = Path()
    gpus: tuple[int, ...] = ()
    runner: Runner | None = None
    flow: Flow = "engine"
    adapters: str = ""
    """Hash of the experts' adapters, if the engine has them on top."""
    turn: int = 0
    """How many that share its GPUs are started before it."""
    per_gpu: int = 1
    """How many share a GPU, at most."""

    def server(self, label: str, port: int, work_dir: Path, host: str) -> RepositoryServer:
        """The server itself, not yet started; see :class:`RepositoryServer`."""
        return RepositoryServer(
            label, self.repository, port, work_dir, self.gpus, host, self.runner, self.flow, self.turn
        )

    @property
    def demand(self) -> dict[str, float]:
        return {"GPU": float(len(self.gpus))}

    @property
    def description(self) -> dict[str, Any]:
        """What it is, wherever it lies: the repository's texts, and the engine as its ``config.json`` describes it."""
        texts = [path.read_text(encoding="utf-8") for path in sorted(self.repository.rglob("*")) if path.is_file()]
        for name, directory in self.parameters.items():
            texts = [text.replace(directory, name) for text in texts]
        return {
            "repository": cache.digest(texts),
            "engine": cache.digest(Path(self.parameters["engine"]) / "config.json"),
            **({"adapters": self.adapters} if self.adapters else {}),
            "gpus": len(self.gpus),
            **({"per_gpu": self.per_gpu} if self.per_gpu > 1 else {}),
            "image": self.runner.image.reference if self.runner else None,
        }


class RepositoryServer(triton.TritonServer):
    """A server on a rendered repository, which is only read; of its engine, each rank has one of the GPUs.

    Its `runner` starts it inside an image; without one, ``tritonserver`` (and ``mpirun``) are installed here.
    """

    def __init__(
        self, label: str, repository: Path, port: int, work_dir: Path, gpus: Sequence[int], host: str = "127.0.0.1",
        runner: Runner | None = None, flow: Flow = "engine", turn: int = 0,
    ):  # fmt: skip
        super().__init__(label, ENGINE_MODEL, {}, 1, port, work_dir, host)
        self.repository = repository
        self.gpus = tuple(gpus)
        self._runner = runner
        self.flow = flow
        self.turn = turn

    @property
    def launch(self) -> Launch:
        """Command and environment of the server process.

        With an engine on GPUs, TensorRT-LLM's leader mode: the first rank serves; the others load nothing but their
        part of the engine and open no port. The LLM API starts its ranks itself: there is one process to start.
        """
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))}
        if self.flow == "llmapi":
            command = ["tritonserver", *self.options(self.shm_prefix), _EXIT_TIMEOUT]
            # What options say to mpirun: the LLM API's ranks are MPI processes, too.
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            environment |= {"OMPI_MCA_hwloc_base_binding_policy": "none"}
        else:
            command = self._in_leader_mode()
        if self._runner is None:
            return Launch(command, environment)
        if self._runner.kind == "bare":
            return Launch(list(self._runner.start(command)), environment)
        return Launch(list(self._runner.start(command, environment, self._container)), {})

    def _in_leader_mode(self) -> list[str]:
        # Unless told not to, mpirun binds one or two processes to a core each, with all that they start, and eight
        # servers that know nothing of each other to the same one. NVIDIA's own script starts a server of one rank with
        # mpirun, too, as the papers did; nothing else about that is to change.
        command = ["mpirun", "--allow-run-as-root", "--bind-to", "none"]
        for rank in range(len(self.gpus)):
            follows = ["--model-control-mode=explicit", f"--load-model={ENGINE_MODEL}"] if rank else []
            command += [":"] * (rank > 0) + ["-n", "1", "tritonserver", *self.options(f"{self.shm_prefix}r{rank}-")]
            command += [_EXIT_TIMEOUT, *self._off_other_gpus(), *follows]
        return command

    def _off_other_gpus(self) -> list[str]:
        """Options that leave GPU memory to the engine.

        Every rank's server would set up a pool on each GPU that it sees and open each to the others. Both serve tensors
        that Triton itself moves between GPUs; here all of its tensors are in host memory, and TensorRT-LLM connects its
        ranks on its own.
        """
        pools = [f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(len(self.gpus))]
        return [*pools, "--enable-peer-access=false"]

    @property
    def _container(self) -> str:
        return f"expert-router-{self.http_port}"

    def options(self, shm_prefix: str) -> list[str]:
        return [
            f"--model-repository={self.repository}",
            f"--http-address={triton.LOOPBACK}", f"--http-port={self.http_port}",
            f"--grpc-address={self.host}", f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self.host}", f"--metrics-port={self.metrics_port}",
            "--grpc-http2-max-ping-strikes=0",  # as triton.TritonServer has it
            "--disable-auto-complete-config",
            f"--grpc-header-forward-pattern={wire.EXPERT}",  # for servers that have several experts' adapters
            *triton.restrictions(),
            *triton.python_backend_options(shm_prefix),
        ]  # fmt: skip

    def start(self) -> None:
        """Start the process, with its image fetched first: only the machine that builds engines needed it so far."""
        if self._runner:
            try:
                builds.fetch_image(self._runner)
            except builds.StepFailed as error:
                raise StartError(f"{self.title}: {error}") from None
        self._claim_shared_memory()
        self.log.unlink(missing_ok=True)
        self._remove_container()
        launch = self.launch
        self.process = processes.spawn(launch.command, self.log, env=launch.environment)

    def verify(self) -> None:
        """StartError if TensorRT-LLM has a smaller KV cache than the repository asks for."""
        tokens, deadline = self._kv_tokens(), time.monotonic() + _PUBLISHED_WITHIN_S
        while tokens == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
            tokens = self._kv_tokens()
        if tokens is None:
            print(f"{self.label}: the server does not say how large its KV cache is")
            return
        if not tokens:
            raise StartError(
                f"{self.label}: TensorRT-LLM still says that it has no KV cache (metric {_KV_METRIC}) "
                f"{_PUBLISHED_WITHIN_S:.0f} s after its first answers; see {self.log}"
            )
        engine = self.repository / ENGINE_MODEL / "config.pbtxt"
        (asked,) = re.findall(
            r'"max_tokens_in_paged_kv_cache".*?string_value: "(\d+)"', engine.read_text(encoding="utf-8")
        )
        if tokens < 0.99 * int(asked):
            raise StartError(
                f"{self.label}: KV cache of {tokens:,.0f} tokens, not the {int(asked):,} of Table I; something else "
                "holds memory of its GPUs (nvidia-smi names it), or they are smaller than the papers'"
            )

    def _kv_tokens(self) -> float | None:
        """Tokens that the KV cache holds, by TensorRT-LLM's own account.

        None where it gives none, as with the LLM API. 0 at first: the gauges are there when a model is loaded, their
        values follow once the engine has run.
        """
        found = {kind: float(value) for line in self._metrics() for kind, value in _KV_CACHE.findall(line)}
        return found["max"] * found["tokens_per"] if {"max", "tokens_per"} <= found.keys() else None

    def take_gpus(self, free: Iterator[int]) -> None:
        """Use the next of `free`, one for each rank."""
        self.gpus = tuple(itertools.islice(free, len(self.gpus)))

    def has_backend(self) -> bool:
        """Whether the server says that it is ready: its engine lives in its own process, or in a container's."""
        return self._healthy()

    def clean_up(self) -> None:
        """Remove what a stopped server may leave: its shared memory and its container."""
        super().clean_up()
        self._remove_container()

    def _remove_container(self) -> None:
        if self._runner and (removal := self._runner.removal(self._container)):
            subprocess.run(removal, capture_output=True, check=False)


def server_plans(plan: Plan, kind: RunnerKind, n_gpus: int) -> list[RepositoryPlan]:
    """How the instances of a system are served, all on one repository, still to be rendered.

    Each has GPUs of its own, or shares one with others. Those are dealt out in turn, so that experts of neighbouring
    clusters, which many ask at a time, are on different GPUs; and they start in turn, each when those before it have
    what they need: what is free of a GPU's memory decides how large a KV cache may be. The repository lies below the
    plan's working directory, which a container sees.
    """
    system, width, per_gpu = plan.system, plan.system.tensor_parallel, plan.configuration.per_gpu
    places = math.ceil(system.instances / per_gpu)
    if places * width > n_gpus:
        raise ConfigError(f"{plan.configuration.id} needs {places * width} GPUs; there are {n_gpus}")
    repository = plan.places.work / "repositories" / plan.configuration.id
    runner = Runner(kind, load_image(plan.version), plan.places)
    directories = {"engine": str(plan.served), "tokenizer": str(plan.source)}
    key = ""
    if plan.adapters:
        key = plan.adapters.key
        directories |= {"converted": str(plan.prefetched), "adapters": str(plan.adapters.folders[0].parent)}
    shared = (ENGINE_MODEL, directories, system.batch_size, 0, repository)
    dealt = [divmod(i, places) for i in range(system.instances)]
    return [
        RepositoryPlan(*shared, tuple(range(place * width, (place + 1) * width)), runner, plan.flow, key, turn, per_gpu)
        for turn, place in dealt
    ]
