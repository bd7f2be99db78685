"""A configuration, scaled to this machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
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
from erlib.machine import hardware
from erlib.workload import lengths

KvCache = Literal["f16", "u8"]

_SLACK_TOKENS = 8

_LEAST_INPUT_TOKENS = 25
"""Two dozen words: what c-BTM's router can tell topics by."""


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
    trained: bool
    """Whether each instance has the adapter of its own cluster."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that one instance's KV cache holds."""
        return self.kv_blocks * config.KV_BLOCK_TOKENS


def longest_sequence_tokens(profile: Profile, workload: Paper | Literal["preliminary"]) -> int:
    """Longest prompt and answer that a workload makes at this profile's scale, with a little slack.

    Paper 1: base prompt (mean + 4 sd), its answer, and the continuation's answer; preliminary: base prompt and its
    answer. Paper 2: longest prompt and answer.
    """
    settings, scale = profile.workload, profile.scale
    if workload == "p2":
        prompt: float = P2_MAX_INPUT_TOKENS
        answers = settings.p2_max_output_tokens
    else:
        prompt = settings.p1_input_tokens + 4 * settings.p1_input_sd
        answers = 2 * settings.p1_output_tokens if workload == "p1" else settings.preliminary_output_tokens
    return math.ceil(prompt / scale.inputs + answers / scale.tokens) + _SLACK_TOKENS


def _scaled_kv_blocks(profile: Profile, configuration: Configuration) -> int:
    """So many KV blocks that as many typical sequences fit, for each user, as in the papers' cache."""
    prompt, answer = lengths.typical_tokens(config.paper_of(configuration.id), profile.workload)
    sequences = kv_tokens(configuration.system) / (prompt + answer) / profile.scale.users
    tokens = profile.scaled_input_tokens(prompt) + profile.scaled_tokens(answer)
    return round(sequences) * math.ceil(tokens / config.KV_BLOCK_TOKENS)


def laptop_system(profile: Profile, configuration: Configuration, max_sequence_tokens: int | None = None) -> LaptopPlan:
    """Scale a configuration to this machine, keeping the papers' ratios of users to slots and to cached sequences.

    Parameters
    ----------
    profile : Profile
        Its ``scale`` divides batch size and what the KV cache holds.
    configuration : Configuration
        ``laptop.batch_size`` and ``laptop.kv_blocks`` override the scaled values.
    max_sequence_tokens : int, optional
        Longest sequence to be served; by default :func:`longest_sequence_tokens`.

    Raises
    ------
    ConfigError
        If an overridden KV cache cannot hold one sequence; the message names the number that can. A scaled one holds
        at least one of the longest, and at most as many as run together.
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
    batch_size = laptop.batch_size or profile.scaled_users(system.batch_size)
    scaled_blocks = max(one_sequence, min(batch_size * one_sequence, _scaled_kv_blocks(profile, configuration)))
    return LaptopPlan(
        config=configuration.id,
        size=laptop.size,
        dtype=laptop.dtype,
        kv_cache=laptop.kv_cache,
        instances=laptop.instances,
        batch_size=batch_size,
        kv_blocks=laptop.kv_blocks or scaled_blocks,
        max_sequence_tokens=max_sequence_tokens,
        threads=max(1, hardware.cores() * system.tensor_parallel // GPUS),
        trained=laptop.weights == "trained",
    )


def distortions(profile: Profile) -> Iterator[str]:
    """Why systems at this profile's scale behave in another way than the papers' do, a line each."""
    for name in dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs]):
        configuration = config.load_configuration(name)
        if configuration.routing != "direct" and laptop_system(profile, configuration).batch_size < 2:
            slots = f"{configuration.system.batch_size} slots for an expert, divided by {profile.scale.users:g}"
            yield f"{name} has one slot ({slots}), so that nothing runs together: lower scale.users"
    for paper in ("p1", "p2"):
        prompt, _ = lengths.typical_tokens(paper, profile.workload)
        if prompt / profile.scale.inputs < _LEAST_INPUT_TOKENS:
            scaled = f"{prompt:.0f} tokens, divided by {profile.scale.inputs:g}"
            yield f"paper {paper[1]}'s prompts ({scaled}) have too few words to route by: lower scale.input_tokens"


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
            kv_cache_gb=cache_gb(model, kv_dtype, tokens),
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


def cache_gb(model: str, kv_dtype: Dtype, tokens: int) -> float:
    """A KV cache as the papers print it, for so many tokens: half a token more, lest rounding takes one away."""
    return (tokens + 0.5) * shape(model).kv_bytes_per_token(kv_dtype) / 1e9


def needed(profile: Profile) -> list[tuple[Size, Dtype]]:
    """Engines that a profile's experiments use, and all formats at the depth at which quality is measured."""
    names = dict.fromkeys([*profile.paper1.configs, *profile.paper2.configs, profile.overhead.config])
    systems = [config.load_configuration(name).laptop for name in names]
    wanted: list[tuple[Size, Dtype]] = [(laptop.size, laptop.dtype) for laptop in systems]
    wanted += [("large", dtype) for dtype in profile.preliminary.dtypes]
    wanted += [("quality", dtype) for dtype in BYTES_PER_VALUE]
    return list(dict.fromkeys(wanted))
