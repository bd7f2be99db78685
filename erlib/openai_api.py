"""The router behind OpenAI's HTTP interface, so that tools which speak only that can drive it.

``/v1/completions`` and ``/v1/chat/completions``, streaming (an event per token) or not, ``/v1/models`` and ``/health``.
Each request becomes one request to NGINX or a gateway, and each of its responses one event.

Experts answer greedily: ``temperature``, ``top_p`` and ``seed`` are taken and change nothing. What would change an
answer and cannot be done (``n`` > 1, ``stop``, ``logprobs``, tools, penalties, ...) is refused. ``ignore_eos``, which
load generators send, forces the full length. A chat is written out as ``role: text`` lines, because base models have
no template of their own.

Run as ``python -m erlib.openai_api --port PORT --router HOST:PORT --tokenizer FILE``.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import grpc
import grpc.aio
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from tokenizers import Tokenizer

from erlib import wire

MODEL = "expert-router"

_HEALTH_TIMEOUT_S = 15.0
"""More than a gateway takes to find that a silent expert is no answer."""
_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


class Refused(ValueError):
    """A request is answered with an error; the message goes to the client."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        other = {part.get("type") for part in self.content} - {"text"}
        if other:
            raise Refused(f"messages hold text only, not {', '.join(sorted(map(str, other)))}")
        return "".join(part["text"] for part in self.content)


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of request have in common; fields that are not named here are refused."""

    model_config = ConfigDict(extra="forbid")

    model: Literal["expert-router"]
    max_tokens: PositiveInt | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False
    # taken, without effect
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    user: str | None = None
    # taken where they ask for nothing
    n: Literal[1, None] = 1
    best_of: Literal[1, None] = 1
    echo: Literal[False, None] = False
    logprobs: Literal[False, None] = None
    stop: None = None
    min_tokens: int | None = Field(None, description="only as load generators send it: equal to max_tokens")
    frequency_penalty: Literal[0, None] = None
    presence_penalty: Literal[0, None] = None

    @property
    def end_id(self) -> int | None:
        if self.min_tokens and self.min_tokens != self.limit:
            raise Refused("min_tokens is taken only if it equals max_tokens")
        return wire.NEVER_STOP if self.ignore_eos or self.min_tokens else None

    @property
    def limit(self) -> int:
        """Most tokens of the answer; OpenAI's default for completions."""
        return self.max_tokens or 16


class _Completion(_Request):
    prompt: str | list[str]

    @property
    def text(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise Refused(f"one prompt per request, not {len(self.prompt)}")
        return self.prompt[0]


class _Chat(_Request):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: PositiveInt | None = None

    @property
    def limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 256

    @property
    def text(self) -> str:
        lines = [f"{message.role}: {message.text}" for message in self.messages]
        return "\n".join([*lines, "assistant:"])


class Front:
    """HTTP handlers in front of a router.

    Parameters
    ----------
    router : str
        ``host:port`` of NGINX or a gateway.
    tokenizer : Tokenizer
        Of the experts, to count prompt tokens.
    """

    def __init__(self, router: str, tokenizer: Tokenizer):
        self._router = router
        self._tokenizer = tokenizer
        self._ids = itertools.count()

    def application(self) -> web.Application:
        """Everything that is served."""
        app = web.Application(client_max_size=2 * wire.MAX_PROMPT_BYTES, middlewares=[_errors_as_json])
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
            ]
        )
        app.cleanup_ctx.append(self._connection)
        return app

    async def _connection(self, _: web.Application) -> AsyncIterator[None]:
        async with grpc.aio.insecure_channel(self._router, options=wire.CHANNEL_OPTIONS) as channel:
            self._channel = channel
            yield

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "experts"}]})

    async def _health(self, _: web.Request) -> web.Response:
        try:
            await self._channel.unary_unary(f"/{wire.SERVICE}/ServerReady")(b"", timeout=_HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return _error(f"the router at {self._router} is not ready: {error.details()}", 503)
        return web.json_response({"router": self._router})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, _Completion)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, _Chat)

    async def _answer(self, request: web.Request, kind: type[_Completion | _Chat]) -> web.StreamResponse:
        try:
            asked = kind.model_validate_json(await request.read())
            frame = _Frame(kind, f"er-{next(self._ids)}")
            async with contextlib.aclosing(self._events(asked, frame)) as events:
                first = await anext(events)  # an answer that fails at once is an error with a status, not a stream
                if asked.stream:
                    return await self._stream(request, asked, frame, first, events)
                return web.json_response(await self._whole(asked, frame, first, events))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in error.errors())
            return _error(wrong, 400)
        except Refused as error:
            return _error(str(error), error.status)

    async def _events(self, asked: _Completion | _Chat, frame: _Frame) -> AsyncGenerator[str, None]:
        """Text of each token; characters that are cut between tokens come with the last of them."""
        if not asked.text.strip():
            raise Refused("the prompt is empty")
        message = wire.encode_request(asked.text, asked.limit, asked.end_id, frame.id)
        # Errors end the stream with their status, as HTTP wants it, instead of coming as messages.
        as_status = (("triton_grpc_error", "true"),)
        call = self._channel.stream_stream(wire.STREAM_INFER)(iter([message]), metadata=as_status)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            async for reply in call:
                response = wire.decode_response(reply)
                if response.error:
                    raise Refused(response.error, 502)
                frame.tokens += len(response.token_ids)
                if response.token_ids:
                    yield decoder.decode(response.text)
        except grpc.aio.AioRpcError as error:
            raise Refused(error.details() or error.code().name, _HTTP_STATUS.get(error.code(), 502)) from None
        finally:
            call.cancel()  # also where the client has gone
        if not frame.tokens:
            raise Refused("the expert sent no token", 502)
        yield decoder.decode(b"", final=True)

    async def _whole(
        self, asked: _Completion | _Chat, frame: _Frame, first: str, events: AsyncIterator[str]
    ) -> dict[str, Any]:
        text = first + "".join([text async for text in events])
        whole = frame.chunk(text, finish=frame.finish(asked.limit), whole=True)
        return whole | {"usage": self._usage(asked, frame)}

    async def _stream(
        self, request: web.Request, asked: _Completion | _Chat, frame: _Frame, first: str, events: AsyncIterator[str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def send(event: Mapping[str, Any] | str) -> None:
            text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
            await response.write(f"data: {text}\n\n".encode())

        try:
            await send(frame.chunk(first))
            async for text in events:
                await send(frame.chunk(text))
            await send(frame.chunk("", finish=frame.finish(asked.limit)))
            if asked.stream_options and asked.stream_options.include_usage:
                await send(frame.chunk(None) | {"usage": self._usage(asked, frame)})
        except Refused as error:
            await send(_error_body(str(error), error.status))
        await send("[DONE]")
        return response

    def _usage(self, asked: _Completion | _Chat, frame: _Frame) -> dict[str, int]:
        prompt = len(self._tokenizer.encode(asked.text).ids)
        return {"prompt_tokens": prompt, "completion_tokens": frame.tokens, "total_tokens": prompt + frame.tokens}


class _Frame:
    """The shape of one answer's JSON."""

    def __init__(self, kind: type[_Completion | _Chat], number: str):
        self._chat = kind is _Chat
        self.id = number
        self._created = int(time.time())
        self.tokens = 0

    def finish(self, limit: int) -> str:
        return "length" if self.tokens >= limit else "stop"

    def chunk(self, text: str | None, finish: str | None = None, whole: bool = False) -> dict[str, Any]:
        """One event, or the whole answer; without text, one that carries no choice."""
        said: dict[str, Any] = {"text": text}
        kind = "text_completion"
        if self._chat:
            said = {"message" if whole else "delta": {"role": "assistant", "content": text}}
            kind = "chat.completion" if whole else "chat.completion.chunk"
        choices = [] if text is None else [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]
        return {"id": self.id, "object": kind, "created": self._created, "model": MODEL, "choices": choices}


def _error_body(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _error(message: str, status: int) -> web.Response:
    return web.json_response(_error_body(message, status), status=status)


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What aiohttp itself refuses (unknown paths and methods, bodies that are too large), as OpenAI says it."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(f"{request.method} {request.path}: {error.reason}", error.status)


def main() -> None:
    """Entry point of the HTTP front."""
    parser = argparse.ArgumentParser(prog="python -m erlib.openai_api", description="OpenAI's interface to the router")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--router", required=True, help="host:port of NGINX or a gateway")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the experts")
    args = parser.parse_args()
    front = Front(args.router, Tokenizer.from_file(str(args.tokenizer)))
    web.run_app(front.application(), host=args.host, port=args.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
