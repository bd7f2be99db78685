"""What a format costs and saves: perplexity, agreement with FP16 and tokens per second of built engines.

Size, perplexity and agreement are the formats' own. Tokens per second are this CPU's, which computes them all alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import pandas as pd

from erlib import cache, paths, provenance
from erlib.config import ConfigError, Profile
from erlib.engines import inference, laptop, llama, worker
from erlib.engines.build import BuiltEngine, build_all
from erlib.engines.checkpoint import tokenizer
from erlib.engines.laptop import KvCache
from erlib.machine.progress import Bar
from erlib.workload import corpus

EVALUATION_TOKENS = 256


def quality(built: Sequence[BuiltEngine], token_ids: npt.ArrayLike) -> pd.DataFrame:
    """Perplexity of each engine, and how often its most probable next token is the FP16 engine's of the same depth.

    Computed in float32 on consecutive windows of `EVALUATION_TOKENS` tokens, the first token of each unscored;
    `token_ids` are of a text that no engine was calibrated on.
    """
    scores = {engine.name: _score(engine, token_ids) for engine in Bar(built, "perplexity")}
    rows = []
    for engine in built:
        reference = next((e.name for e in built if e.dtype == "fp16" and e.layers == engine.layers), None)
        if reference is None:
            raise ConfigError(f"{engine.name} has no FP16 engine of the same depth beside it to be compared with")
        (nll, best), (nll_fp16, best_fp16) = scores[engine.name], scores[reference]
        rows.append(
            {
                "name": engine.name,
                "perplexity": np.exp(nll),
                "perplexity_ratio": np.exp(nll - nll_fp16),
                "argmax_agreement": np.mean(best == best_fp16),
            }
        )
    return pd.DataFrame(rows)


def _score(engine: BuiltEngine, token_ids: npt.ArrayLike) -> tuple[float, npt.NDArray[np.int64]]:
    """Mean negative log-likelihood (nats per token) and the most probable next tokens."""
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or len(ids) < 2:
        raise ConfigError(f"perplexity needs one sequence of at least two token ids, got shape {ids.shape}")
    width = min(EVALUATION_TOKENS, len(ids))
    windows = ids[: len(ids) // width * width].reshape(-1, width)
    model = openvino.Core().compile_model(engine.path / "openvino_model.xml", "CPU", inference.COMPUTE)
    losses, best = [], []
    for window in windows:
        request = model.create_infer_request()  # a new request has an empty KV cache
        request.infer(inference.feed(window))
        logits = request.get_tensor("logits").data[0, :-1].astype(np.float32)
        peak = logits.max(axis=-1)
        log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
        losses.append(log_sum - logits[np.arange(width - 1), window[1:]])
        best.append(logits.argmax(axis=-1))
    return float(np.mean(losses)), np.concatenate(best)


def speed(
    systems: Sequence[tuple[BuiltEngine, KvCache]], batches: Sequence[int], tokens: int, prompt_tokens: int = 32
) -> pd.DataFrame:
    """Tokens per second of the continuous-batching pipeline, called directly with all cores, per system and batch.

    Greedy, forced length, all (random) prompts submitted at once, after a warm-up, prefill included. Not the formats'
    own speed: a CPU computes all of them in float32. ``kv_bytes_per_token`` is the size of the cache that the pipeline
    reports, scales included, over its tokens.
    """
    rows: list[dict[str, Any]] = []
    for engine, kv_cache in Bar(systems, "tokens/s"):
        job = {"engine": str(engine.path), "kv_cache": kv_cache, "batches": list(batches)}
        job |= {"tokens": tokens, "prompt_tokens": prompt_tokens}
        rows += [
            {"name": engine.name, "kv_cache": kv_cache, **row}
            for row in worker.in_own_process("erlib.engines.speed", [job])
        ]
    return pd.DataFrame(rows)


def measure_engines(profile: Profile) -> pd.DataFrame:
    """Build and measure all engines that a profile needs; kept in ``engines.csv`` of the profile's run directory.

    Perplexity and agreement are measured at the depth ``engines.quality_layers`` on the first
    ``engines.perplexity_tokens`` tokens of held-out text: the shallower siblings are load, not language models.

    Parameters
    ----------
    profile : Profile

    Returns
    -------
    pandas.DataFrame
        One row per engine and KV cache: ``name``, ``label``, ``dtype``, ``kv_cache``, ``layers``, ``parameters``,
        ``weights_bytes``, ``bits_per_weight``, ``kv_bytes_per_token``, ``perplexity``,
        ``perplexity_ratio``, ``argmax_agreement``, one ``tokens_per_s_at_<batch>`` per batch size, and ``key``, the
        hash of what was measured.

    Raises
    ------
    ConfigError, RuntimeError
        As :func:`build_all`; ConfigError also if the held-out text is too short.
    """
    settings = profile.engines
    built = list({engine.name: engine for engine in build_all(profile, laptop.needed(profile))}.values())
    built.sort(key=lambda engine: (-engine.layers, list(llama.BYTES_PER_VALUE).index(engine.dtype)))
    code = provenance.code_digest("engines/quality.py", "engines/speed.py")
    measured = settings.perplexity_tokens, settings.speed_batches, settings.speed_tokens
    key = cache.digest(
        [engine.path.name for engine in built], measured, corpus.fingerprint(profile.corpus), profile.seed, code
    )
    file = paths.run_dir(profile.name) / "engines.csv"
    systems: list[tuple[BuiltEngine, KvCache]] = [(engine, "f16") for engine in built]
    systems += [(engine, "u8") for engine in built if engine.dtype in ("int8", "fp8")]
    known = cache.recalled(file, lambda file: pd.read_csv(file, dtype={"key": str}), "engines")  # a hash may be digits
    if known is not None and _is_whole(known, [(engine.name, kv_cache, key) for engine, kv_cache in systems]):
        print("engines: already measured with these engines and settings")
        return known
    whole = [engine for engine in built if engine.layers == settings.quality_layers]
    qualities = quality(whole, _held_out(profile))
    speeds = speed(systems, settings.speed_batches, settings.speed_tokens)
    speeds = speeds.pivot(index=["name", "kv_cache", "kv_bytes_per_token"], columns="batch", values="tokens_per_s")
    speeds = speeds.add_prefix("tokens_per_s_at_").rename_axis(columns=None).reset_index()
    fields = ["name", "label", "dtype", "layers", "parameters", "weights_bytes", "bits_per_weight"]
    table = pd.DataFrame([{field: getattr(engine, field) for field in fields} for engine in built])
    table = table.merge(qualities, how="left", on="name").merge(speeds, on="name")
    table["key"] = key
    with cache.writing(file) as partial:
        table.to_csv(partial, index=False)
    return table


def _is_whole(table: pd.DataFrame, wanted: Sequence[tuple[str, str, str]]) -> bool:
    """Whether a kept table has the row of each (engine, KV cache, hash of what was measured), and no other."""
    identity = ["name", "kv_cache", "key"]
    return set(identity) <= set(table) and sorted(table[identity].itertuples(index=False, name=None)) == sorted(wanted)


def _held_out(profile: Profile) -> list[int]:
    bpe, ids, wanted = tokenizer(profile), list[int](), profile.engines.perplexity_tokens
    for text in corpus.load_corpus(profile.corpus, profile.seed, split="holdout").texts:
        ids += bpe.encode(text).ids
        if len(ids) >= wanted:
            return ids[:wanted]
    raise ConfigError(f"held-out text has {len(ids)} tokens; engines.perplexity_tokens asks for {wanted}")
