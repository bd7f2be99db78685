"""The experts behind a gateway: replicas of each, the least busy one first, a dead one left alone until it works again.

Every replica has a circuit breaker. *Closed*: requests go to it. If something fails there, a canary is sent, and if
that fails too, and nothing else has come from the replica meanwhile, the breaker *opens*: no request goes there, and
those that it still holds are ended. *Half-open*: from time to time another canary asks, and the first to be answered
closes the breaker. So no client's request is spent on finding out, and a request that is itself at fault does no harm.

The canary is an inference, because Triton goes on saying "ready" when the process that runs the model is dead.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from erlib.machine.processes import StartError
from erlib.serving import wire

CANARY = wire.encode_request(
    "How long does a letter take from one end of the country to the other?", 1, wire.NEVER_STOP
)
FRONT_TIMEOUT_S = 10.0
"""A server that does not even say whether it is ready within this time is not; no other question takes longer."""
CANARY_TIMEOUT_S = 60.0
"""A canary that takes longer waits in a queue, as far as one can tell."""
PROBE_AFTER_S, PROBE_AT_MOST_AFTER_S = 0.25, 2.0
"""Pause between the first two canaries to a dead replica; it doubles up to the second value."""
ABANDON_AFTER_S = 5.0
"""A replica that has been dead for so long has lost the requests that it holds."""
SLOW_CONNECT_S = 20.0
"""A server that has not finished connecting within this time never will; one on a busy machine takes seconds."""

DOUBT_AGAIN_AFTER_S = 2.0
"""Between two questions to a replica that may merely give short answers."""
STATISTICS_LATE_S = 0.2
"""Triton may count a failure a little after its error has been sent."""
SERVER_AT_FAULT = {"UNAVAILABLE", "INTERNAL", "UNKNOWN", "DATA_LOSS"}
"""How a request ends for which its server can be suspected, and not its client."""

CHANNEL_OPTIONS = [
    *wire.CHANNEL_OPTIONS,
    # The defaults let a restarted expert wait up to two minutes for the next attempt to connect.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Despite its name, the time in which a connection has to be complete. A refused one is tried again before.
    ("grpc.min_reconnect_backoff_ms", round(SLOW_CONNECT_S * 1000)),
    ("grpc.client_idle_timeout_ms", 2**31 - 1),  # half an hour by default, then the next request has to connect
]


class Call(Protocol):
    """What a replica needs to know of a request that it holds."""

    def cancel(self) -> bool:
        """End it."""
        ...


class Replica:
    """One server of an expert, as one gateway sees it.

    Parameters
    ----------
    url : str
        ``host:port``.
    credentials : ChannelCredentials, optional
        For TLS; None: plain text.
    """

    def __init__(self, url: str, credentials: grpc.ChannelCredentials | None = None):
        self.url = url
        self.is_up = True
        self.responses = 0
        """How many good responses it has given: whether this still grows shows that it lives."""
        self.calls: dict[Call, None] = {}
        """What it is busy with, oldest first."""
        self._channel = (
            grpc.aio.insecure_channel(url, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(url, credentials, options=CHANNEL_OPTIONS)
        )
        # On the wire, a stream of one request. gRPC sends it in one go, and if the server is lost, it says so, where it
        # would sometimes tell a call that is still writing nothing but "Internal error from Core".
        self.stream_infer = self._channel.unary_stream(wire.STREAM_INFER)
        self._examination: asyncio.Task[None] | None = None
        self._responses_when_busy: int | None = None
        self._doubt_again_s = 0.0
        self._question: asyncio.Task[None] | None = None
        self._failures = 0

    @property
    def is_connected(self) -> bool:
        """Whether a connection stands."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def keep_connected(self) -> None:
        """Connect whenever there is no connection, so that no request has to wait until there is one."""
        while True:
            await self._channel.wait_for_state_change(self._channel.get_state(try_to_connect=True))

    async def connected(self, insist_s: float = 0.0) -> bool:
        """Wait until there is a connection; False if there is none in time.

        A connection that is merely slow gets :data:`SLOW_CONNECT_S`, a server that refuses one gets `insist_s`.
        """
        loop = asyncio.get_running_loop()
        slow_until_s = loop.time() + max(SLOW_CONNECT_S, insist_s)
        insist_until_s = loop.time() + insist_s
        while (state := self._channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            until_s = insist_until_s if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE else slow_until_s
            try:
                async with asyncio.timeout_at(until_s):
                    await self._channel.wait_for_state_change(state)
            except TimeoutError:
                return False
        return True

    async def ask(
        self,
        method: str,
        message: bytes = b"",
        within_s: float | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> bytes:
        """The answer to a method of the inference service that is no inference, within `within_s` and at most 10 s.

        Raises
        ------
        AioRpcError
        """
        timeout_s = FRONT_TIMEOUT_S if within_s is None else min(within_s, FRONT_TIMEOUT_S)
        return await self._channel.unary_unary(f"/{wire.SERVICE}/{method}")(
            message, timeout=timeout_s, metadata=metadata
        )

    @contextmanager
    def busy_with(self, call: Call) -> Iterator[None]:
        """Count `call` as outstanding, and cancel it in the end, which does nothing to one that is complete."""
        self.calls[call] = None
        try:
            yield
        finally:
            del self.calls[call]
            call.cancel()

    def suspect(self, infer: bool = True) -> None:
        """Find out, in the background, whether it works; without `infer`: whether it answers at all."""
        if self._examination is None or self._examination.done():
            self._examination = asyncio.create_task(self._examine(infer))

    def doubt(self) -> None:
        """Ask it whether inferences have failed, unless that was done lately, and suspect it if so.

        For signs that do not tell a bad answer from a short one. Unlike a canary, the question takes no tokens, which a
        measurement would count.
        """
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._doubt_again_s and (self._question is None or self._question.done()):
            self._doubt_again_s = now_s + DOUBT_AGAIN_AFTER_S
            self._question = asyncio.create_task(self._ask_for_failures())

    async def _ask_for_failures(self) -> None:
        """Triton counts those of a backend that is dead, and not the errors that a living one gives as its answers."""
        await asyncio.sleep(STATISTICS_LATE_S)
        try:
            reply = pb.ModelStatisticsResponse.FromString(await self.ask("ModelStatistics"))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                self.suspect()
            return
        except DecodeError:
            return
        before, self._failures = self._failures, sum(one.inference_stats.fail.count for one in reply.model_stats)
        if self._failures > before:
            self.suspect()

    def suspect_if_silent(self) -> None:
        """Called at intervals: suspect it if it was busy the last time, is now, and has given nothing in between.

        Not with the same requests, perhaps: clients give up, or their deadlines pass.
        """
        responses = self.responses if self.calls else None
        if responses is not None and responses == self._responses_when_busy:
            self.suspect(infer=False)  # it may be busy: a canary would only stand in line, too
        self._responses_when_busy = responses

    async def close(self) -> None:
        """End everything."""
        for task in (self._examination, self._question):
            if task is not None:
                task.cancel()
        await self._channel.close()

    async def _examine(self, infer: bool) -> None:
        responses = self.responses
        abandon_at_s = asyncio.get_running_loop().time() + ABANDON_AFTER_S
        pause_s = PROBE_AFTER_S
        while True:
            works = await self._works(infer)
            if works or self.responses != responses:
                self.is_up = True
                return
            if works is None and self.is_up:
                return
            if works is False:
                self.is_up = False
                infer = True
                if asyncio.get_running_loop().time() >= abandon_at_s:
                    for call in list(self.calls):
                        call.cancel()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PROBE_AT_MOST_AFTER_S)

    async def _works(self, infer: bool) -> bool | None:
        """Whether it is ready and, with `infer`, answers a canary; None: the canary is still waiting."""
        try:
            reply = await self.ask("ServerReady")
            is_ready = pb.ServerReadyResponse.FromString(reply).ready
        except DecodeError:
            is_ready = False
        except grpc.aio.AioRpcError as error:
            is_ready = error.code() is grpc.StatusCode.UNIMPLEMENTED  # an answer, too
        if not (is_ready and infer):
            return is_ready
        canary = self.stream_infer(CANARY, timeout=CANARY_TIMEOUT_S, metadata=((wire.EXPERT, "0"),))
        try:
            return not any([wire.is_error(response) async for response in canary])
        except grpc.aio.AioRpcError as error:
            return None if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else False
        finally:
            canary.cancel()


class Expert:
    """One expert: servers of the same model.

    Parameters
    ----------
    replicas : sequence of Replica
    first : int
        Where equally busy replicas begin to take turns; different for each gateway, so that not all begin at the same.
    """

    def __init__(self, replicas: Sequence[Replica], first: int = 0):
        self.replicas = list(replicas)
        self._turn = itertools.count(first)

    def choose(self, besides: Replica | None = None) -> Replica | None:
        """The replica with the fewest outstanding requests, of those that are up and not `besides`, if any.

        A gateway counts its own requests only.
        """
        turn = next(self._turn)
        n = len(self.replicas)
        in_turn = (self.replicas[(turn + i) % n] for i in range(n))
        up = [replica for replica in in_turn if replica.is_up and replica is not besides]
        return min(up, key=lambda replica: len(replica.calls), default=None)

    def has_other(self, replica: Replica) -> bool:
        """Whether another one than `replica` is up."""
        return any(other.is_up for other in self.replicas if other is not replica)


def connect(addresses: str, first: int = 0, credentials: grpc.ChannelCredentials | None = None) -> list[Expert]:
    """The experts at `addresses`: separated by commas, replicas of one by ``|``, e.g. ``"a:1|b:1,c:1"``.

    An address that stands there several times is one server, with several experts' adapters.

    Raises
    ------
    StartError
        If one of them is no address.
    """
    urls = dict.fromkeys(re.split(r"[,|]", addresses))
    for url in urls:
        if not re.fullmatch(r"\S+:\d+", url):
            raise StartError(f"an expert's address is HOST:PORT, not {url!r}")
    servers = {url: Replica(url, credentials) for url in urls}
    return [Expert([servers[url] for url in one.split("|")], first) for one in addresses.split(",")]


def servers_of(experts: Sequence[Expert]) -> list[Replica]:
    """All replicas, each once: where a server has adapters of several experts, it is a replica of each."""
    return list(dict.fromkeys(replica for expert in experts for replica in expert.replicas))


async def unconnected(experts: Sequence[Expert], insist_s: float = 0.0) -> list[str]:
    """Wait for connections to all replicas, see :meth:`Replica.connected`; the addresses of those that have none."""
    replicas = servers_of(experts)
    connected = await asyncio.gather(*(replica.connected(insist_s) for replica in replicas))
    return [replica.url for replica, is_connected in zip(replicas, connected, strict=True) if not is_connected]


async def watch(experts: Sequence[Expert], silence_s: float) -> None:
    """Suspect every replica that owes somebody an answer and has said nothing for one to two times `silence_s`."""
    while True:
        await asyncio.sleep(silence_s)
        for replica in servers_of(experts):
            replica.suspect_if_silent()
