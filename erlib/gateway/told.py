"""What a client is told about its request, beside the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from erlib.gateway.callers import Caller, pairs
from erlib.gateway.telemetry import Request
from erlib.serving import wire

Distances = Callable[[str], Sequence[float]]
"""Prompt -> its distance to each cluster's centre."""


class Told:
    """Metadata and parameters; see :mod:`erlib.gateway.service`.

    Parameters
    ----------
    index : int
        Which of the gateways this is.
    distances : Distances, optional
        For clients that ask for an explanation.
    """

    def __init__(self, index: int, distances: Distances | None):
        self._index = index
        self._distances = distances

    def who(self, request: Request) -> dict[str, int | str]:
        """What is told when a request has been forwarded."""
        return {"er-gateway": self._index, wire.EXPERT: request.expert, **request.span_metadata}

    def explanation(self, request: Request) -> dict[str, int | str]:
        """What is told besides to a client that wants to know all of it."""
        told = self.who(request) | {"er-replica": request.replica}
        if self._distances is not None:
            told["er-distances"] = ",".join(f"{distance:.6g}" for distance in self._distances(request.prompt))
        return told

    def at_the_end(self, caller: Caller, request: Request) -> None:
        """Set the call's trailing metadata."""
        if caller.explain and request.expert >= 0:
            ours = request.explanation or self.who(request)
        else:
            ours = {name: ns for name, ns in request.span_metadata.items() if name == "er-first-byte-ns"}
        caller.context.set_trailing_metadata((*request.trailing_metadata, *pairs(ours)))
