"""Claims that arithmetic settles: Table I's numbers, computed."""

from __future__ import annotations

import math
from collections.abc import Callable

from erlib import config
from erlib.claims.finding import WORDS, Finding, number, predicate
from erlib.engines import llama, table1
from erlib.workload import prompts


def _system(name: str) -> config.PaperSystem:
    return config.load_configuration(name).system


def _weights_gb(name: str, dtype: config.Dtype | None = None) -> float:
    system = _system(name)
    return llama.shape(system.model).parameters * llama.BYTES_PER_VALUE[dtype or system.dtype] / 1e9


def _loaded_thousand_mib(name: str) -> float:
    system = _system(name)
    return llama.shape(system.model).loaded_bytes(system.dtype, system.tensor_parallel) / 2**20 / 1000


def _gpu_gb(name: str) -> float:
    table = table1.recomputed_table1(config.paper_of(name)).set_index("config")
    return float(table["gpu_gb"][name])


QUANTITIES: dict[str, tuple[str, Callable[[str], float]]] = {
    "weights_gb": ("parameters x bytes [GB]", _weights_gb),
    "weights_loaded_thousand_mib": ("thousands of MiB that are loaded", _loaded_thousand_mib),
    "weights_as_int8_gb": ("parameters x 1 byte [GB]", lambda name: _weights_gb(name, "int8")),
    "kv_tokens": ("tokens that the KV cache holds", lambda name: llama.kv_tokens(_system(name))),
    "gpu_gb": ("weights, KV cache and gateways on one GPU [GB]", _gpu_gb),
    "gateway_mb_per_gpu": ("MB of 16 gateways on each of 8 GPUs", lambda _: 16 * 1138 / 8),
    "parameters_billion": (
        "parameters of all instances [10^9]",
        lambda name: _system(name).instances * llama.shape(_system(name).model).parameters / 1e9,
    ),
    "response_tokens_million": (
        "users x repeats x prompts x tokens x systems [10^6]",
        lambda _: sum(_P1_USERS) * 10 * 2 * 1200 * 4 / 1e6,
    ),
    "query_heads_per_kv_head": (
        "query heads per KV head",
        lambda name: llama.shape(_system(name).model).heads / llama.shape(_system(name).model).kv_heads,
    ),
    "slots": ("batch size x instances", lambda name: _system(name).batch_size * _system(name).instances),
    "batch_size": ("batch size", lambda name: _system(name).batch_size),
    "hottest_expert_users": (
        "users of the busiest expert, normal mix with an sd of two clusters, 1,000 users",
        lambda _: 1000 * prompts.mix_shares("normal", 8, 2.0).max(),
    ),
    "p1_slowest_user_tokens_per_s": ("1,200 tokens over 1,200 x 1 s", lambda _: 1200 / (1200 * 1.0)),
    "p1_admitted_streams": (
        "streams admitted at 1,000 users, against 2,000 tokens/s x 0.1 s",
        lambda name: min(1000, _system(name).batch_size * _system(name).instances),
    ),
    "p2_kv_gain_gb": ("KV cache of B less that of A [GB]", lambda _: _kv_gb("p2.B") - _kv_gb("p2.A")),
    "network_over_routing": ("17 µs over the routing latency of 442 ms", lambda _: 17e-6 / 0.442),
}
"""Name -> meaning, and its value for a configuration (``all``: not of one configuration)."""


WORDS["quantity"] = lambda name: QUANTITIES[name][0]


def _kv_gb(name: str) -> float:
    return _system(name).kv_cache_gb * _system(name).instances


def _of(name: str) -> str:
    return "" if name == "all" else f"{name} "


@predicate("{quantity} = {printed} ± {tolerance}", arithmetic=True)
def computes_to(*, quantity: str, printed: dict[str, float], tolerance: float) -> Finding:
    """What the architecture gives is what is printed, within a relative `tolerance`."""
    found = {name: QUANTITIES[quantity][1](name) for name in printed}
    off = {name: printed[name] / value - 1 for name, value in found.items()}
    text = ", ".join(
        f"{_of(name)}computed {number(value, 4)}, printed {number(printed[name], 4)} ({off[name]:+.1%})"
        for name, value in found.items()
    )
    return Finding(all(abs(value) <= tolerance + 1e-9 for value in off.values()), text)


@predicate("{quantity} {of} {bounds}", arithmetic=True)
def computes_within(*, quantity: str, of: list[str], low: float = 0, high: float = math.inf) -> Finding:
    """What follows from the papers' numbers lies between `low` and `high`."""
    found = {name: QUANTITIES[quantity][1](name) for name in of}
    text = ", ".join(f"{_of(name)}{number(value, 4)}" for name, value in found.items())
    return Finding(all(low <= value <= high for value in found.values()), text)


_P1_USERS: list[int] = [1, *range(100, 1001, 100)]
