"""The serving path on real parts: engines in Triton, gateways, NGINX, users; and that nothing is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_client
import tritonclient.grpc.aio as triton_client_aio
import tritonclient.utils as triton_utils
from tokenizers import Tokenizer
from tritonclient.grpc import service_pb2 as pb

from erlib import paths
from erlib.load import users
from erlib.machine import processes
from erlib.routing.clusterer import Clusterer
from erlib.serving import share, stack, wire
from tests.support.ports import METRICS_PORT
from tests.support.processes import metrics
from tests.support.served import changed, drop, drop_all, refusal, wrong_type
from tests.support.stacks import answer, answer_of, generated_tokens

PROMPT = "The goalie stopped thirty shots and the team went home with two points"
FOLLOW_UP = f"{PROMPT}, and nobody was surprised, least of all the goalie himself"


def test_one_response_is_one_token_and_the_length_is_forced(expert_router, tokenizer):
    responses = answer(expert_router.servers[0].url, PROMPT, 25)
    assert [len(response.token_ids) for response in responses] == [1] * 25
    ids = [response.token_ids[0] for response in responses]
    text = b"".join(response.text for response in responses).decode()
    assert text == Tokenizer.from_file(str(tokenizer)).decode(ids, skip_special_tokens=True)


def test_gateway_and_expert_give_the_same_answer(expert_router, router):
    expert = Clusterer.load(router).route(PROMPT)[0]
    direct = answer(expert_router.servers[expert].url, PROMPT, 12)
    routed = answer(expert_router.targets[0], PROMPT, 12)
    assert routed == direct


def test_an_answer_may_end_early(expert_router):
    forced = [response.token_ids[0] for response in answer(expert_router.servers[0].url, PROMPT, 12)]
    stop_at = forced[4]
    stopped = answer(expert_router.servers[0].url, PROMPT, 12, end_id=stop_at)
    assert len(stopped) == forced.index(stop_at) + 1


@pytest.mark.parametrize("through_the_gateway", [False, True])
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "reason"),
    [
        ("  \n ", 5, "text_input is empty"),
        (PROMPT, 0, "INVALID_ARGUMENT: max_tokens must be at least 1"),
        (PROMPT, -7, "INVALID_ARGUMENT: max_tokens must be at least 1"),
        (PROMPT, 5000, "INVALID_ARGUMENT: 14 input tokens + 5000 output tokens exceed the 512"),
        ("word " * 5000, 5, "exceed the 512"),
        ("a" * 500_000, 5, "the prompt's 500,000 bytes exceed the 512"),
    ],
)
def test_bad_requests_get_a_reason_and_the_next_one_is_served(
    expert_router, through_the_gateway, prompt, max_tokens, reason
):
    url = expert_router.targets[0] if through_the_gateway else expert_router.servers[0].url
    (refused,) = answer(url, prompt, max_tokens)
    assert reason in refused.error
    assert len(answer(url, PROMPT, 3)) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("max_tokens"), "max_tokens is missing: the request has no input 'max_tokens'"),
        (drop("text_input"), "the request has no input 'text_input'"),
        (drop_all, "input"),
        (wrong_type, "data-type is 'INT64', but model 'ensemble' expects 'INT32'"),
    ],
)
def test_what_a_request_lacks_is_said(expert_router, change, reason):
    request = changed(wire.encode_request(PROMPT, 3, wire.NEVER_STOP), change)
    for url in (expert_router.targets[0], expert_router.servers[0].url):
        assert reason in refusal(url, request)
    assert len(answer(expert_router.servers[0].url, PROMPT, 3)) == 3


def test_the_server_says_how_much_context_there_is(expert_router):
    for url in (expert_router.targets[0], expert_router.servers[0].url):
        with grpc.insecure_channel(url) as channel:
            assert wire.context_tokens(channel.unary_unary(wire.MODEL_CONFIG)(wire.ASK_MODEL_CONFIG)) == 512


def test_bytes_that_are_not_utf8_are_refused(expert_router):
    request = wire.encode_request("ab", 3).replace(b"\x02\x00\x00\x00ab", b"\x02\x00\x00\x00\xff\xfe")
    for url in (expert_router.targets[0], expert_router.servers[0].url):
        (refused,) = asyncio.run(answer_of(url, request))
        assert "not valid UTF-8" in refused.error


def _inputs(client, prompt: str, stream: bool | None = None) -> list:
    """As the official client takes them."""
    inputs = []
    for name, value, datatype in (
        ("text_input", np.array([[prompt.encode()]], dtype=np.object_), "BYTES"),
        ("max_tokens", np.array([[7]], np.int32), "INT32"),
        ("end_id", np.array([[-1]], np.int32), "INT32"),
        *([] if stream is None else [("stream", np.array([[stream]]), "BOOL")]),
    ):
        inputs.append(client.InferInput(name, [1, 1], datatype))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def test_the_official_client_gets_the_whole_answer_at_once_unless_it_asks_for_a_stream(expert_router):
    """Its ``infer``, of which Triton itself says that models that can stream do not take it."""
    tokens = [token for response in answer(expert_router.targets[0], PROMPT, 7) for token in response.token_ids]
    url = expert_router.targets[0]
    refusals = []
    with triton_client.InferenceServerClient(url) as client:
        for stream in (None, False):
            result = client.infer("ensemble", _inputs(triton_client, PROMPT, stream), headers={"er-explain": "1"})
            assert result.as_numpy("output_ids").reshape(-1).tolist() == tokens
            assert {"er-expert", "er-distances"} <= set(result.get_response().parameters)
        wrong_type = _inputs(triton_client, PROMPT)
        wrong_type[1] = triton_client.InferInput("max_tokens", [1, 1], "INT64")
        wrong_type[1].set_data_from_numpy(np.array([[7]]))
        for inputs in (_inputs(triton_client, PROMPT, stream=True), wrong_type, wrong_type[:1]):
            with pytest.raises(triton_client.InferenceServerException) as refused:
                client.infer("ensemble", inputs)
            refusals.append((refused.value.status(), refused.value.message()))
    assert [status for status, _ in refusals] == ["StatusCode.INVALID_ARGUMENT"] * 3
    assert "ModelStreamInfer" in refusals[0][1]
    assert "INT32" in refusals[1][1]

    async def use() -> list[int]:
        async with triton_client_aio.InferenceServerClient(url) as client:
            return (
                (await client.infer("ensemble", _inputs(triton_client_aio, PROMPT))).as_numpy("output_ids").reshape(-1)
            )

    assert asyncio.run(use()).tolist() == tokens


def test_the_official_client_talks_to_the_gateway_several_requests_on_one_stream(expert_router):
    replies: list[tuple[str, int]] = []
    done = threading.Event()

    def callback(result, error):
        assert error is None, error
        replies.append((result.get_response().id, len(result.as_numpy("output_ids").reshape(-1))))
        if len(replies) == 3 * 7:
            done.set()

    with triton_client.InferenceServerClient(expert_router.targets[0]) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("ensemble")
        client.start_stream(callback)
        for number, prompt in enumerate([PROMPT, "How fast is the new graphics card?", "The senate voted on taxes"]):
            inputs = _inputs(triton_client, prompt, stream=True)
            client.async_stream_infer("ensemble", inputs, request_id=str(number))
        assert done.wait(30)
    assert sorted(replies) == sorted((str(number), 1) for number in range(3) for _ in range(7))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("end", ["cancelled", "deadline"])
def test_whoever_gives_up_frees_the_slot(expert_router, stream, end):
    """Engines count far fewer tokens than were asked for, whether the answer is to come token by token or as one."""
    request = wire.encode_request(PROMPT, 450, wire.NEVER_STOP)
    if not stream:
        request = changed(request, drop("stream"))

    async def give_up() -> None:
        async with grpc.aio.insecure_channel(expert_router.targets[0]) as channel:
            timeout = 0.1 if end == "deadline" else None
            call = channel.stream_stream(wire.STREAM_INFER)(iter([request]), timeout=timeout)
            if end == "cancelled":
                await call.initial_metadata()
                await (call.read() if stream else asyncio.sleep(0.05))
                call.cancel()
            assert await call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)

    before = generated_tokens(expert_router)
    asyncio.run(give_up())
    time.sleep(1)
    after, deadline = -1, time.monotonic() + 30
    while after != (after := generated_tokens(expert_router)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert after - before < 300


def _scripts(n: int, max_tokens: int, targets: int = 1) -> list[users.Script]:
    words = ["space", "hockey", "windows", "gun", "church", "motorcycle", "chip", "medicine"]
    return [
        users.Script(i, i, 0, f"{words[i % 8]} {PROMPT}", max_tokens, wire.NEVER_STOP, i % targets, FOLLOW_UP)
        for i in range(n)
    ]


CLIENTS = pytest.mark.parametrize(("client", "n_processes"), [("asyncio", 2), ("threads", 1)])


@CLIENTS
def test_users_get_exactly_what_they_ask_for(expert_router, tokenizer, tmp_path, client, n_processes):
    """Forced length: as many timestamps as tokens, strictly ordered, and the servers counted the same sum."""
    with users.UserSimulator(tokenizer, n_processes, tmp_path / "users.log", client) as simulator:
        before = generated_tokens(expert_router)
        seen = simulator.run(_scripts(10, 15), expert_router.targets, 60)
    assert len(seen.answers) == 20
    for one in seen.answers:
        assert one.status == "ok"
        assert len(one.token_ns) == 15
        assert one.t_send_ns < one.token_ns[0] == one.t_first_ns
        assert one.token_ns[-1] == one.t_last_ns
        assert all(np.diff(one.token_ns) > 0)
        if client == "asyncio":
            assert set(one.routing) == {"queue", "vectorise", "svd", "kmeans", "forward", "first_byte"}
            # NGINX, which relays, takes the time of the first byte from a clock that it reads now and then.
            assert 0 < sum(one.routing.values()) <= one.t_first_ns - one.t_send_ns + 5e6
        else:  # tritonclient shows no metadata
            assert (one.expert, one.routing) == (-1, {})
    assert sum(len(one.token_ns) for one in seen.answers) == generated_tokens(expert_router) - before
    sent = [one.t_send_ns for one in seen.answers if one.turn == "base"]
    assert max(sent) - min(sent) < 0.1e9
    assert seen.cpu_cores > 0
    assert 0 < seen.lag_p99_ms <= seen.lag_max_ms
    by_user = {(one.user, one.turn): one for one in seen.answers}
    for user in range(10):
        base, continuation = by_user[user, "base"], by_user[user, "continuation"]
        assert continuation.t_send_ns > base.t_last_ns
        assert continuation.input_tokens > base.input_tokens


@CLIENTS
def test_users_come_when_their_script_says(expert_router, tokenizer, tmp_path, client, n_processes):
    late = [dataclasses.replace(script, comes_s=0.3 * script.user) for script in _scripts(4, 2)]
    with users.UserSimulator(tokenizer, n_processes, tmp_path / "users.log", client) as simulator:
        seen = simulator.run(late, expert_router.targets, 60)
    sent_s = {one.user: one.t_send_ns * 1e-9 for one in seen.answers if one.turn == "base"}
    for user in (1, 2, 3):
        assert sent_s[user] - sent_s[0] > 0.3 * user - 0.05


def test_both_clients_get_the_same_answers(expert_router, tokenizer, tmp_path):
    """Both ask the same, and count it alike."""
    lengths = []
    for client in ("asyncio", "threads"):
        with users.UserSimulator(tokenizer, 1, tmp_path / "users.log", client) as simulator:
            seen = simulator.run(_scripts(8, 12), expert_router.targets, 60)
        lengths.append({(one.user, one.turn): one.input_tokens for one in seen.answers})
    assert lengths[0] == lengths[1]
    assert len(lengths[0]) == 16


@CLIENTS
def test_failures_are_told_and_the_users_go_on(expert_router, tokenizer, tmp_path, client, n_processes):
    """A refusal, a time limit, an answer that ends early; then a point as if nothing had been."""
    log, urls = tmp_path / "users.log", expert_router.targets
    (stop_at, *_) = [response.token_ids[0] for response in answer(urls[0], PROMPT, 12)][4:]
    with users.UserSimulator(tokenizer, n_processes, log, client) as simulator:
        refused = simulator.run(_scripts(3, 5000), urls, 60).answers
        assert [one.turn for one in refused] == ["base"] * 3
        assert all("exceed the 512" in one.status for one in refused)
        late = simulator.run(_scripts(3, 450), urls, 0.15).answers
        assert [one.turn for one in late] == ["base"] * 3
        assert all(one.status.startswith("DEADLINE_EXCEEDED") for one in late)
        (early,) = simulator.run([users.Script(0, 0, 0, PROMPT, 12, stop_at, 0, None)], urls, 60).answers
        assert early.status == "ok"
        assert len(early.token_ns) <= 5
        assert all(one.status == "ok" for one in simulator.run(_scripts(3, 5), urls, 60).answers)


def test_nobody_answering_is_an_error(tokenizer, profile, tmp_path):
    nobody = [f"127.0.0.1:{profile.serving.base_port + 99}"]
    with (
        users.UserSimulator(tokenizer, 1, tmp_path / "users.log", "threads") as simulator,
        pytest.raises(processes.StartError, match="nobody answers at"),
    ):
        simulator.run(_scripts(4, 5), nobody, 10)


def test_threaded_users_share_one_process(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="one process"):
        users.UserSimulator(tokenizer, 2, tmp_path / "users.log", client="threads")


def test_the_threaded_client_ends_by_itself(expert_router, tokenizer):
    """No stream is left open, not even that of a user who gave up: Python would wait for it for ever."""
    jobs = [
        {
            "command": "run",
            "scripts": [asdict(script) for script in _scripts(4, tokens)],
            "targets": expert_router.targets,
            "timeout_s": timeout_s,
            "start_ns": 0,
        }
        for tokens, timeout_s in ((5, 60), (450, 0.15))
    ]
    command = [sys.executable, "-m", "erlib.load.threaded_users", str(tokenizer)]
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{one["status"][:17] for one in result["answers"]} for result in results] == [{"ok"}, {"DEADLINE_EXCEEDED"}]


def test_nginx_spreads_evenly_and_gateways_agree(expert_router, router, profile):
    """Round robin is exact, and every gateway decides like the router's model itself."""
    model = Clusterer.load(router)
    prompts = [f"{word} {PROMPT[i:]}" for i in range(8) for word in ("space", "church", "windows", "gun", "engine")]

    async def routes() -> list[tuple[int, int]]:
        async with grpc.aio.insecure_channel(expert_router.targets[0]) as channel:
            seen = []
            for prompt in prompts:
                call = channel.stream_stream(wire.STREAM_INFER)(iter([wire.encode_request(prompt, 1, wire.NEVER_STOP)]))
                metadata = dict(await call.initial_metadata())
                assert [len(wire.decode_response(message).token_ids) async for message in call] == [1]
                seen.append((int(metadata["er-gateway"]), int(metadata["er-expert"])))
            return seen

    seen = asyncio.run(routes())
    assert [expert for _, expert in seen] == list(model.predict(prompts))
    counts = np.bincount([gateway for gateway, _ in seen], minlength=profile.serving.gateways)
    assert set(counts) == {len(prompts) // profile.serving.gateways}


def test_every_gateway_serves_its_metrics_at_a_port_of_its_own(expert_router, profile):
    """What goes through NGINX is counted by one of them."""

    def counted() -> list[float]:
        seen = [asyncio.run(metrics(int(target.rpartition(":")[2]))) for target in expert_router.metrics_targets]
        return [sum(n for name, n in one.items() if name[0] == "er_requests_total") for one in seen]

    before = counted()
    assert len(before) == profile.serving.gateways
    for _ in range(4):
        answer(expert_router.targets[0], PROMPT, 2)
    each = 4 // len(before)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [each] * len(before)


def test_a_port_for_metrics_that_is_in_use_is_said_before_anything_starts(own_ports, router, server_plan, tmp_path):
    last = METRICS_PORT + own_ports.gateways + 5
    with (
        socket.socket() as taken,
        pytest.raises(processes.StartError, match=f"port in use: {last}"),
    ):
        taken.bind(("127.0.0.1", last))
        first = last - own_ports.gateways + 1
        with stack.Stack(
            "refused", [server_plan], "replicas", own_ports, router, tmp_path, metrics_port=first
        ):  # fmt: skip
            pass
    assert not list(tmp_path.iterdir())


def test_metrics_of_a_system_without_gateways_are_refused():
    command = [sys.executable, paths.ROOT / "scripts" / "serve.py", "p2.A", "--profile", "smoke", "--metrics", "9100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "error: p2.A has no gateways, whose metrics --metrics would serve\n")


def test_servers_that_share_a_gpu_start_when_those_before_them_are_ready(monkeypatch, tmp_path):
    """And gateways with the last of them, because they do not wait for servers for ever."""
    done = []

    class Recorded(share.TritonServer):
        def __init__(self, i: int, turn: int):
            super().__init__(f"p2.E-{i}", "openvino", {}, 1, 65_000 + 3 * i, tmp_path)
            self.turn = turn

        def start(self) -> None:
            done.append(f"start {self.label[-1]}")

        def wait_ready(self, timeout_s: float) -> None:
            done.append(f"ready {self.label[-1]}")

    class Nursery:
        process = None

    monkeypatch.setattr(share.Gateway, "nursery", lambda self: Nursery())
    monkeypatch.setattr(share.Gateway, "start", lambda self, nursery: done.append("start gateway"))
    monkeypatch.setattr(share.Gateway, "wait_ready", lambda self, timeout_s: done.append("ready gateway"))
    servers = [Recorded(i, turn) for i, turn in enumerate((0, 0, 1, 1, 2))]
    gateway = share.Gateway(0, "127.0.0.1", 65_100, ["127.0.0.1:65001"], None, "replicas", tmp_path, 0)
    mine = share.Share("127.0.0.1", servers, [gateway], None)
    mine.start()
    assert done == ["start 0", "start 1"]
    mine.wait_ready(1)
    turns = ["start 0", "start 1", "ready 0", "ready 1", "start 2", "start 3", "ready 2", "ready 3", "start 4"]
    assert done == [*turns, "start gateway", "ready 4", "ready gateway"]


def test_a_second_stack_on_the_same_ports_is_refused_before_anything_starts(
    expert_router, profile, router, server_plan, tmp_path
):
    with (
        pytest.raises(processes.StartError, match=r"in use.*serving\.base_port"),
        stack.Stack("second", [server_plan], "expert_router", profile.serving, router, tmp_path),
    ):
        pass
    assert len(answer(expert_router.targets[0], PROMPT, 2)) == 2


def _leftovers(base_port: int) -> list[str]:
    ports = range(base_port, base_port + 60)
    return [f"port {port}" for port in ports if processes.listening(port)] + [
        str(path) for port in ports for path in Path("/dev/shm").glob(f"er{port}-*")
    ]


@pytest.fixture
def own_ports(profile):
    """Serving settings whose ports no other stack of the tests uses."""
    return profile.serving.model_copy(update={"base_port": profile.serving.base_port + 100})


@pytest.mark.parametrize(
    ("whose", "reason"),
    # An engine that dies as its client gives up may take Triton along, whose abort is then what there is to say.
    [("server", "died with code -9"), ("engine", "the engine of .* died|died with code -6")],
)
def test_a_killed_server_is_an_error_and_nothing_is_left(
    whose, reason, own_ports, router, server_plan, tokenizer, tmp_path
):
    with stack.Stack("dying", [server_plan], "replicas", own_ports, router, tmp_path) as running:
        server = psutil.Process(running.servers[0].process.pid)
        victim = server if whose == "server" else server.children()[0]
        with users.UserSimulator(tokenizer, 1, tmp_path / "users.log") as simulator:
            threading.Timer(0.6, victim.kill).start()
            seen = simulator.run([users.Script(0, 0, 0, PROMPT, 480, -1, 0, None)], running.targets, 10)
        assert seen.answers[0].status != "ok"
        with pytest.raises(processes.StartError, match=reason):
            running.require_alive()
    assert _leftovers(own_ports.base_port) == []


def test_triton_counts_failures_of_a_dead_engine_and_not_the_errors_of_a_living_one(own_ports, server_plan, tmp_path):
    """By which a gateway tells a short answer from an error that it does not see."""

    def failures(url: str) -> int:
        with grpc.insecure_channel(url) as channel:
            reply = channel.unary_unary(f"/{wire.SERVICE}/ModelStatistics")(b"")
        (model,) = pb.ModelStatisticsResponse.FromString(reply).model_stats
        return model.inference_stats.fail.count

    def error(url: str, tokens: int) -> str:
        with grpc.insecure_channel(url) as channel:
            message = wire.encode_request(PROMPT, tokens, wire.NEVER_STOP)
            (reply,) = channel.unary_stream(wire.STREAM_INFER)(message, timeout=20)
            return wire.decode_response(reply).error

    with stack.Stack("failing", [server_plan], "replicas", own_ports, None, tmp_path) as running:
        (server,) = running.servers
        assert error(server.url, 99_999).startswith("INVALID_ARGUMENT") and failures(server.url) == 0
        (engine,) = psutil.Process(server.process.pid).children()
        engine.kill()
        processes.wait_until(lambda: not server.has_backend(), server.process, "Triton", server.log, 20)
        assert "not healthy" in error(server.url, 1)
        # The count follows the error, sometimes a little later.
        processes.wait_until(lambda: failures(server.url) == 1, server.process, "Triton", server.log, 20)


def test_a_balancer_that_dies_amid_a_point_is_named_at_once(own_ports, router, server_plan, tokenizer, tmp_path):
    """Users would connect to it again and again until that is given up."""
    with stack.Stack("dying", [server_plan], "replicas", own_ports, router, tmp_path) as running:
        nginx = psutil.Process(running._front.process.pid)
        watch = functools.partial(running.require_alive, engines=False)
        with users.UserSimulator(tokenizer, 1, tmp_path / "users.log", watch=watch) as simulator:
            for process in (nginx, *nginx.children()):  # the other way round it may start new ones in time
                process.kill()
            with pytest.raises(processes.StartError, match="NGINX died with code -9"):
                simulator.run(_scripts(4, 5), running.targets, 60)
    assert _leftovers(own_ports.base_port) == []


def test_users_are_not_waited_for_once_what_they_ask_has_died(tokenizer, tmp_path):
    def dead() -> None:
        raise processes.StartError("gateway 3 died with code -11")

    with (
        socket.socket() as silent,
        users.UserSimulator(tokenizer, 1, tmp_path / "users.log", watch=dead) as simulator,
    ):
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(processes.StartError, match="gateway 3 died"):
            simulator.run(_scripts(4, 5), [f"127.0.0.1:{silent.getsockname()[1]}"], 60)
        assert time.monotonic() - began < users.CONNECT_TIMEOUT_S / 2


@pytest.fixture
def restricted(expert_router):
    with triton_client.InferenceServerClient(expert_router.servers[0].url) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("get_system_shared_memory_status", []),
        ("register_system_shared_memory", ["mine", "/er", 8]),
        ("unregister_system_shared_memory", []),
        ("get_cuda_shared_memory_status", []),
        ("get_model_repository_index", []),
        ("load_model", ["ensemble"]),
        ("unload_model", ["ensemble"]),
        ("get_trace_settings", []),
        ("update_trace_settings", ["ensemble", {"trace_level": "OFF"}]),
        ("get_log_settings", []),
        ("update_log_settings", [{"log_verbose_level": 9}]),
    ],
)
def test_a_client_of_a_server_changes_nothing_there(restricted, method, arguments):
    with pytest.raises(triton_utils.InferenceServerException, match="restricted"):
        getattr(restricted, method)(*arguments)


def test_of_http_a_server_answers_questions_for_its_health_alone(expert_router):
    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{expert_router.servers[0].http_port}/v2{path}") as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/health/ready") == status("/health/live") == 200
    questions = ["", "/logging", "/trace/setting", "/systemsharedmemory/status", "/cudasharedmemory/status"]
    questions += [f"/models/ensemble{what}" for what in ("", "/stats", "/config")]
    assert {path: status(path) for path in questions} == dict.fromkeys(questions, 403)


def test_names_of_folders_are_never_read_by_a_shell_or_a_configuration_file(own_ports, server_plan, tmp_path):
    odd = tmp_path / "a b;$(touch pwned)&'\"\\{x}%s\nü"
    engine = odd / "engine"
    engine.parent.mkdir()
    shutil.copytree(server_plan.parameters["engine"], engine)
    plan = replace(server_plan, parameters=server_plan.parameters | {"engine": str(engine)})
    with stack.Stack("odd", [plan], "replicas", own_ports, None, odd / "logs") as running:
        assert len(answer(running.targets[0], PROMPT, 3)) == 3
    assert {path.name for path in tmp_path.rglob("pwned")} == set()
    assert not Path("pwned").exists()


def test_too_little_shared_memory_is_said_before_anything_starts(own_ports, server_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(3 << 20, 0, 3 << 20))
    with (
        pytest.raises(processes.StartError, match=r"/dev/shm has 3\.0 MiB free; .* 8 MiB: 2 times 4.*--shm-size"),
        stack.Stack("cramped", [server_plan] * 2, "direct", own_ports, None, tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def _revived(running: stack.Stack) -> list[str]:
    deadline = time.monotonic() + 30  # a crash takes its time
    while not (lines := running.revive()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return lines


def test_what_dies_is_brought_back_where_clients_look_for_it(own_ports, router, server_plan, tmp_path):
    """A server that crashes, an engine that is killed, a gateway, the balancer."""
    with stack.Stack("mortal", [server_plan], "replicas", own_ports, router, tmp_path) as running:
        assert running.revive() == []
        server, nginx = running.servers[0], running._front
        engine = psutil.Process(server.process.pid).children()[0]
        for kill, who in [
            (lambda: server.process.send_signal(signal.SIGSEGV), r"Triton server mortal-0 died with code -11"),
            (running._gateways[1].process.kill, r"gateway 1 died with code -9"),
            (nginx.process.kill, r"NGINX died with code -9"),
        ]:
            kill()
            (line,) = _revived(running)
            assert re.match(rf"{who} \(see .*\.died\.log\) and has been started again$", line)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
        psutil.Process(server.process.pid).children()[0].kill()
        (line,) = _revived(running)
        assert re.match(r"Triton server mortal-0 lost its engine \(see .*\) and has been started again$", line)
        deadline = time.monotonic() + 30  # until the breakers have closed
        while len(answer(running.targets[0], PROMPT, 3)) != 3:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert _leftovers(own_ports.base_port) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupting_or_killing_the_run_leaves_nothing(number, own_ports, router, server_plan, tmp_path):
    code = (
        "import json, signal, sys, time; from pathlib import Path\n"
        "from erlib import config; from erlib.serving import stack, triton\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if the tests run in the background\n"
        "settings, plan, router, logs = json.loads(sys.argv[1])\n"
        "settings = config.ServingSettings(**settings)\n"
        "plan = triton.ServerPlan(**plan)\n"
        "with stack.Stack('cut', [plan] * 2, 'replicas', settings, Path(router), Path(logs)):\n"
        "    print('up', flush=True); time.sleep(60)\n"
    )
    arguments = json.dumps([own_ports.model_dump(), asdict(server_plan), str(router), str(tmp_path)])
    with subprocess.Popen(
        [sys.executable, "-c", code, arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout.readline() == "up\n"
        children = psutil.Process(run.pid).children(recursive=True)
        assert len(children) >= 2 * 2 + 2 + 2
        os.kill(run.pid, number)
        run.wait(30)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert _leftovers(own_ports.base_port) == []
