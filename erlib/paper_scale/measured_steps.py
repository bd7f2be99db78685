"""Step times measured on a GPU at hand, held against the table of H100 step times and against whole steps.

Such a table is what ``scripts/measure_step_times.py`` writes; :class:`~erlib.paper_scale.steptimes.Table` reads it.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import pandas as pd

from erlib import config
from erlib.config import ConfigError, Dtype, Paper, Profile
from erlib.engines import llama
from erlib.engines.table1 import paper_sequence_tokens
from erlib.load import metrics, records
from erlib.machine import hardware
from erlib.paper_scale import batching, simulation, steptimes
from erlib.paper_scale.steptimes import OutOfRange, Table
from erlib.workload import prompts
from erlib.workload.prompts import Workload

FORM = ["model", "dtype", "kv_dtype", "tensor_parallel"]
SHARE = "dense without all-reduce"
"""One GPU's share of a model in tensor parallelism; the H100 table's ``dense`` has the all-reduce in it."""


def read(file: Path) -> pd.DataFrame:
    """The rows of a measured table.

    Raises
    ------
    ConfigError
        If it has other columns or no row, or a line is not what it should be: cut off, a time that is not more than 0,
        a batch or a context that is no whole number, an unknown format. The message has the line's number.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
        lines = csv.reader(io.StringIO(content), strict=True)
        header = next(lines, [])
        _check_columns(file, header)
        for cells in lines:
            if not cells:
                continue
            place = f"{file}, line {lines.line_num}"
            if len(cells) < len(header) and not content.endswith("\n") and lines.line_num > content.count("\n"):
                raise ConfigError(
                    f"{place}: cut off, as a measurement leaves it that was stopped: measure again with the same "
                    "command, which goes on from there"
                )
            if len(cells) != len(header):
                raise ConfigError(f"{place}: {len(cells)} cells, but {len(header)} columns: {_ADVICE}")
            _check(dict(zip(header, cells, strict=True)), place)
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not a text in UTF-8, as tables of scripts/measure_step_times.py are") from None
    except csv.Error as error:
        raise ConfigError(f"{file}, line {lines.line_num}: not CSV ({error}): {_ADVICE}") from None
    rows = pd.read_csv(io.StringIO(content))
    if rows.empty:
        raise ConfigError(f"{file} holds no step times: measure again with the same command, which goes on from there")
    return rows


_ADVICE = "remove the line and measure again, which adds what is missing"
_LEAST = {"tensor_parallel": 1, "x": 1, "y": 0}
_TIMES = ["ms", "p10_ms", "p90_ms"]


def _check_columns(file: Path, header: list[str]) -> None:
    wanted = [*FORM, "part", "x", "y", *_TIMES, "how"]
    if missing := [name for name in wanted if name not in header]:
        raise ConfigError(f"{file} has no column {missing[0]!r}; tables of scripts/measure_step_times.py have it")
    if twice := [name for name in wanted if header.count(name) > 1]:
        raise ConfigError(f"{file} has two columns {twice[0]!r}: leave one of them")


def _check(row: dict[str, str], place: str) -> None:
    """Refuse what no measurement says: it would be interpolated as if one had."""
    for name in ("model", "part"):
        if not row[name].strip():
            raise ConfigError(f"{place}: no {name}: {_ADVICE}")
    for name in ("dtype", "kv_dtype"):
        if row[name] not in get_args(Dtype):
            raise ConfigError(f"{place}: {name} must be one of {', '.join(get_args(Dtype))}, not {row[name]!r:.60}")
    for name, least in _LEAST.items():
        if not ((number := _number(row[name])).is_integer() and least <= number < 2**31):
            raise ConfigError(f"{place}: {name} must be a whole number from {least}, not {row[name]!r:.60}: {_ADVICE}")
    for name in _TIMES:
        if not 0 < _number(row[name]) < math.inf:
            raise ConfigError(f"{place}: {name} must be a time of more than 0, not {row[name]!r:.60}: {_ADVICE}")


def _number(text: str) -> float:
    """Not a number, if it is none for pandas and Arrow, which read the column."""
    try:
        return float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return math.nan


def entry_by_entry(file: Path) -> pd.DataFrame:
    """Each measured point beside the H100 table.

    Matrices do not depend on the KV cache's format, attention does: points of which the table has no model with the
    same KV cache are missing.

    Returns
    -------
    DataFrame
        The measured rows with ``table_ms`` and ``ratio`` (measured over table).
    """
    tables = _by_form(pd.read_parquet(steptimes.TABLE))
    known = {(form.model, form.dtype, form.tensor_parallel): form.kv_dtype for form, _ in tables}
    rows = []
    for form, mine in _by_form(measured := read(file)):
        kv_dtype = known.get((form.model, form.dtype, form.tensor_parallel))
        if kv_dtype is None:
            continue
        table = Table(form.model, form.dtype, kv_dtype, form.tensor_parallel)
        parts = {"dense", SHARE, "output"} | ({"decode", "prefill"} if kv_dtype == form.kv_dtype else set())
        for row in mine[mine["part"].isin(parts)].itertuples():
            try:
                ms = table.part_ms("dense" if row.part == SHARE else row.part, row.x, row.y)
            except OutOfRange:
                continue
            rows.append({name: getattr(row, name) for name in measured.columns} | {"table_ms": ms})
    beside = pd.DataFrame(rows, columns=[*measured.columns, "table_ms"])
    return beside.assign(ratio=beside["ms"] / beside["table_ms"])


def sums_beside_whole_steps(file: Path) -> pd.DataFrame:
    """Do a step's parts add up? Steps measured as a whole, beside the sum of their parts.

    Returns
    -------
    DataFrame
        Columns of :data:`FORM`, ``turn`` (decode, prefill), ``x``, ``y``, ``whole_ms``, ``parts_ms``, ``ratio`` (parts
        over whole).
    """
    rows = []
    for form, mine in _by_form(read(file)):
        dense = "dense" if "dense" in set(mine["part"]) else SHARE  # neither exchanges anything between GPUs
        for row in mine[mine["part"].str.startswith("whole ")].itertuples():
            turn = row.part.removeprefix("whole ")
            try:
                table = Table(*form, file, dense=dense)
                seconds = table.decode_s(row.x, row.y) if turn == "decode" else table.prefill_s(row.y, row.x)
            except OutOfRange:  # a part of it was not measured
                continue
            rows.append([*form, turn, row.x, row.y, row.ms, 1e3 * seconds])
    sums = pd.DataFrame(rows, columns=[*FORM, "turn", "x", "y", "whole_ms", "parts_ms"])
    return sums.assign(ratio=sums["parts_ms"] / sums["whole_ms"])


def measured_twice(file: Path) -> pd.Series:
    """What can be told from noise: points of equal work, measured once for each format of the weights.

    Attention and the output layer are in FP16 whatever the weights are in.

    Returns
    -------
    Series
        Longer over shorter time of each such pair.
    """
    rows = read(file)
    same = rows[rows["part"].isin(["decode", "prefill"]) | ((rows["part"] == "output") & (rows["x"] >= _FP8_TOKENS))]
    ms = same.groupby(["model", "tensor_parallel", "part", "x", "y"])["ms"].agg(["min", "max", "size"])
    pairs = ms[ms["size"] == 2]
    return pairs["max"] / pairs["min"]


_FP8_TOKENS = 16
"""Below it, what stands beside FP8 matrices is computed for more sequences."""


def spread(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Median, smallest and largest ``ratio`` of each group, and how many points it has."""
    ratio = table.groupby(by, sort=False)["ratio"]
    return ratio.agg(median="median", smallest="min", largest="max", points="size").reset_index()


def simulated_from(
    name: str, file: Path, profile: Profile, users: Sequence[int], repeats: int = 3, gpu_bytes: float | None = None
) -> pd.DataFrame:
    """A paper's configuration in virtual time, with the H100 table's step times and with measured ones.

    It has one GPU per expert, as ``p2.E`` has, and the profile is at full scale (``dgx-h100``). All users come at once;
    both see the same draws, uniform over clusters, without gateways' costs (preset "hardware"). Where the memory of the
    measured GPU is known to be less than an H100's, its engines hold fewer tokens and sequences.

    Returns
    -------
    DataFrame
        ``users``, and for each of ``ttft_mean_s``, ``tpot_mean_s`` and ``session_tokens_per_s``: ``<metric>`` from the
        table, ``<metric>_measured``, ``<metric>_ratio`` (measured over table), means over repeats.

    Raises
    ------
    OutOfRange
        If the measured table does not hold it.
    ConfigError
        If the GPU's memory does not.
    """
    paper = config.paper_of(name)
    workload = simulation.textless_workload(profile, paper)
    limit = profile.workload.p2_max_output_tokens if paper == "p2" else None
    system = batching.paper_system(name, answer_limit=limit)
    measured = replace(system, steps=steptimes.for_configuration(config.load_configuration(name), file))
    if gpu_bytes is not None:
        measured = _in_memory(measured, gpu_bytes)
    means = [by_users(_simulated(one, workload, paper, profile.seed, users, repeats)) for one in (system, measured)]
    ratios = (means[1] / means[0]).add_suffix("_ratio")
    return pd.concat([means[0], means[1].add_suffix("_measured"), ratios], axis=1).reset_index()


def _in_memory(system: batching.System, gpu_bytes: float) -> batching.System:
    """With a KV cache that fits beside the weights, and as many sequences less as that holds less tokens."""
    held = config.load_configuration(system.config).system
    loaded = llama.shape(held.model).loaded_bytes(held.dtype)
    usable = gpu_bytes - hardware.CONTEXT_BYTES
    tokens = llama.most_kv_tokens(held.model, held.dtype, held.kv_dtype, 1, loaded, gpu_bytes=usable)
    longest = paper_sequence_tokens(config.paper_of(system.config))
    if tokens < longest:
        raise ConfigError(
            f"{system.config}: {loaded / 1e9:.0f} GB of weights leave a GPU of {gpu_bytes / 1e9:.0f} GB a KV cache of "
            f"{tokens:,} tokens, and one sequence has up to {longest:,}: set your_gpu.config to a smaller system"
        )
    if tokens >= system.kv_tokens:
        return system
    slots = max(tokens // longest, round(system.batch_size * tokens / system.kv_tokens))
    return replace(system, kv_tokens=tokens, batch_size=min(system.batch_size, slots))


METRICS = ["ttft_mean_s", "tpot_mean_s", "session_tokens_per_s"]
"""By which two ways to make or to measure the same point are compared."""


def by_users(some: pd.DataFrame) -> pd.DataFrame:
    """Means of :data:`METRICS` over the repeats of some records, by users; of a user's first prompt alone."""
    summary = metrics.summarise(some)
    return summary[summary["turn"] == "base"].groupby("users")[METRICS].mean()


def _simulated(
    system: batching.System, workload: Workload, paper: Paper, seed: int, users: Sequence[int], repeats: int
) -> pd.DataFrame:
    parts = []
    for crowd, repeat in itertools.product(users, range(repeats)):
        drawn = prompts.draw(workload, crowd, "uniform", seed, repeat)
        parts.append(simulation.simulate(system, drawn, paper=paper, repeat=repeat))
    return records.frame(parts)


class _Form(NamedTuple):
    model: str
    dtype: Dtype
    kv_dtype: Dtype
    tensor_parallel: int


def _by_form(rows: pd.DataFrame) -> Iterator[tuple[_Form, pd.DataFrame]]:
    """Forms in the order in which a table begins them, and the rows of each."""
    for (model, dtype, kv_dtype, tensor_parallel), mine in rows.groupby(FORM, sort=False):
        yield _Form(model, dtype, kv_dtype, int(tensor_parallel)), mine
