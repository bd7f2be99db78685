"""Trains, scores, asks and merges experts, in a process of its own: ``python -m erlib.experts.jobs``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging

from erlib.engines.worker import do_jobs
from erlib.experts import answering, scoring, training


def _work(jobs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All jobs name the same checkpoint, which is loaded once."""
    transformers_logging.set_verbosity_error()
    base = None
    for job in jobs:
        if base is None:
            base = training.base_model(Path(job["checkpoint"]), job["dtype"], job["layers"])
        if "blocks" in job:
            yield from training.trained(base, job)
            continue
        model = scoring.merged(base, [Path(path) for path in job["adapters"]]).eval()
        do = scoring.scored if "texts" in job else answering.drawn if "prompts" in job else scoring.written
        yield from do(model, job)


if __name__ == "__main__":
    do_jobs(_work)
