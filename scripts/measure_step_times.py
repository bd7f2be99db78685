"""Measure the step times of Llama models on this machine's GPU. Needs Python and PyTorch (2.5 or newer), nothing else.

    python3 measure_step_times.py steps.csv                             # the papers' models: minutes on an H100
    python3 measure_step_times.py steps.csv --models llama-3-8b:fp16    # one of them
    python3 measure_step_times.py steps.csv --shape mine=16,2048,8192,32,8,128256 --models mine:fp16
    python3 measure_step_times.py tiny.csv --device cpu --models tiny:fp16

Weights are random, since a step takes as long whatever they say. The parts of a step are measured as the table of H100
step times has them (``data/h100_step_times.NOTICE.md``), four layers with matrices of their own standing for all; each
point is a CUDA graph that is replayed between events, and its median counts:

- ``dense``: matrices, norms and activations of all layers, by `x` tokens in the step;
- ``output``: the output layer, by `x` sequences;
- ``decode``: attention of `x` sequences that each decode one token with `y` tokens of context;
- ``prefill``: attention of `x` prompts of `y` tokens.

Three more parts say how far these can be trusted: ``matrices`` are the matrices of ``dense`` alone, and ``whole
decode`` and ``whole prefill`` are steps with all layers in one graph, against which the sums of the parts can be held.
Of a model in tensor parallelism one GPU's share is measured; as nothing is exchanged between GPUs, its ``dense`` is
called ``dense without all-reduce``. Attention is always in FP16, the fastest of PyTorch's kernels that takes the shape.

Beside the table lies ``<name>.json``: device, driver, versions, clocks and power as found, and two ceilings of the
device (a large copy, a large matrix product). A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(f"error: {error}; this script needs PyTorch 2.5 or newer")


class Shape(NamedTuple):
    """What a step's time depends on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 32000),
    "llama-2-70b": Shape(80, 8192, 28672, 64, 8, 32000),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "llama-3-70b": Shape(80, 8192, 28672, 64, 8, 128256),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152),
    "tiny": Shape(4, 128, 256, 4, 2, 512),
}
MODELS = [
    "llama-3-8b:fp16",
    "llama-2-13b:fp16",
    "llama-3-8b:fp8",
    "llama-2-13b:fp8",
    "llama-3-70b:fp16:8",
    "llama-3-70b:fp8",
]
COLUMNS = ["model", "dtype", "kv_dtype", "tensor_parallel", "part", "x", "y", "ms", "p10_ms", "p90_ms", "how"]
KEY = 7
"""The first columns, which name a point."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
HALF = torch.float16
LAYERS = 4
CACHES_BYTES = 8e9
"""KV caches of so many bytes at most; larger ones are those of fewer than four layers, which no cache holds either."""

TOKENS = [
    1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384,
    512, 640, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192,
]  # fmt: skip
SEQUENCES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
DECODE = list(
    itertools.product([1, 2, 4, 8, 16, 32, 64, 128, 256, 512], [16, 128, 256, 512, 1024, 1536, 2048, 3072, 4096])
)
PREFILL = list(itertools.product([1, 2, 4, 8, 16, 32], [16, 64, 128, 256, 512, 1024, 2048, 4096]))
WHOLE_DECODE = [(1, 512), (1, 2048), (8, 1024), (32, 512), (32, 1024), (64, 1024), (128, 512), (128, 1024), (256, 512)]
WHOLE_PREFILL = [(1, 128), (1, 512), (1, 2048), (4, 512), (8, 512)]
FEW = 2
"""Points of each grid that are measured with --few."""
SAY_EVERY_S = 5
"""How far it is."""

Work = Callable[[], Any]
Work1 = Callable[[torch.Tensor], Any]
Times = tuple[float, float, float]
"""Median, 10th and 90th percentile."""


def timed(work: Work, device: str) -> Times:
    """How long `work` takes on the device, in ms."""
    with torch.inference_mode():
        for _ in range(3):
            work()
        return _replayed(work) if device.startswith("cuda") else _called(work)


def _replayed(work: Work) -> Times:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    began, warm = time.monotonic(), 5
    for _ in range(warm):
        graph.replay()
    torch.cuda.synchronize()
    # Thirty replays, fewer of long ones, so that a point costs less than a second.
    n = max(7, min(30, int(0.6 * warm / (time.monotonic() - began))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return _spread([a.elapsed_time(b) for a, b in itertools.pairwise(events)])


def _called(work: Work) -> Times:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return _spread(times)


def _spread(times: list[float]) -> Times:
    times = sorted(times)
    return statistics.median(times), times[len(times) // 10], times[9 * len(times) // 10]


class Share:
    """One GPU's share of a model's layers, with random weights."""

    def __init__(self, shape: Shape, dtype: str, tensor_parallel: int, device: str, layers: int = LAYERS):
        self.shape, self.dtype, self.device, self.layers = shape, dtype, device, layers
        self.size = shape.hidden // shape.heads
        self.heads = shape.heads // tensor_parallel
        self.kv_heads = max(1, shape.kv_heads // tensor_parallel)
        self.intermediate = shape.intermediate // tensor_parallel
        self.vocabulary = shape.vocabulary // tensor_parallel
        self._norm = torch.ones(shape.hidden, device=device, dtype=HALF)
        self._matrices: list[tuple[Work1, ...]] = []

    def _loaded(self) -> list[tuple[Work1, ...]]:
        """The four matrices of every layer; they are made when they are first wanted."""
        if self._matrices:
            return self._matrices
        hidden, queries = self.shape.hidden, self.heads * self.size
        outputs = queries + 2 * self.kv_heads * self.size
        sizes = [(outputs, hidden), (hidden, queries), (2 * self.intermediate, hidden), (hidden, self.intermediate)]
        self._matrices = [tuple(self._linear(*size, self.dtype) for size in sizes) for _ in range(self.layers)]
        return self._matrices

    def unload(self) -> None:
        """Give the matrices' memory back."""
        self._matrices = []

    def _linear(self, outputs: int, inputs: int, dtype: str) -> Work1:
        weight = torch.randn(outputs, inputs, device=self.device, dtype=HALF) * 0.02
        if dtype == "fp16":
            return lambda x: F.linear(x, weight)
        fp8, one = weight.to(torch.float8_e4m3fn).t(), torch.ones((), device=self.device)
        return lambda x: torch._scaled_mm(
            x.to(torch.float8_e4m3fn), fp8, scale_a=one, scale_b=one, out_dtype=HALF, use_fast_accum=True
        )

    def activations(self, tokens: int, inputs: int | None = None) -> torch.Tensor:
        """Products in FP8 take multiples of 16 tokens, and so many are computed."""
        padded = -(-tokens // 16) * 16 if self.dtype == "fp8" else tokens
        return torch.randn(padded, inputs or self.shape.hidden, device=self.device, dtype=HALF)

    def dense(self, x: torch.Tensor, attend: Callable[[torch.Tensor, int], torch.Tensor] | None = None) -> torch.Tensor:
        """All layers; without `attend`, the queries are taken for what attention would answer."""
        for layer, (qkv, projection, up, down) in enumerate(self._loaded()):
            y = qkv(F.rms_norm(x, (self.shape.hidden,), self._norm))
            attended = attend(y, layer) if attend else y[:, : self.heads * self.size].contiguous()
            x = x + projection(attended)
            a = up(F.rms_norm(x, (self.shape.hidden,), self._norm))
            x = x + down(F.silu(a[:, : self.intermediate]) * a[:, self.intermediate :])
        return x

    def matrices(self, tokens: int) -> Work:
        """The products of :meth:`dense` alone."""
        hidden = self.activations(tokens)
        queries = self.activations(tokens, self.heads * self.size)
        inner, loaded = self.activations(tokens, self.intermediate), self._loaded()

        def work() -> None:
            for products in loaded:
                for product, x in zip(products, (hidden, queries, hidden, inner), strict=True):
                    product(x)

        return work

    def output(self) -> Work1:
        """The output layer, which engines keep in FP16."""
        return self._linear(self.vocabulary, self.shape.hidden, "fp16")

    def cache(self, sequences: int, context: int, layers: int) -> list[list[torch.Tensor]]:
        """Keys and values of `layers` layers, each (sequences, KV heads, context, size of a head)."""
        shape = (sequences, self.kv_heads, context, self.size)
        return [[torch.randn(shape, device=self.device, dtype=HALF) for _ in range(layers)] for _ in "kv"]

    def cache_bytes(self, sequences: int, context: int) -> int:
        """Of one layer."""
        return 2 * 2 * sequences * self.kv_heads * context * self.size

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=self.heads != self.kv_heads)

    def attention(self, sequences: int, queries: int, context: int) -> tuple[Times, str, int]:
        """Times of the fastest kernel that takes the shape, its name, and how many layers were measured."""
        layers = int(max(1, min(LAYERS, CACHES_BYTES // self.cache_bytes(sequences, context))))
        size = (sequences, self.heads, queries, self.size)
        q = [torch.randn(size, device=self.device, dtype=HALF) for _ in range(layers)]
        k, v = self.cache(sequences, context, layers)

        def work() -> None:
            for one in zip(q, k, v, strict=True):
                self.attend(*one)

        found: dict[str, Times] = {}
        for name, backend in BACKENDS.items():
            if name == "math" and found:
                continue  # slow, and of use only where no other runs
            try:
                with sdpa_kernel(backend):
                    found[name] = timed(work, self.device)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:  # this kernel does not take the shape
                continue
        if not found:
            raise RuntimeError("no attention kernel of PyTorch takes this shape")
        best = min(found, key=lambda name: found[name])
        return found[best], f"sdpa {best}", layers

    def whole(self, sequences: int, queries: int, context: int) -> tuple[Times, str]:
        """A step with all layers, attention between the matrices, and the output layer at its end."""
        k, v = self.cache(sequences, context, self.layers)
        x, last = self.activations(sequences * queries), self.output()

        def attend(y: torch.Tensor, layer: int) -> torch.Tensor:
            q = y[: sequences * queries, : self.heads * self.size]
            q = q.view(sequences, queries, self.heads, self.size).transpose(1, 2)
            answer = self.attend(q, k[layer], v[layer]).transpose(1, 2).reshape(sequences * queries, -1)
            return F.pad(answer, (0, 0, 0, len(y) - len(answer)))  # rows that only FP8 products want

        found: list[Times] = []
        for name, backend in BACKENDS.items():
            if name == "math" and found:
                continue
            try:
                with sdpa_kernel(backend):
                    found.append(
                        timed(lambda: last(self.dense(x, attend)[: sequences * queries : queries]), self.device)
                    )
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError:
                continue
        if not found:
            raise RuntimeError("no attention kernel of PyTorch takes this shape")
        return min(found), "all layers"


class Plan(NamedTuple):
    """What one of --models says."""

    model: str
    dtype: str
    tensor_parallel: int

    @classmethod
    def read(cls, text: str, shapes: dict[str, Shape]) -> Plan:
        if text.count(":") > 2:
            raise ValueError(f"{text}: wanted MODEL:DTYPE[:TP], and nothing behind it")
        model, dtype, tensor_parallel = (*text.split(":"), *("fp16", "1")[text.count(":") :])
        if model not in shapes:
            raise ValueError(f"no shape is called {model!r}; known: {', '.join(shapes)}; --shape adds one")
        if dtype not in ("fp16", "fp8"):
            raise ValueError(f"{text}: PyTorch alone measures fp16 and fp8, not {dtype!r}")
        shape = shapes[model]
        if not tensor_parallel.isdecimal() or not int(tensor_parallel) or shape.heads % int(tensor_parallel):
            raise ValueError(f"{text}: {shape.heads} heads cannot be shared by {tensor_parallel!r} GPUs")
        return cls(model, dtype, int(tensor_parallel))


class Measured(NamedTuple):
    """One point: its times, how many times as long all layers take, and how it was measured."""

    times: Times
    factor: float
    how: str


class Bench:
    """All points of one plan; what a point needs is made when it is first asked for."""

    def __init__(self, plan: Plan, shape: Shape, device: str):
        self.plan, self.shape, self.device = plan, shape, device
        self.share = Share(shape, plan.dtype, plan.tensor_parallel, device)
        self._all: Share | None = None
        self._output: Work1 | None = None
        self._how = "graph" if device.startswith("cuda") else "called"

    def grid(self, few: bool) -> Iterator[tuple[str, int, int]]:
        """(part, x, y) of every point."""
        dense = "dense" if self.plan.tensor_parallel == 1 else "dense without all-reduce"
        for part, grid in (
            (dense, [(x, 0) for x in TOKENS]),
            ("matrices", [(x, 0) for x in TOKENS]),
            ("output", [(x, 0) for x in SEQUENCES]),
            ("decode", DECODE),
            ("prefill", PREFILL),
            ("whole decode", WHOLE_DECODE),
            ("whole prefill", WHOLE_PREFILL),
        ):
            for x, y in grid[:FEW] if few else grid:
                yield part, x, y

    def measure(self, part: str, x: int, y: int) -> Measured:
        """Time one point.

        Raises
        ------
        RuntimeError
            If the device cannot: no memory, no such kernel.
        """
        factor = self.shape.layers / LAYERS
        if part in ("decode", "prefill"):
            times, how, layers = self.share.attention(x, 1 if part == "decode" else y, y)
            return Measured(times, self.shape.layers / layers, how)
        if part == "output":
            self._output = self._output or self.share.output()
            return Measured(self._timed(self._output, x), 1, self._how)
        if part.startswith("whole"):
            if self._all is None:
                self.share.unload()  # its memory is wanted
                self._all = Share(
                    self.shape, self.plan.dtype, self.plan.tensor_parallel, self.device, self.shape.layers
                )
            times, how = self._all.whole(x, 1 if part == "whole decode" else y, y)
            return Measured(times, 1, how)
        if part == "matrices":
            return Measured(timed(self.share.matrices(x), self.device), factor, self._how)
        return Measured(self._timed(self.share.dense, x), factor, self._how)

    def _timed(self, work: Work1, tokens: int) -> Times:
        x = self.share.activations(tokens)
        return timed(lambda: work(x), self.device)


def ceilings(device: str) -> dict[str, float]:
    """What the device does at best: GB/s of a large copy (read and written), TFLOP/s of a large FP16 product."""
    cuda = device.startswith("cuda")
    n, m = (1 << 30, 8192) if cuda else (1 << 22, 128)
    if cuda:
        n = min(n, torch.cuda.mem_get_info()[0] // 16)  # half of the free memory, for two of them
    source, target = (torch.ones(n, dtype=torch.float32, device=device) for _ in range(2))
    copy_ms = timed(lambda: target.copy_(source), device)[0]
    a, b = (torch.randn(m, m, device=device, dtype=HALF) for _ in range(2))
    product_ms = timed(lambda: a @ b, device)[0]
    return {"copy_gb_per_s": round(8e-6 * n / copy_ms, 1), "fp16_tflops": round(2e-9 * m**3 / product_ms, 4)}


def about(device: str) -> dict[str, Any]:
    """Which device and software this is; two runs of one table must agree in it."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": _smi("driver_version") if cuda else None,
    }


def _smi(query: str) -> str | None:
    if not (tool := shutil.which("nvidia-smi")):
        return None
    command = [tool, f"--id={torch.cuda.current_device()}", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip() or None


class Table:
    """The rows of a CSV file, of which those already there are not measured again, and the description beside it."""

    def __init__(self, path: Path, described: dict[str, Any], shapes: dict[str, Shape]):
        self._path, self._beside = path, path.with_suffix(".json")
        self.known: set[tuple[str, ...]] = set()
        wanted = {name: shape._asdict() for name, shape in shapes.items()}
        self.described: dict[str, Any] = described | {"shapes": {}}
        if path.exists():
            if not self._beside.exists():
                raise ValueError(
                    f"{self._beside}, which says what {path} was measured on, is missing; name another file"
                )
            self.described = self._description()
            if different := [name for name, value in described.items() if self.described.get(name) != value]:
                raise ValueError(f"{path} was measured with another {', '.join(different)}; name another file")
            for name, shape in wanted.items():
                if self.described["shapes"].get(name, shape) != shape:
                    raise ValueError(f"{path} holds another shape called {name}; name another file")
            self._read()
        self.described["shapes"] |= wanted
        self.describe()
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")

    def _description(self) -> dict[str, Any]:
        """What is in the file beside the table."""
        try:
            found = json.loads(self._beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = None
        complete = found.get("complete", []) if isinstance(found, dict) else None
        named = isinstance(complete, list) and all(isinstance(plan, str) for plan in complete)
        if not named or not isinstance(found.get("shapes"), dict):
            raise ValueError(f"{self._beside} does not say what {self._path} was measured on; name another file")
        return dict(found)

    def _read(self) -> None:
        """Take note of what is there; a line that was being written when the machine stopped goes."""
        header = ",".join(COLUMNS) + "\n"
        try:
            text = self._path.read_text(encoding="utf-8-sig")
            whole = header if header.startswith(text) else text[: text.rfind("\n") + 1]
            rows = list(csv.reader(whole.splitlines()))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self._path} is no table of this script ({error}); name another file") from None
        if not whole.startswith(header):
            raise ValueError(f"{self._path} is no table of this script: it has other columns; name another file")
        for line, row in enumerate(rows, 1):
            if len(row) != len(COLUMNS):
                raise ValueError(f"{self._path}, line {line}: {len(row)} cells, not {len(COLUMNS)}; remove the line")
        if text != whole:
            self._path.write_text(whole, encoding="utf-8")
        self.known = {tuple(row[:KEY]) for row in rows}

    def add(self, key: tuple[Any, ...], measured: Measured) -> None:
        ms = [f"{measured.factor * time_ms:.5g}" for time_ms in measured.times]
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([*key, *ms, measured.how])
        self.known.add(tuple(map(str, key)))

    def describe(self, **more: Any) -> None:
        self.described |= more
        self._beside.write_text(json.dumps(self.described, indent=1) + "\n", encoding="utf-8")


def run(bench: Bench, table: Table, end: float, few: bool) -> bool:
    """Measure what a plan's table lacks, until the time is over; whether it was enough."""
    plan = bench.plan
    name = f"{plan.model} {plan.dtype} TP{plan.tensor_parallel}"
    todo = []
    for part, x, y in bench.grid(few):
        key = (plan.model, plan.dtype, "fp16", plan.tensor_parallel, part, x, y)
        if tuple(map(str, key)) not in table.known:
            todo.append((key, part, x, y))
    began = said = time.monotonic()
    for done, (key, part, x, y) in enumerate(todo):
        if time.monotonic() > end:
            print(f"{name}: the time is over; {len(todo) - done} points are left, the same command goes on")
            return False
        if time.monotonic() > said + SAY_EVERY_S:
            said = time.monotonic()
            print(f"{name}: {done}/{len(todo)} points", flush=True)
        try:
            table.add(key, bench.measure(part, x, y))
        except RuntimeError as error:
            print(f"{name}: {part} {x} {y} left out: {str(error).strip().splitlines()[0][:150]}")
        if bench.device.startswith("cuda"):
            torch.cuda.empty_cache()
    print(f"{name}: {len(todo)} points in {time.monotonic() - began:.0f} s", flush=True)
    return True


def main() -> None:
    """Read the command line, refuse what cannot work, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="table to write or to complete, .csv")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL:DTYPE[:TP]", help=" ".join(MODELS))
    parser.add_argument(
        "--shape", action="append", default=[], metavar="NAME=LAYERS,HIDDEN,INTERMEDIATE,HEADS,KV_HEADS,VOCABULARY"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=600, help="stop after so many seconds (600)")
    parser.add_argument("--few", action="store_true", help="two points of each part: does it run?")
    options = parser.parse_args()
    try:
        shapes = SHAPES | dict(_shape(text) for text in options.shape)
        plans = [Plan.read(text, shapes) for text in options.models]
        _check(options.device, plans)
        if options.out.suffix != ".csv":
            raise ValueError(f"{options.out}: a table's name ends in .csv")
        table = Table(options.out, about(options.device), {plan.model: shapes[plan.model] for plan in plans})
        reached = ceilings(options.device)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[0]}")
    cuda, end = options.device.startswith("cuda"), time.monotonic() + options.budget_s
    if not cuda:
        torch.set_num_threads(1)  # threads that wait for each other would be what is measured of a tiny model
    state = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    found = {"date": datetime.date.today().isoformat(), "found": f"{state}: {_smi(state)}" if cuda else None, **reached}
    found["memory_bytes"] = torch.cuda.get_device_properties().total_memory if cuda else None
    table.describe(**{name: value for name, value in found.items() if name not in table.described})
    print(", ".join(f"{name} {value}" for name, value in table.described.items() if name != "shapes"), flush=True)
    torch.manual_seed(0)
    for plan in plans:
        if run(Bench(plan, shapes[plan.model], options.device), table, end, options.few) and not options.few:
            table.describe(complete=sorted({*table.described.get("complete", []), ":".join(map(str, plan))}))
        if cuda:
            torch.cuda.empty_cache()
    table.describe(left=f"{state}: {_smi(state)}" if cuda else None)


def _shape(text: str) -> tuple[str, Shape]:
    name, _, numbers = text.partition("=")
    values = [int(n) if n.isdecimal() else 0 for n in numbers.split(",")]
    if not name or len(values) != len(Shape._fields) or not all(values):
        raise ValueError(f"--shape {text}: wanted NAME={','.join(Shape._fields).upper()}, six whole numbers")
    return name, Shape(*values)


def _check(device: str, plans: list[Plan]) -> None:
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "PyTorch sees no CUDA GPU here (nvidia-smi says why); --device cpu --models tiny:fp16 tries the script"
        )
    torch.cuda.set_device(torch.device(device) if ":" in device else 0)
    if torch.cuda.get_device_capability() < (8, 9) and any(plan.dtype == "fp8" for plan in plans):
        raise ValueError(f"{torch.cuda.get_device_name()} computes no FP8; leave such models out of --models")


if __name__ == "__main__":
    main()
