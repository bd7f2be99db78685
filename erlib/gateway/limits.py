"""What one peer may ask of one gateway: streams at a time, requests per second, bytes of a prompt.

A gateway counts for itself: behind a balancer with sixteen of them, a peer may have sixteen times as much.

By default, streams take turns and peers do not: a thousand users of one host, each with a stream of its own, are a load
like any other, but requests that come on one stream stand in line there, not before everybody else's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote

FORWARDED_FOR = "x-real-ip"
"""In this metadata, NGINX says whom it forwards for."""
_FORGET_AT = 1000


class Refused(Exception):
    """A peer has asked for too much; the message says of what."""


@dataclass(frozen=True)
class Limits:
    """What a gateway takes; infinite where the experts' own queues are limit enough."""

    prompt_bytes: int = 512 << 10
    """Ten times 8,000 words; to classify more would hold up everybody else for longer than a tenth of a second."""
    streams_per_peer: float = math.inf
    requests_per_s: float = math.inf
    """Per peer; a second's worth may come at once."""
    waiting_per_stream: int = 16
    """Requests of one stream that wait for the first response of one expert; more have to wait here for their turn.

    Those that have had it do not count, so that a stream alone fills every slot that is free.
    """
    in_flight_per_stream: int = 1024
    """Requests of one stream; more are not read before others are done, so that a flood stays with its sender."""

    @property
    def are_per_peer(self) -> bool:
        """Whether a peer may not have as much as it likes."""
        return min(self.streams_per_peer, self.requests_per_s) < math.inf

    @property
    def message_bytes(self) -> int:
        """Largest message: a prompt and what comes with it."""
        return self.prompt_bytes + (64 << 10)


@dataclass
class _Account:
    streams: int = 0
    credit: float = 0.0
    """Requests that may come at once."""
    t_s: float = -math.inf
    """When `credit` was that."""


class Peers:
    """Who holds how many streams and has sent how many requests lately."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._accounts: dict[str, _Account] = {}
        self._forget_at = _FORGET_AT

    @contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """Count a stream of `peer` for as long as it is open.

        Raises
        ------
        Refused
            If it has too many.
        """
        account = self._account(peer)
        if account.streams >= self._limits.streams_per_peer:
            raise Refused(f"you have {account.streams} streams open here; more are not taken")
        account.streams += 1
        try:
            yield
        finally:
            account.streams -= 1
            if len(self._accounts) >= self._forget_at:
                self._forget()
                self._forget_at = max(_FORGET_AT, 2 * len(self._accounts))

    def charge(self, peer: str) -> None:
        """Count one request of `peer`.

        Raises
        ------
        Refused
            If that is one too many for now.
        """
        rate = self._limits.requests_per_s
        if rate == math.inf:
            return
        account, now_s = self._account(peer), time.monotonic()
        account.credit = min(max(1.0, rate), account.credit + (now_s - account.t_s) * rate)
        account.t_s = now_s
        if account.credit < 1:
            raise Refused(
                f"you may send {rate:g} requests per second here; try again in {(1 - account.credit) / rate:.2g} s"
            )
        account.credit -= 1

    def _account(self, peer: str) -> _Account:
        return self._accounts.setdefault(peer, _Account())

    def _forget(self) -> None:
        """Drop accounts that are as good as new, so that peers who come and go leave nothing behind."""
        full_again_s = 1 / min(1.0, self._limits.requests_per_s)
        before_s = time.monotonic() - full_again_s
        self._accounts = {
            peer: account for peer, account in self._accounts.items() if account.streams or account.t_s > before_s
        }


def peer_of(address: str, metadata: Mapping[str, str | bytes], behind_proxy: bool) -> str:
    """Who asks: the host of a gRPC address (``ipv4:HOST:PORT``) or, `behind_proxy`, whom the proxy names."""
    if behind_proxy and FORWARDED_FOR in metadata:
        return str(metadata[FORWARDED_FOR])
    return unquote(address.partition(":")[2].rpartition(":")[0]) or address
