"""Lets trained experts answer, as a process of :mod:`erlib.experts.jobs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from erlib import cache

_BATCH = 16
"""Prompts at a time: a gigabyte of memory with four answers each."""


@torch.inference_mode()
def drawn(model: Any, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answers to all prompts, drawn token by token from what the model predicts, in one array (prompts, samples, n).

    All arms draw with the same random numbers, so that their answers part only where what they predict does.
    """
    prompts = torch.tensor(json.loads(Path(job["prompts"]).read_text(encoding="utf-8")), device=model.device)
    n, samples = job["answer_tokens"], job["samples"]
    end = model.generation_config.eos_token_id
    # Nothing else that a checkpoint asks for, such as a penalty for repetitions; no answer ends, or is padded.
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end[0] if isinstance(end, list) else end)
    # Merged weights want no gradient, and with such torch multiplies each sequence's last hidden state by a copy of the
    # output layer: four gigabytes, and a third of the speed.
    model.requires_grad_(True)
    torch.manual_seed(job["seed"])
    answers = []
    for batch in prompts.split(_BATCH):
        tokens = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=n,
            max_new_tokens=n,
            num_return_sequences=samples,
        )
        answers.append(tokens[:, prompts.shape[1] :].reshape(len(batch), samples, n).cpu().numpy())
        yield {"tokens": len(batch) * samples * n}
    with cache.writing(Path(job["target"])) as partial, partial.open("wb") as file:
        np.save(file, np.concatenate(answers).astype(np.int32))
