"""An engine that only keeps time, and users who only take notes: both ends of a proxy, as cheap as Python can be.

Measuring what a proxy costs takes ends that cost little beside it. A gRPC library at both ends takes several times as
much CPU per token as the proxy, and with two cores it is the library that would be measured. Here both speak just
enough HTTP/2 to stream (no header compression to decode, no message objects): responses are encoded once, and a token
is one write at one end and one read at the other. The same two over HTTP/1.1 with server-sent events serve proxies
that speak OpenAI's protocol.

Each stream gets its first token at once and the others at a fixed pace, with a phase of its own. A token carries the
instant at which it was sent (``CLOCK_MONOTONIC`` ns), so that whoever receives it on this host knows how long it took.

Run as ``python -m benchmarks.paced GRPC_PORT HTTP_PORT``; each line on standard input is answered with one of JSON: a
number sets the pace (s), an empty line changes nothing. The answer holds tokens, and how late they were sent (ms),
since the line before.
"""

from __future__ import annotations

import array
import asyncio
import collections
import json
import random
import re
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from erlib.serving import wire

ENDLESS = 1_000_000_000
"""``max_tokens`` of a stream that its reader ends."""

_STAMP = re.compile(rb"sent-ns (\d{19})")
_NO_STAMP = b"sent-ns " + b"0" * 19


def _stamped(message: bytes) -> Callable[[], bytes]:
    """A function that returns `message` with the present instant for its (first) empty stamp."""
    before, after = message.split(_NO_STAMP, 1)
    before += b"sent-ns "
    return lambda: b"%b%019d%b" % (before, time.monotonic_ns(), after)


# --- HTTP/2, the part that a stream takes (RFC 9113) --------------------------------------------------------------

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_PADDED = 8
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WIDE = (1 << 31) - 1
_DEFAULT_WINDOW = 65_535
_MAX_FRAME = 16_384


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload) << 8 | kind) + bytes([flags]) + stream.to_bytes(4, "big") + payload


def _header(name: bytes, value: bytes) -> bytes:
    """One header field as a literal that goes into no table (RFC 7541, 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _message(serialised: bytes) -> bytes:
    """A gRPC message: uncompressed, behind its length."""
    return struct.pack(">BI", 0, len(serialised)) + serialised


class _Http2(asyncio.Protocol):
    """One connection; takes all that the peer sends and keeps to the peer's windows."""

    greeting = b""

    def __init__(self) -> None:
        self._unread = b""
        self._window = _DEFAULT_WINDOW
        self._initial = _DEFAULT_WINDOW
        self._windows: dict[int, int] = {}
        self._waiting: collections.deque[tuple[int, bytes, int]] = collections.deque()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        settings = struct.pack(">HIHI", 3, 100_000, 4, _WIDE)  # concurrent streams, initial window
        widen = struct.pack(">I", _WIDE - _DEFAULT_WINDOW)
        transport.write(self.greeting + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, widen))

    def data_received(self, data: bytes) -> None:
        data = self._unread + data if self._unread else data
        position, end = 0, len(data)
        while end - position >= 9:
            head = int.from_bytes(data[position : position + 4], "big")
            length = head >> 8
            stop = position + 9 + length
            if stop > end:
                break
            flags = data[position + 4]
            stream = int.from_bytes(data[position + 5 : position + 9], "big")
            self._take(head & 0xFF, flags, stream, data[position + 9 : stop])
            position = stop
        self._unread = data[position:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            if flags & _PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            self.on_data(stream, payload, bool(flags & _END_STREAM))
        elif kind == _HEADERS:
            self.on_headers(stream, bool(flags & _END_STREAM))
        elif kind == _RST_STREAM:
            self._windows.pop(stream, None)
            self.on_end(stream, f"reset with code {int.from_bytes(payload, 'big')}")
        elif kind == _PING and not flags & _ACK:
            self.transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    self._windows = {stream: left + value - self._initial for stream, left in self._windows.items()}
                    self._initial = value
            self.transport.write(_frame(_SETTINGS, _ACK, 0, b""))
            self._flush()
        elif kind == _WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += increment
            elif stream in self._windows:
                self._windows[stream] += increment
            self._flush()

    def open(self, stream: int) -> None:
        """Have a send window for `stream`."""
        self._windows[stream] = self._initial

    def close(self, stream: int) -> None:
        """Forget `stream`; what still waits to be sent on it is dropped."""
        self._windows.pop(stream, None)

    def send(self, stream: int, data: bytes, flags: int = 0) -> None:
        """Send `data` now, or in turn when the peer's windows allow."""
        for start in range(0, len(data), _MAX_FRAME):
            part = data[start : start + _MAX_FRAME]
            self._waiting.append((stream, part, flags if start + _MAX_FRAME >= len(data) else 0))
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            stream, data, flags = self._waiting[0]
            left = self._windows.get(stream)
            if left is not None:
                if len(data) > min(left, self._window):
                    return
                self._windows[stream] = left - len(data)
                self._window -= len(data)
                self.transport.write(_frame(_DATA, flags, stream, data))
            self._waiting.popleft()

    def on_headers(self, stream: int, last: bool) -> None:
        raise NotImplementedError

    def on_data(self, stream: int, payload: bytes, last: bool) -> None:
        raise NotImplementedError

    def on_end(self, stream: int, reason: str) -> None:
        raise NotImplementedError


# --- the engine ---------------------------------------------------------------------------------------------------


class Engine:
    """What all connections share: the pace, and how it was kept."""

    def __init__(self) -> None:
        self.pace_s = 0.5
        self.late_ms = array.array("d")

    def start(self, send: Callable[[bool], None], finish: Callable[[], None], n_tokens: int) -> Callable[[], None]:
        """Call `send` `n_tokens` times (with whether it is the last), then `finish`; returns what ends it before.

        The first token is due at once, the second after a random part of the pace, so that streams that began together
        do not go on in step.
        """
        loop = asyncio.get_running_loop()
        due = loop.time()
        sent = 0
        timer: asyncio.TimerHandle | None = None

        def step() -> None:
            nonlocal due, sent, timer
            self.late_ms.append((loop.time() - due) * 1e3)
            sent += 1
            send(sent == n_tokens)
            if sent == n_tokens:
                timer = None
                finish()
            else:
                due += self.pace_s * (random.random() if sent == 1 else 1.0)
                timer = loop.call_at(due, step)

        step()
        return lambda: timer.cancel() if timer else None

    def report(self) -> dict[str, Any]:
        """Tokens since the last report, and how late they were sent (ms)."""
        late_ms, self.late_ms = np.array(self.late_ms or [0.0]), array.array("d")
        return {
            "tokens": len(late_ms),
            "late_p50_ms": float(np.median(late_ms)),
            "late_p99_ms": float(np.percentile(late_ms, 99)),
        }


def _triton_response(final: bool) -> bytes:
    response = pb.ModelStreamInferResponse()
    response.infer_response.model_name = wire.MODEL_NAME
    if final:
        response.infer_response.parameters["triton_final_response"].bool_param = True
    for name, datatype, raw in (
        ("text_output", "BYTES", struct.pack("<I", len(_NO_STAMP)) + _NO_STAMP),
        ("output_ids", "INT32", struct.pack("<i", 1)),
    ):
        response.infer_response.outputs.add(name=name, datatype=datatype, shape=[1, 1])
        response.infer_response.raw_output_contents.append(raw)
    return response.SerializeToString()


class _GrpcEngine(_Http2):
    """Answers every request with its ``max_tokens`` responses, and an empty one, which asks for it, with "ready"."""

    _next, _last = (staticmethod(_stamped(_message(_triton_response(final)))) for final in (False, True))
    _ready = _message(pb.ServerReadyResponse(ready=True).SerializeToString())
    _head = b"\x88" + _header(b"content-type", b"application/grpc")
    _trailers = _header(b"grpc-status", b"0")

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._unread = b""
        self._greeted = False
        self._requests: dict[int, bytes] = {}
        self._stops: dict[int, Callable[[], None]] = {}

    def data_received(self, data: bytes) -> None:
        if not self._greeted:
            self._unread += data
            if len(self._unread) < len(_PREFACE):
                return
            data, self._unread, self._greeted = self._unread[len(_PREFACE) :], b"", True
        super().data_received(data)

    def on_headers(self, stream: int, last: bool) -> None:
        self.open(stream)
        self._requests[stream] = b""

    def on_data(self, stream: int, payload: bytes, last: bool) -> None:
        if not payload or stream not in self._requests:
            return
        credit = struct.pack(">I", len(payload))
        self.transport.write(_frame(_WINDOW_UPDATE, 0, 0, credit))
        request = self._requests[stream] = self._requests[stream] + payload
        if len(request) < 5 or len(request) < 5 + int.from_bytes(request[1:5], "big"):
            return
        del self._requests[stream]
        self.transport.write(_frame(_HEADERS, _END_HEADERS, stream, self._head))
        if len(request) == 5:
            self.send(stream, self._ready)
            self._finish(stream)
            return
        self._stops[stream] = self._engine.start(
            lambda last: self.send(stream, self._last() if last else self._next()),
            lambda: self._finish(stream),
            _max_tokens(request[5:]),
        )

    def _finish(self, stream: int) -> None:
        self.transport.write(_frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, self._trailers))
        self.close(stream)
        self._stops.pop(stream, None)

    def on_end(self, stream: int, reason: str) -> None:
        self._requests.pop(stream, None)
        if stop := self._stops.pop(stream, None):
            stop()

    def connection_lost(self, exc: Exception | None) -> None:
        for stream in list(self._stops):
            self.on_end(stream, "connection lost")


def _max_tokens(serialised: bytes) -> int:
    request = pb.ModelInferRequest.FromString(serialised)
    position = next(i for i, tensor in enumerate(request.inputs) if tensor.name == "max_tokens")
    return struct.unpack("<i", request.raw_input_contents[position])[0]


def _chunk(event: bytes) -> bytes:
    """One server-sent event as one HTTP/1.1 chunk."""
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _openai_chunk(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps(
        {"id": "paced", "object": "chat.completion.chunk", "created": 0, "model": "paced", "choices": [choice]}
    ).encode()


class _OpenAiEngine(asyncio.Protocol):
    """``POST /v1/chat/completions`` with ``stream``, one request after the other on a connection."""

    _head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    _next = staticmethod(_stamped(_chunk(_openai_chunk({"role": "assistant", "content": _NO_STAMP.decode()}, None))))
    _tail = _chunk(_openai_chunk({}, "stop")) + _chunk(b"[DONE]") + b"0\r\n\r\n"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unread = b""
        self._stop: Callable[[], None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        head, found, body = self._unread.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not found or (length and len(body) < int(length[1])):
            return
        self._unread = b""
        self.transport.write(self._head)
        n_tokens = json.loads(body).get("max_tokens", 1) if length else 1
        self._stop = self._engine.start(
            lambda _: self.transport.write(self._next()), lambda: self.transport.write(self._tail), n_tokens
        )

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stop:
            self._stop()


async def _serve_engine(grpc_port: int, http_port: int) -> None:
    engine = Engine()
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: _GrpcEngine(engine), "127.0.0.1", grpc_port, backlog=4096)
    await loop.create_server(lambda: _OpenAiEngine(engine), "127.0.0.1", http_port, backlog=4096)
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        engine.pace_s = float(line) if line.strip() else engine.pace_s
        print(json.dumps(engine.report()), flush=True)


# --- the users ----------------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """One request as its user saw it; times in ns."""

    sent_ns: int
    ended: asyncio.Future[None]
    arrived_ns: list[int] = field(default_factory=list)
    took_ns: list[int] = field(default_factory=list)
    """From engine to user, for each token."""
    error: str = ""
    abandon: Callable[[], None] = lambda: None
    unread: bytes = b""

    def note(self, now_ns: int, text: bytes) -> None:
        """Take note of all tokens in `text`; one without a stamp is an error's text."""
        stamps = [int(found[1]) for found in _STAMP.finditer(text)]
        self.arrived_ns += [now_ns] * len(stamps)
        self.took_ns += [now_ns - stamp for stamp in stamps]
        if not stamps and not self.error:
            self.error = text.decode(errors="replace")[:300]

    def end(self, reason: str = "") -> None:
        """The stream is over, with what is wrong about it; what happens to its connection later is not."""
        if not self.ended.done():
            self.error = self.error or reason or ("" if self.arrived_ns else "ended without a token")
            self.ended.set_result(None)


class _GrpcUsers(_Http2):
    """Many users' streams on one connection, as a gRPC channel has them."""

    greeting = _PREFACE

    def __init__(self, authority: str) -> None:
        super().__init__()
        self._streams: dict[int, Stream] = {}
        self._next = 1
        path = wire.STREAM_INFER.encode()
        self._head = (
            b"\x83\x86\x04" + bytes([len(path)]) + path + b"\x01" + bytes([len(authority)]) + authority.encode()
            + _header(b"te", b"trailers") + _header(b"content-type", b"application/grpc")
            + _header(b"grpc-timeout", b"3600S") + _header(*(part.encode() for part in wire.COMPLETE))
        )  # fmt: skip

    def request(self, prompt: str, max_tokens: int) -> Stream:
        """Send one; its message should be made before, but at 20 us it disappears beside what is measured."""
        number, self._next = self._next, self._next + 2
        message = _message(wire.encode_request(prompt, max_tokens, wire.NEVER_STOP))
        stream = Stream(time.monotonic_ns(), asyncio.get_running_loop().create_future())
        stream.abandon = lambda: self._abandon(number)
        self._streams[number] = stream
        self.open(number)
        self.transport.write(_frame(_HEADERS, _END_HEADERS, number, self._head))
        self.send(number, message, _END_STREAM)
        return stream

    def _abandon(self, number: int) -> None:
        if stream := self._streams.pop(number, None):
            self.close(number)
            self.transport.write(_frame(_RST_STREAM, 0, number, struct.pack(">I", 8)))
            stream.end()

    def on_headers(self, stream: int, last: bool) -> None:
        if last:
            self.on_end(stream, "")

    def on_data(self, stream: int, payload: bytes, last: bool) -> None:
        now_ns = time.monotonic_ns()
        if user := self._streams.get(stream):
            data = user.unread + payload if user.unread else payload
            while len(data) >= 5 and len(data) >= (size := 5 + int.from_bytes(data[1:5], "big")):
                user.note(now_ns, data[5:size])
                data = data[size:]
            user.unread = data
        if last:
            self.on_end(stream, "")

    def on_end(self, stream: int, reason: str) -> None:
        self.close(stream)
        if user := self._streams.pop(stream, None):
            user.end(reason)

    def connection_lost(self, exc: Exception | None) -> None:
        for number in list(self._streams):
            self.on_end(number, f"connection lost: {exc}")


class _OpenAiUser(asyncio.Protocol):
    """One user's request on a connection of its own."""

    def __init__(self, prompt: str, max_tokens: int) -> None:
        self._body = json.dumps(
            {
                "model": "paced",
                "messages": [{"role": "user", "content": prompt}],
                "stream": True,
                "max_tokens": max_tokens,
            }
        ).encode()
        self.stream = Stream(time.monotonic_ns(), asyncio.get_running_loop().create_future())
        self._head = b""
        self._refused = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.stream.abandon = self._abandon
        transport.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: paced\r\nauthorization: Bearer none\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(self._body), self._body)
        )

    def _abandon(self) -> None:
        self._transport.abort()
        self.stream.end()

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        stream = self.stream
        stream.unread += data
        if not self._head:
            self._head, found, stream.unread = stream.unread.partition(b"\r\n\r\n")
            if not found:
                self._head, stream.unread = b"", self._head
                return
            self._refused = b" 200 " not in self._head[:16]
        if self._refused:
            stream.note(now_ns, stream.unread or self._head)
            return
        events, _, stream.unread = stream.unread.rpartition(b"\n\n")
        if b"sent-ns " in events or b'"error"' in events:
            stream.note(now_ns, events)
        if b"[DONE]" in events:
            stream.end()
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stream.end(f"connection lost: {exc}")


class Users:
    """Opens streams at one address, round robin over `connections` where one connection carries several streams.

    Parameters
    ----------
    url : str
        ``host:port``.
    protocol : {"grpc", "openai"}
    connections : int
    """

    def __init__(self, url: str, protocol: str, connections: int = 4) -> None:
        self._host, _, port = url.rpartition(":")
        self._port = int(port)
        self._url = url
        self._protocol = protocol
        self._n_connections = connections
        self._connections: list[_GrpcUsers] = []
        self._turn = 0

    async def __aenter__(self) -> Users:
        loop = asyncio.get_running_loop()
        if self._protocol == "grpc":
            for _ in range(self._n_connections):
                _, users = await loop.create_connection(lambda: _GrpcUsers(self._url), self._host, self._port)
                self._connections.append(users)
        return self

    async def __aexit__(self, *_: object) -> None:
        for users in self._connections:
            users.transport.close()

    async def request(self, prompt: str, max_tokens: int) -> Stream:
        """Send a prompt; the stream is noted as its tokens arrive."""
        if self._protocol == "grpc":
            self._turn += 1
            return self._connections[self._turn % len(self._connections)].request(prompt, max_tokens)
        loop = asyncio.get_running_loop()
        user = _OpenAiUser(prompt, max_tokens)
        connecting: Awaitable[Any] = loop.create_connection(lambda: user, self._host, self._port)
        await connecting
        return user.stream


if __name__ == "__main__":
    asyncio.run(_serve_engine(int(sys.argv[1]), int(sys.argv[2])))
