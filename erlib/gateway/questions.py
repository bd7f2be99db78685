"""What is no inference: any live server may be asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import grpc.aio
from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb

from erlib.gateway.callers import Failure, forwarded
from erlib.gateway.experts import Expert, Replica, servers_of

_QUESTIONS = ["ServerReady", "ModelReady", "ModelMetadata", "ModelConfig", "RepositoryIndex"]
"""Methods that any live server is asked to answer. Those that would change a server are not offered."""
_EXTENSIONS = {"classification", "model_configuration", "parameters", "schedule_policy", "statistics"}
"""Of what Triton says that it offers, what it offers through a gateway, too."""
_SILENT = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
"""How a question ends that a server has not answered."""

Answer = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


class Questions:
    """Asks servers what clients ask a gateway about them.

    Parameters
    ----------
    experts : sequence of Expert
    is_draining : callable
        Whether nobody is to be asked any more.
    """

    def __init__(self, experts: Sequence[Expert], is_draining: Callable[[], bool]):
        self._experts = experts
        self._is_draining = is_draining

    def method(self, name: str) -> Answer | None:
        """What answers the method `name` of the service; None: nothing here."""
        answers: dict[str, Answer] = {
            "ModelStatistics": self._statistics,
            "ServerLive": self._live,
            "ServerMetadata": self._metadata,
            **{question: partial(self._ask, question) for question in _QUESTIONS},
        }
        return answers.get(name)

    async def _live(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def _metadata(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        reply = pb.ServerMetadataResponse.FromString(await self._ask("ServerMetadata", message, context))
        reply.extensions[:] = [extension for extension in reply.extensions if extension in _EXTENSIONS]
        return reply.SerializeToString()

    async def _ask(self, question: str, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Ask one server after the other until one answers."""
        last = Failure(
            StatusCode.UNAVAILABLE, "this gateway is shutting down" if self._is_draining() else "no expert is up"
        )
        for expert in [] if self._is_draining() else self._experts:
            replica = expert.choose()
            if replica is None:
                continue
            try:
                return await self._ask_one(replica, question, message, context)
            except Failure as failure:
                last = failure
                if failure.code not in _SILENT:
                    break
        await context.abort(last.code, last.details)
        raise last

    async def _statistics(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Statistics of all live servers, one entry each."""
        servers = [replica for replica in servers_of(self._experts) if replica.is_up]
        questions = [self._ask_one(replica, "ModelStatistics", message, context) for replica in servers]
        replies = await asyncio.gather(*questions, return_exceptions=True)
        good = [reply for reply in replies if isinstance(reply, bytes)]
        if not good:
            await self._ask("ModelStatistics", message, context)
        return b"".join(good)  # serialised messages one behind the other are one that has the elements of all

    @staticmethod
    async def _ask_one(replica: Replica, question: str, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return await replica.ask(question, message, context.time_remaining(), forwarded(context))
        except grpc.aio.AioRpcError as error:
            if error.code() in _SILENT:
                replica.suspect(infer=False)
            raise Failure(error.code(), error.details() or "") from None
