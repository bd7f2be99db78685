"""How long does one step of an engine take? Tables distilled from measurements, a roofline, or a fit to records.

An engine step of in-flight batching reads some new prompts and decodes one token of every running sequence. All three
models answer the same question, :meth:`StepTimes.step_s`, and refuse it outside what they know.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from erlib import paths
from erlib.config import Configuration, Dtype
from erlib.engines.llama import BYTES_PER_VALUE, LlamaShape

TABLE = paths.FACTS / "h100_step_times.parquet"
PARTS = ("dense", "output", "decode", "prefill")
"""What adds up to a step; a table may hold more."""


class OutOfRange(ValueError):
    """A step lies outside what its model knows; models are not extrapolated."""


@dataclass(frozen=True)
class Limits:
    """Largest step that a model knows, or can be asked for."""

    tokens: float
    """Prompt tokens and decoded tokens of one step."""
    batch: float
    """Sequences decoded in one step."""
    context: float
    """Mean tokens in the KV cache of the decoded sequences, or longest prompt."""
    instances: float = np.inf
    """Instances at work on the same machine."""
    prompts: float = np.inf
    """Prompts that one step reads."""


class StepTimes(ABC):
    """Duration of engine steps."""

    limits: Limits
    at_full_speed: float = np.inf
    """Instances that a machine carries at full speed; more of them share it evenly. Infinite: each has its own."""

    @abstractmethod
    def step_s(self, prompts: int, prompt_tokens: int, sequences: int, context_tokens: int) -> float:
        """Seconds of one step.

        Parameters
        ----------
        prompts, prompt_tokens : int
            New prompts that the step reads, and their tokens, all together.
        sequences, context_tokens : int
            Running sequences that each get one more token, and the tokens in their KV caches, all together.

        Raises
        ------
        OutOfRange
            If the step lies outside :attr:`limits`.
        """

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of a step that decodes `batch` sequences of `context` tokens each."""
        return self.step_s(0, 0, batch, batch * context)

    def decode_steps_s(self, steps: int, sequences: int, context_tokens: int) -> npt.NDArray[np.float64]:
        """Seconds of each of `steps` consecutive steps that only decode, the first of them as in :meth:`step_s`."""
        return np.array([self.step_s(0, 0, sequences, context_tokens + n * sequences) for n in range(steps)])

    def prefill_s(self, tokens: int, prompts: int = 1) -> float:
        """Seconds of a step that reads `prompts` prompts of `tokens` tokens each: up to their first tokens."""
        return self.step_s(prompts, prompts * tokens, 0, 0)

    def slowdown(self, busy: int) -> float:
        """How many times as long a step takes while `busy` instances have work.

        Raises
        ------
        OutOfRange
            If they are more than :attr:`limits` says.
        """
        if busy > self.limits.instances:
            raise self._beyond("instances", busy)
        return max(1.0, busy / self.at_full_speed)

    def _check(self, prompts: int, prompt_tokens: int, sequences: int, context_tokens: int) -> None:
        limits = self.limits
        if (
            0 <= prompts <= prompt_tokens <= prompts * limits.context
            and 0 <= sequences <= context_tokens <= sequences * limits.context
            and sequences <= limits.batch
            and 0 < prompt_tokens + sequences <= limits.tokens
        ):
            return  # simulations ask a million times: nothing more for them to do
        if min(prompts, sequences) < 0 or prompt_tokens < prompts or context_tokens < sequences:
            raise OutOfRange("every prompt and every running sequence of a step has at least one token")
        if not prompts + sequences:
            raise OutOfRange("a step reads a prompt or decodes a sequence")
        if (prompt_tokens and not prompts) or (context_tokens and not sequences):
            raise OutOfRange("a step has prompt tokens or a context, but no prompt or sequence that they belong to")
        asked = {
            "tokens": prompt_tokens + sequences,
            "batch": sequences,
            "context": max(prompt_tokens / max(1, prompts), context_tokens / max(1, sequences)),
        }
        for name, value in asked.items():
            if value > getattr(limits, name):
                raise self._beyond(name, value)

    def _beyond(self, name: str, value: float) -> OutOfRange:
        return OutOfRange(
            f"a step with {name} {value:,.6g} was asked for, but {type(self).__name__} knows {name} up to "
            f"{getattr(self.limits, name):,.6g} and does not extrapolate"
        )


# --- from measured kernels ----------------------------------------------------------------------------------------


class Table(StepTimes):
    """Step times of one model, from ``data/h100_step_times.parquet``; provenance in the notice beside it.

    A step is the sum of four parts: ``dense`` (matrices, all-reduce and element-wise work, by tokens in the step),
    ``output`` (output layer, by sequences), ``decode`` (attention of decoded tokens, by sequences and mean context) and
    ``prefill`` (attention of prompts, by prompts and mean length). Between the table's points each is linear.

    Another `file` has the same columns, e.g. one that ``scripts/measure_step_times.py`` measured (CSV); the part that
    holds the matrices may have another name there. Prompts beyond the most that it read at once each take as long as
    those between its last two points: their attention is work of its own, and a small part of a step.

    Raises
    ------
    OutOfRange
        If the table does not hold this model in this form, or not all of its parts.
    """

    def __init__(
        self,
        model: str,
        dtype: Dtype,
        kv_dtype: Dtype,
        tensor_parallel: int,
        file: Path | None = None,
        *,
        dense: str = "dense",
    ):
        self._file = file or TABLE
        mine = (pc.field("model") == model) & (pc.field("dtype") == dtype) & (pc.field("kv_dtype") == kv_dtype)
        rows = _table(self._file).filter(mine & (pc.field("tensor_parallel") == tensor_parallel))
        held = set(rows["part"].to_pylist())
        if missing := [part for part in (dense, *PARTS[1:]) if part not in held]:
            raise OutOfRange(
                f"{self._file.name} holds no {model} in {dtype} with {kv_dtype} KV cache and TP{tensor_parallel}"
                f"{f' ({missing[0]} is missing)' if held else ''}; use Roofline, distil it with "
                "scripts/distill_step_times.py, or measure it with scripts/measure_step_times.py"
            )
        self._name = f"{model} {dtype}, KV cache {kv_dtype}, TP{tensor_parallel}"
        self._dense, self._output = (_line(*_part(rows, name)) for name in (dense, "output"))
        self._decode, self._prefill = (_Grid(*_part(rows, name)) for name in ("decode", "prefill"))
        self._outputs = len(self._output) - 1
        self.limits = Limits(
            tokens=len(self._dense) - 1,
            batch=self._decode.x[-1],
            context=min(self._decode.y[-1], self._prefill.y[-1]),
            prompts=np.inf if file else self._prefill.x[-1],
        )

    def __str__(self) -> str:
        return f"{self._file.name}: {self._name}"

    @property
    def dense_s(self) -> list[float]:
        """Seconds of the part ``dense`` of steps with 0, 1, 2, ... tokens."""
        return self._dense

    def part_ms(self, part: str, x: float, y: float = 0) -> float:
        """Milliseconds of one of :data:`PARTS` alone.

        Raises
        ------
        OutOfRange
            If the table ends before `x` or `y`.
        """
        if part in ("dense", "output"):
            line = self._dense if part == "dense" else self._output
            if x > len(line) - 1:
                raise OutOfRange(f"{self}: {part} is known up to {len(line) - 1}, not {x:g}")
            return 1e3 * float(np.interp(x, np.arange(len(line)), line))
        grid = self._decode if part == "decode" else self._prefill
        if x > grid.x[-1] or y > grid.y[-1]:
            raise OutOfRange(f"{self}: {part} is known up to {grid.x[-1]} x {grid.y[-1]} tokens, not {x:g} x {y:g}")
        return 1e3 * grid.at(x, y)

    def step_s(self, prompts: int, prompt_tokens: int, sequences: int, context_tokens: int) -> float:
        self._check(prompts, prompt_tokens, sequences, context_tokens)
        if prompts > self.limits.prompts:
            raise OutOfRange(f"a step reads at most {self.limits.prompts} prompts, not {prompts}")
        if prompts + sequences > self._outputs:
            raise OutOfRange(f"a step gives at most {self._outputs} tokens, not {prompts + sequences}")
        seconds = self._dense[prompt_tokens + sequences] + self._output[prompts + sequences]
        if sequences:
            seconds += self._decode.at(sequences, context_tokens / sequences)
        if prompts:
            seconds += self._prefill.at(prompts, prompt_tokens / prompts)
        return seconds

    def decode_steps_s(self, steps: int, sequences: int, context_tokens: int) -> npt.NDArray[np.float64]:
        self._check(0, 0, sequences, context_tokens + max(0, steps - 1) * sequences)
        contexts = np.arange(context_tokens, context_tokens + steps * sequences, sequences) / sequences
        seconds = self._decode.along(sequences, contexts)
        seconds += self._dense[sequences] + self._output[sequences]
        return seconds


def for_configuration(configuration: Configuration, file: Path | None = None) -> Table:
    """The table of one instance of a paper's configuration (or of the one that a baseline stands beside)."""
    system = configuration.system
    return Table(system.model, system.dtype, system.kv_dtype, system.tensor_parallel, file)


@functools.cache
def _table(file: Path) -> pa.Table:  # not pandas: every emulated engine imports this
    # Read here: Triton's embedded Python may not know the encoding of its name, and pyarrow would insist on it. Of a
    # file opened by Python, pyarrow would read in threads that abort the process if it ends before they do.
    content = pa.BufferReader(file.read_bytes())
    if file.suffix == ".csv":
        return pyarrow.csv.read_csv(content, pyarrow.csv.ReadOptions(use_threads=False))
    return pq.ParquetFile(content).read(use_threads=False)


def _part(rows: pa.Table, name: str) -> Iterator[npt.NDArray[Any]]:
    """Columns x, y and seconds of one of the four parts."""
    part = rows.filter(pc.field("part") == name)
    yield from (part["x"].to_numpy().astype(int), part["y"].to_numpy().astype(int), part["ms"].to_numpy() * 1e-3)


def _line(x: npt.NDArray[Any], y: npt.NDArray[Any], seconds: npt.NDArray[Any]) -> list[float]:
    """Seconds for 0, 1, 2, ... (nothing takes no time); plain floats, with which Python counts twice as fast."""
    order = np.argsort(x)  # a point that was measured later stands at a table's end
    x, seconds = x[order], seconds[order]
    return np.interp(np.arange(x.max() + 1), [0, *x], [0, *seconds]).tolist()


class _Grid:
    """Bilinear interpolation of seconds; plain lists for who asks for one point at a time."""

    def __init__(self, x: npt.NDArray[Any], y: npt.NDArray[Any], seconds: npt.NDArray[Any]):
        ys, column = np.unique(y, return_inverse=True)
        xs, row = np.unique(x, return_inverse=True)
        seconds_at = np.full((len(xs), len(ys)), np.nan)
        seconds_at[row, column] = seconds
        # A GPU whose memory did not suffice for the longest contexts has measured fewer of the largest batches.
        whole = ~np.isnan(seconds_at).any(axis=1)
        if min(whole.sum(), len(ys)) < 2:
            raise OutOfRange(
                "attention was measured at too few points; at least two batches and two contexts are needed"
            )
        xs, seconds_at = xs[whole], seconds_at[whole]
        if ys[0] > 0:  # below the first point, the line between the first two goes on
            slope = (seconds_at[:, 1] - seconds_at[:, 0]) / (ys[1] - ys[0])
            ys, seconds_at = np.append(0, ys), np.column_stack([seconds_at[:, 0] - ys[0] * slope, seconds_at])
        self.x: list[int] = xs.tolist()
        self.y: list[int] = ys.tolist()
        self._seconds: list[list[float]] = seconds_at.tolist()
        self._lines: dict[float, tuple[npt.NDArray[np.float64], list[float]]] = {}

    def _line(self, x: float) -> tuple[npt.NDArray[np.float64], list[float]]:
        """Seconds at all of :attr:`y`, twice: for who asks for many points of the line, and for one."""
        if x not in self._lines:
            i = bisect_right(self.x, x, 1, len(self.x) - 1) - 1
            low, high = np.array(self._seconds[i : i + 2])
            line = low + (x - self.x[i]) / (self.x[i + 1] - self.x[i]) * (high - low)
            self._lines[x] = line, line.tolist()
        return self._lines[x]

    def along(self, x: float, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """:meth:`at` for many ascending `y`, digit by digit."""
        line, values = self._line(x)
        j = bisect_right(self.y, y[0], 1, len(self.y) - 1) - 1 if len(y) else 0
        if not len(y) or y[-1] >= self.y[j + 1]:
            return np.interp(y, self.y, line)
        return (values[j + 1] - values[j]) / (self.y[j + 1] - self.y[j]) * (y - self.y[j]) + values[j]

    def at(self, x: float, y: float) -> float:
        line = self._line(x)[1]
        j = bisect_right(self.y, y, 1, len(self.y) - 1) - 1
        return (line[j + 1] - line[j]) / (self.y[j + 1] - self.y[j]) * (y - self.y[j]) + line[j]


# --- from first principles ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers of a GPU, and the share of them that kernels reach.

    ``flops`` are dense, per format of the computation; weight-only formats (INT8, INT4) compute in FP16.
    """

    name: str
    fp16_flops: float
    fp8_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """NVLink, one direction."""
    compute_share: float = 0.6
    memory_share: float = 0.75
    allreduce_s: float = 10e-6
    """Latency of one all-reduce, whatever its size."""


H100 = Gpu("H100 SXM", 989e12, 1979e12, 3.35e12, 450e9)
H200 = Gpu("H200 SXM", 989e12, 1979e12, 4.8e12, 450e9)
A100 = Gpu("A100 SXM 80 GB", 312e12, 312e12, 2.039e12, 300e9)  # no FP8: computes it as FP16 would


class Roofline(StepTimes):
    """Step times of any Llama shape on any GPU: the slower of computing and reading, plus attention and all-reduce.

    Cruder than :class:`Table` (which knows real kernels), but it needs no measurement and knows no limits.
    """

    limits = Limits(np.inf, np.inf, np.inf)

    def __init__(
        self, shape: LlamaShape, gpu: Gpu, dtype: Dtype = "fp16", kv_dtype: Dtype = "fp16", tensor_parallel: int = 1
    ):
        self._shape, self._gpu, self._tensor_parallel = shape, gpu, tensor_parallel
        self._flops = (gpu.fp8_flops if dtype == "fp8" else gpu.fp16_flops) * gpu.compute_share * tensor_parallel
        self._attention_flops = gpu.fp16_flops * gpu.compute_share * tensor_parallel
        self._bytes_per_s = gpu.memory_bytes_per_s * gpu.memory_share * tensor_parallel
        self._weight_bytes = shape.linear * BYTES_PER_VALUE[dtype] + 2 * shape.embedding
        self._kv_bytes = shape.kv_bytes_per_token(kv_dtype)

    def step_s(self, prompts: int, prompt_tokens: int, sequences: int, context_tokens: int) -> float:
        self._check(prompts, prompt_tokens, sequences, context_tokens)
        shape, tokens = self._shape, prompt_tokens + sequences
        operations = 2 * (shape.linear * tokens + shape.embedding * (prompts + sequences))
        matrices = max(operations / self._flops, self._weight_bytes / self._bytes_per_s)
        # causal: a prompt's token looks at half of the prompt on average; 2 matrices, 2 operations each
        looked_at = prompt_tokens * prompt_tokens / max(1, prompts) / 2
        attention = 4 * shape.layers * shape.hidden * looked_at / self._attention_flops
        attention += context_tokens * self._kv_bytes / self._bytes_per_s
        return matrices + attention + self._allreduce_s(tokens)

    def _allreduce_s(self, tokens: int) -> float:
        """Two all-reduces of FP16 activations per layer (ring: each GPU sends 2 (n - 1) / n of them)."""
        n = self._tensor_parallel
        if n == 1:
            return 0.0
        sent = 2 * (n - 1) / n * tokens * self._shape.hidden * 2
        return 2 * self._shape.layers * (self._gpu.allreduce_s + sent / self._gpu.link_bytes_per_s)
