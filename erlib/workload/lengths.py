"""How long the papers' prompts and answers are: paper 1's and the preliminary sweep's normal, paper 2's as MLPerf's."""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy

from erlib import config, paths

Paper = Literal["p1", "p2", "preliminary"]
Floats = npt.NDArray[np.float64]

FORCED = -1
"""``end_id`` with which an engine generates exactly ``max_tokens`` tokens."""

_WRITTEN, _AT_MOST = 7_174_833 / 24_576, 1024
"""What Llama-2-70B writes for a sample of MLPerf's, on average and at most; see data/mlperf_lengths.NOTICE.md."""


@functools.cache
def _mlperf() -> tuple[Floats, Floats]:
    """Lengths of MLPerf's samples, ascending: of the prompts, and of answers as Llama-2-70B writes them."""
    counts = pd.read_csv(paths.FACTS / "mlperf_lengths.csv")
    prompts, references = (counts["tokens"].repeat(counts[name]).to_numpy(float) for name in ("inputs", "outputs"))

    def written(factor: float) -> Floats:
        return np.minimum(references * factor, _AT_MOST)

    return prompts, written(scipy.optimize.brentq(lambda factor: written(factor).mean() - _WRITTEN, 1, 2))


def input_tokens(paper: Paper, settings: config.WorkloadSettings, n: int) -> npt.NDArray[np.int64]:
    """`n` full-scale input lengths at evenly spaced quantiles, int array (n,), ascending.

    Paper 1 and the preliminary sweep: normal, 335 +- 30 (paper 1, section IV-B; paper 2, section IV-C). Paper 2:
    MLPerf's (Fig. 2). Evenly spaced rather than random quantiles, so that a small pool shows the whole distribution.
    """
    levels = (np.arange(n) + 0.5) / n
    if paper == "p2":
        lengths = np.quantile(_mlperf()[0], levels)
    elif settings.p1_input_sd == 0:
        lengths = np.full(n, float(settings.p1_input_tokens))
    else:
        normal = NormalDist(settings.p1_input_tokens, settings.p1_input_sd)
        lengths = np.array([normal.inv_cdf(level) for level in levels])
    return np.maximum(1, lengths.round()).astype(np.int64)


def answer_tokens(
    paper: Paper, profile: config.Profile, n: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], int | None]:
    """Answer lengths of `n` prompts in tokens on this machine, int array (n,), and the ``end_id`` that goes with them.

    Forced, except in paper 2 with ``workload.p2_answers: eos``, where they are limits. With ``mlperf``, each answer of
    paper 2 is forced to a length that Llama-2-70B's answers to MLPerf's prompts have, without regard to its prompt.
    """
    settings = profile.workload
    if paper == "p2" and settings.p2_answers == "mlperf":
        lengths = np.quantile(_mlperf()[1], rng.permutation((np.arange(n) + 0.5) / n))
        return np.array([profile.scaled_tokens(min(x, settings.p2_max_output_tokens)) for x in lengths]), FORCED
    tokens = {
        "p1": settings.p1_output_tokens,
        "p2": settings.p2_max_output_tokens,
        "preliminary": settings.preliminary_output_tokens,
    }[paper]
    return np.full(n, profile.scaled_tokens(tokens)), None if paper == "p2" else FORCED


def typical_tokens(workload: Paper, settings: config.WorkloadSettings) -> tuple[float, float]:
    """Mean full-scale lengths of an experiment's (first) prompts and of their answers."""
    if workload == "p2":
        return tuple(float(lengths.mean()) for lengths in _mlperf())  # type: ignore[return-value]
    answer = settings.p1_output_tokens if workload == "p1" else settings.preliminary_output_tokens
    return float(settings.p1_input_tokens), float(answer)
