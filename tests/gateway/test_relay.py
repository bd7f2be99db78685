"""NGINX relays complete requests itself: it asks a gateway which expert, and takes the tokens from there."""

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
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

from erlib.gateway.limits import Limits
from erlib.load import users
from erlib.machine import processes
from erlib.serving import wire
from erlib.serving.nginx import Nginx
from tests.support.gateways import free_port
from tests.support.responses import RESPONSES
from tests.support.standin_expert import Front, StandIn, eventually, front, response, standin

PROMPT = wire.encode_request("0 n=3", 5, request_id="7")


@dataclasses.dataclass
class Site(Front):
    """NGINX in front of two gateways, of which `gateway` is the first."""

    gateways: list[Front]

    def counted(self, name: str) -> float:
        """A counter of all gateways together."""
        texts = [prometheus_client.generate_latest(one.gateway.telemetry.registry).decode() for one in self.gateways]
        return sum(float(line.split()[-1]) for text in texts for line in text.splitlines() if line.startswith(name))

    @property
    def owed(self) -> int:
        """Requests that replicas owe, as all gateways count."""
        return sum(
            len(replica.calls) for one in self.gateways for expert in one.gateway.experts for replica in expert.replicas
        )


@asynccontextmanager
async def site(work: Path, *experts: str, n_gateways: int = 2, **arguments) -> AsyncIterator[Site]:
    """Experts at addresses, replicas of one joined by ``|``."""
    async with AsyncExitStack() as exits:
        gateways = [
            await exits.enter_async_context(front(",".join(experts), index=i, hands_over=True, **arguments))
            for i in range(n_gateways)
        ]
        questions = [one.asked_at for one in gateways]
        built = Nginx(free_port(), [one.url for one in gateways], work, experts=experts, questions=questions)
        built.start()
        exits.callback(processes.stop, [built.process], 2)
        async with grpc.aio.insecure_channel(built.url, options=wire.CHANNEL_OPTIONS) as channel:
            yield Site(gateways[0].gateway, built.url, channel, questions[0], gateways)


def through(work: Path, visit, n: int = 1, answer=None, **arguments):
    """What `visit` returns of a site with `n` experts, and the stand-ins."""

    async def run():
        async with AsyncExitStack() as exits:
            stand_ins = [await exits.enter_async_context(standin(answer)) for _ in range(n)]
            async with site(work, *(one.url for one in stand_ins), **arguments) as built:
                return await visit(built), stand_ins

    return asyncio.run(run())


async def complete(site: Site, message: bytes, metadata=(), **arguments) -> list[bytes]:
    """Responses to a request that says it is complete."""
    call = site.channel.unary_stream(wire.STREAM_INFER)(message, metadata=(wire.COMPLETE, *metadata), **arguments)
    return [one async for one in call]


def relayed_here(expert: StandIn) -> list[bool]:
    """For each request, whether it came from NGINX itself: gateways have a name of their own."""
    return ["grpc-python-asyncio" not in str(dict(seen.metadata).get("user-agent")) for seen in expert.requests]


def test_every_byte_arrives_in_order_on_both_ways(tmp_path):
    wanted: list[bytes] = []

    async def visit(site: Site):
        for responses in RESPONSES.values():
            wanted[:] = responses
            assert await complete(site, PROMPT) == responses
            stream = site.channel.stream_stream(wire.STREAM_INFER)()
            await stream.write(PROMPT)
            await asyncio.sleep(0.1)
            await stream.done_writing()
            assert [one async for one in stream] == responses
        await eventually(lambda: site.counted("er_requests_total") == 2 * len(RESPONSES))
        assert site.owed == 0

    _, (expert,) = through(tmp_path, visit, answer=lambda _: wanted)
    assert [seen.message for seen in expert.requests] == [PROMPT] * 2 * len(RESPONSES)


def test_the_tokens_of_a_complete_request_do_not_pass_a_gateway(tmp_path):
    async def visit(site: Site):
        peers = [await complete(site, PROMPT), [one async for one in site.stream(PROMPT)]]
        await eventually(lambda: site.counted("er_requests_total") == 2)
        return peers, site.counted("er_tokens_total")

    (answers, tokens), _ = through(tmp_path, visit)
    assert [len(one) for one in answers] == [3, 3]
    assert tokens == 3  # of the one that was not said to be complete


def test_gateways_are_asked_in_turn_and_say_what_the_model_says(tmp_path):
    async def visit(site: Site):
        told = []
        for i in range(30):
            call = site.channel.unary_stream(wire.STREAM_INFER)(
                wire.encode_request(f"{i % 3} n=1", 1), metadata=(wire.COMPLETE,)
            )
            assert len([one async for one in call]) == 1
            told.append(dict(await call.initial_metadata()))
        return [(int(one["er-gateway"]), int(one["er-expert"])) for one in told]

    told, stand_ins = through(tmp_path, visit, n=3)
    assert [expert for _, expert in told] == [i % 3 for i in range(30)]
    assert [gateway for gateway, _ in told] in ([i % 2 for i in range(30)], [(i + 1) % 2 for i in range(30)])
    assert [len(one.requests) for one in stand_ins] == [10, 10, 10]


def test_metadata_pass_both_ways_with_what_the_gateway_tells(tmp_path):
    kept = [("traceparent", "00-ab"), ("token-bin", b"\x00\xfe"), ("twice", "a"), ("twice", "b"), ("my_key", "1")]
    sent = (*kept, wire.COMPLETE, ("er-sent-ns", str(time.monotonic_ns())), ("er-failed", "x"))

    async def visit(site: Site):
        call = site.channel.unary_stream(wire.STREAM_INFER)(PROMPT, metadata=sent)
        assert len([one async for one in call]) == 3
        return dict(await call.initial_metadata()), dict(await call.trailing_metadata())

    (first, last), (expert,) = through(tmp_path, visit)
    seen = [pair for pair in expert.requests[0].metadata if pair[0] != "user-agent"]
    assert sorted(map(str, map(tuple, seen))) == sorted(map(str, [*kept, ("er-expert", "0")]))
    assert (last["from-expert"], last["binary-bin"]) == ("yes", b"\x00\xff")
    assert first["er-expert"] == "0"
    assert not {"er-ticket", "x-accel-redirect"} & set(first)
    spans = {name: int(first[f"er-{name}-ns"]) for name in ("queue", "svd", "kmeans", "forward", "first-byte")}
    assert spans["svd"] == 2 and spans["kmeans"] == 3  # as the router says
    assert 0 < spans["queue"] < 5e9 and 0 <= spans["first-byte"] < 5e9


def test_a_server_of_several_experts_is_told_which_one_either_way(tmp_path):
    """As adapters of one model; what a client says of it counts for nothing."""

    async def run():
        async with standin() as one, standin() as other:
            both = f"{one.url}|{other.url}"
            async with site(tmp_path, both, both, both) as built:
                assert all(len(front.gateway.experts) == 3 for front in built.gateways)
                for i in range(12):
                    message = wire.encode_request(f"{i % 3} n=1", 1)
                    assert len(await complete(built, message, (("er-expert", "7"),))) == 1
                    assert len([each async for each in built.stream(message)]) == 1
                await eventually(lambda: built.counted("er_requests_total") == 24)
                assert built.owed == 0
                shown = prometheus_client.generate_latest(built.gateway.telemetry.registry).decode().splitlines()
                assert len([line for line in shown if line.startswith("er_outstanding{")]) == 2
            return [one, other]

    servers = asyncio.run(run())
    assert min(len(server.requests) for server in servers) >= 8  # any server will do
    told = [dict(seen.metadata).get("er-expert") for server in servers for seen in server.requests]
    assert sorted(told) == sorted(["0", "1", "2"] * 8)


def test_the_first_byte_is_in_the_experts_own_time(tmp_path):
    async def visit(site: Site):
        call = site.channel.unary_stream(wire.STREAM_INFER)(
            wire.encode_request("0 first=0.4", 1), metadata=(wire.COMPLETE,)
        )
        assert len([one async for one in call]) == 3
        return int(dict(await call.initial_metadata())["er-first-byte-ns"])

    first_byte_ns, _ = through(tmp_path, visit)
    assert 0.35e9 < first_byte_ns < 2e9


def test_what_is_not_one_good_request_gets_the_gateways_own_answer(tmp_path):
    async def visit(site: Site):
        bad = [b"\xff\xff", wire.encode_request(" ", 1), PROMPT.replace(b"ensemble", b"ensembli")]
        told = [wire.decode_response(*await complete(site, each)).error.partition(":")[0] for each in bad]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await complete(site, wire.encode_request("0 " + "x" * Limits().message_bytes, 1))
        return told, error.value.code().name

    (told, too_long), (expert,) = through(tmp_path, visit)
    assert told == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "NOT_FOUND"]
    assert too_long == "RESOURCE_EXHAUSTED"
    assert not expert.requests


def test_a_body_beyond_the_buffer_is_refused_at_once(tmp_path):
    async def visit(site: Site):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await complete(site, wire.encode_request("0 " + "x" * 2 * wire.BODY_BYTES, 1), timeout=10)
        return error.value

    error, (expert,) = through(tmp_path, visit)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(wire.BODY_BYTES) in error.details()
    assert not expert.requests


def test_several_requests_that_say_they_are_one_are_all_answered(tmp_path):
    async def visit(site: Site):
        call = site.channel.stream_stream(wire.STREAM_INFER)(iter([PROMPT] * 3), metadata=(wire.COMPLETE,), timeout=10)
        return [one async for one in call]

    answers, _ = through(tmp_path, visit)
    assert len(answers) == 9


def test_what_has_to_pass_a_gateway_does_although_it_is_complete(tmp_path):
    async def visit(site: Site):
        first, *_ = await complete(site, PROMPT, metadata=(("er-explain", "1"),))
        return set(pb.ModelStreamInferResponse.FromString(first).infer_response.parameters)

    explained, _ = through(tmp_path, visit)
    assert {"er-expert", "er-replica", "er-svd-ns"} <= explained

    async def count(site: Site):
        assert len(await complete(site, PROMPT)) == 3
        return site.counted("er_tokens_total")

    assert through(tmp_path, count, limits=Limits(streams_per_peer=5))[0] == 3


def test_a_client_may_take_its_time_to_ask(tmp_path):
    """Its headers come long before its request, and that long before the end of the stream."""

    async def visit(site: Site):
        stream = site.channel.stream_stream(wire.STREAM_INFER)(metadata=(wire.COMPLETE,))
        await asyncio.sleep(0.3)
        await stream.write(PROMPT)
        await asyncio.sleep(0.3)
        await stream.done_writing()
        idle = site.channel.stream_stream(wire.STREAM_INFER)(metadata=(wire.COMPLETE,))
        await asyncio.sleep(0.3)
        await idle.done_writing()
        return [one async for one in stream], [one async for one in idle]

    (answers, none), _ = through(tmp_path, visit)
    assert (len(answers), none) == (3, [])


def test_the_users_find_in_it_what_they_find_in_a_gateway(tmp_path):
    script = users.Script(0, 0, 1, "1 n=4", 4, wire.NEVER_STOP, 0, None)

    async def visit(site: Site):
        return await users._request(script, "base", script.text, site.channel, 10, True)

    answer, _ = through(tmp_path, visit, n=2)
    assert (answer.status, answer.expert, len(answer.token_ns)) == ("ok", 1, 4)
    assert set(answer.routing) == {"queue", "vectorise", "svd", "kmeans", "forward", "first_byte"}


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
        return got

    async def visit(site: Site):
        health = await health_pb2_grpc.HealthStub(site.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        return await asyncio.to_thread(ask, site.url)

    answers, _ = through(tmp_path, visit, answer=None)
    assert answers == [b"tt"] * 4


def test_who_hangs_up_or_runs_out_of_time_frees_the_experts_slot_at_once_and_is_counted(tmp_path):
    async def visit(site: Site):
        call = site.channel.unary_stream(wire.STREAM_INFER)(
            wire.encode_request("0 n=1000 gap=0.01", 1), metadata=(wire.COMPLETE,)
        )
        await call.read()
        assert site.owed == 1
        began_s = time.monotonic()
        call.cancel()
        (expert,) = experts
        await eventually(lambda: expert.requests[0].end == "cancelled")
        took_s = expert.requests[0].t_end_s - began_s
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await complete(site, wire.encode_request("0 first=60", 1), timeout=0.3)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: site.counted("er_errors_total") == 2)
        assert site.owed == 0
        return took_s

    experts: list[StandIn] = []

    async def run():
        async with standin() as expert:
            experts.append(expert)
            async with site(tmp_path, expert.url) as built:
                return await visit(built)

    took_s = asyncio.run(run())
    assert took_s < 1
    assert [seen.end for seen in experts[0].requests] == ["cancelled"] * 2
    assert experts[0].requests[1].time_remaining_s < 0.31


def test_long_prompts_pass(tmp_path):
    message = wire.encode_request("0 n=1 " + "x" * 500_000, 1)

    async def visit(site: Site):
        return await asyncio.gather(*(complete(site, message) for _ in range(20)))

    answers, (expert,) = through(tmp_path, visit)
    assert answers == [[response(b"tt", 0)]] * 20
    assert {seen.message for seen in expert.requests} == {message}


def test_a_gateway_knows_what_replicas_owe_though_it_does_not_relay(tmp_path):
    """So, of two replicas, each gets half of what is asked at once."""

    async def run():
        async with standin() as one, standin() as two, site(tmp_path, f"{one.url}|{two.url}", n_gateways=1) as built:
            calls = [
                asyncio.create_task(complete(built, wire.encode_request("0 n=2 gap=1", 1), timeout=20))
                for _ in range(20)
            ]
            await eventually(lambda: built.owed == 20)
            busy = [len(replica.calls) for replica in built.gateway.experts[0].replicas]
            await asyncio.gather(*calls)
            await eventually(lambda: built.owed == 0)
            return busy

    assert asyncio.run(run()) == [10, 10]


def test_who_hangs_up_before_it_is_decided_where_a_request_belongs_leaves_nothing_behind(tmp_path):
    """NGINX does not know by then which of the gateways it has asked."""
    long = wire.encode_request("0 n=1 " + "x" * 100_000, 1)

    async def visit(site: Site):
        for i in range(200):
            call = site.channel.unary_stream(wire.STREAM_INFER)(long, metadata=(wire.COMPLETE,))
            await asyncio.sleep(i * 5e-5)
            call.cancel()
        assert len(await complete(site, PROMPT)) == 3
        await eventually(lambda: site.owed == 0)

    through(tmp_path, visit)


def test_short_answers_send_no_canary_which_a_measurement_would_count(tmp_path):
    async def visit(site: Site):
        for _ in range(30):
            await complete(site, wire.encode_request("0 n=1", 1))
            await complete(site, wire.encode_request("0 error=INVALID_ARGUMENT:~no", 1))
        await asyncio.sleep(0.2)

    _, (expert,) = through(tmp_path, visit, n_gateways=1)
    assert expert.questions == ["ModelStatistics"]  # once in a while
    assert len(expert.seen) == len(expert.requests)


def test_a_replica_that_answers_with_errors_only_does_not_get_all_requests(tmp_path):
    """Although it would always be the one that owes the fewest answers."""

    async def run():
        async with (
            standin() as broken,
            standin() as other,
            site(tmp_path, f"{broken.url}|{other.url}", n_gateways=1) as built,
        ):
            broken.broken = "Stub process is not healthy"
            await complete(built, PROMPT)
            await eventually(lambda: not built.gateway.experts[0].replicas[0].is_up)
            return [wire.decode_response(one).error for _ in range(20) for one in await complete(built, PROMPT)]

    assert asyncio.run(run()) == [""] * 60


def test_a_forged_end_is_ignored(tmp_path):
    async def visit(site: Site):
        call = site.channel.unary_stream(wire.STREAM_INFER)(
            wire.encode_request("0 n=50 gap=0.01", 1), metadata=(wire.COMPLETE,)
        )
        answers = aiter(call)
        await anext(answers)
        for gateway in site.gateways:
            for data in (b"<190>er: x-1 0 200 0 -", b"", b"\xff" * 2000, b"er: a b c d e"):
                gateway.gateway.handovers.datagram_received(data, ("127.0.0.1", 1))
        owed = site.owed
        return owed, len([one async for one in answers])

    (owed, rest), _ = through(tmp_path, visit)
    assert (owed, rest) == (1, 49)
