"""Every name and size of metadata that gRPC allows passes each front as it passes a gateway."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from erlib.serving import wire
from tests.support.fronts import FRONTS, way

METADATA: list[tuple[str, str | bytes]] = [
    ("my_key", "1"),
    ("my.key", "2"),
    ("0-9_a.b-c", "digits first"),
    ("_", "nothing but an underscore"),
    ("k" * 200, "a long name"),
    ("empty", ""),
    ("spaces", "a  b"),
    ("punctuation", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"),
    ("twice", "a"),
    ("twice", "b,c"),
    ("binary-bin", bytes(range(256))),
    ("binary-bin", b""),
    ("under_score-bin", b"\x00"),
    ("authorization", "Bearer x"),
    ("cookie", "a=1"),
    ("accept", "x"),
    ("accept-language", "de"),
    ("cache-control", "no-cache"),
    ("date", "today"),
    ("expect", "much"),
    ("from", "me"),
    ("if-modified-since", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ("if-range", "x"),
    ("max-forwards", "0"),
    ("proxy-connection", "close"),
    ("range", "bytes=0-0"),
    ("referer", "x"),
    ("server", "mine"),
    ("via", "x"),
    ("x-accel-buffering", "no"),
    ("x-accel-expires", "1"),
    ("x-accel-limit-rate", "1"),
    ("x-accel-redirect", "/unavailable"),
    ("x-forwarded-for", "1.2.3.4"),
    ("x-request-id", "mine"),
]

SIZES = {
    "one of 7 KB": [("large", "x" * 7000)],
    "150 of them": [(f"k{i}", "v") for i in range(150)],
    "binary of 5 KB": [("large-bin", bytes(5000))],
}


def named(metadata, wanted) -> dict[str, list[str | bytes]]:
    """Values of each name in `wanted`, in order; a comma between values is how HTTP joins those of one name."""
    names = {name for name, _ in wanted}
    return {name: [value for one, value in metadata if one == name] for name in names}


def joined(values: dict[str, list[str | bytes]]) -> dict[str, str | list[bytes]]:
    return {name: ",".join(all_) if isinstance(all_[0], str) else all_ for name, all_ in values.items() if all_}


async def exchange(channel, expert, metadata):
    """What the expert sees of `metadata`, and the client of the same as the expert's trailing metadata."""
    expert.tells = metadata
    call = channel.unary_stream(wire.STREAM_INFER)(
        wire.encode_request("0", 1), metadata=(*metadata, wire.COMPLETE), timeout=10
    )
    responses = [wire.decode_response(message) async for message in call]
    assert [response.error for response in responses] == ["", "", ""]
    return expert.requests[-1].metadata, list(await call.trailing_metadata())


@pytest.mark.parametrize("kind", FRONTS)
@pytest.mark.parametrize("which", ["names", *SIZES])
def test_metadata_pass_each_front_in_both_directions(kind, which, tmp_path):
    sent = METADATA if which == "names" else SIZES[which]

    async def run():
        async with way(kind, tmp_path) as (channel, expert, _):
            return await exchange(channel, expert, sent)

    seen, told = asyncio.run(run())
    wanted = joined(named(sent, sent))
    got, back = joined(named(seen, sent)), joined(named(told, sent))
    assert got == wanted
    assert back == wanted


@pytest.mark.parametrize("kind", FRONTS)
@pytest.mark.parametrize("n_bytes", [60_000, 300_000])
def test_metadata_beyond_what_grpc_takes_are_refused_by_each_front_in_the_same_class(kind, n_bytes, tmp_path):
    async def run():
        async with way(kind, tmp_path) as (channel, *_):
            metadata = [(f"k{i}", "x" * 10_000) for i in range(n_bytes // 10_000)]
            call = channel.unary_stream(wire.STREAM_INFER)(
                wire.encode_request("0", 1), metadata=(*metadata, wire.COMPLETE), timeout=10
            )
            try:
                return [wire.decode_response(message).error async for message in call]
            except grpc.aio.AioRpcError as error:
                return [f"{error.code().name}: {error.details()}"]

    (end,) = asyncio.run(run())
    assert end.startswith("RESOURCE_EXHAUSTED: ")


@pytest.mark.parametrize("kind", FRONTS)
def test_a_client_that_wants_its_stream_to_end_with_an_error_gets_that_through_each_front(kind, tmp_path):
    async def run():
        async with way(kind, tmp_path) as (channel, *_):
            metadata = [("triton_grpc_error", "true"), wire.COMPLETE]
            call = channel.unary_stream(wire.STREAM_INFER)(wire.encode_request(" ", 1), metadata=metadata, timeout=10)
            return [message async for message in call]

    with pytest.raises(grpc.aio.AioRpcError) as failure:
        asyncio.run(run())
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
