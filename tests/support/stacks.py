"""Requests to a real stack."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio

from erlib.serving import stack, wire


def generated_tokens(running: stack.Stack) -> int:
    return round(running.counters()["expert_generated_tokens"])


def answer(url: str, prompt: str, max_tokens: int, end_id: int | None = wire.NEVER_STOP) -> list[wire.Response]:
    return asyncio.run(answer_of(url, wire.encode_request(prompt, max_tokens, end_id)))


async def answer_of(url: str, request: bytes, **call_arguments) -> list[wire.Response]:
    async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
        call = channel.stream_stream(wire.STREAM_INFER)(iter([request]), timeout=60, **call_arguments)
        return [wire.decode_response(message) async for message in call]
