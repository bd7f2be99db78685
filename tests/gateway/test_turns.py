"""Requests of one stream take turns, so that others do not stand in line behind all of them."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from erlib.gateway.limits import Limits
from erlib.serving import wire
from tests.support.gateways import ends, start
from tests.support.standin_expert import StandIn, eventually, setting

WAITING = Limits().waiting_per_stream


def flood(prompt: str, n: int) -> list[bytes]:
    return [wire.encode_request(f"{prompt} flood", 1, request_id=str(i)) for i in range(n)]


def waiting(expert: StandIn) -> int:
    """Requests that have had no response."""
    return sum(not seen.sent and not seen.end for seen in expert.requests)


async def errors(call: grpc.aio.StreamStreamCall) -> list[str]:
    """What became of a stream's requests, each of which asks for one response."""
    return [wire.decode_response(message).error for message in [message async for message in call]]


@pytest.mark.parametrize("metadata", [(), (("triton_grpc_error", "true"),)], ids=["plain", "as status"])
def test_a_flood_on_one_stream_lets_others_through_and_is_served_in_order(metadata):
    """An expert does four at a time, in the order in which they come."""
    n = 20 * WAITING

    async def run():
        async with setting(1) as (door, (expert,)):
            expert.line = asyncio.Semaphore(0)  # nothing moves until all that can are in it
            flooding = asyncio.create_task(errors(door.stream(*flood("0 n=1", n), metadata=metadata)))
            await eventually(lambda: waiting(expert) == WAITING)
            others = start(door.channel, *["0 n=1"] * 3)
            await eventually(lambda: waiting(expert) == WAITING + 3)
            for _ in range(4):
                expert.line.release()
            assert ends(await asyncio.gather(*others)) == {"OK": 3}
            assert await flooding == [""] * n
            return [wire.prompt_of(seen.message) for seen in expert.requests]

    asked = asyncio.run(run())
    assert [prompt for _, prompt in asked[WAITING : WAITING + 3]] == ["0 n=1"] * 3
    numbers = [int(number) for number, prompt in asked if "flood" in prompt]
    assert sorted(numbers) == list(range(n))
    # Calls that begin together may change places in gRPC, on their way to where this is noted.
    assert all(abs(number - place) < WAITING for place, number in enumerate(numbers))


def test_no_more_than_its_share_of_a_stream_stands_in_line_at_an_expert():
    async def run():
        async with setting(1, 1) as (door, (expert, other)):
            call = door.stream(*flood("0 first=60", 100), *flood("1 first=60", 5), *flood("1 n=1", 1))
            answer = wire.decode_response(await call.read())  # those for one expert hold up none for another
            assert answer.error == "" and [seen.sent for seen in other.requests] == [0] * 5 + [1]
            assert waiting(expert) == len(expert.requests) == WAITING
            assert (await asyncio.gather(*start(door.channel, "0 n=1")))[0].end == "OK"
            call.cancel()
            await eventually(lambda: not any(one.calls for each in door.gateway.experts for one in each.replicas))
            assert len(expert.requests) == WAITING + 1

    asyncio.run(run())


def test_a_stream_alone_fills_every_slot():
    """What streams waits no more."""

    async def run():
        async with setting(1) as (door, (expert,)):
            call = door.stream(*flood("0 n=10000 gap=0.5", 5 * WAITING))
            reading = asyncio.create_task(errors(call))
            await eventually(lambda: sum(seen.sent > 0 for seen in expert.requests) == 5 * WAITING, 20)
            call.cancel()
            await asyncio.wait({reading})

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["streams", "unary"])
def test_users_with_a_stream_of_their_own_are_not_held_back(kind):
    """The papers' users are a thousand on one host."""
    n = 200

    async def run():
        async with setting(1) as (door, (expert,)):
            if kind == "streams":
                tasks = start(door.channel, *["0 first=60"] * n)
            else:
                infer = door.channel.unary_unary(wire.INFER)
                tasks = [infer(wire.encode_request("0 first=60", 1)) for _ in range(n)]
            await eventually(lambda: waiting(expert) == n, 20)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_who_waits_for_a_turn_goes_where_one_can_be_served_then():
    """To the replica that is up by then, or nowhere, at once."""

    async def run():
        async with setting(1) as (door, (expert,)):
            first, second = door.stream(*flood("0 first=60", WAITING + 10)), door.stream(*flood("0 first=60", 3))
            await eventually(lambda: waiting(expert) == WAITING + 3)
            replica = door.gateway.experts[0].replicas[0]
            replica.is_up = False
            for call in list(replica.calls):
                call.cancel()
            ended = [await errors(first), await errors(second)]
            assert len(expert.requests) == WAITING + 3
            return ended

    for errors_of_one in asyncio.run(run()):
        assert {error.partition(":")[0] for error in errors_of_one} == {"UNAVAILABLE"}


def test_draining_lets_those_that_wait_for_a_turn_end():
    async def run():
        async with setting(1) as (door, (expert,)):
            expert.line = asyncio.Semaphore(4)
            flooding = asyncio.create_task(errors(door.stream(*flood("0 n=1 first=0.02", 4 * WAITING))))
            await eventually(lambda: len(expert.requests) >= WAITING)
            await asyncio.sleep(0.1)
            door.gateway.drain()
            return await flooding

    assert asyncio.run(run()) == [""] * 4 * WAITING
