"""Each way from a client to an expert."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio

from erlib.machine import processes
from erlib.serving import wire
from erlib.serving.nginx import Nginx
from tests.support.gateways import free_port
from tests.support.standin_expert import StandIn, front, standin

FRONTS = ["gateway", "NGINX", "NGINX that relays"]


@asynccontextmanager
async def way(kind: str, work: Path) -> AsyncIterator[tuple[grpc.aio.Channel, StandIn, str]]:
    """A channel to a gateway or to what is in front of it, the expert behind, and where the channel leads."""
    relays = kind == "NGINX that relays"
    async with standin() as expert, front(expert.url, hands_over=relays) as door:
        before = None
        if kind != "gateway":
            known = ([expert.url], [door.asked_at]) if relays else ()
            before = Nginx(free_port(), [door.url], work, "127.0.0.1", *known)
            before.start()
        try:
            url = before.url if before else door.url
            async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
                yield channel, expert, url
        finally:
            if before:
                processes.stop([before.process], grace_s=2)
