"""Measure what adapters cost an engine's step on this machine's GPU. Needs Python, PyTorch and measure_step_times.py.

    python3 measure_adapters.py adapters.csv                                # Llama 3 8B in FP16 and FP8, a minute
    python3 measure_adapters.py adapters.csv --models llama-2-13b:fp16 --ranks 8 64
    python3 measure_adapters.py tiny.csv --device cpu --models tiny:fp16

``dense``, the part of a step that adapters (LoRA at all layers, on all seven matrices) make longer, is measured as
``measure_step_times.py`` does it, in four ways that take turns within a point:

- ``none``: without adapters;
- ``one``: the same adapter for all sequences, its two products beside each matrix;
- ``gathered``: every sequence its own expert's adapter, which is gathered, so that a batch of small products follows;
- ``masked``: the adapters of all experts for all sequences, as two products eight times as wide, where what the first
  gives for other experts is set to zero.

``gathered`` and ``masked`` give the same results, and the faster is what an engine of PyTorch's kernels would take;
kernels that are made for it, as TensorRT-LLM's, may do better. Beside the table lies ``<name>.json``, with the device.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure_step_times as steps
import torch

COLUMNS = ["model", "dtype", "tensor_parallel", "experts", "rank", "way", "x", "ms", "p10_ms", "p90_ms"]
WAYS = ("none", "one", "gathered", "masked")
TOKENS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256]
EXPERTS = 8
PARTS = (3, 1, 2, 1)
"""Of a layer's four products: how many matrices lie in one, each with an adapter (queries, keys, values; gate, up)."""


class Adapters:
    """The adapters of all experts beside one product, with random weights.

    An expert's adapters of the matrices that lie in one product are one of their ranks' sum, whose second matrix is
    block-diagonal: as many operations as an engine that keeps them so.
    """

    def __init__(self, outputs: int, inputs: int, parts: int, rank: int, device: str) -> None:
        self.parts, self.rank = parts, rank
        inner = parts * rank
        self.first = torch.randn(EXPERTS, inner, inputs, device=device, dtype=steps.HALF) * 0.02
        self.second = torch.randn(EXPERTS, outputs, inner, device=device, dtype=steps.HALF) * 0.02
        bounds = [round(outputs * part / parts) for part in range(parts + 1)]
        for part in range(parts):
            outside = torch.ones(outputs, device=device, dtype=torch.bool)
            outside[bounds[part] : bounds[part + 1]] = False
            self.second[:, outside, part * rank : (part + 1) * rank] = 0
        self.all_first = self.first.reshape(EXPERTS * inner, inputs).contiguous()
        self.all_second = self.second.transpose(0, 1).reshape(outputs, EXPERTS * inner).contiguous()

    def one(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        return x @ self.first[0].T @ self.second[0].T

    def gathered(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        inner = torch.bmm(self.first[expert], x[:, :, None])
        return torch.bmm(self.second[expert], inner)[:, :, 0]

    def masked(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        inner = (x @ self.all_first.T).view(len(x), EXPERTS, -1)
        own = torch.nn.functional.one_hot(expert, EXPERTS).to(x.dtype)
        return (inner * own[:, :, None]).view(len(x), -1) @ self.all_second.T


class AdaptedShare(steps.Share):
    """A share of a model's layers of whose products every one has adapters beside it."""

    def __init__(self, shape: steps.Shape, dtype: str, tensor_parallel: int, device: str, rank: int) -> None:
        super().__init__(shape, dtype, tensor_parallel, device)
        self.rank = rank
        self.way = "none"
        self.expert = torch.zeros(1, device=device, dtype=torch.int64)

    def _loaded(self) -> list[tuple[steps.Work1, ...]]:
        if not self._matrices:
            plain = super()._loaded()
            queries = self.heads * self.size
            outputs = queries + 2 * self.kv_heads * self.size
            hidden, inner = self.shape.hidden, self.intermediate
            sizes = [(outputs, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]
            self._matrices = [
                tuple(
                    self._beside(product, Adapters(*size, parts, self.rank, self.device))
                    for product, size, parts in zip(layer, sizes, PARTS, strict=True)
                )
                for layer in plain
            ]
        return self._matrices

    def _beside(self, product: steps.Work1, adapters: Adapters) -> steps.Work1:
        def work(x: torch.Tensor) -> torch.Tensor:
            y = product(x)
            if self.way == "none":
                return y
            adapted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = getattr(adapters, self.way)
            return y + adapted(x, self.expert)

        return work

    def in_turns(self, tokens: int) -> dict[str, steps.Times]:
        """Times of one step of `tokens` sequences, whose experts take turns, by way."""
        x = self.activations(tokens)
        self.expert = torch.arange(len(x), device=self.device) % EXPERTS
        found = {}
        for self.way in WAYS:
            found[self.way] = steps.timed(lambda: self.dense(x), self.device)
        return found


def check(device: str) -> None:
    """Both ways to give every sequence its own adapter must give what its expert's adapter alone does."""
    adapters = Adapters(96, 64, 3, 4, device)
    x = torch.randn(16, 64, device=device, dtype=steps.HALF)
    expert = torch.arange(16, device=device) % EXPERTS
    right = torch.stack(
        [row @ adapters.first[e].T @ adapters.second[e].T for row, e in zip(x, expert.tolist(), strict=True)]
    )
    for way in (adapters.gathered, adapters.masked):
        torch.testing.assert_close(way(x, expert), right, rtol=0.02, atol=0.002)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the table, a new CSV file")
    parser.add_argument("--models", nargs="+", default=["llama-3-8b:fp16", "llama-3-8b:fp8"], metavar="NAME:DTYPE")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --device cpu --models tiny:fp16 shows that the script runs")
    try:
        plans = [steps.Plan.read(text, steps.SHAPES) for text in options.models]
    except ValueError as error:
        parser.error(str(error))
    if not options.out.absolute().parent.is_dir():
        parser.error(f"there is no folder {options.out.absolute().parent}")
    torch.manual_seed(0)
    check(device)
    rows: list[list[Any]] = []
    for name, dtype, width in plans:
        shape = steps.SHAPES[name]
        for rank in options.ranks:
            share = AdaptedShare(shape, dtype, width, device, rank)
            for tokens in TOKENS[:2] if device == "cpu" else TOKENS:
                for way, times in share.in_turns(tokens).items():
                    ms = [round(time * shape.layers / steps.LAYERS, 5) for time in times]
                    rows.append([name, dtype, width, EXPERTS, rank, way, tokens, *ms])
                last = {row[5]: row[7] for row in rows[-len(WAYS) :]}
                ratios = ", ".join(f"{way} {ms / last['none']:.3f}" for way, ms in last.items() if way != "none")
                print(f"{name} {dtype} rank {rank}, {tokens:4d} sequences: {last['none']:.3f} ms; {ratios}", flush=True)
            del share
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    with options.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    options.out.with_suffix(".json").write_text(
        json.dumps(steps.about(device) | steps.ceilings(device), indent=1), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
