"""A configuration, scaled to this machine."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from typing import Literal

from erlib import config
from erlib.config import ConfigError, Configuration, Dtype, LaptopSystem, Paper, PaperSystem, Profile
from erlib.engines.llama import (
    BYTES_PER_VALUE,
    FOREIGN_CONTEXT_BYTES,
    GPUS,
    P2_MAX_INPUT_TOKENS,
    WORKSPACE_BYTES,
    Size,
    block_tokens,
    kv_tokens,
    most_kv_tokens,
    shape,
)

KvCache = Literal["f16", "u8"]


_SLACK_TOKENS = 8


@dataclass(frozen=True)
class LaptopPlan:
    """What stands for one configuration on this machine; batch size, KV blocks and threads are per instance."""

    config: str
    size: Size
    dtype: Dtype
    kv_cache: KvCache
    """Precision of the KV cache. ``u8`` also stands for FP8, which a CPU does not have."""
    instances: int
    batch_size: int
    kv_blocks: int
    max_sequence_tokens: int
    threads: int

    @property
    def kv_tokens(self) -> int:
        """Tokens that one instance's KV cache holds."""
        return self.kv_blocks * config.KV_BLOCK_TOKENS


def longest_sequence_tokens(profile: Profile, workload: Paper | Literal["preliminary"]) -> int:
    """Longest prompt and answer that a workload makes at this profile's scale, with a little slack.

    Paper 1: base prompt (mean + 4 sd), its answer, and the continuation's answer; preliminary: base prompt and its
    answer. Paper 2: longest prompt and answer.
    """
    settings = profile.workload
    if workload == "p2":
        longest: float = P2_MAX_INPUT_TOKENS + settings.p2_max_output_tokens
    else:
        answers = 2 * settings.p1_output_tokens if workload == "p1" else settings.preliminary_output_tokens
        longest = settings.p1_input_tokens + 4 * settings.p1_input_sd + answers
    return math.ceil(longest / profile.scale.tokens) + _SLACK_TOKENS


def laptop_system(profile: Profile, configuration: Configuration, max_sequence_tokens: int | None = None) -> LaptopPlan:
    """Scale a configuration to this machine, keeping the papers' ratios of users to slots and to KV tokens.

    Parameters
    ----------
    profile : Profile
        Its ``scale`` divides batch size (users) and KV tokens (users and tokens).
    configuration : Configuration
        ``laptop.batch_size`` and ``laptop.kv_blocks`` override the scaled values.
    max_sequence_tokens : int, optional
        Longest sequence to be served; by default :func:`longest_sequence_tokens`.

    Raises
    ------
    ConfigError
        If an overridden KV cache cannot hold one sequence; the message names the number that can. A scaled one is
        rounded up to hold one.
    """
    laptop, system = configuration.laptop, configuration.system
    if max_sequence_tokens is None:
        max_sequence_tokens = longest_sequence_tokens(profile, config.paper_of(configuration.id))
    one_sequence = math.ceil(max_sequence_tokens / config.KV_BLOCK_TOKENS)
    if laptop.kv_blocks is not None and laptop.kv_blocks < one_sequence:
        raise ConfigError(
            f"{configuration.id}: laptop.kv_blocks is {laptop.kv_blocks}, but one sequence of "
            f"{max_sequence_tokens} tokens needs {one_sequence} blocks of {config.KV_BLOCK_TOKENS}"
        )
    scaled_tokens = kv_tokens(system) / (profile.scale.users * profile.scale.tokens)
    scaled_blocks = max(one_sequence, math.ceil(scaled_tokens / config.KV_BLOCK_TOKENS))
    return LaptopPlan(
        config=configuration.id,
        size=laptop.size,
        dtype=laptop.dtype,
        kv_cache=laptop.kv_cache,
        instances=laptop.instances,
        batch_size=laptop.batch_size or profile.scaled_users(system.batch_size),
        kv_blocks=laptop.kv_blocks or scaled_blocks,
        max_sequence_tokens=max_sequence_tokens,
        threads=max(1, len(os.sched_getaffinity(0)) * system.tensor_parallel // GPUS),
    )


def preliminary_configurations(profile: Profile) -> list[Configuration]:
    """Systems of paper 2's search for its baselines (section IV-C): data types x TP8, TP4 x batch sizes, one instance.

    The paper states no KV caches. They hold the whole batch (and no less than an engine's longest sequence), so that
    the batch size alone limits what runs together, wherever that fits the memory that the weights leave.
    """
    settings, model = profile.preliminary, "llama-3-70b"
    sequence_blocks = -(-longest_sequence_tokens(profile, "preliminary") // config.KV_BLOCK_TOKENS)
    full = profile.model_copy(update={"scale": config.Scale(users=1, tokens=1)})
    drawn, longest = (
        block_tokens(model) * math.ceil(longest_sequence_tokens(full, workload) / block_tokens(model))
        for workload in ("preliminary", "p2")
    )
    found = []
    for dtype, tensor_parallel, batch_size in itertools.product(settings.dtypes, (8, 4), settings.batch_sizes):
        kv_dtype: Dtype = "fp8" if dtype == "fp8" else "fp16"
        weights = shape(model).loaded_bytes(dtype, tensor_parallel)
        taken = WORKSPACE_BYTES + (tensor_parallel - 1) * FOREIGN_CONTEXT_BYTES
        most = most_kv_tokens(model, dtype, kv_dtype, tensor_parallel, weights, taken)
        tokens = min(most, max(batch_size * drawn, longest))
        system = PaperSystem(
            model=model, dtype=dtype, kv_dtype=kv_dtype, tensor_parallel=tensor_parallel, instances=1,
            batch_size=batch_size, weights_gb=weights / 1e9,
            # half a token more, lest rounding takes one away
            kv_cache_gb=(tokens + 0.5) * shape(model).kv_bytes_per_token(kv_dtype) / 1e9,
        )  # fmt: skip
        slots = profile.scaled_users(batch_size)
        laptop = LaptopSystem(
            size="large", dtype=dtype, kv_cache="u8" if dtype == "fp8" else "f16", instances=1,
            batch_size=slots, kv_blocks=slots * sequence_blocks,
        )  # fmt: skip
        title = f"70B {dtype.upper()} TP{tensor_parallel}, batch size {batch_size}"
        name = f"p2.{dtype}-tp{tensor_parallel}-bs{batch_size}"
        found.append(Configuration(id=name, title=title, routing="direct", paper=system, laptop=laptop))
    return found


def needed(profile: Profile) -> list[tuple[Size, Dtype]]:
    """Engines that a profile's experiments use, and all formats at the depth at which quality is measured."""
    names = dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config])
    systems = [config.load_configuration(name).laptop for name in names]
    wanted: list[tuple[Size, Dtype]] = [(laptop.size, laptop.dtype) for laptop in systems]
    wanted += [("large", dtype) for dtype in profile.preliminary.dtypes]
    wanted += [("quality", dtype) for dtype in BYTES_PER_VALUE]
    return list(dict.fromkeys(wanted))
