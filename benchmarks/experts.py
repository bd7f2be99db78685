"""How fast are experts trained here? The workbench's loop beside PEFT's own way, and what matrix products would allow.

Both train the same adapters (LoRA at all layers) on the same blocks. PEFT's own way keeps the adapters of a bfloat16
model in float32; where the model is float32 there is nothing to convert, and the two are the same. The limit is what
the processor multiplies in the shapes of this model, at four operations per weight and token: two forward, and two back
to the activations, since the weights themselves stay as they are.

    python -m benchmarks.experts [--profile laptop] [--set experts.dtype=float32] [--steps 6] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import torch
from peft import LoraConfig, get_peft_model

from erlib import config
from erlib.experts import scoring, training
from erlib.experts.base import base_of


def tokens_per_cpu_s(work: Callable[[], int], rounds: int = 3) -> list[float]:
    """Tokens per second of one core's time, of each round after one that is not counted."""
    work()
    found = []
    for _ in range(rounds):
        before_s = time.process_time()
        tokens = work()
        found.append(tokens / (time.process_time() - before_s))
    return found


def multiplied_per_cpu_s(base: torch.nn.Module, tokens: int) -> float:
    """Floating-point operations per second of one core's time in this model's products."""
    weights = [module.weight for module in base.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=w.dtype) for w in weights}

    def work() -> int:
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
        return sum(2 * tokens * weight.numel() for weight in weights)

    with torch.inference_mode():
        return max(tokens_per_cpu_s(work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    profile = config.load_profile(options.profile, config.read_overrides(options.set))
    settings = profile.experts
    torch.set_num_threads(1)
    start = base_of(profile)
    base = training.base_model(start.directory, start.dtype)
    blocks = torch.randint(100, start.tokenizer.get_vocab_size(), (options.steps * settings.batch, settings.sequence))

    def ours() -> int:
        model = training.with_adapter(base, settings.rank, None, 0)
        for _ in training.train(model, blocks, settings.batch, settings.learning_rate):
            pass
        model.unload()
        return blocks.numel()

    def as_is() -> int:
        lora = LoraConfig(r=settings.rank, lora_alpha=training.ALPHA * settings.rank, target_modules=training.MATRICES)
        model = get_peft_model(base, lora)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], settings.learning_rate)
        for step in blocks.split(settings.batch):
            model(input_ids=step, labels=step, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.unload()
        return blocks.numel()

    def judging() -> int:
        with torch.inference_mode():
            for block in blocks:
                scoring.log_probabilities(base, block)
        return blocks.numel()

    weights = sum(module.weight.numel() for module in base.modules() if isinstance(module, torch.nn.Linear))
    limit = multiplied_per_cpu_s(base, settings.batch * settings.sequence) / (4 * weights)
    found = {"dtype": start.dtype, "matrix products allow": [limit]}
    found |= {"PEFT's own way": tokens_per_cpu_s(as_is), "the workbench's loop": tokens_per_cpu_s(ours)}
    found |= {"judging": tokens_per_cpu_s(judging)}
    print(f"tokens per CPU second in {start.dtype}, one thread, {settings.batch} x {settings.sequence} tokens a step")
    for name, speeds in found.items():
        if isinstance(speeds, list):
            print(f"  {name:<24} {' '.join(f'{speed:7.1f}' for speed in speeds)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
