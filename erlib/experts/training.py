"""Trains adapters, as a process of :mod:`erlib.experts.jobs`.

Low-rank adapters (LoRA) at all layers, by PEFT on transformers; the weights below them stay as they are. Only the loop
is ours: PEFT alone keeps bfloat16 models' adapters in float32 and converts at every layer (``benchmarks/experts.py``
says what that costs); here the adapters have the model's type, and the optimiser float32 copies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from erlib import cache

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALPHA = 2
"""Of an adapter, per rank."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; then it falls with the root of what is left."""


def base_model(checkpoint: Path, dtype: str, layers: int | None = None) -> PreTrainedModel:
    """The checkpoint, or its first `layers`, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = {"num_hidden_layers": layers} if layers else {}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), device_map={"": device}, **changed
    )
    assert isinstance(model, PreTrainedModel)
    return model


def with_adapter(base: PreTrainedModel, rank: int, start: Path | None, seed: int) -> PeftModel:
    """`base` with an adapter to train: one that goes on from `start`, or a new one, which changes nothing yet."""
    if start is not None:
        return PeftModel.from_pretrained(base, start, is_trainable=True, autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=MATRICES, task_type="CAUSAL_LM")
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def train(model: PeftModel, blocks: torch.Tensor, batch: int, learning_rate: float) -> Iterator[float]:
    """One pass over `blocks` (n, tokens); yields the loss (nats per token) of every step.

    AdamW (betas 0.9 and 0.99), gradients clipped to a norm of 1, no dropout, no weight decay.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exact = [parameter.detach().float().clone() for parameter in parameters]  # bfloat16 would lose what a step adds
    optimizer = torch.optim.AdamW(exact, learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    steps = blocks.split(batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, len(steps)))
    for step in steps:
        ids = step.to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for parameter, copy in zip(parameters, exact, strict=True):
            assert parameter.grad is not None
            copy.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        schedule.step()
        for parameter, copy in zip(parameters, exact, strict=True):
            parameter.data.copy_(copy)
        yield float(loss.detach())
    for parameter, copy in zip(parameters, exact, strict=True):
        parameter.data = copy  # an adapter is kept as exact as it was trained


def _share_of_rate(step: int, steps: int) -> float:
    rising = (step + 1) / (WARM_UP * steps)
    return min(rising, 1.0) * (1 - step / steps) ** 0.5


def trained(base: PreTrainedModel, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Write one arm's adapter, telling the tokens of each step; `base` is as before in the end."""
    blocks = torch.from_numpy(np.load(job["blocks"])).long()
    target = Path(job["target"])
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    model = with_adapter(base, job["rank"], Path(job["start"]) if job["start"] else None, job["seed"])
    losses = []
    for loss in train(model, blocks, job["batch"], job["learning_rate"]):
        losses.append(loss)
        yield {"tokens": job["batch"] * blocks.shape[1]}
    partial = Path(job["scratch"]) / target.name
    model.save_pretrained(str(partial))
    (partial / "README.md").unlink(missing_ok=True)  # a form to fill in
    facts = {"arm": job["arm"], "tokens": blocks.numel(), "losses": losses, **job["facts"]}
    facts |= {"train_s": time.monotonic() - started_s, "train_cpu_s": time.process_time() - started_cpu_s}
    (partial / "training.json").write_text(json.dumps(facts), encoding="utf-8")
    _say_what_it_is_for(partial, job["base"])
    cache.put(partial, target)
    model.unload()


def _say_what_it_is_for(adapter: Path, base: str) -> None:
    """In PEFT's own file: where it names the model, a path of this machine would stand."""
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"base_model_name_or_path": base}, indent=1), encoding="utf-8")
