"""What a step takes longer where its sequences have adapters of several experts, as one H100 measured it.

PyTorch's kernels in a CUDA graph, each of eight experts having an adapter at every matrix; provenance in the notice
beside ``data/h100_pytorch_adapters.csv``. Engines have kernels of their own for that, which may do better.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from erlib import config, paths
from erlib.paper_scale.batching import System
from erlib.paper_scale.setups import Repriced
from erlib.paper_scale.steptimes import OutOfRange, Table

MEASURED = paths.FACTS / "h100_pytorch_adapters.csv"
RANK = 16
"""Of the adapters, usual for models of some billion parameters. With rank 8 the matrices take some 2 % less time, with
rank 64 some 10 % more."""


@functools.cache
def more_ms(model: str, dtype: str, rank: int = RANK, file: Path = MEASURED) -> pd.Series:
    """Milliseconds by which a step becomes longer, by its number of tokens, each with one of eight adapters.

    The faster of the two ways to compute it that were measured counts.

    Raises
    ------
    OutOfRange
        If this was not measured.
    """
    rows = pd.read_csv(file)
    mine = (rows["model"] == model) & (rows["dtype"] == dtype) & (rows["rank"] == rank) & (rows["tensor_parallel"] == 1)
    if not mine.any():
        raise OutOfRange(
            f"{file.name} holds no adapters of rank {rank} at {model} in {dtype}: measure it with "
            "scripts/measure_adapters.py"
        )
    ms = rows[mine].pivot(index="x", columns="way", values="ms")
    return ms[["gathered", "masked"]].min(axis=1) - ms["none"]


def with_adapters(system: System, rank: int = RANK) -> System:
    """A system of one GPU per expert whose steps take as much longer as adapters do.

    Beyond the most tokens that were measured, they make the matrices so many times as long as there. The straight line
    through the measured points would give less (with 1,024 tokens three quarters, with 8,192 less than 0.6).

    Raises
    ------
    OutOfRange
        If this was not measured.
    """
    about = config.load_configuration(system.config).system
    table = system.steps
    if not isinstance(table, Table) or about.tensor_parallel != 1:
        raise OutOfRange(f"adapters were measured at engines of one GPU, of which {system.config} is none")
    more = more_ms(about.model, about.dtype, rank)
    tokens = np.arange(int(table.limits.tokens) + 1)
    dense_ms = 1e3 * np.array(table.dense_s)
    measured_ms = np.interp(tokens, more.index, more)
    last = int(more.index[-1])
    grown_ms = more[last] * dense_ms / dense_ms[last]
    more_s = 1e-3 * np.where(tokens <= last, measured_ms, grown_ms)
    return replace(system, steps=Repriced(table, 1.0, more_s.tolist()))
