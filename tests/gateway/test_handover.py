"""What NGINX asks a gateway, over a plain connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import pytest

from erlib.gateway.handover import Handovers, hearing
from erlib.machine.processes import StartError
from erlib.serving import wire

BODY = b"what is asked"
QUESTION = b"POST /x HTTP/1.1\r\nhost: questions\r\ncontent-length: 13\r\nEr-Ticket: 7\r\n\r\n" + BODY


def talk(*pieces: bytes, n_answers: int = 1) -> tuple[list[str], list[tuple[bytes, Mapping[str, str]]]]:
    """Send pieces one after the other; the heads of the answers, and what was asked."""
    asked: list[tuple[bytes, Mapping[str, str]]] = []

    async def decide(body: bytes, headers: Mapping[str, str]) -> Mapping[str, str]:
        asked.append((body, headers))
        if body == b"who breaks it":
            raise RuntimeError("broken")
        return {"X-Accel-Redirect": "@here", "er-expert": "3"}

    async def run() -> list[str]:
        async with hearing(decide, Handovers(lambda request: None), "127.0.0.1:0") as address:
            host, _, port = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))

            async def heads() -> list[str]:
                return [(await reader.readuntil(b"\r\n\r\n")).decode() for _ in range(n_answers)]

            # Read meanwhile: what is refused amid a question is reset, and then nothing more can be read.
            reading = asyncio.create_task(asyncio.wait_for(heads(), 5))
            for piece in pieces:
                writer.write(piece)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                await asyncio.sleep(0.01)
            answers = await reading
            writer.close()
            return answers

    return asyncio.run(run()), asked


def test_a_question_is_answered_by_headers_alone() -> None:
    (answer,), ((body, headers),) = talk(QUESTION)
    assert answer == "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nX-Accel-Redirect: @here\r\ner-expert: 3\r\n\r\n"
    assert (body, headers["er-ticket"]) == (BODY, "7")


def test_a_question_may_come_in_pieces_and_a_connection_has_many() -> None:
    pieces = [QUESTION[i : i + 7] for i in range(0, len(QUESTION), 7)]
    answers, asked = talk(*pieces, QUESTION, QUESTION, n_answers=3)
    assert len({*answers}) == 1 and asked == [asked[0]] * 3


def test_a_connection_that_is_to_end_ends() -> None:
    (answer,), _ = talk(QUESTION.replace(b"host:", b"proxy-connection: close\r\nhost:"))
    assert answer.startswith("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n")


def test_the_first_of_metadata_of_one_name_counts_and_bytes_that_are_no_text_pass() -> None:
    _, ((_, headers),) = talk(QUESTION.replace(b"host:", b"x: 1\r\nx: 2\r\ny: \xff\r\nhost:"))
    assert headers["x"] == "1" and headers["y"].encode("utf-8", "surrogateescape") == b"\xff"


@pytest.mark.parametrize(
    "question",
    [
        b"what is this?\r\n\r\n",
        b"POST /x HTTP/1.1\r\nno colon\r\n\r\n",
        QUESTION.replace(b"host:", b"a: " + (2 << 20) * b"x" + b"\r\nhost:"),
        QUESTION.replace(b"13", str(2 + wire.BODY_BYTES).encode()) + wire.BODY_BYTES * b"x",
    ],
    ids=["no HTTP", "no header", "too many headers", "too long"],
)
def test_what_is_no_question_is_refused(question: bytes) -> None:
    answers, asked = talk(question)
    assert answers == ["HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"]
    assert not asked


def test_an_error_of_ours_is_one_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    answers, _ = talk(QUESTION.replace(BODY, b"who breaks it"))
    assert answers == ["HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"]
    assert "could not be answered" in caplog.text


def test_an_address_that_is_taken_is_refused() -> None:
    async def run() -> None:
        async def decide(body: bytes, headers: Mapping[str, str]) -> Mapping[str, str]:
            return {}

        async with hearing(decide, Handovers(lambda request: None), "127.0.0.1:0") as address:
            with pytest.raises(StartError, match=address):
                async with hearing(decide, Handovers(lambda request: None), address):
                    pass

    asyncio.run(run())
