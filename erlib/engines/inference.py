"""Inference with an engine, outside Triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

COMPUTE = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Every engine computes in float32. Set, because OpenVINO would take bfloat16, or 8-bit activations, on a CPU that has
them: then results of two machines could not be compared, nor those of two formats."""


def feed(ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
    """Inputs of the stateful model for one sequence of token ids, shape (n,)."""
    row = ids[None]
    return {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(row.shape[1])[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
