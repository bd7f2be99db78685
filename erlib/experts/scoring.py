"""Scores texts with trained experts and merges them, as a process of :mod:`erlib.experts.jobs`."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from erlib import cache


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """Of every token of one text but the first, given those before it (nats), float32."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].cpu().numpy()


def merged(base: PreTrainedModel, adapters: list[Path]) -> PreTrainedModel:
    """A copy of `base` to whose weights the mean of what the adapters add has been added; of none: `base` itself."""
    if not adapters:
        return base
    names = [f"adapter{i}" for i in range(len(adapters))]
    model = PeftModel.from_pretrained(copy.deepcopy(base), adapters[0], names[0], autocast_adapter_dtype=False)
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, adapter_name=name, autocast_adapter_dtype=False)
    if len(adapters) > 1:
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "mean", combination_type="cat")
        model.set_adapter("mean")
    return model.merge_and_unload()


def scored(model: PreTrainedModel, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Log-probabilities of all texts, one after the other, in one array."""
    scores = []
    for ids in json.loads(Path(job["texts"]).read_text(encoding="utf-8")):
        scores.append(log_probabilities(model, torch.tensor(ids, device=model.device)))
        yield {"tokens": len(ids)}
    with cache.writing(Path(job["target"])) as partial, partial.open("wb") as file:
        np.save(file, np.concatenate(scores))


def written(model: PreTrainedModel, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The model as a checkpoint in FP16."""
    target, source = Path(job["target"]), Path(job["checkpoint"])
    partial = Path(job["scratch"]) / target.name
    model.half().save_pretrained(partial)
    for file in source.glob("*token*.json"):
        shutil.copy(file, partial)
    cache.put(partial, target)
    yield {"tokens": 1}
