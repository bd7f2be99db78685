"""What adapters of several experts in one batch cost a decoding step here: PEFT on a CPU, which is what there is.

No engine for CPUs that this workbench serves with batches requests of different adapters; PEFT does, one adapter after
the other. A step is one more token for every sequence, with a KV cache. The ways take turns, so that a machine that
changes its pace changes it for all; what is printed are medians, and their ratios to steps without any adapter.

    python -m benchmarks.mixed_adapters [--profile laptop] [--set KEY=VALUE] [--batch 8 32] [--steps 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from erlib import config
from erlib.experts import arms
from erlib.experts.base import base_of
from erlib.machine import hardware

CONTEXT = 64
WAYS = ("no adapter", "one adapter for all", "each expert's own")


@contextlib.contextmanager
def as_way(model: PeftModel, way: str, batch: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """What to call the model with."""
    if way == "no adapter":
        with model.disable_adapter():
            yield {}
    elif way == "one adapter for all":
        model.set_adapter(names[0])
        yield {}
    else:
        yield {"adapter_names": [names[i % len(names)] for i in range(batch)]}


@torch.inference_mode()
def steps_s(model: PeftModel, names: list[str], batch: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every step, by way; the ways take turns."""
    ids = torch.randint(100, 20_000, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    caches = {}
    for way in WAYS:
        with as_way(model, way, batch, names) as more:
            caches[way] = model(input_ids=ids, use_cache=True, **more).past_key_values
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(steps):
        for way in WAYS:
            with as_way(model, way, batch, names) as more:
                begun_s = time.perf_counter()
                model(input_ids=ids[:, :1], past_key_values=caches[way], use_cache=True, **more)
                taken[way].append(time.perf_counter() - begun_s)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    profile = config.load_profile(options.profile, config.read_overrides(options.set))
    adapters = arms.adapters(profile, profile.clusterer.n_clusters)
    torch.set_num_threads(hardware.cores())
    base = AutoModelForCausalLM.from_pretrained(base_of(profile).directory, dtype=torch.float32)
    names = [f"expert-{i}" for i in range(len(adapters))]
    model = PeftModel.from_pretrained(base, adapters[0], names[0]).eval()
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, adapter_name=name)
    print(f"{len(names)} adapters of rank {profile.experts.rank}, {options.steps} steps, on {hardware.machine()}")
    found = {}
    for batch in options.batch:
        taken = found[batch] = steps_s(model, names, batch, options.steps)
        for way, its in taken.items():
            ratio = np.array(its) / np.array(taken[WAYS[0]])
            low, high = np.quantile(ratio, [0.25, 0.75])
            print(
                f"  {batch:3d} sequences, {way:<20} {1e3 * np.median(its):7.1f} ms, "
                f"x {np.median(ratio):.2f} (quartiles {low:.2f} to {high:.2f})"
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
