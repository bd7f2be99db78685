"""GPUs that step times are known of: measured tables, or what a data sheet says.

Tables (:mod:`erlib.paper_scale.steptimes`) are NVIDIA's for the H100, what PyTorch's kernels took on an H100 and an
H200, or one of your own. A data sheet (A100, H200) prices every large Llama shape.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import pandas as pd

from erlib import paths
from erlib.config import ConfigError, Dtype, nearest
from erlib.engines import llama
from erlib.machine import hardware
from erlib.paper_scale import measured_steps, setups, steptimes
from erlib.paper_scale.measured_steps import FORM
from erlib.paper_scale.steptimes import OutOfRange, Roofline, StepTimes, Table

Form = tuple[Dtype, Dtype, int]
"""Weights, KV cache and width."""


class Gpu(NamedTuple):
    """A GPU that step times are known of."""

    tables: tuple[Path, ...]
    memory_bytes: float
    said: str
    """Whose times these are."""
    sheet: steptimes.Gpu | None = None
    """What prices steps where there is no table."""


def _usable(mib: int) -> float:
    """Bytes that engines see of so many MiB, which is what nvidia-smi shows of the whole."""
    return float(mib * 2**20 - hardware.CONTEXT_BYTES)


GPUS = {
    "h100": Gpu((steptimes.TABLE, setups.BESIDE), llama.H100_BYTES, "H100s, kernel times that NVIDIA published"),
    "h100-pytorch": Gpu(
        (paths.FACTS / "h100_pytorch_step_times.csv",), llama.H100_BYTES, "H100s, measured with PyTorch's kernels"
    ),
    "h200-pytorch": Gpu(
        (paths.FACTS / "h200_pytorch_step_times.csv",), _usable(143_771), "H200s, measured with PyTorch's kernels"
    ),
    "h200": Gpu((), _usable(143_771), "H200s, priced from the data sheet and not from kernels", steptimes.H200),
    "a100": Gpu((), _usable(81_920), "A100s, priced from the data sheet and not from kernels", steptimes.A100),
}
"""By name; the memory is what an engine sees of it."""
SMALLEST = 1e9
"""Parameters of a model that a data sheet prices, at least: steps of smaller ones are launches of kernels above all, of
which it knows nothing."""


def gpu(name: str, memory_gb: float | None = None) -> Gpu:
    """A GPU by its name, or by the file of its step times.

    Raises
    ------
    ConfigError
        If there is neither; the message says how to get one.
    """
    measure = "measure it with scripts/measure_step_times.py on one and give the file that it writes"
    if not name.endswith((".csv", ".parquet")):
        if name.lower() not in GPUS:
            others = f"{nearest(name, list(GPUS))}; there are {', '.join(GPUS)}"
            raise ConfigError(f"no step times of GPU {name!r}{others}. For another one, {measure}")
        its = GPUS[name.lower()]
        if not memory_gb:
            return its
        return its._replace(memory_bytes=memory_gb * 1e9, said=f"{its.said}, with {memory_gb:g} GB each")
    if not (file := paths.ROOT / Path(name).expanduser()).is_file():
        raise ConfigError(f"there is no step table {name}: {measure}")
    if not memory_gb:
        raise ConfigError(f"{name} does not say how much memory its GPU has: give that, too, in GB (gpu_gb)")
    return Gpu((file,), memory_gb * 1e9, f"GPUs with {memory_gb:g} GB, step times of {file.name}")


def models() -> list[str]:
    """Models that some GPU has step times for."""
    return sorted({model for its in GPUS.values() for model in known(its)["model"]})


def forms(of: Gpu, model: str, gpus: int, formats: Sequence[Dtype] = ()) -> Iterator[tuple[Form, StepTimes]]:
    """Forms of the model that are known of so many such GPUs, the widest weights first, and how long steps take."""
    rows = known(of)
    mine = rows[(rows["model"] == model) & (rows["tensor_parallel"] <= gpus)]
    order = list(get_args(Dtype))
    found = {(str(r.dtype), str(r.kv_dtype), int(r.tensor_parallel)) for r in mine.itertuples()}
    for form in sorted(found, key=lambda form: (order.index(form[0]), form[2], order.index(form[1]))):
        if formats and form[0] not in formats:
            continue
        if (steps := _steps(model, form, of)) is not None:
            yield form, steps  # type: ignore[misc]


@functools.cache
def known(of: Gpu) -> pd.DataFrame:
    """Forms of models that there are step times for."""
    if of.sheet is not None:
        return pd.DataFrame(_of_sheet(of.sheet), columns=FORM)
    try:
        parts = [
            pd.read_parquet(file, columns=FORM) if file.suffix == ".parquet" else measured_steps.read(file)[FORM]
            for file in of.tables
        ]
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"{of.tables[0].name} is no table of step times: {str(error).splitlines()[0]}") from None
    return pd.concat(parts).astype({"tensor_parallel": int}).drop_duplicates()


def _of_sheet(sheet: steptimes.Gpu) -> Iterator[tuple[str, Dtype, Dtype, int]]:
    """Forms of every large model, in the formats that the GPU computes with."""
    formats: list[Dtype] = [its for its in get_args(Dtype) if its != "fp8" or sheet.fp8_flops > sheet.fp16_flops]
    large = {model: shape for model, shape in llama.shapes().items() if shape.parameters >= SMALLEST}
    for (model, shape), dtype, width in itertools.product(large.items(), formats, (1, 2, 4, 8)):
        if shape.kv_heads % width == 0:
            for kv_dtype in ("fp16", dtype) if dtype in ("fp8", "int8") else ("fp16",):
                yield model, dtype, kv_dtype, width


@functools.cache
def _steps(model: str, form: Form, of: Gpu) -> StepTimes | None:
    """Read once: a table has some ten thousand rows."""
    if of.sheet is not None:
        return Roofline(llama.shape(model), of.sheet, *form)
    for file in of.tables:
        try:
            return Table(model, *form, None if file == steptimes.TABLE else file)
        except OutOfRange:  # of a part of a system only, such as one GPU's share without what they exchange
            continue
    return None
