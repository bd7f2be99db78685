"""Servers on TensorRT-LLM's repositories behind one gateway, and what tests ask them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
from tokenizers import Tokenizer
from tritonclient.grpc import service_pb2 as pb

from benchmarks.on_cpu import ServerOnCpu
from erlib import config
from erlib.dgx import tensorrt_llm
from erlib.dgx.containers import Places
from erlib.machine import processes
from erlib.serving import triton, wire

END_AT = 5  # the stand-ins repeat the prompt, with the end of sequence as the sixth token
PROMPT = "Is the word for a big cat still 猫, or rather Löwe 🦁? the end"


class Served:
    """Servers behind one gateway that takes them in turn, each with the tokenizer of its repository."""

    def __init__(self, servers: list[ServerOnCpu], tokenizers: list[Path], url: str):
        self.servers, self.url = servers, url
        self.tokenizers = [Tokenizer.from_file(str(directory / "tokenizer.json")) for directory in tokenizers]
        ends = [json.loads((directory / "tokenizer_config.json").read_text())["eos_token"] for directory in tokenizers]
        self.end_ids = [
            tokenizer.token_to_id(end if isinstance(end, str) else end["content"])
            for tokenizer, end in zip(self.tokenizers, ends, strict=True)
        ]

    def expected(self, server: int, prompt: str, n: int) -> list[int]:
        """The stand-ins' answer."""
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

    def cancel(self, requests: list[bytes], after: int) -> list[int]:
        """Ask all side by side, and cancel each after some responses; which servers they were."""

        async def one(request: bytes) -> int:
            async with grpc.aio.insecure_channel(self.url) as channel:
                call = channel.stream_stream(wire.STREAM_INFER)(iter([request]))
                server = int(dict(await call.initial_metadata())["er-expert"])
                for _ in range(after):
                    await call.read()
                call.cancel()
                return server

        async def all_of_them() -> list[int]:
            return await asyncio.gather(*map(one, requests))

        return asyncio.run(all_of_them())

    def start_again_what_crashed(self) -> list[str]:
        """Start each server again that a fault in native code has ended, by its own words; returns those words."""
        crashed = [server for server in self.servers if server.process and server.process.poll() is not None]
        said = [server.log.read_text(encoding="utf-8", errors="replace") for server in crashed]
        if not said or not all("Signal (11) received" in words or "Signal (6) received" in words for words in said):
            return []
        for server in crashed:
            server.clean_up()
            server.start()
        for server in crashed:
            server.wait_ready(120)
        for _ in range(2):  # the gateway's first request to it finds the old connection, and a counter starts at none
            with contextlib.suppress(KeyError):
                self.ask_each(wire.encode_request(PROMPT, 1, wire.NEVER_STOP))
            time.sleep(1)
        return said

    def counted(self, by: str) -> list[int]:
        """Tokens that each server has counted: ``generated`` on their way to a client, by the ``engine``."""
        return [round(server.counters().get(f"expert_{by}_tokens", 0)) for server in self.servers]


def once_more_if_triton_crashes(test: Callable[..., None]) -> Callable[..., None]:
    """Ask a second time if Triton crashed: a cancellation that meets the end of its answer ends Triton now and then
    with a segmentation fault (triton-inference-server/server, pull request 7840 and issue 8034)."""

    @functools.wraps(test)
    def twice(self: object, served: Served, **arguments: object) -> None:
        try:
            test(self, served, **arguments)
        except Exception as error:
            said = served.start_again_what_crashed()
            if not said:
                raise
            print(f"once more, after {error!r}, because Triton crashed:", *said, sep="\n")
            test(self, served, **arguments)

    return twice


@contextlib.contextmanager
def serving(
    repositories: list[Path], tokenizers: list[Path], port: int, home: Path, flow: config.Flow, adapters: int = 0
) -> Iterator[Served]:
    """A server per repository and the gateway, on `port` and those above it; `adapters`: experts that each has."""
    ports = [port + 1 + i * triton.TritonServer.PORTS for i in range(len(repositories))]
    servers = [
        ServerOnCpu(f"{models.name}-{at}", models, at, home, flow)
        for models, at in zip(repositories, ports, strict=True)
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
        urls = [server.url for server in servers]
        experts = ",".join(["|".join(urls)] * adapters or urls)
        gateway = processes.spawn([*command, "--experts", experts], home / "gateway")
        processes.wait_until(lambda: processes.listening(port), gateway, "gateway", home / "gateway", 60)
        yield Served(servers, tokenizers, f"127.0.0.1:{port}")
    finally:
        processes.stop([process for process in (gateway, *(server.process for server in servers)) if process], 0)
        for server in servers:
            server.clean_up()
    assert [path for at in ports for path in Path("/dev/shm").glob(f"er{at}-*")] == []


def plan_of(name: str, flow: config.Flow = "engine") -> tensorrt_llm.Plan:
    """The plan of one of the papers' systems with the workload's own lengths."""
    configuration = config.load_configuration(name)
    longest = tensorrt_llm.lengths(configuration, config.WorkloadSettings())
    return tensorrt_llm.Plan(configuration, longest, Places(Path("/checkpoints"), Path("/work")), flow)


def refusal(url: str, request: bytes, metadata: Sequence[tuple[str, str]] = ()) -> str:
    """What a server says instead of an answer."""
    with grpc.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
        (reply,) = channel.stream_stream(wire.STREAM_INFER)(iter([request]), timeout=60, metadata=metadata)
        return wire.decode_response(reply).error


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


def drop_all(message: pb.ModelInferRequest) -> None:
    message.ClearField("inputs")
    message.ClearField("raw_input_contents")


def with_text(text: str) -> Callable[[pb.ModelInferRequest], None]:
    def change(message: pb.ModelInferRequest) -> None:
        position = [tensor.name for tensor in message.inputs].index("text_input")
        message.raw_input_contents[position] = len(text).to_bytes(4, "little") + text.encode()

    return change


def wrong_type(message: pb.ModelInferRequest) -> None:
    (position,) = (i for i, tensor in enumerate(message.inputs) if tensor.name == "max_tokens")
    message.inputs[position].datatype = "INT64"
    message.raw_input_contents[position] = (3).to_bytes(8, "little")
