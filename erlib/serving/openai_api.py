"""The router behind OpenAI's HTTP interface, so that tools which speak only that can drive it.

``/v1/completions`` and ``/v1/chat/completions``, streaming (an event per token, of which the last says why the answer
ends) or not, ``/v1/models`` and ``/health``. Each prompt becomes one request to NGINX or a gateway.

Experts answer greedily: ``temperature``, ``top_p`` and ``seed`` are taken and change nothing. What would change an
answer and cannot be done (``n`` > 1, ``stop``, ``logprobs``, tools, penalties, ...) is refused; each field's neutral
value, and null, is taken. ``ignore_eos``, which load generators send, forces the full length. A chat is written out as
``role: text`` lines, because base models have no template of their own.

Where a request sets no length, an answer may have what its prompt leaves of the experts' context: ``context_tokens`` of
the model's configuration, or, where that says nothing, 256 tokens.

Run as ``python -m erlib.serving.openai_api --port PORT --router HOST:PORT --tokenizer FILE``; ``tokenizer_config.json``
beside it says which token ends an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
from aiohttp import web
from tokenizers import Tokenizer

from erlib.serving import http_front, wire
from erlib.serving.http_front import Refused
from erlib.serving.openai_requests import Chat as _Chat
from erlib.serving.openai_requests import Completion as _Completion

MODEL = "expert-router"

_ANSWER_TOKENS = 256
"""Of an answer whose length neither the request nor the experts' context limits."""
BODY_TIMEOUT_S = 60.0
_QUESTION_TIMEOUT_S = 15.0
"""More than a gateway takes to find that a silent expert is no answer."""
_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TOO_LONG = "context_length_exceeded"


class _Token(NamedTuple):
    """What an event says: a token's text, and why the answer ends with it (empty: it does not)."""

    text: str
    finish: str


class Front:
    """HTTP handlers in front of a router.

    Parameters
    ----------
    router : str
        ``host:port`` of NGINX, a gateway or an expert.
    tokenizer : Tokenizer
        Of the experts, to count prompt tokens.
    end_id : int, optional
        The token that ends an answer. Without it, experts decide, and any special token that comes last has ended one.
    """

    def __init__(self, router: str, tokenizer: Tokenizer, end_id: int | None = None):
        self._router = router
        self._tokenizer = tokenizer
        self._end_id = end_id
        added = tokenizer.get_added_tokens_decoder()
        self._ends = {token for token in added if added[token].special} if end_id is None else {end_id}
        self._max_token_bytes = max(len(piece.encode()) for piece in tokenizer.get_vocab())
        self._context: int | None = None
        self._ids = itertools.count()
        self._began = int(time.time())

    def application(self, origins: list[str] | None = None, on_loopback: bool = False) -> web.Application:
        """Everything that is served; for the arguments, see :func:`erlib.serving.http_front.application`."""
        app = http_front.application(2 * wire.MAX_PROMPT_BYTES, origins or [], on_loopback)
        app.add_routes(
            [
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.get("/health", self._health),
            ]
        )
        app.cleanup_ctx.append(self._connection)
        return app

    async def _connection(self, _: web.Application) -> AsyncIterator[None]:
        async with grpc.aio.insecure_channel(self._router, options=wire.CHANNEL_OPTIONS) as channel:
            self._channel = channel
            yield

    @property
    def _described(self) -> dict[str, Any]:
        return {"id": MODEL, "object": "model", "created": self._began, "owned_by": "experts"}

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described]})

    async def _model(self, request: web.Request) -> web.Response:
        _require_model(request.match_info["name"])
        return web.json_response(self._described)

    async def _health(self, _: web.Request) -> web.Response:
        try:
            await self._channel.unary_unary(f"/{wire.SERVICE}/ServerReady")(b"", timeout=_QUESTION_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise Refused(f"the router at {self._router} is not ready: {error.details()}", 503) from None
        return web.json_response({"router": self._router})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, _Completion)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, _Chat)

    async def _answer(self, request: web.Request, kind: type[_Completion | _Chat]) -> web.StreamResponse:
        asked = await _read(request, kind)
        number = f"er-{next(self._ids)}"
        answers = [_Answer(asked, text, number) for text in asked.texts]
        frame = _Frame(kind is _Chat, number)
        if asked.stream:
            return await self._stream(request, frame, answers[0])
        tasks = [asyncio.create_task(self._whole(answer)) for answer in answers]
        try:
            wholes = await asyncio.gather(*tasks)
        finally:  # the first failure, or a client that has gone, ends them all
            for task in tasks:
                task.cancel()
        return web.json_response(frame.whole(wholes) | {"usage": await self._usage(answers)})

    async def _whole(self, answer: _Answer) -> _Token:
        """An answer as if it were one token."""
        async with contextlib.aclosing(self._tokens(answer)) as tokens:
            parts = [token async for token in tokens]
        return _Token("".join(token.text for token in parts), parts[-1].finish)

    async def _stream(self, request: web.Request, frame: _Frame, answer: _Answer) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})

        async def send(event: Mapping[str, Any] | str) -> None:
            text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
            await response.write(f"data: {text}\n\n".encode())

        async with contextlib.aclosing(self._tokens(answer)) as tokens:
            first = await anext(tokens)  # an answer that fails at once is an error with a status, not a stream
            await response.prepare(request)
            try:
                await send(frame.event(first))
                async for token in tokens:
                    await send(frame.event(token))
                if answer.asked.includes_usage:
                    await send(frame.event(None) | {"usage": await self._usage([answer])})
            except Refused as refusal:
                await send(refusal.body)
            except ConnectionError:  # the client has gone
                raise
            except Exception:
                await send(http_front.failed(request).body)
        await send("[DONE]")
        return response

    async def _tokens(self, answer: _Answer) -> AsyncGenerator[_Token, None]:
        """Each token as it comes; characters that are cut between tokens come with the last of them.

        Raises
        ------
        Refused
        """
        is_forced = answer.asked.is_forced
        limit = answer.asked.limit or await self._room(answer.text)
        end_id = wire.NEVER_STOP if is_forced else self._end_id
        message = wire.encode_request(answer.text, limit, end_id, answer.number)
        call = self._channel.unary_stream(wire.STREAM_INFER)(message, metadata=(wire.COMPLETE,))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        finish = ""
        try:
            async for reply in call:
                response = wire.decode_response(reply)
                if response.error:
                    raise self._failed(*wire.status_of(response.error))
                if not response.token_ids:
                    continue
                if finish:  # more than was asked for
                    break
                answer.tokens += len(response.token_ids)
                if not is_forced and response.token_ids[-1] in self._ends:
                    finish = "stop"
                elif answer.tokens >= limit:
                    finish = "length"
                yield _Token(decoder.decode(response.text, final=bool(finish)), finish)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error.code(), error.details() or error.code().name) from None
        finally:
            call.cancel()  # also where the client has gone
        if not answer.tokens:
            raise Refused("the expert sent no token", 502)
        if not finish:  # the expert has stopped, for a reason of its own
            yield _Token(decoder.decode(b"", final=True), "length" if self._end_id is not None else "stop")

    async def _room(self, text: str) -> int:
        """Tokens that a prompt leaves for its answer."""
        context = await self._context_tokens()
        if context is None:
            return _ANSWER_TOKENS
        if len(text) > context * self._max_token_bytes:  # to tokenise what is too long anyway may take seconds
            raise Refused(f"the maximum context length is {context} tokens; the prompt has more", 400, _TOO_LONG)
        used = await self._count(text)
        if used >= context:
            raise Refused(
                f"the maximum context length is {context} tokens; the prompt has {used} and leaves none to answer",
                400,
                _TOO_LONG,
            )
        return context - used

    async def _context_tokens(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None if the router does not say."""
        if self._context is None:
            ask = self._channel.unary_unary(wire.MODEL_CONFIG)
            try:
                self._context = wire.context_tokens(await ask(wire.ASK_MODEL_CONFIG, timeout=_QUESTION_TIMEOUT_S))
            except grpc.aio.AioRpcError as error:
                raise self._failed(error.code(), error.details() or error.code().name) from None
        return self._context

    def _failed(self, code: grpc.StatusCode, details: str) -> Refused:
        """How a client is told that its request has failed behind us."""
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:  # gRPC's own limit
            return Refused(details, 413, _TOO_LONG)
        if code is grpc.StatusCode.INVALID_ARGUMENT:  # all but the length has been looked at here
            self._context = None  # which may have been that of another system at the same address
            return Refused(details, 400, _TOO_LONG)
        return Refused(details, _HTTP_STATUS.get(code, 502))

    async def _count(self, text: str) -> int:
        return len((await self._tokenizer.async_encode(text)).ids)

    async def _usage(self, answers: list[_Answer]) -> dict[str, int]:
        prompt = sum([await self._count(answer.text) for answer in answers])
        answered = sum(answer.tokens for answer in answers)
        return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


class _Answer:
    """What is asked with one prompt, and how many tokens have come."""

    def __init__(self, asked: _Completion | _Chat, text: str, number: str):
        self.asked, self.text, self.number = asked, text, number
        self.tokens = 0


class _Frame:
    """The shape of one answer's JSON."""

    def __init__(self, is_chat: bool, number: str):
        self._is_chat = is_chat
        self._shared = {"id": number, "created": int(time.time()), "model": MODEL}
        self._role = {"role": "assistant"}

    def whole(self, answers: list[_Token]) -> dict[str, Any]:
        """The answers to all prompts of a request."""
        choices = []
        for i, token in enumerate(answers):
            said = {"message": self._role | {"content": token.text}} if self._is_chat else {"text": token.text}
            choices.append(self._choice(said, token, i))
        return {**self._shared, "object": "chat.completion" if self._is_chat else "text_completion", "choices": choices}

    def event(self, token: _Token | None) -> dict[str, Any]:
        """One token of a stream; None: what belongs to no choice. The first one says whose words they are."""
        choices = []
        if token is not None:
            said = {"delta": self._role | {"content": token.text}} if self._is_chat else {"text": token.text}
            choices = [self._choice(said, token, 0)]
            self._role = {}
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._shared, "object": kind, "choices": choices}

    @staticmethod
    def _choice(said: Mapping[str, Any], token: _Token, index: int) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": None, "finish_reason": token.finish or None}


async def _read(request: web.Request, kind: type[_Completion | _Chat]) -> _Completion | _Chat:
    """What is asked.

    Raises
    ------
    Refused
        Whatever is wrong with it.
    """
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
        if request.content_type != "application/json":  # which a browser's page cannot send to others' servers unasked
            raise Refused(f"Content-Type must be application/json, not {request.content_type}")
        asked = kind.read(body)
        _require_model(asked.model)
        for text in asked.texts:
            wire.encode_request(text, asked.limit or 1)
        return asked
    except TimeoutError:
        raise Refused(f"the request's body did not arrive within {BODY_TIMEOUT_S:.0f} s", 408) from None
    except (Refused, web.HTTPException, ConnectionError):
        raise
    except Exception as error:
        raise Refused(f"the request cannot be read: {error}") from error


def _require_model(name: str) -> None:
    if name != MODEL:
        raise Refused(f"the model {name!r} does not exist; there is {MODEL!r}", 404, "model_not_found", "model")


def _end_id(tokenizer: Tokenizer, directory: Path) -> int | None:
    """Which token ends an answer, by the ``tokenizer_config.json`` there, if there is one."""
    try:
        end = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    except FileNotFoundError:
        return None
    return tokenizer.token_to_id(end if isinstance(end, str) else end["content"])


def main() -> None:
    """Entry point of the HTTP front."""
    parser = argparse.ArgumentParser(
        prog="python -m erlib.serving.openai_api", description="OpenAI's interface to the router"
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--router", required=True, help="host:port of NGINX or a gateway")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the experts")
    parser.add_argument("--cors", nargs="*", default=[], metavar="ORIGIN", help="whose pages may ask; *: everybody's")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    front = Front(args.router, tokenizer, _end_id(tokenizer, args.tokenizer.parent))
    http_front.serve(front.application(args.cors, http_front.is_loopback(args.host)), args.host, args.port)


if __name__ == "__main__":
    main()
