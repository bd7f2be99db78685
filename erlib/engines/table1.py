"""Both papers' Table I, recomputed."""

from __future__ import annotations

import pandas as pd

from erlib import config
from erlib.config import Paper, PaperSystem
from erlib.engines.llama import (
    BYTES_PER_VALUE,
    GATEWAYS_GB_PER_GPU,
    P2_MAX_INPUT_TOKENS,
    TABLE1_WEIGHTS_UNIT,
    kv_tokens,
    shape,
)


def recomputed_table1(paper: Paper) -> pd.DataFrame:
    """Table I of a paper, printed and recomputed.

    Parameters
    ----------
    paper : {'p1', 'p2'}

    Returns
    -------
    pandas.DataFrame
        One row per configuration of the paper. ``*_printed`` as in the paper (GB, per instance); ``plain_gb``
        parameters times bytes; ``loaded_gb`` what TensorRT-LLM loads
        (:meth:`erlib.engines.llama.LlamaShape.loaded_bytes`), also as ``loaded_mib_1000`` (thousands of MiB);
        ``weights_agree`` whether that is the printed number within 1.5 % or its rounding, in the paper's unit
        (:data:`TABLE1_WEIGHTS_UNIT`); ``kv_bytes_per_token``; ``kv_tokens`` what the printed KV cache holds;
        ``full_sequences`` how many of the longest sequences fit; ``gpu_gb`` weights, KV cache and gateways on one GPU;
        ``discrepancy`` where print and arithmetic disagree, empty where they agree.
    """
    rows = []
    for name in config.config_ids():
        configuration = config.load_configuration(name)
        if not name.startswith(paper) or configuration.paper is None:
            continue
        system = configuration.paper
        model = shape(system.model)
        loaded = model.loaded_bytes(system.dtype, system.tensor_parallel)
        gateways = GATEWAYS_GB_PER_GPU if configuration.routing == "expert_router" else 0
        unit, digit = TABLE1_WEIGHTS_UNIT[paper]
        rows.append(
            {
                "config": name,
                "title": configuration.title,
                "batch_size": system.batch_size,
                "weights_gb_printed": system.weights_gb,
                "plain_gb": model.parameters * BYTES_PER_VALUE[system.dtype] / 1e9,
                "loaded_gb": loaded / 1e9,
                "loaded_mib_1000": loaded / 2**20 / 1000,
                "weights_agree": abs(loaded / unit - system.weights_gb) <= max(0.015 * system.weights_gb, digit / 2),
                "kv_cache_gb_printed": system.kv_cache_gb,
                "kv_bytes_per_token": model.kv_bytes_per_token(system.kv_dtype),
                "kv_tokens_printed": system.kv_tokens,
                "kv_tokens": kv_tokens(system),
                "full_sequences": kv_tokens(system) // paper_sequence_tokens(paper),
                "gpu_gb": (system.weights_gb + system.kv_cache_gb) / system.tensor_parallel + gateways,
                "discrepancy": "; ".join(_discrepancies(paper, system)),
            }
        )
    return pd.DataFrame(rows).astype({"kv_tokens_printed": "Int64"})


def _discrepancies(paper: Paper, system: PaperSystem) -> list[str]:
    model, found = shape(system.model), []
    plain_gb = model.parameters * BYTES_PER_VALUE[system.dtype] / 1e9
    loaded = model.loaded_bytes(system.dtype, system.tensor_parallel)
    deviation = system.weights_gb / plain_gb - 1
    if abs(deviation) > 0.015:
        readings = {
            "GB as loaded, with FP16 embeddings, scales and a copy of the embedding per GPU": loaded / 1e9,
            "× 1,000 MiB, as TensorRT-LLM logs what it loads": loaded / 2**20 / 1000,
        }
        reading, value = min(readings.items(), key=lambda item: abs(item[1] - system.weights_gb))
        near = abs(system.weights_gb / value - 1) <= 0.015
        explanation = f"agrees with {value:.1f} {reading}" if near else "not explained by what is loaded"
        found.append(
            f"weights {deviation:+.1%} against parameters x bytes ({plain_gb:.1f} GB, "
            f"{plain_gb * 1e9 / 2**30:.1f} GiB): {explanation}"
        )
    tokens = kv_tokens(system)
    if system.kv_tokens and abs(system.kv_tokens / tokens - 1) > 0.03:
        needed_gb = system.kv_tokens * model.kv_bytes_per_token(system.kv_dtype) / 1e9
        found.append(
            f"text says {system.kv_tokens:,} KV tokens, which need {needed_gb:.0f} GB; "
            f"{system.kv_cache_gb:g} GB hold {tokens:,}"
        )
    longest = paper_sequence_tokens(paper)
    if tokens // longest < system.batch_size:
        found.append(
            f"batch size {system.batch_size}, but {tokens // longest} sequences of {longest:,} tokens fit the KV cache"
        )
    return [*found, system.remark] if system.remark else found


def paper_sequence_tokens(paper: Paper) -> int:
    """Longest sequence: paper 1's continuation prompt and its answer; paper 2's longest prompt and answer limit."""
    return 335 + 1200 + 1200 if paper == "p1" else P2_MAX_INPUT_TOKENS + 1000
