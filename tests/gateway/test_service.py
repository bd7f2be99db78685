"""A gateway changes nothing that passes through it, and answers what a Triton client asks."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton_client
import tritonclient.grpc.aio as triton_client_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from erlib.serving import wire
from tests.support.responses import RESPONSES
from tests.support.standin_expert import Front, eventually, front, response, setting, standin

PROMPT = wire.encode_request("0 hello", 5, request_id="7")

ONE = wire.encode_request("0 n=1", 5)


def relayed(responses: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """What the client gets, and what the expert got."""

    async def run():
        async with standin(lambda _: responses) as expert, front(expert.url) as gateway:
            got = [message async for message in gateway.stream(PROMPT)]
            return got, [seen.message for seen in expert.requests]

    return asyncio.run(run())


@pytest.mark.parametrize("responses", RESPONSES.values(), ids=RESPONSES)
def test_every_byte_arrives_in_order(responses):
    got, expert_got = relayed(responses)
    assert got == responses
    assert expert_got == [PROMPT]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=300) | st.text().map(str.encode), max_size=30))
def test_whatever_the_expert_sends_arrives_as_it_was(responses):
    assert relayed(responses)[0] == responses


def test_a_request_reaches_the_expert_as_it_was_sent():
    """Unknown fields, parameters, other inputs, sequence ids: all that the gateway knows nothing of."""
    request = pb.ModelInferRequest.FromString(PROMPT)
    request.parameters["sequence_id"].int64_param = 3
    request.parameters["custom"].string_param = "x"
    request.inputs.add(name="top_k", datatype="INT32", shape=[1, 1])
    request.raw_input_contents.append(b"\x05\x00\x00\x00")
    request.outputs.add(name="text_output")
    unknown = request.SerializeToString() + b"\xfa\x3f\x03abc" + b"\xf8\x3f\x07"  # fields 1023
    reordered = b"\xfa\x3f\x03abc" + PROMPT

    async def run():
        async with setting(1) as (gateway, (expert,)):
            for message in (unknown, reordered):
                assert len([one async for one in gateway.stream(message)]) == 3
            return [seen.message for seen in expert.requests]

    assert asyncio.run(run()) == [unknown, reordered]


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_requests_may_be_compressed_but_not_to_hide_their_size(algorithm):
    """40 MB of the same letter are 40 KB on the way."""
    bomb = wire.encode_request("0 " + "x" * (40 << 20), 1)

    async def run():
        async with setting(1) as (gateway, (expert,)):
            assert len([one async for one in gateway.stream(PROMPT, compression=algorithm)]) == 3
            async with grpc.aio.insecure_channel(
                gateway.url, options=[("grpc.max_send_message_length", -1)]
            ) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await channel.unary_unary(wire.INFER)(bomb, compression=algorithm)
            return error.value.code(), [seen.message for seen in expert.requests]

    assert asyncio.run(run()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, [PROMPT])


def test_metadata_pass_both_ways():
    kept = [("traceparent", "00-ab"), ("token-bin", b"\x00\xfe"), ("twice", "a"), ("twice", "b")]
    sent = (*kept, ("er-sent-ns", "5"), ("x-real-ip", "192.0.2.7"))

    async def run():
        async with setting(1) as (gateway, (expert,)):
            call = gateway.stream(PROMPT, metadata=sent)
            assert len([one async for one in call]) == 3
            unary = gateway.channel.unary_unary(wire.INFER)(ONE, metadata=sent)
            await unary
            return (
                [seen.metadata for seen in expert.requests],
                [dict(await one.trailing_metadata()) for one in (call, unary)],
            )

    there, back = asyncio.run(run())
    for metadata in there:
        assert [pair for pair in metadata if pair[0] != "user-agent"] == [*kept, ("er-expert", "0")]
    for metadata in back:
        assert metadata["from-expert"] == "yes"
        assert metadata["binary-bin"] == b"\x00\xff"


def test_many_requests_share_one_stream_and_each_keeps_its_order():
    n = 60

    async def run():
        async with setting(1, 1, 1) as (gateway, _):
            messages = [
                wire.encode_request(f"{i % 3} n={i % 7} gap=0.00{i % 4}", 1, request_id=str(i)) for i in range(n)
            ]
            return [pb.ModelStreamInferResponse.FromString(one) async for one in gateway.stream(*messages)]

    numbers: dict[str, list[int]] = {}
    for reply in asyncio.run(run()):
        token = int.from_bytes(reply.infer_response.raw_output_contents[1], "little")
        numbers.setdefault(reply.infer_response.id, []).append(token)
    assert numbers == {str(i): list(range(i % 7)) for i in range(n) if i % 7}


def test_a_slow_decision_in_a_thread_holds_up_nobody_else():
    """Nor is one made any more for a client that has left meanwhile."""
    decided = []

    def slow(prompt):
        if "slow" in prompt:
            time.sleep(0.25)
        decided.append(prompt)
        return 0, (0, 0, 0)

    async def run(thread):
        async with setting(1, route=slow, thread=thread) as (gateway, _):
            arrivals_s = []

            async def read() -> None:
                async for _ in gateway.stream(wire.encode_request("0 n=60 gap=0.01", 1)):
                    arrivals_s.append(time.monotonic())

            reading = asyncio.create_task(read())
            await eventually(lambda: bool(arrivals_s))
            asking = [asyncio.create_task(gateway.ask("0 n=1 slow")) for _ in range(2)]
            await asyncio.sleep(0.05)
            leaving = gateway.stream(wire.encode_request("0 n=1 slow left", 1))
            await asyncio.sleep(0.05)
            leaving.cancel()
            assert [len(one) for one in await asyncio.gather(*asking)] == [1, 1]
            await reading
            return max(np.diff(arrivals_s))

    assert asyncio.run(run(None)) > 0.24
    decided.clear()
    with ThreadPoolExecutor(1) as thread:
        assert asyncio.run(run(thread)) < 0.15
    assert decided == ["0 n=60 gap=0.01", "0 n=1 slow", "0 n=1 slow"]


def test_one_bad_request_of_a_stream_does_not_disturb_the_others():
    bad = [b"\xff\xff", wire.encode_request("  ", 1), wire.encode_request("0 fail_after=1", 1, request_id="f")]

    async def run():
        async with setting(1) as (gateway, _):
            good = [wire.encode_request("0 n=9 gap=0.01", 1, request_id=f"good {i}") for i in range(2)]
            stream = gateway.stream(good[0], *bad, good[1])
            return [pb.ModelStreamInferResponse.FromString(one) async for one in stream]

    replies = asyncio.run(run())
    errors = sorted(reply.error_message for reply in replies if reply.error_message)
    assert [error.partition(":")[0] for error in errors] == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "UNAVAILABLE"]
    ids = [reply.infer_response.id for reply in replies if not reply.error_message]
    assert [ids.count(name) for name in ("good 0", "good 1", "f")] == [9, 9, 1]


def test_replicas_share_the_work_and_the_least_busy_one_is_asked():
    async def run():
        async with setting(3) as (gateway, stand_ins):
            for _ in range(9):  # one after the other: all are idle, and take turns
                await gateway.ask("0 n=1")
            in_turn = [len(one.requests) for one in stand_ins]
            held = gateway.stream(*[wire.encode_request("0 n=100 gap=0.05", 1)] * 9)
            await eventually(lambda: sum(len(one.requests) for one in stand_ins) == 18)
            held.cancel()
            at_once = [len(one.requests) for one in stand_ins]

            # one is busy with a long request: all others go to the idle two
            await eventually(lambda: not any(replica.calls for replica in gateway.gateway.experts[0].replicas))
            long = gateway.stream(wire.encode_request("0 n=100 gap=0.05", 1))
            await eventually(lambda: sum(len(one.requests) for one in stand_ins) == 19)
            busy = next(i for i, one in enumerate(stand_ins) if len(one.requests) > at_once[i])
            for _ in range(8):
                await gateway.ask("0 n=1")
            long.cancel()
            return in_turn, at_once, len(stand_ins[busy].requests) - at_once[busy]

    in_turn, at_once, by_the_busy_one = asyncio.run(run())
    assert in_turn == [3, 3, 3]
    assert at_once == [6, 6, 6]
    assert by_the_busy_one == 1


def test_the_deadline_is_passed_on_less_the_time_spent():
    def slow(prompt):
        time.sleep(0.2)
        return 0, (0, 0, 0)

    async def run():
        async with setting(1, route=slow) as (gateway, (expert,)):
            await gateway.ask("0 n=1", timeout=5)
            await gateway.ask("0 n=1")
            await gateway.channel.unary_unary(wire.INFER)(ONE, timeout=5)
            return [seen.time_remaining_s for seen in expert.requests]

    streamed, unlimited, unary = asyncio.run(run())
    for remaining_s in (streamed, unary):  # gRPC rounds to two or three digits
        assert 4.0 < remaining_s < 4.85
    assert unlimited is None


def test_a_passed_deadline_ends_the_request_everywhere():
    async def run():
        async with setting(1) as (gateway, (expert,)):
            for prompt in ("0 first=60", "0 n=1000 gap=0.05"):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await gateway.ask(prompt, timeout=0.3)
                assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: [seen.end for seen in expert.requests] == ["cancelled"] * 2, 1)

    asyncio.run(run())


@pytest.mark.parametrize("orders", ["first=60", "n=10000 gap=0.01", "n=100000"])
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_client_that_leaves_is_noticed_by_the_expert_within_100_ms(orders, how):
    async def run():
        async with setting(1) as (gateway, (expert,)):
            late_ms = []
            for i in range(5):
                channel = grpc.aio.insecure_channel(gateway.url, options=wire.CHANNEL_OPTIONS)
                call = channel.stream_stream(wire.STREAM_INFER)()
                await call.write(wire.encode_request(f"0 {orders}", 1))
                if "first" not in orders:
                    await call.read()
                await eventually(lambda i=i: len(expert.requests) == i + 1)
                await asyncio.sleep(0.01 * i)
                left_s = time.monotonic()
                if how == "cancel":
                    call.cancel()
                else:
                    await channel.close()
                await eventually(lambda: all(seen.end == "cancelled" for seen in expert.requests), 2)
                late_ms.append((expert.requests[-1].t_end_s - left_s) * 1e3)
                await channel.close()
            return late_ms

    assert np.median(asyncio.run(run())) < 100


@pytest.mark.parametrize("code", ["CANCELLED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"])
@pytest.mark.parametrize("as_status", [True, False])
def test_an_expert_that_gives_up_is_noticed_by_the_client_within_100_ms(code, as_status):
    """As an in-stream error, behind the responses that came before it, or, if asked for, as the stream's status."""
    metadata = (("triton_grpc_error", "true"),) if as_status else ()

    async def once(gateway, expert):
        call = gateway.stream(wire.encode_request(f"0 n=9 fail_after=3 code={code}", 1), metadata=metadata)
        got = []
        try:
            async for one in call:
                got.append(wire.decode_response(one))
        except grpc.aio.AioRpcError as error:
            got.append(wire.Response(f"{error.code().name}: {error.details()}", b"", ()))
        noticed_s = time.monotonic()
        return got, await call.code(), noticed_s - expert.requests[-1].t_end_s

    async def run():
        async with setting(1) as (gateway, (expert,)):
            return [await once(gateway, expert) for _ in range(5)]

    late_s = []
    for got, status, one_late_s in asyncio.run(run()):
        assert [one.text for one in got] == [b"tt"] * 3 + [b""]
        assert got[-1].error == f"{code}: expert 0 failed: as ordered"
        assert status is (grpc.StatusCode[code] if as_status else grpc.StatusCode.OK)
        late_s.append(one_late_s)
    assert np.median(late_s) < 0.1


async def unary(gateway: Front, prompt: str, **arguments) -> str:
    """How ``ModelInfer`` ends."""
    try:
        await gateway.channel.unary_unary(wire.INFER)(wire.encode_request(prompt, 1), timeout=10, **arguments)
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "OK"


def test_unary_inference_gives_the_one_response_of_a_stream_as_it_was():
    inner = pb.ModelInferResponse(model_name="ensemble", id="9").SerializeToString() + b"\xfa\x3f\x03abc"
    reply = b"\x12" + bytes([len(inner)]) + inner  # the field infer_response

    async def run():
        async with standin() as zero, standin(lambda _: [reply]) as one, front(f"{zero.url},{one.url}") as gateway:
            infer = gateway.channel.unary_unary(wire.INFER)
            message = wire.encode_request("1", 1)
            assert await infer(message) == inner
            assert ([seen.message for seen in one.requests], zero.requests) == ([message], [])
            counted = gateway.gateway.telemetry.registry.get_sample_value
            assert counted("er_requests_total", {"expert": "1", "kind": "unary"}) == 1
            assert counted("er_tokens_total", {"expert": "1"}) == 1

    asyncio.run(run())


UNARY = {
    "several responses": (
        "0 n=2",
        "INVALID_ARGUMENT: ModelInfer has room for one response only: send stream: false, or use ModelStreamInfer",
    ),
    "none": ("0 n=0", "INTERNAL: expert 0 has sent no answer"),
    "refused": ("0 error=INVALID_ARGUMENT:~too~long", "INVALID_ARGUMENT: too long"),
    "refused in an ensemble": (
        "0 error=in~ensemble~'ensemble',~INVALID_ARGUMENT:~too~long",
        "INVALID_ARGUMENT: too long",
    ),
    "failed": ("0 error=no~idea", "UNKNOWN: no idea"),
    "failed with a status": ("0 fail_after=0 code=ABORTED", "ABORTED: expert 0 failed: as ordered"),
    "failed behind the answer": ("0 n=2 fail_after=1", "UNAVAILABLE: expert 0 failed: as ordered"),
    "no prompt": (" ", "INVALID_ARGUMENT: text_input is empty"),
}


@pytest.mark.parametrize(("prompt", "end"), UNARY.values(), ids=UNARY)
def test_unary_inference_ends_with_one_status_of_the_right_class(prompt, end):
    async def run():
        async with setting(1) as (gateway, (expert,)):
            ended = await unary(gateway, prompt)
            await eventually(lambda: not gateway.gateway.experts[0].replicas[0].calls)
            assert not [seen for seen in expert.requests if seen.end == ""]
            return ended

    assert asyncio.run(run()) == end


def test_unary_inference_is_tried_on_a_spare_replica_and_what_cannot_be_read_is_said():
    async def run():
        async with setting(2) as (gateway, stand_ins):
            stand_ins[0].broken = "Stub process is not healthy"
            ends = [await unary(gateway, "0 n=1") for _ in range(2)]
        async with standin(lambda _: [b"\xff"]) as expert, front(expert.url) as gateway:
            return [*ends, await unary(gateway, "0")]

    assert asyncio.run(run()) == ["OK", "OK", "UNKNOWN: the expert's answer cannot be read"]


def test_a_client_that_leaves_a_unary_request_is_noticed_by_the_expert():
    async def run():
        async with setting(1) as (gateway, (expert,)):
            call = gateway.channel.unary_unary(wire.INFER)(wire.encode_request("0 first=60", 1))
            await eventually(lambda: bool(expert.requests))
            call.cancel()
            await eventually(lambda: expert.requests[0].end == "cancelled")

    asyncio.run(run())


@pytest.mark.parametrize("what", ["model", "type", "expert's reason"])
def test_a_long_reason_still_fits_into_a_status(what):
    asked = pb.ModelInferRequest.FromString(PROMPT)
    if what == "model":
        asked.model_name = "é" * 20_000
    elif what == "type":
        asked.inputs[0].datatype = "X" * 20_000
    else:
        asked = pb.ModelInferRequest.FromString(wire.encode_request("0 fail_after=0 reason=" + "é" * 1000, 1))

    async def run():
        async with setting(1) as (gateway, _):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await gateway.channel.unary_unary(wire.INFER)(asked.SerializeToString())
            return error.value

    error = asyncio.run(run())
    expected = {"model": "NOT_FOUND", "type": "INVALID_ARGUMENT", "expert's reason": "UNAVAILABLE"}
    assert error.code() is grpc.StatusCode[expected[what]]
    assert error.details().endswith(" ...")


def test_questions_are_answered_by_any_live_server_and_orders_by_none():
    async def run():
        async with setting(1, 1) as (gateway, stand_ins):
            ask = {
                name: gateway.channel.unary_unary(f"/{wire.SERVICE}/{name}")
                for name in [method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
            }
            shown = (("authorization", "me"), ("er-sent-ns", "5"))
            metadata = pb.ModelMetadataResponse.FromString(await ask["ModelMetadata"](b"", metadata=shown))
            assert metadata.platform == stand_ins[0].url
            assert [pair for pair in stand_ins[0].shown if pair[0] != "user-agent"] == [("authorization", "me")]
            for orders in ("0", "1", "1"):
                await gateway.ask(orders)
            statistics = pb.ModelStatisticsResponse.FromString(await ask["ModelStatistics"](b""))
            assert [model.inference_count for model in statistics.model_stats] == [1, 2]
            server = pb.ServerMetadataResponse.FromString(await ask["ServerMetadata"](b""))
            offered = {"classification", "schedule_policy", "model_configuration", "parameters", "statistics"}
            assert (server.name, set(server.extensions)) == ("triton", offered)
            for name in ("RepositoryModelUnload", "SystemSharedMemoryRegister", "TraceSetting", "LogSettings"):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await ask[name](b"")
                assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert not {"RepositoryModelUnload", "TraceSetting"} & {q for one in stand_ins for q in one.questions}

    asyncio.run(run())


def test_health_and_reflection_are_the_standard_services():
    async def run():
        async with setting(1) as (gateway, _):
            stub = health_pb2_grpc.HealthStub(gateway.channel)
            for name in ("", wire.SERVICE):
                reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING

            def reflect():
                with grpc.insecure_channel(gateway.url) as channel:
                    database = ProtoReflectionDescriptorDatabase(channel)
                    return list(database.get_services()), database.FindFileContainingSymbol(wire.SERVICE)

            services, file = await asyncio.to_thread(reflect)
            assert {wire.SERVICE, "grpc.health.v1.Health"} <= set(services)
            assert "ModelStreamInfer" in [method.name for method in file.service[0].method]

    asyncio.run(run())


def _inputs(client, prompt: str) -> list:
    inputs = []
    for name, value, datatype in (
        ("text_input", np.array([[prompt.encode()]], dtype=np.object_), "BYTES"),
        ("max_tokens", np.array([[7]], np.int32), "INT32"),
    ):
        inputs.append(client.InferInput(name, [1, 1], datatype))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def test_tritons_own_client_works_unchanged():
    def use(url: str) -> list[tuple[str, str]]:
        replies, done = [], threading.Event()

        def callback(result, error):
            replies.append((result.get_response().id, "") if error is None else ("", error.message()))
            if len(replies) == 7:
                done.set()

        with triton_client.InferenceServerClient(url) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("ensemble")
            assert client.get_server_metadata().name == "triton"
            assert client.get_model_metadata("ensemble").name == "ensemble"
            client.get_model_config("ensemble")
            assert client.get_inference_statistics("ensemble").model_stats[0].name == "ensemble"
            assert client.infer("ensemble", _inputs(triton_client, "1 n=1"), request_id="8").get_response().id == "8"
            with pytest.raises(triton_client.InferenceServerException) as refused:
                client.infer("ensemble", _inputs(triton_client, "1 error=INVALID_ARGUMENT:~no"))
            assert (refused.value.status(), refused.value.message()) == ("StatusCode.INVALID_ARGUMENT", "no")
            client.start_stream(callback)
            for number in range(2):
                client.async_stream_infer("ensemble", _inputs(triton_client, f"{number} n=3"), request_id=str(number))
            client.async_stream_infer("ensemble", _inputs(triton_client, " "), request_id="bad")
            assert done.wait(10)
        return sorted(replies)

    async def run():
        async with setting(1, 1) as (gateway, _):
            return await asyncio.to_thread(use, gateway.url)

    assert asyncio.run(run()) == [("", "INVALID_ARGUMENT: text_input is empty")] + [("0", "")] * 3 + [("1", "")] * 3


def test_tritons_own_asyncio_client_works_unchanged():
    async def run():
        async with setting(1, 1) as (gateway, _), triton_client_aio.InferenceServerClient(gateway.url) as client:
            assert await client.is_model_ready("ensemble")
            answer = await client.infer("ensemble", _inputs(triton_client_aio, "1 n=1"))
            assert answer.as_numpy("text_output").tolist() == [[b"tt"]]

            async def requests():
                for number in range(4):
                    yield {"model_name": "ensemble", "inputs": _inputs(triton_client_aio, f"{number % 2} n=5")}

            return [(result is None, error) async for result, error in client.stream_infer(requests())]

    assert asyncio.run(run()) == [(False, None)] * 20


def test_who_asks_is_told_how_the_request_was_routed():
    async def run():
        distances = {"distances": lambda prompt: [float(len(prompt)), 0.25]}
        async with setting(1, 2, **distances) as (gateway, stand_ins):
            messages = [wire.encode_request(prompt, 1, request_id=prompt[:1]) for prompt in ("1 n=2", "0   n=2")]
            call = gateway.stream(*messages, metadata=(("er-explain", "1"), ("er-sent-ns", str(time.monotonic_ns()))))
            replies = [pb.ModelStreamInferResponse.FromString(one).infer_response async for one in call]
            trailing = dict(await call.trailing_metadata())
            silent = [pb.ModelStreamInferResponse.FromString(one) async for one in gateway.stream(messages[0])]
            unary = gateway.channel.unary_unary(wire.INFER)(
                wire.encode_request("1 n=1", 1), metadata=(("er-explain", "1"),)
            )
            answer = pb.ModelInferResponse.FromString(await unary)
            told = {name: value.string_param or str(value.int64_param) for name, value in answer.parameters.items()}
            assert told["er-distances"] == "5,0.25"
            assert told.items() <= dict(await unary.trailing_metadata()).items()
            assert dict(await unary.initial_metadata())["er-expert"] == "1"
            return replies, trailing, silent, [one.url for one in stand_ins]

    replies, trailing, silent, urls = asyncio.run(run())
    first = {reply.id: reply.parameters for reply in reversed(replies)}
    assert first["1"]["er-expert"].int64_param == 1
    assert first["0"]["er-expert"].int64_param == 0
    assert first["0"]["er-replica"].string_param == urls[0]
    assert first["1"]["er-replica"].string_param in urls[1:]
    assert first["1"]["er-distances"].string_param == "5,0.25"
    assert first["0"]["er-distances"].string_param == "7,0.25"
    assert [first["1"][f"er-{span}-ns"].int64_param for span in ("vectorise", "svd", "kmeans")] == [1, 2, 3]
    assert all(first["1"][f"er-{span}-ns"].int64_param > 0 for span in ("queue", "forward", "first-byte"))
    explained = [reply for reply in replies if reply.parameters]
    assert len(explained) == 2
    assert trailing["er-expert"] == "1"
    assert trailing["er-distances"] == "5,0.25"
    assert trailing["er-first-byte-ns"] == str(first["1"]["er-first-byte-ns"].int64_param)
    assert not any(reply.infer_response.parameters for reply in silent)


@pytest.mark.parametrize("sent", ["9" * 18, "9" * 400, "9" * 5000, "-5", "soon", "1e3", ""])
def test_a_time_of_sending_that_is_none_is_ignored(sent):
    metadata = (("er-sent-ns", sent), ("er-explain", "1"))

    async def run():
        async with setting(1) as (gateway, _):
            call = gateway.stream(PROMPT, PROMPT, metadata=metadata)
            replies = [wire.decode_response(one) async for one in call]
            unary = gateway.channel.unary_unary(wire.INFER)(ONE, metadata=metadata)
            await unary
            queued = [dict(await one.trailing_metadata()).get("er-queue-ns") for one in (call, unary)]
            return [one.error for one in replies], queued

    assert asyncio.run(run()) == ([""] * 6, [None, None])


def test_an_explained_response_keeps_what_is_unknown():
    strange = response(b"a", 1) + b"\xfa\x3f\x03abc"

    async def run():
        async with standin(lambda _: [strange]) as expert, front(expert.url) as gateway:
            return [one async for one in gateway.stream(PROMPT, metadata=(("er-explain", "1"),))]

    (got,) = asyncio.run(run())
    assert b"\xfa\x3f\x03abc" in got
    assert wire.decode_response(got) == wire.decode_response(strange)


def test_distances_are_those_to_the_centres(router):
    from erlib.gateway import process
    from erlib.routing.clusterer import Clusterer

    model = Clusterer.load(router)
    prompt = "The goalie stopped thirty shots and the team went home with two points"
    distances = process.distances_with(model)(prompt)
    assert len(distances) == model.n_clusters
    assert int(np.argmin(distances)) == model.route(prompt)[0]


def test_a_router_that_fails_is_an_internal_error_of_that_request_alone(caplog):
    async def run():
        async with setting(1) as (gateway, _):
            (failed,) = await gateway.ask("no number at all")
            return failed, await gateway.ask("0 n=2")

    failed, good = asyncio.run(run())
    assert failed.error == "INTERNAL: the gateway failed; its log says why"
    assert len(good) == 2
    assert "first_word" in caplog.text  # where it happened
    assert "ValueError" in caplog.text
    assert "invalid literal" not in caplog.text  # what an error says may quote the prompt
