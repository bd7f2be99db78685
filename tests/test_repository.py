"""Model repositories of TensorRT-LLM engines: all nine in the real Triton, with a stand-in for the engine alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from conftest import BASE_PORT
from google.protobuf import json_format, text_format
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from tritonclient.grpc import InferenceServerClient, model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from erlib import config, processes, repository, stack, triton, users, wire

STANDIN = Path(__file__).with_name("standin_tensorrt_llm.py")
END_AT = 5  # the stand-in repeats the prompt, with the end of sequence as its sixth token
PROMPT = "Is the word for a big cat still 猫, or rather Löwe 🦁? the end"

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

# --- as written -------------------------------------------------------------------------------------------------


def rendered(name: str, target: Path, tokenizer: Path = Path("/tokenizer"), **arguments: int) -> Path:
    return repository.render(config.load_configuration(name), Path(f"/engines/{name}"), tokenizer, target, **arguments)


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
        "gpt_model_path": f"/engines/{name}",
        "gpt_model_type": "inflight_fused_batching",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "false",
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


def test_every_system_has_as_many_processes_around_its_engines(tmp_path):
    for name in NINE:
        directory = rendered(name, tmp_path / name)
        counts = {model_config(directory, f"{step}processing").instance_group[0].count for step in ("pre", "post")}
        assert {count * config.load_configuration(name).system.instances for count in counts} == {repository.PROCESSES}


def test_a_repository_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "models" / "tensorrt_llm_bls").mkdir(parents=True)  # it would be loaded
    assert sorted(path.name for path in rendered("p2.D", tmp_path / "models").iterdir()) == sorted(repository.MODELS)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_one_expert_per_gpu(tmp_path):
    settings = config.load_profile("dgx-h100").serving
    servers = repository.servers(config.load_configuration("p1.D"), tmp_path, settings, tmp_path)
    assert [server.launch.environment for server in servers] == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(8)]
    assert all(server.launch.command[:4] == ["mpirun", "--allow-run-as-root", "-n", "1"] for server in servers)
    assert not any("--model-control-mode=explicit" in server.launch.command for server in servers)
    assert str(servers[3].launch).startswith("CUDA_VISIBLE_DEVICES=3 mpirun --allow-run-as-root -n 1 tritonserver --")


@pytest.mark.parametrize(("name", "gpus"), [("p1.A", ["0,1,2,3,4,5,6,7"]), ("p2.C", ["0,1,2,3", "4,5,6,7"])])
def test_tensor_parallel_engines_have_a_leader(name, gpus, tmp_path):
    settings = config.load_profile("dgx-h100").serving
    launches = [
        server.launch for server in repository.servers(config.load_configuration(name), tmp_path, settings, tmp_path)
    ]
    assert [launch.environment["CUDA_VISIBLE_DEVICES"] for launch in launches] == gpus
    for launch in launches:
        assert launch.command[0] == "mpirun"
        ranks = [list(rank) for colon, rank in itertools.groupby(launch.command, ":".__eq__) if not colon]
        assert len(ranks) == config.load_configuration(name).system.tensor_parallel
        follows = {"--model-control-mode=explicit", "--load-model=tensorrt_llm"}
        assert [follows <= set(rank) for rank in ranks] == [False] + [True] * (len(ranks) - 1)
        assert all(rank[rank.index("-n") + 1] == "1" and "tritonserver" in rank for rank in ranks)
    prefixes = [option for launch in launches for option in launch.command if "shm-region-prefix-name" in option]
    assert len(set(prefixes)) == len(prefixes) == 8


@pytest.mark.parametrize("name", NINE)
def test_ports_are_those_of_the_stack(name, tmp_path):
    settings = config.load_profile("dgx-h100").serving
    configuration = config.load_configuration(name)
    served = repository.servers(configuration, tmp_path, settings, tmp_path)
    plans = [triton.ServerPlan("tensorrt_llm", {}, 1)] * configuration.system.instances
    known = stack.Stack(name, plans, configuration.routing, settings, tmp_path, tmp_path).servers
    assert [(server.label, server.url, server.metrics_port) for server in served] == [
        (server.label, server.url, server.metrics_port) for server in known
    ]


def test_too_few_gpus_are_said(tmp_path):
    configuration = config.load_configuration("p1.B")
    settings = config.load_profile("dgx-h100").serving
    with pytest.raises(config.ConfigError, match=r"p1\.B needs 8 GPUs; there are 4"):
        repository.servers(configuration, tmp_path, settings, tmp_path, n_gpus=4)


# --- in the real Triton -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama2_like(tmp_path_factory) -> Path:
    """A tokenizer with Llama 2's parts (SentencePiece pieces, bytes for what it has no piece for), but few pieces."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = ["▁", "▁t", "he", "▁the", "▁c", "at", "▁cat"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in ("<unk>", "<s>", "</s>")])
    directory = tmp_path_factory.mktemp("llama-2")
    tokenizer.save(str(directory / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "</s>"}  # as Llama 2 writes it
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return directory


class Served:
    """The nine repositories, p2.C's on both of its servers, behind one gateway that takes them in turn."""

    def __init__(self, servers: list[repository.RepositoryServer], tokenizers: list[Path], url: str):
        self.servers, self.url = servers, url
        self.tokenizers = [Tokenizer.from_file(str(directory / "tokenizer.json")) for directory in tokenizers]
        ends = [json.loads((directory / "tokenizer_config.json").read_text())["eos_token"] for directory in tokenizers]
        self.end_ids = [
            tokenizer.token_to_id(end if isinstance(end, str) else end["content"])
            for tokenizer, end in zip(self.tokenizers, ends, strict=True)
        ]

    def expected(self, server: int, prompt: str, n: int) -> list[int]:
        """The stand-in's answer."""
        ids = self.tokenizers[server].encode(prompt).ids
        return [self.end_ids[server] if i == END_AT else ids[i % len(ids)] for i in range(n)]

    def ask(self, requests: list[bytes]) -> list[tuple[int, list[bytes]]]:
        """For each request, all asked side by side through the gateway: which server replied, and its messages."""

        async def one(channel: grpc.aio.Channel, request: bytes) -> tuple[int, list[bytes]]:
            call = channel.stream_stream(wire.STREAM_INFER)(iter([request]), timeout=60)
            server = int(dict(await call.initial_metadata())["er-expert"])
            return server, [message async for message in call]

        async def all_of_them() -> list[tuple[int, list[bytes]]]:
            async with grpc.aio.insecure_channel(self.url, options=wire.CHANNEL_OPTIONS) as channel:
                return await asyncio.gather(*(one(channel, request) for request in requests))

        return asyncio.run(all_of_them())

    def ask_each(self, request: bytes) -> list[list[bytes]]:
        """Messages of each server: the gateway takes them in turn, so as many requests as servers reach all."""
        replies = dict(self.ask([request] * len(self.servers)))
        return [replies[server] for server in range(len(self.servers))]

    def counted(self, by: str) -> list[int]:
        """Tokens that each server has counted: ``generated`` on their way to a client, by the ``engine``."""
        return [round(server.counters().get(f"expert_{by}_tokens", 0)) for server in self.servers]


@pytest.fixture(scope="module")
def served(profile, tokenizer, llama2_like, tmp_path_factory):
    triton.preflight()
    home = tmp_path_factory.mktemp("repositories")
    names = [*NINE, "p2.C"]
    tokenizers = [llama2_like if name.startswith("p1") else tokenizer.parent for name in names]
    for name, directory in zip(NINE, tokenizers, strict=False):
        # p2.E as it is, two processes before and two behind the engine, and steps so short that tokens could overtake
        # one another; for the others one process is enough, and quicker.
        as_it_is = name == "p2.E"
        models = rendered(name, home / name, directory, **({} if as_it_is else {"n_processes": 1}))
        engine = models / "tensorrt_llm" / "config.pbtxt"
        step = f'parameters {{ key: "step_s" value {{ string_value: "{0 if as_it_is else 0.002}" }} }}\n'
        engine.write_text(engine.read_text().replace('backend: "tensorrtllm"', 'backend: "python"') + step)
        (models / "tensorrt_llm" / "1" / "model.py").symlink_to(STANDIN)
    port = BASE_PORT + 300
    ports = [port + 1 + i * triton.TritonServer.PORTS for i in range(len(names))]
    servers = [
        repository.RepositoryServer(f"{name}-{at}", home / name, at, home, gpus=())
        for name, at in zip(names, ports, strict=True)
    ]
    processes.require_free_ports([port, *(at + i for at in ports for i in range(triton.TritonServer.PORTS))])
    gateway = None
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(120)
        command = processes.python(
            "-m", "erlib.gateway", "--port", str(port), "--clusterer", "", "--policy", "replicas"
        )
        gateway = processes.spawn([*command, "--experts", ",".join(server.url for server in servers)], home / "gateway")
        processes.wait_until(lambda: processes.listening(port), gateway, "gateway", home / "gateway", 60)
        yield Served(servers, tokenizers, f"127.0.0.1:{port}")
    finally:
        processes.stop([process for process in (gateway, *(server.process for server in servers)) if process], 0)
        for server in servers:
            server.clean_up()
    assert [path for at in ports for path in Path("/dev/shm").glob(f"er{at}-*")] == []


def answered(messages: list[bytes]) -> list[int]:
    """Token ids of a reply."""
    return [token for message in messages for token in wire.decode_response(message).token_ids]


def difference(after: list[int], before: list[int]) -> list[int]:
    return [one - other for one, other in zip(after, before, strict=True)]


def changed(request: bytes, change: Callable[[pb.ModelInferRequest], None]) -> bytes:
    message = pb.ModelInferRequest.FromString(request)
    change(message)
    return message.SerializeToString()


def drop(name: str) -> Callable[[pb.ModelInferRequest], None]:
    def change(message: pb.ModelInferRequest) -> None:
        position = [tensor.name for tensor in message.inputs].index(name)
        del message.inputs[position], message.raw_input_contents[position]

    return change


def test_a_kv_cache_that_is_smaller_than_the_papers_is_told(served):
    for server in served.servers:
        server.verify()
    (server,) = (server for server in served.servers if server.label.startswith("p1.B"))
    engine = server.repository / "tensorrt_llm" / "config.pbtxt"
    as_served = engine.read_text()
    try:
        engine.write_text(as_served.replace('string_value: "73242"', 'string_value: "146484"'))
        with pytest.raises(processes.StartError, match=r"KV cache of 73,248 tokens, not the 146,484 of Table I"):
            server.verify()
    finally:
        engine.write_text(as_served)


def test_all_nine_are_loaded_and_speak_the_contract(served):
    for server in served.servers:
        with InferenceServerClient(server.url) as client:
            assert all(client.is_model_ready(model) for model in repository.MODELS)
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
            loaded = json_format.MessageToDict(client.get_model_config("tensorrt_llm").config)
            assert loaded["modelTransactionPolicy"] == {"decoupled": True}


def test_one_response_is_one_token_and_the_length_is_forced(served):
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


def test_characters_cut_between_tokens_are_whole_again(served):
    lengths = [len(tokenizer.encode(PROMPT).ids) for tokenizer in served.tokenizers]
    replies = served.ask_each(wire.encode_request(PROMPT, max(lengths), wire.NEVER_STOP))
    for server, (tokenizer, n, messages) in enumerate(zip(served.tokenizers, lengths, replies, strict=True)):
        texts = [wire.decode_response(message).text for message in messages[:n]]
        whole = tokenizer.decode(served.expected(server, PROMPT, n), skip_special_tokens=False)
        assert b"".join(texts).decode() == whole
        with pytest.raises(UnicodeDecodeError):
            [text.decode() for text in texts]


def test_without_end_id_the_tokenizers_end_of_sequence_ends_the_answer(served):
    for server, messages in enumerate(served.ask_each(wire.encode_request(PROMPT, 40))):
        ids = answered(messages)
        assert ids == served.expected(server, PROMPT, END_AT + 1)
        assert ids[-1] == served.end_ids[server]
        assert wire.decode_response(messages[-1]) == wire.Response("", b"", ())  # which is none too many


def test_without_stream_the_answer_is_one_response(served):
    request = changed(wire.encode_request(PROMPT, 9, wire.NEVER_STOP), drop("stream"))
    for server, messages in enumerate(served.ask_each(request)):
        (response,) = [wire.decode_response(message) for message in messages]
        assert list(response.token_ids) == served.expected(server, PROMPT, 9)


def _wrong_type(message: pb.ModelInferRequest) -> None:
    (position,) = (i for i, tensor in enumerate(message.inputs) if tensor.name == "max_tokens")
    message.inputs[position].datatype = "INT64"
    message.raw_input_contents[position] = (3).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("change", "max_tokens", "reason"),
    [
        (_wrong_type, 3, "data-type is 'INT64', but model 'ensemble' expects 'INT32'"),
        (drop("max_tokens"), 3, "the request has no input 'max_tokens'"),
        (lambda message: None, 0, "max_tokens must be at least 1, not 0"),
        (lambda message: None, 5000, "the engine holds sequences of up to 4096 tokens"),
    ],
    ids=["wrong type", "missing input", "refused by preprocessing", "refused by the engine"],
)
def test_bad_requests_get_a_reason_and_the_next_one_is_served(served, change, max_tokens, reason):
    for messages in served.ask_each(changed(wire.encode_request(PROMPT, max_tokens, wire.NEVER_STOP), change)):
        (refused,) = [wire.decode_response(message) for message in messages]
        assert reason in refused.error
    assert [len(messages) for messages in served.ask_each(wire.encode_request(PROMPT, 3, -1))] == [3] * 10


def test_many_streams_side_by_side_keep_their_tokens_in_order(served):
    colours = ("red", "green", "blue", "grey")
    prompts = [f"{colour} number {i}" for i in range(len(served.servers)) for colour in colours]
    replies = served.ask([wire.encode_request(prompt, 60, wire.NEVER_STOP) for prompt in prompts])
    for prompt, (server, messages) in zip(prompts, replies, strict=True):
        assert answered(messages) == served.expected(server, prompt, 60)


def test_users_count_every_token(served, tokenizer, tmp_path):
    """The user simulator: base prompts and continuations, which hold the answers' text."""
    n = 2 * len(served.servers)
    scripts = [users.Script(i, i, 0, f"{PROMPT} {i}", 20, wire.NEVER_STOP, 0, True) for i in range(n)]
    before = sum(served.counted("generated"))
    with users.UserSimulator(tokenizer, 1, tmp_path / "users.log") as simulator:
        seen = simulator.run(scripts, [served.url], 60)
    assert [(one.status, len(one.token_ns)) for one in seen.answers] == [("ok", 20)] * (2 * n)
    assert sum(served.counted("generated")) - before == 2 * n * 20


def test_cancelling_ends_the_stream_but_not_the_engines_work(served):
    """An ensemble does not tell a step that runs; should a later Triton do, what is said about it must change."""

    async def cancel_after_three() -> int:
        async with grpc.aio.insecure_channel(served.url) as channel:
            call = channel.stream_stream(wire.STREAM_INFER)(iter([wire.encode_request(PROMPT, 400, wire.NEVER_STOP)]))
            server = int(dict(await call.initial_metadata())["er-expert"])
            for _ in range(3):
                await call.read()
            call.cancel()
            return server

    async def cancel_all() -> list[int]:
        return await asyncio.gather(*(cancel_after_three() for _ in served.servers))

    served.ask_each(wire.encode_request(PROMPT, 1, wire.NEVER_STOP))  # all counters are there
    before = served.counted("engine")
    assert sorted(asyncio.run(cancel_all())) == list(range(len(served.servers)))
    deadline = time.monotonic() + 30
    while (written := difference(served.counted("engine"), before)) != [400] * len(served.servers):
        assert time.monotonic() < deadline, written
        time.sleep(0.1)
    replies = served.ask_each(wire.encode_request(PROMPT, 20, wire.NEVER_STOP))
    for server, messages in enumerate(replies):
        ids = answered(messages)
        assert ids == served.expected(server, PROMPT, 20)
