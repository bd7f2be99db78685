"""What a routed request spends its time on before its first token, in the order of time."""

from __future__ import annotations

GATEWAY_SPANS = ("queue", "vectorise", "svd", "kmeans", "forward")
"""What the gateway adds before the expert has the prompt."""
SPANS = (*GATEWAY_SPANS, "first_byte")
"""The last is the expert's own: from the forwarded prompt to the first response."""


def header(span: str) -> str:
    """Metadata key under which a client is told of a span (ns)."""
    return f"er-{span.replace('_', '-')}-ns"


def column(span: str) -> str:
    """Column of the records that holds it (ns)."""
    return f"route_{span}_ns"
