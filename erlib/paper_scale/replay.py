"""A trace instead of a paper's workload: the same requests at the same moments, put to a system in virtual time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from erlib.config import Mix
from erlib.load import metrics
from erlib.paper_scale import clock
from erlib.paper_scale.batching import CannotServe, Engine, System
from erlib.paper_scale.clock import HARDWARE, Harness
from erlib.paper_scale.instances import Request
from erlib.workload import prompts, traces
from erlib.workload.prompts import Prompt
from erlib.workload.traces import Trace

REFUSED = "refused"
"""``status`` of a request that no engine of the system can hold."""


def asked(
    trace: Trace, clusters: int = 8, mix: Mix = "uniform", sigma: float = 2.0, seed: int = 0
) -> tuple[list[Prompt], list[float]]:
    """What users ask, and when they come, as :func:`erlib.paper_scale.clock.trace` takes it.

    Parameters
    ----------
    trace : Trace
    clusters : int
        Experts of the system. A trace of more of them has neighbours share one.
    mix : {"uniform", "normal"}
        How requests spread over the clusters, in random order, where the trace does not say whose they are.
    sigma : float
        Width of the normal mix, in clusters.
    seed : int

    Returns
    -------
    list of Prompt
        Without texts; ``prompt`` is the request's place in the trace.
    list of float
        Moments, in seconds.
    """
    if trace.cluster is None:
        rng = np.random.default_rng([seed, len(trace)])
        cluster = prompts.spread(len(trace), prompts.mix_shares(mix, clusters, sigma), rng)
    else:
        cluster = trace.cluster * clusters // max(clusters, len(trace.experts))
    return traces.asked(trace, cluster.tolist(), range(len(trace))), trace.arrival_s.tolist()


def replay(
    system: System, drawn: Sequence[Prompt], starts_s: Sequence[float], around: Harness = HARDWARE
) -> pd.DataFrame:
    """What each request of a trace is like to who asks.

    Parameters
    ----------
    system : System
    drawn, starts_s
        As :func:`asked` returns them.
    around : Harness

    Returns
    -------
    DataFrame
        One row per request, in the trace's order: columns of :data:`erlib.load.records.SCHEMA` (``source`` is
        "simulated") and those of :func:`erlib.load.metrics.latencies`. Requests that no engine can hold, because of
        their length, have ``status`` "refused" and no latencies, and load nobody; :func:`attained` counts them.

    Raises
    ------
    CannotServe
        If none can be held.
    """
    engine = Engine[Request](system)
    held = [_holds(engine, prompt) for prompt in drawn]
    kept = [place for place, can in enumerate(held) if can]
    if not kept:
        raise CannotServe(f"{system.config}: none of the {len(drawn)} requests fits into an engine")
    happened = clock.trace(
        system, [drawn[place] for place in kept], continues=False, around=around,
        starts_s=[starts_s[place] for place in kept],
    )  # fmt: skip
    experts = system.experts
    rows = [
        (kept[request.user], experts[request.server], round(request.sent_s * 1e9), int(stamps[0]), int(stamps[-1]))
        for request, stamps in zip(happened.requests, happened.token_ns(), strict=True)
    ]
    times = pd.DataFrame(rows, columns=["user", "expert", "t_send_ns", "t_first_ns", "t_last_ns"]).set_index("user")
    about = pd.DataFrame(
        {
            "source": "simulated", "config": system.config, "point_hash": "trace", "turn": "base",
            "cluster": [prompt.cluster for prompt in drawn],
            "input_tokens": [prompt.input_tokens for prompt in drawn],
            "output_tokens": [prompt.max_tokens for prompt in drawn],
            "status": np.where(held, "ok", REFUSED),
        }
    )  # fmt: skip
    return metrics.latencies(about.join(times).rename_axis("user").reset_index())


def attained(rows: pd.DataFrame, ttft_s: float, tpot_s: float) -> float:
    """Share of all requests, refused ones included, that keep to both latencies; one token has no TPOT to miss."""
    kept = (rows["status"] == "ok") & (rows["ttft_s"] <= ttft_s) & ~(rows["tpot_s"] > tpot_s)
    return float(kept.mean())


def _holds(engine: Engine[Request], prompt: Prompt) -> bool:
    """Whether an engine has room for a prompt and its answer, and step times know them."""
    request = Request(0, "base", prompt, prompt.input_tokens, prompt.cluster, 0.0)
    longest = prompt.input_tokens + prompt.max_tokens
    try:
        engine.check(request)
    except CannotServe:
        return False
    return longest <= engine.system.steps.limits.context
