"""What an HTTP front does whatever it answers: every error as OpenAI's JSON, browsers kept out, connections bounded.

A page in a browser may send a request to any address, the loopback included. It cannot send JSON to somebody else's
without asking first, which :func:`application` answers for allowed origins only. And where a front listens on loopback,
it takes no name for itself but ``localhost``: a page could come from a name that leads there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

logger = logging.getLogger(__name__)

IDLE_S = 60.0
"""A connection that asks nothing for so long is closed; so is one whose request's header is not complete by then."""
_DRAIN_S = 0.5
"""What requests have left when the front is stopped."""
_SPARE_FILES = 64
"""For everything that is no connection."""
_MOST_CONNECTIONS = 16384
_MOST_WAITING = 1024
"""Connections that the kernel holds until they are accepted."""
MOST_FILES = _MOST_CONNECTIONS + _MOST_WAITING + _SPARE_FILES
"""Of one front."""
_ONE_LOG_PER_S = 10.0
_MOST_MESSAGE_CHARS = 1000

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(ValueError):
    """A request is answered with an error; the message goes to the client.

    Parameters
    ----------
    message : str
    status : int
        HTTP's.
    code : str, optional
        OpenAI's name for it, if it has one.
    param : str, optional
        The field that is wrong.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI says it."""
        text = " ".join(str(self).split())
        return {
            "error": {
                "message": text if len(text) <= _MOST_MESSAGE_CHARS else text[:_MOST_MESSAGE_CHARS] + " ...",
                "type": "invalid_request_error" if self.status < 500 else "server_error",
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> web.Response:
        return web.json_response(self.body, status=self.status)


def failed(request: web.BaseRequest) -> Refused:
    """What is told of an exception that is being handled, and that is our own fault; the log has the rest."""
    logger.exception("%s %s", request.method, request.path)
    return Refused("this front failed; its log says why", 500)


def application(largest_body: int, origins: Sequence[str] = (), on_loopback: bool = False) -> web.Application:
    """An application without routes.

    Parameters
    ----------
    largest_body : int
        Bytes; more are refused.
    origins : sequence of str
        Whose pages may ask, e.g. ``https://chat.example``; ``*``: everybody's.
    on_loopback : bool
        Whether it listens there only, and takes requests for no other name.
    """
    allowed = {origin.rstrip("/") for origin in origins}

    @web.middleware
    async def errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Refused as refusal:
            response = refusal.response
            if request.content.exception():  # who knows where the next request begins
                response.force_close()
            return response
        except web.HTTPException as error:
            return _as_json(request, error)
        except ConnectionError:  # the client has gone
            raise
        except Exception:
            return failed(request).response

    @web.middleware
    async def check(request: web.Request, handler: _Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "localhost")
        if on_loopback and not _is_of_this_machine(host):
            raise Refused(f"this front is for programs on its machine, which do not call it {host!r}", 403)
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if is_preflight and (allowed & {"*", request.headers.get("Origin", "")}):
            return web.Response(status=204)
        if (request.content_length or 0) > largest_body:  # said at once, and not when all of it has come
            raise web.HTTPRequestEntityTooLarge(largest_body, request.content_length or 0)
        return await handler(request)

    async def tell_browsers(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin", "")
        if allowed & {"*", origin}:
            response.headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else origin
            response.headers["Vary"] = "Origin"
            if request.method == "OPTIONS":
                wanted = request.headers.get("Access-Control-Request-Headers", "content-type")
                response.headers["Access-Control-Allow-Methods"] = "GET, POST"
                response.headers["Access-Control-Allow-Headers"] = wanted

    app = web.Application(client_max_size=largest_body, middlewares=[errors_as_json, check])
    if allowed:
        app.on_response_prepare.append(tell_browsers)
    return app


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_of_this_machine(host: str) -> bool:
    """Whether a ``Host`` header names it so that no name server could have led there: an address, or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _as_json(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    response = Refused(f"{request.method} {request.path}: {error.reason}", error.status).response
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


class _Connection(web.RequestHandler):
    """A client's connection: what aiohttp itself refuses is JSON, too; where there are too many, an idle one goes."""

    def __init__(self, server: web.Server, most: int, loop: asyncio.AbstractEventLoop):
        super().__init__(server, loop=loop, keepalive_timeout=IDLE_S)
        self._server, self._most = server, most

    @property
    def is_idle(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connections = self._server.connections  # oldest first
        if len(connections) > self._most:
            idle = [one for one in connections if isinstance(one, _Connection) and one.is_idle]
            never_asked = [one for one in idle if not one._request_count]
            for one in (never_asked or idle)[:1]:
                one.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status >= 500:
            logger.error("%s %s", request.method, request.path, exc_info=exc)
        if request.writer.output_size:
            raise ConnectionError("an answer that has begun cannot become an error")
        response = Refused(f"this cannot be read as HTTP: {message or type(exc).__name__}", status).response
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):
            resp = _as_json(request, resp)
        return await super().finish_response(request, resp, start_time)


@contextlib.asynccontextmanager
async def listening(app: web.Application, host: str, port: int, open_files: int = 1024) -> AsyncIterator[int]:
    """Serve; gives the port.

    Parameters
    ----------
    app : web.Application
    host : str
    port : int
        0: any.
    open_files : int
        As many as this process may have; connections leave some for everything else.
    """
    # As many as wait are accepted at a time, and have files before there is a chance to close others.
    waiting = min(_MOST_WAITING, open_files // 4)
    most = max(1, min(_MOST_CONNECTIONS, open_files - waiting - _SPARE_FILES))
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=_DRAIN_S)
    await runner.setup()
    try:
        server, loop = runner.server, asyncio.get_running_loop()
        assert server is not None
        listener = await loop.create_server(lambda: _Connection(server, most, loop), host, port, backlog=waiting)
        async with listener:
            yield listener.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


def serve(app: web.Application, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, with as many connections as the hard limit of open files leaves room for."""
    for name in ("aiohttp.server", "asyncio", __name__):
        logging.getLogger(name).addFilter(_Seldom())
    asyncio.run(_serve(app, host, port, _raise_open_files()))


async def _serve(app: web.Application, host: str, port: int, open_files: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with listening(app, host, port, open_files):
        await stop.wait()


def _raise_open_files() -> int:
    """Raise the soft limit of open files, which is often 1,024, to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)


class _Seldom(logging.Filter):
    """Of what may be logged for every connection, each kind once in ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._said_s: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now_s = record.exc_info and record.exc_info[0], time.monotonic()
        if now_s - self._said_s.get(kind, -_ONE_LOG_PER_S) < _ONE_LOG_PER_S:
            return False
        self._said_s[kind] = now_s
        return True
