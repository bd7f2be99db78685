"""The benchmark's engine and users get along with real peers; its table compares like with like."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import numpy as np
import pandas as pd
import pytest

from benchmarks import gateway, ways
from benchmarks.paced import ENDLESS, Users
from benchmarks.ways import Site
from erlib.machine import processes
from erlib.serving import wire

BASE_PORT = 27700


@pytest.fixture(scope="module")
def site(router, tmp_path_factory):
    return Site(BASE_PORT, router, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def engine(site, tmp_path_factory):
    engine = gateway.Engine((site.engine_port, site.openai_port), tmp_path_factory.mktemp("logs") / "engine.log")
    yield engine
    processes.stop([engine.process], 2)


async def _answers(way, prompts: list[str], max_tokens: int) -> list:
    async with Users(way.url, way.protocol, connections=2) as users:
        streams = [await users.request(prompt, max_tokens) for prompt in prompts]
        await asyncio.wait_for(asyncio.gather(*(stream.ended for stream in streams)), 30)
    return streams


def test_a_grpc_client_gets_what_it_asks_the_engine_for(site, engine):
    async def ask(prompt: str) -> list[wire.Response]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{site.engine_port}", options=wire.CHANNEL_OPTIONS) as channel:
            request = wire.encode_request(prompt, 30, wire.NEVER_STOP)
            call = channel.stream_stream(wire.STREAM_INFER)(iter([request]), timeout=20)
            return [wire.decode_response(message) async for message in call]

    engine.report(0.001)
    for prompt in ("short", "long " * 100_000):  # the latter takes more than a window
        responses = asyncio.run(ask(prompt))
        assert [len(response.token_ids) for response in responses] == [1] * 30
        assert not any(response.error for response in responses)


RELAYING = f"NGINX, asking {ways.GATEWAYS} gateways"


@pytest.mark.parametrize("name", ["direct", "direct, OpenAI", "gateway", "NGINX", RELAYING])
def test_users_get_every_token_in_time(site, engine, name, monkeypatch):
    monkeypatch.setattr(ways, "GATEWAYS", 2)  # as good as sixteen
    engine.report(0.02)
    with site.way(name) as way:
        streams = asyncio.run(_answers(way, [f"prompt {i} about ice hockey" for i in range(10)], 20))
    for stream in streams:
        assert stream.error == ""
        assert len(stream.arrived_ns) == len(stream.took_ns) == 20
        assert min(stream.took_ns) > 0
        assert 0.3 < (stream.arrived_ns[-1] - stream.arrived_ns[1]) / 1e9 < 2
    assert engine.report()["tokens"] == 200


def test_many_long_prompts_keep_to_the_peers_window(site, engine):
    engine.report(0.001)
    with site.way("gateway") as way:
        streams = asyncio.run(_answers(way, ["the same words again " * 20_000] * 6, 2))
    assert [(stream.error, len(stream.arrived_ns)) for stream in streams] == [("", 2)] * 6


def test_an_error_of_the_gateway_is_noted_as_such(site, engine):
    with site.way("gateway") as way:
        (stream,) = asyncio.run(_answers(way, [" "], 2))
    assert "text_input is empty" in stream.error


def test_an_abandoned_stream_ends_at_the_engine(site, engine):
    async def abandon(way) -> None:
        async with Users(way.url, way.protocol) as users:
            streams = [await users.request("goodbye", ENDLESS) for _ in range(5)]
            await asyncio.sleep(0.5)
            for stream in streams:
                stream.abandon()
            await asyncio.sleep(0.5)
            engine.report()
            await asyncio.sleep(0.5)

    engine.report(0.01)
    with site.way("gateway") as way:
        asyncio.run(abandon(way))
    assert engine.report()["late_p50_ms"] == 0.0  # nothing was sent any more


def test_a_point_says_what_the_way_and_the_machine_did(site, engine):
    with site.way("gateway") as way:
        row = asyncio.run(gateway.point(way, engine, 5, 100, iter(["some words"] * 1000), (1, 1)))
    assert row["failed"] == 0 and row["arrivals"] == gateway.ARRIVALS_PER_S
    assert row["tokens_per_s"] == pytest.approx(100, rel=0.2)
    assert 10 < row["cpu_us_per_token"] < 10_000
    assert 0 < row["ttft_p50_ms"] <= row["ttft_p95_ms"]


def test_a_connection_that_is_closed_after_the_answer_is_no_error(site, engine):
    with site.way("direct, OpenAI") as way:
        streams = asyncio.run(_answers(way, ["one", "two"], 1))
    for stream in streams:
        stream.end("closed by the peer, much later")
        assert stream.error == "" and len(stream.arrived_ns) == 1


def test_ways_are_compared_with_their_own_protocol_at_the_same_level_of_the_same_repeat():
    table = pd.DataFrame(
        {
            "repeat": 0,
            "way": ["direct", "direct", "NGINX", "direct, OpenAI", "LiteLLM", "LiteLLM"],
            "streams": [1, 10, 10, 10, 10, 1],
            "ttft_p50_ms": [1.0, 2.0, 5.0, 3.0, 13.0, 9.0],
        }
    )
    added = gateway.compared(table)["added_ttft_p50_ms"].tolist()
    assert added[:5] == [0, 0, 3, 0, 10] and np.isnan(added[5])
    again = table.assign(repeat=1, ttft_p50_ms=[1.0, 4.0, 8.0, 3.0, 13.0, 9.0])
    both = gateway.compared(pd.concat([table, again], ignore_index=True))
    printed = gateway.medians(both).set_index(["way", "streams"])
    assert printed.loc[("NGINX", 10), "+TTFT p50"] == 3.5  # the median of 5 - 2 and 8 - 4
