"""What judging trained experts leaves behind: a few tables, and no model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd

SEED, ADAPTED, DENSE, AVERAGE = "seed", "adapted", "dense", "average"
"""Arms that are no expert's."""
TEXT = "text"
"""Beside the arms' answers: how the text itself goes on."""
LEAST_TOKENS = 160
"""Of a held-out text, where blocks are as long: enough to judge what follows a prompt of 128."""
PROMPT = 32
"""Tokens of a held-out text that are its prompt, by which the expert is chosen that answers."""


class Judged(NamedTuple):
    """Tables from which every figure of the experts follows, without running a model again."""

    documents: pd.DataFrame
    tokens: pd.DataFrame
    """Both as in :class:`~erlib.experts.texts.HeldOut`."""
    scores: pd.DataFrame
    """One row per document, cluster, arm and position: ``log_probability`` (nats)."""
    training: pd.DataFrame
    """One row per trained arm: ``arm``, ``tokens``, ``train_s``, ``train_cpu_s``, ``first_loss``, ``last_loss``,
    ``dtype``, ``machine``."""

    def wide(self) -> pd.DataFrame:
        """Log-probabilities with a column per arm, rows as those of ``tokens``."""
        wide = self.scores.pivot(index=["document", "position"], columns="arm", values="log_probability")
        return wide.set_axis(wide.columns.astype(str), axis=1)


def read(directory: Path) -> Judged:
    """What :func:`erlib.experts.judged` has kept in `directory`."""
    return Judged(*(pd.read_parquet(directory / f"{name}.parquet") for name in Judged._fields))
