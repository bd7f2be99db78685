"""What may stand between users and simulated engines, by name.

``hardware``
    Nothing.
``harness``
    Gateways that relay few streams at a time, a client of limited speed, and the papers' routing latency. A hypothesis
    whose numbers were fitted to the papers' statements (:data:`HARNESS`), never a measurement.
``pinned-host``
    Eight servers whose processes share one core, because each was started with ``mpirun -n 1``; a hypothesis about how
    the papers' servers were started, with what a core takes measured (``benchmarks.host_binding``), and nothing fitted.
``thread-client``
    One client process with a thread per user, as both papers have it (section IV), with what a token costs it measured
    (``benchmarks.client_threads``), and nothing fitted. That it ran in Python, with ``tritonclient``, is a hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from erlib import paths
from erlib.config import ConfigError, Paper
from erlib.config.choices import Preset
from erlib.load import metrics
from erlib.paper_scale.clock import HARDWARE, Harness

HARNESS: dict[Paper, Harness] = {
    "p1": Harness("harness", 160, routing_mean_s=0.442, routing_sd_s=0.302, client_tokens_per_s=2000),
    "p2": Harness("harness", 48, routing_mean_s=0.442, routing_sd_s=0.302),
}
"""Routing latency as both papers state it (section VI); streams and client speed fitted to their claims."""

HOST_BINDING = paths.FACTS / "host_binding.csv"
"""What ``benchmarks.host_binding`` has measured: CPU time per streamed token by process, in microseconds."""
HOST = ("tritonserver", "preprocessing", "postprocessing")
"""The processes of a server but for its engine."""
BUSY_FROM_USERS = 50
"""Where the servers' core has no time left, so that a token costs what it costs under load."""
CLIENT_THREADS = paths.FACTS / "client_threads.csv"
"""What ``benchmarks.client_threads`` has measured: CPU time per token of a client that is offered too many."""


def preset(name: Preset, paper: Paper) -> Harness:
    """What a preset puts around the engines of a paper; change single numbers with :func:`dataclasses.replace`.

    Raises
    ------
    ConfigError
        If there is no such preset.
    """
    if name == "hardware":
        return HARDWARE
    if name == "harness":
        return HARNESS[paper]
    if name == "pinned-host":
        return pinned_host()
    if name == "thread-client":
        return thread_client()
    raise ConfigError(f"preset must be one of {', '.join(get_args(Preset))}, not {name!r}")


def host_us(programs: Sequence[str], servers: int, cores: int) -> float:
    """Microseconds that a streamed token costs in some of a host's processes (:data:`HOST`).

    The mean over rounds and levels of users. So many servers share so many cores; each has one process per Python
    model, and a response for each token.
    """
    rows = pd.read_csv(HOST_BINDING)
    rows = rows[(rows["servers"] == servers) & (rows["cores"] == cores) & (rows["users"] >= BUSY_FROM_USERS)]
    rows = rows[(rows["processes"] == 1) & (rows["tokens_per_response"] == 1)]
    return float(rows[[f"{program}_us_per_token" for program in programs]].sum(axis=1).to_numpy().mean())


def host_binding() -> pd.DataFrame:
    """What was measured, by condition and number of users: means over rounds.

    Returns
    -------
    DataFrame
        ``tokens_per_s`` with ``ci95`` (half of its 95 % interval; missing for one round), ``tpot_mean_s`` and
        ``ttft_mean_s`` (all users at once), ``busy_cores``; CPU time per token in microseconds, ``host_us`` of Triton
        and the Python processes around the engine, ``engine_us`` of what stood in its place, ``users_us`` of users.
    """
    rows = pd.read_csv(HOST_BINDING)
    rows["host_us"] = rows[[f"{program}_us_per_token" for program in HOST]].sum(axis=1)
    rows = rows.rename(columns={"tensorrt_llm_us_per_token": "engine_us", "users_us_per_token": "users_us"})
    shown = ["tokens_per_s", "tpot_mean_s", "ttft_mean_s", "busy_cores", "host_us", "engine_us", "users_us"]
    by = rows.groupby(["servers", "cores", "processes", "tokens_per_response", "users"])
    table, rate = by[shown].mean(), by["tokens_per_s"]
    table.insert(1, "ci95", metrics.half_interval(rate.std(), rate.count()))
    return table


def pinned_host(core_speed: float = 1.0) -> Harness:
    """Servers of one GPU share one core; one of more than two ranks has a socket, and one postprocessing process.

    Every message waits for the core to have brought those before it; every prompt, for those before it to have been
    preprocessed. What the engines themselves need of the core is not in it, nor is what a core loses by turns. The core
    is `core_speed` times as fast as the one that was measured.
    """
    answer_tokens = float(pd.read_csv(HOST_BINDING, usecols=["answer_tokens"])["answer_tokens"].iloc[0])

    def around(message: Sequence[str], servers: int, cores: int, per_server: bool = False) -> Harness:
        token_us = host_us(message, servers, cores)
        request_us = host_us(["preprocessing"], servers, cores) * answer_tokens
        return Harness(
            "pinned-host" if core_speed == 1 else f"pinned-host-{core_speed:g}",
            client_tokens_per_s=core_speed * 1e6 / token_us,
            client_slope=math.inf,
            per_request_s=request_us * 1e-6 / core_speed,
            client_per_server=per_server,
        )

    wide = around(["postprocessing"], 1, 2, per_server=True)
    return replace(around(["tritonserver", "postprocessing"], 8, 1), tensor_parallel=wide)


def client_cost() -> pd.DataFrame:
    """What a token costs a client with a thread per user, by ``cores`` and ``users``: means over rounds.

    Returns
    -------
    DataFrame
        ``us_per_token`` of CPU time with ``ci95`` (half of its 95 % interval; missing for one round), and ``rounds``.
    """
    by = pd.read_csv(CLIENT_THREADS).groupby(["cores", "users"])["us_per_token"]
    rounds = by.count()
    return pd.DataFrame({"us_per_token": by.mean(), "ci95": metrics.half_interval(by.std(), rounds), "rounds": rounds})


def thread_client(core_speed: float = 1.0) -> Harness:
    """All tokens wait for one interpreter, which has less time for each the more threads want it.

    What is measured on one core is drawn as a line with one bend (:class:`Harness`); how far off that is, the notice
    beside the file says. How long it takes until all threads have sent is not in it. The core is `core_speed` times as
    fast as the one that was measured.
    """
    cost = client_cost().loc[1, "us_per_token"]
    knee, us, slope = _bent_line(cost.index.to_numpy(), cost.to_numpy())
    name = "thread-client" if core_speed == 1 else f"thread-client-{core_speed:g}"
    return Harness(name, client_tokens_per_s=core_speed * 1e6 / us, client_knee=knee, client_slope=slope)


def _bent_line(x: npt.NDArray[np.int64], y: npt.NDArray[np.float64]) -> tuple[int, float, float]:
    """Knee (one of x), a and b of ``a * (1 + max(0, x - knee) / b)`` with the least relative errors."""
    tried = []
    for knee in x[:-1]:
        rising = np.maximum(0, x - knee)
        (height, rise), (error,), *_ = np.linalg.lstsq(np.stack([1 / y, rising / y], axis=1), np.ones(len(x)), None)
        tried.append((error, int(knee), float(height), float(height / rise)))
    return min(tried)[1:]
