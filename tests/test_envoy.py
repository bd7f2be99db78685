"""The fast front: Envoy sends complete requests straight to the expert that a gateway's processor names."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import prometheus_client
import pytest
import tritonclient.grpc as triton_client
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from standin_expert import Front, StandIn, eventually, front, response, standin
from test_faults import free_port, needs_envoy
from test_service import RESPONSES
from tritonclient.grpc import service_pb2 as pb

from erlib import config, envoy, preflight, processes, users, wire
from erlib.limits import Limits
from erlib.processes import StartError


@pytest.fixture
def patient(monkeypatch):
    """However busy this machine is, a request that comes complete is taken for one."""
    from erlib import processor

    monkeypatch.setattr(processor, "COMPLETE_WITHIN_S", 5)


PROMPT = wire.encode_request("0 n=3", 5, request_id="7")

# --- configuration ----------------------------------------------------------------------------------------------


def configuration() -> dict:
    built = envoy.Envoy(1234, ["10.0.0.5:1", "10.0.0.5:2"], ["h:3|h:4", "h:5"], Path("/tmp"), "10.0.0.5")
    return yaml.safe_load(built.configuration)


def test_clusters_are_the_gateways_together_and_each_and_the_experts_with_all_replicas():
    def addresses(cluster: dict) -> list[str]:
        ends = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        sockets = [end["endpoint"]["address"]["socket_address"] for end in ends]
        return [f"{socket['address']}:{socket['port_value']}" for socket in sockets]

    assert {one["name"]: addresses(one) for one in configuration()["static_resources"]["clusters"]} == {
        "gateways": ["10.0.0.5:1", "10.0.0.5:2"],
        "gateway-0": ["10.0.0.5:1"],
        "gateway-1": ["10.0.0.5:2"],
        "expert-0": ["h:3", "h:4"],
        "expert-1": ["h:5"],
    }


def test_it_listens_where_it_is_told_and_nowhere_else():
    read = configuration()
    assert set(read) == {"static_resources"}  # no administration
    (listener,) = read["static_resources"]["listeners"]
    assert listener["address"]["socket_address"] == {"address": "10.0.0.5", "port_value": 1234}


def test_what_is_missing_is_said_with_the_remedy(monkeypatch):
    """Before anything is started."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    profile = config.load_profile("smoke", {"serving.front": "envoy"})
    (problem,) = [one for one in preflight.basics(profile) if "Envoy" in one]
    assert "install.py envoy" in problem
    with pytest.raises(StartError, match=r"install\.py envoy"):
        envoy.find()


# --- the processor ----------------------------------------------------------------------------------------------


def framed(message: bytes, compressed: int = 0) -> bytes:
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


@dataclasses.dataclass
class Decision:
    """What a processor answers about one stream."""

    headers: dict[str, str]
    told: dict[str, str]
    body: bytes
    is_complete: bool


async def decided(gateway: Front, *parts: bytes, ends: bool = True, sent: str = "") -> Decision:
    """Say what Envoy says of a stream that comes in `parts`."""
    from envoy.service.ext_proc.v3 import external_processor_pb2 as xds

    call = gateway.channel.stream_stream(
        "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
        xds.ProcessingRequest.SerializeToString,
        xds.ProcessingResponse.FromString,
    )()
    began = xds.ProcessingRequest()
    header = began.request_headers.headers.headers.add()
    header.key, header.raw_value = "er-sent-ns", sent.encode()
    await call.write(began)
    for i, part in enumerate(parts):
        last = ends and i == len(parts) - 1
        await call.write(xds.ProcessingRequest(request_body={"body": part, "end_of_stream": last}))
    first, second = [await call.read() for _ in range(2)]
    decision = first.request_headers.response
    passed = second.request_body.response.body_mutation.streamed_response
    call.cancel()
    return Decision(
        {one.header.key: one.header.raw_value.decode() for one in decision.header_mutation.set_headers},
        dict(first.dynamic_metadata["er"]) if "er" in first.dynamic_metadata else {},
        passed.body,
        passed.end_of_stream,
    )


def decisions(*streams: tuple[bytes, ...], ends: bool = True, addresses: str = "127.0.0.1:1,127.0.0.1:2", **arguments):
    """What gateway 3 decides about each of `streams`, which come in parts."""
    from erlib.processor import Processor

    async def run() -> list[Decision]:
        async with front(addresses, index=3, beside=lambda gateway: [Processor(gateway)], **arguments) as gateway:
            return [await decided(gateway, *parts, ends=ends) for parts in streams]

    return asyncio.run(run())


@needs_envoy
def test_a_complete_request_goes_to_its_expert_wherever_it_is_cut(patient):
    body = framed(wire.encode_request("1 hello", 5))
    streams = [(body[:i], body[i:]) for i in range(len(body) + 1)] + [tuple(body[i : i + 1] for i in range(len(body)))]
    for decision in decisions(*streams):
        assert decision.headers == {"er-cluster": "expert-1"}
        assert (decision.body, decision.is_complete) == (body, True)
        assert decision.told["er-gateway"] == "3" and decision.told["er-expert"] == "1"
        assert int(decision.told["er-forward-ns"]) > 0


@needs_envoy
def test_a_spare_replica_is_allowed_one_more_try(patient):
    (decision,) = decisions((framed(PROMPT),), addresses="127.0.0.1:1|127.0.0.1:2")
    assert "unavailable" in decision.headers["x-envoy-retry-grpc-on"]


OTHERS = {
    "two messages": framed(PROMPT) * 2,
    "half a message": framed(PROMPT)[:-1],
    "nothing": b"",
    "compressed": framed(PROMPT, 1),
    "no request": framed(b"\xff\xff"),
    "no prompt": framed(wire.encode_request("  ", 1)),
    "too long": framed(wire.encode_request("0 " + "x" * Limits().message_bytes, 1)),
}


@needs_envoy
@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_whatever_is_not_one_good_request_goes_to_the_gateway_as_it_is(body):
    (decision,) = decisions((body[: len(body) // 2], body[len(body) // 2 :]))
    assert (decision.headers, decision.told) == ({"er-cluster": "gateway-3"}, {})
    assert decision.body == body


@needs_envoy
def test_a_stream_that_stays_open_goes_to_the_gateway():
    (decision,) = decisions((framed(PROMPT),), ends=False)
    assert (decision.headers, decision.is_complete) == ({"er-cluster": "gateway-3"}, False)


@needs_envoy
def test_where_peers_are_limited_the_gateway_does_everything():
    (decision,) = decisions((framed(PROMPT),), limits=Limits(streams_per_peer=5))
    assert decision.headers == {"er-cluster": "gateway-3"}


# --- Envoy, gateways and experts ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Site(Front):
    """Envoy in front of two gateways, of which `gateway` is the first."""

    gateways: list[Front]

    def counted(self, name: str) -> float:
        """A counter of all gateways together."""
        texts = [prometheus_client.generate_latest(one.gateway.telemetry.registry).decode() for one in self.gateways]
        return sum(float(line.split()[-1]) for text in texts for line in text.splitlines() if line.startswith(name))


@asynccontextmanager
async def site(work: Path, *stand_ins: StandIn) -> AsyncIterator[Site]:
    """Each stand-in is an expert."""
    from erlib.processor import Processor

    urls = [one.url for one in stand_ins]
    beside = lambda gateway: [Processor(gateway)]  # noqa: E731
    async with AsyncExitStack() as exits:
        gateways = [await exits.enter_async_context(front(",".join(urls), index=i, beside=beside)) for i in range(2)]
        built = envoy.Envoy(free_port(), [one.url for one in gateways], urls, work)
        built.start()
        exits.callback(processes.stop, [built.process], 2)
        async with grpc.aio.insecure_channel(built.url, options=wire.CHANNEL_OPTIONS) as channel:
            yield Site(gateways[0].gateway, built.url, channel, gateways)


def through(work: Path, visit, n: int = 1, answer=None):
    """What `visit` returns of a site with `n` experts, and the stand-ins."""

    async def run():
        async with AsyncExitStack() as exits:
            stand_ins = [await exits.enter_async_context(standin(answer)) for _ in range(n)]
            async with site(work, *stand_ins) as built:
                return await visit(built), stand_ins

    return asyncio.run(run())


async def complete(site: Site, message: bytes, **arguments) -> list[bytes]:
    """Responses to a request that is sent in one go, and so goes to its expert directly."""
    return [one async for one in site.channel.unary_stream(wire.STREAM_INFER)(message, **arguments)]


@needs_envoy
def test_every_byte_arrives_in_order_on_both_ways(tmp_path):
    wanted: list[bytes] = []

    async def visit(site: Site):
        for responses in RESPONSES.values():
            wanted[:] = responses
            assert await complete(site, PROMPT) == responses
            stream = site.channel.stream_stream(wire.STREAM_INFER)()
            await stream.write(PROMPT)
            await asyncio.sleep(0.1)  # so long that it is not complete
            await stream.done_writing()
            assert [one async for one in stream] == responses
        await eventually(lambda: site.counted("er_requests_total") == 2 * len(RESPONSES))

    _, (expert,) = through(tmp_path, visit, answer=lambda _: wanted)
    assert [seen.message for seen in expert.requests] == [PROMPT] * 2 * len(RESPONSES)


@needs_envoy
def test_metadata_pass_both_ways_with_what_the_gateway_tells(patient, tmp_path):
    kept = [("traceparent", "00-ab"), ("token-bin", b"\x00\xfe"), ("twice", "a"), ("twice", "b")]
    sent = (*kept, ("er-sent-ns", str(time.monotonic_ns())), ("er-cluster", "expert-9"))

    async def visit(site: Site):
        call = site.channel.unary_stream(wire.STREAM_INFER)(PROMPT, metadata=sent)
        assert len([one async for one in call]) == 3
        return dict(await call.initial_metadata()), dict(await call.trailing_metadata())

    (first, last), (expert,) = through(tmp_path, visit)
    assert [pair for pair in expert.requests[0].metadata if pair[0] != "user-agent"] == kept
    assert (last["from-expert"], last["binary-bin"]) == ("yes", b"\x00\xff")
    assert first["er-expert"] == "0"
    spans = {name: int(first[f"er-{name}-ns"]) for name in ("queue", "svd", "kmeans", "forward", "first-byte")}
    assert spans["svd"] == 2 and spans["kmeans"] == 3  # as the router says
    assert 0 < spans["queue"] < 5e9 and 0 < spans["first-byte"] < 5e9


@needs_envoy
def test_a_client_may_take_its_time_to_ask(tmp_path):
    """Its headers come long before its request, and that long before the end of the stream."""

    async def visit(site: Site):
        stream = site.channel.stream_stream(wire.STREAM_INFER)()
        await asyncio.sleep(0.3)
        await stream.write(PROMPT)
        await asyncio.sleep(0.3)
        await stream.done_writing()
        idle = site.channel.stream_stream(wire.STREAM_INFER)()
        await asyncio.sleep(0.3)
        await idle.done_writing()
        return [one async for one in stream], [one async for one in idle]

    (answers, none), _ = through(tmp_path, visit)
    assert (len(answers), none) == (3, [])


@needs_envoy
def test_the_requests_of_one_stream_go_to_their_experts(tmp_path):
    async def visit(site: Site):
        messages = [wire.encode_request(f"{i % 3} n=2", 1, request_id=str(i)) for i in range(9)]
        return [one async for one in site.stream(*messages)]

    responses, stand_ins = through(tmp_path, visit, n=3)
    assert len(responses) == 18
    assert [len(one.requests) for one in stand_ins] == [3, 3, 3]


@needs_envoy
def test_the_users_find_in_it_what_they_find_in_a_gateway(patient, tmp_path):
    script = users.Script(0, 0, 1, "1 n=4", 4, wire.NEVER_STOP, 0, False)

    async def visit(site: Site):
        return await users._request(script, "base", script.text, site.channel, 10, True)

    (answer, reply), _ = through(tmp_path, visit, n=2)
    assert (answer.status, answer.expert, len(answer.token_ns), reply) == ("ok", 1, 4, b"tt" * 4)
    assert set(answer.routing) == {"queue", "vectorise", "svd", "kmeans", "forward", "first_byte"}


@needs_envoy
def test_triton_clients_and_health_checks_are_answered_by_the_gateways(tmp_path):
    def ask(url: str) -> list:
        prompt = triton_client.InferInput("text_input", [1, 1], "BYTES")
        prompt.set_data_from_numpy(np.array([["0 n=2"]], dtype=object))
        got: list = []
        with triton_client.InferenceServerClient(url) as client:
            assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(wire.MODEL_NAME)
            assert client.get_server_metadata().name == "triton"
            client.start_stream(lambda result, error: got.append(error or result.as_numpy("text_output")[0, 0]))
            client.async_stream_infer(wire.MODEL_NAME, [prompt])
            client.async_stream_infer(wire.MODEL_NAME, [prompt])
            client.stop_stream()
            prompt.set_data_from_numpy(np.array([["0 n=1"]], dtype=object))  # its one answer has one response
            client.infer(wire.MODEL_NAME, [prompt])
        return got

    async def visit(site: Site):
        health = await health_pb2_grpc.HealthStub(site.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        told, *_ = await complete(site, PROMPT, metadata=(("er-explain", "1"),))
        parameters = pb.ModelStreamInferResponse.FromString(told).infer_response.parameters
        assert {"er-expert", "er-replica", "er-svd-ns"} <= set(parameters)
        return await asyncio.to_thread(ask, site.url)

    answers, _ = through(tmp_path, visit, answer=None)
    assert answers == [b"tt"] * 4


@needs_envoy
def test_refusals_are_the_gateways_own(tmp_path):
    async def visit(site: Site):
        bad = [b"\xff\xff", wire.encode_request(" ", 1), PROMPT.replace(b"ensemble", b"ensembli")]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await complete(site, wire.encode_request("0 " + "x" * 2 * Limits().message_bytes, 1))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return [wire.decode_response(one).error.partition(":")[0] for each in bad for one in await complete(site, each)]

    errors, (expert,) = through(tmp_path, visit)
    assert errors == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "NOT_FOUND"]
    assert not expert.requests


@needs_envoy
def test_who_hangs_up_or_runs_out_of_time_frees_the_experts_slot_and_is_counted(tmp_path):
    async def visit(site: Site):
        call = site.channel.unary_stream(wire.STREAM_INFER)(wire.encode_request("0 n=1000 gap=0.01", 1))
        await call.read()
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await complete(site, wire.encode_request("0 first=60", 1), timeout=0.3)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: site.counted("er_errors_total") == 2)

    _, (expert,) = through(tmp_path, visit)
    assert [seen.end for seen in expert.requests] == ["cancelled"] * 2
    assert expert.requests[1].time_remaining_s < 0.31


@needs_envoy
def test_long_prompts_pass(tmp_path):
    message = wire.encode_request("0 n=1 " + "x" * 500_000, 1)

    async def visit(site: Site):
        return await asyncio.gather(*(complete(site, message) for _ in range(20)))

    answers, (expert,) = through(tmp_path, visit)
    assert answers == [[response(b"tt", 0)]] * 20
    assert {seen.message for seen in expert.requests} == {message}
