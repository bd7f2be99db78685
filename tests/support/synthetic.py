"""Seeded records with the shape of real ones, so that metrics and figures can be tested without servers.

Requests wait in line for a slot, wave after wave, on the server of their cluster. Nothing here is a measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa

from erlib import cache, config
from erlib.load import records
from erlib.serving.spans import SPANS

# seconds per decode step: alone, and added by each request in the batch
STEP_S = {"large": (0.020, 0.0035), "small": (0.012, 0.0016)}
DTYPE = {"fp16": 1.0, "fp8": 0.95, "int8": 1.05, "int4": 1.15}


def point(
    paper: str,
    experiment: str,
    name: str,
    users: int,
    repeat: int,
    *,
    mix: str = "uniform",
    size: str = "large",
    dtype: str = "fp16",
    servers: int = 8,
    slots: int = 4,
    tokens: int | None = 50,
    turns: tuple[str, ...] = ("base",),
    gateway: bool = True,
    kmeans: bool = True,
    failures: int = 0,
    host: str = "2 x Synthetic CPU, 24 GB",
) -> list[dict[str, Any]]:
    """Rows of one point; `tokens` None draws an answer length per request, as an end of sequence would."""
    rng = np.random.default_rng([ord(c) for c in f"{paper}{experiment}{name}{mix}"] + [users, repeat])
    weights = np.exp(-((np.arange(8) - 3.5) ** 2) / 8) if mix == "normal" else np.ones(8)
    cluster = rng.choice(8, users, p=weights / weights.sum()) if mix == "normal" else np.arange(users) % 8
    server = cluster % servers
    rank = pd.Series(server).groupby(server).cumcount().to_numpy()
    load = np.bincount(server, minlength=servers)
    start = int(rng.integers(10**12, 10**13))
    free = np.zeros(users)
    rows = []
    for turn in turns:
        n = np.full(users, tokens) if tokens else 1 + rng.poisson(12, users)
        batch = np.minimum(load, slots)[server]
        alone, each = (part * DTYPE[dtype] / (1 if servers > 1 else 3) for part in STEP_S[size])
        # eight engines share the cores that one engine has to itself
        step = (alone + each * batch) * (1 + 0.5 * (servers > 1) * min(users, 8) / 8)
        wave = rank // slots
        span = {name: rng.lognormal(mu, 0.8, users) for name, mu in zip(SPANS, ROUTE_MU, strict=True)}
        prefill = 0.02 + step * (rank % slots + 1) * (1 if turn == "base" else 1.3)
        send = free + rng.uniform(0, 0.02, users)
        for user in range(users):
            wait = wave[user] * n[user] * step[user] + prefill[user] + gateway * sum(span[s][user] for s in SLOW) / 1e3
            gaps = step[user] * rng.lognormal(0, 0.15, n[user] - 1)
            stamps = send[user] + wait + np.concatenate([[0], np.cumsum(gaps)])
            token_ns = (start + stamps * 1e9).astype(np.int64)
            free[user] = stamps[-1]
            ok = user >= failures
            rows.append(
                {
                    **dict(source="measured", paper=paper, experiment=experiment, config=name, mix=mix, users=users),
                    "relay": "front" if gateway else None,
                    **dict(repeat=repeat, user=user, turn=turn, cluster=int(cluster[user]), expert=int(server[user])),
                    **dict(prompt=user, input_tokens=14 if turn == "base" else 64, output_tokens=int(n[user]) * ok),
                    "t_send_ns": int(start + send[user] * 1e9),
                    "t_first_ns": int(token_ns[0]) if ok else None,
                    "t_last_ns": int(token_ns[-1]) if ok else None,
                    "token_ns": token_ns.tolist() if ok else [],
                    "status": "ok" if ok else "UNAVAILABLE",
                    **{
                        f"route_{s}_ns": (int(span[s][user] * 1e6) if kmeans or s not in CLASSIFY else 0)
                        if gateway
                        else None
                        for s in SPANS
                    },
                    **dict(client_lag_p99_ms=0.4, client_lag_max_ms=2.0, client_cpu_cores=0.1, server_tokens=0),
                    "point_hash": cache.digest(paper, experiment, name, mix, users, repeat),
                    **dict(profile="synthetic", profile_hash="0" * 16, git_commit="0" * 40, host=host),
                    **dict(versions="{}", seed=0, started="2024-01-01T00:00:00Z"),
                }
            )
    return rows


CLASSIFY = ("vectorise", "svd", "kmeans")
SLOW = ("queue", *CLASSIFY, "forward")
ROUTE_MU = (0.0, 0.6, -0.6, -2.0, 0.3, 4.0)  # log ms: queue, vectorise, svd, kmeans, forward, first_byte


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as :func:`erlib.load.records.read` would return them."""
    return pa.Table.from_pylist(rows, schema=records.SCHEMA).to_pandas()


def load_rows(profile: config.Profile, paper: str) -> Iterator[dict[str, Any]]:
    """The load experiment of one paper, every configuration, level, mix and repeat of `profile`."""
    sweep = profile.paper1 if paper == "p1" else profile.paper2
    for name in sweep.configs:
        spec = config.load_configuration(name)
        for mix in sweep.mixes:
            for users in sweep.users:
                for repeat in range(sweep.repeats):
                    yield from point(
                        *(paper, "load", name, users, repeat),
                        mix=mix,
                        size=spec.laptop.size,
                        dtype=spec.laptop.dtype,
                        servers=spec.laptop.instances,
                        slots=profile.scaled_users(spec.system.batch_size),
                        tokens=profile.scaled_tokens(profile.workload.p1_output_tokens) if paper == "p1" else None,
                        turns=("base", "continuation") if paper == "p1" else ("base",),
                        gateway=spec.routing in ("expert_router", "replicas"),
                        kmeans=spec.routing == "expert_router",
                    )


def preliminary_rows(profile: config.Profile) -> Iterator[dict[str, Any]]:
    """The preliminary experiment of paper 2."""
    sweep = profile.preliminary
    for dtype in sweep.dtypes:
        for parallel in (4, 8):
            for batch in sweep.batch_sizes:
                for users in sweep.users:
                    for repeat in range(sweep.repeats):
                        yield from point(
                            *("p2", "preliminary", f"p2.{dtype}-tp{parallel}-bs{batch}", users, repeat),
                            dtype=dtype,
                            servers=1,
                            slots=profile.scaled_users(batch),
                            tokens=profile.scaled_tokens(profile.workload.preliminary_output_tokens),
                            gateway=False,
                        )


def overhead_rows(profile: config.Profile) -> Iterator[dict[str, Any]]:
    """The routing-overhead experiment."""
    for relay in get_args(config.Relay):
        for users in profile.overhead.users:
            for repeat in range(profile.overhead.repeats):
                rows = point("p2", "overhead", profile.overhead.config, users, repeat, size="small", tokens=8)
                yield from (
                    row | {"relay": relay, "point_hash": cache.digest(row["point_hash"], relay)} for row in rows
                )
