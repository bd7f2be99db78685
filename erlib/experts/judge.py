"""How likely are experts' answers to a judge that is none of them, and has not read what they were trained on?

The judge is CMU Sphinx' trigram model of US English, which the package ``pocketsphinx`` brings along. It knows words
without capitals, and of a prompt the last two; so it tells English from what is none, and not whether an answer fits.
Fewer bits are plainer words and not better answers: what to be near is the text itself.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pocketsphinx

from erlib.experts.tables import ADAPTED, DENSE, PROMPT, SEED, TEXT, Judged
from erlib.experts.worth import LABELS, RANDOM_CLUSTERS, RANDOM_ROUTING, Designs, routed_by_first

Floats = npt.NDArray[np.float64]

ROUTED, OTHER = routed_by_first(PROMPT), "other experts than that"
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
_IMPOSSIBLE = -(1 << 28)
"""Below the logarithm of any probability: that of a word which is none of the model's."""


class Trigrams:
    """Probabilities of words after the two before them."""

    def __init__(self) -> None:
        file = Path(pocketsphinx.get_model_path()) / "en-us" / "en-us.lm.bin"
        self._logs = pocketsphinx.LogMath()
        self._model = pocketsphinx.NGramModel(pocketsphinx.Config(), self._logs, str(file))

    def bits(self, prompt: str, answer: str) -> tuple[float, int, int]:
        """-log2 of the probability of an answer's words, how many were judged, and how many the model does not know.

        A word that it does not know is not judged, and what follows it is judged without what stood before. Nor is one
        judged that may have been cut: the first, where prompt and answer meet within it, and the last.
        """
        log, judged, unknown = 0, 0, 0
        before: list[str] = []
        prompt, answer = (text.lower().replace("’", "'") for text in (prompt, answer))
        whole = prompt + answer
        for word in _WORD.finditer(whole):
            if word.start() < len(prompt) < word.end() or (word.end() == len(whole) and answer):
                before = []
                continue
            known = bool(self._model.prob([word[0]]) > _IMPOSSIBLE)
            if word.start() >= len(prompt):
                judged, unknown = judged + known, unknown + (not known)
                log += self._model.prob([word[0], *before[::-1]]) if known else 0  # the latest first
            before = [*before, word[0]][-2:] if known else []
        return -self._logs.log_to_ln(log) / np.log(2), judged, unknown


def judge_answers(judged: Judged, answers: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Every design's answers beside those of experts that are chosen by the prompt.

    Parameters
    ----------
    judged : Judged
        What :func:`erlib.experts.judged` returned.
    answers : DataFrame
        What :func:`erlib.experts.answered` returned.
    seed : int
        Of the resamples.

    Returns
    -------
    DataFrame
        ``design``; ``bits_per_word`` of the answers under the judge; ``more_bits``, how much more that is than of
        experts routed by the prompt (0.01: one per cent), with ``ci95_low`` and ``ci95_high``, by bootstrap over the
        texts; ``words`` that were judged; ``unknown``, the share of all words that the judge does not know, without
        which designs do not compare; ``texts``.
    """
    trigrams = Trigrams()
    columns = ["bits", "words", "unknown"]
    found = [trigrams.bits(prompt, answer) for prompt, answer in zip(answers["prompt"], answers["answer"], strict=True)]
    table = answers[["arm", "document"]].join(pd.DataFrame(found, columns=columns, index=answers.index))
    of_arm = {
        str(arm): its.groupby("document")[columns].sum().to_numpy(np.float64) for arm, its in table.groupby("arm")
    }
    designs = Designs(judged, temperature=1.0)  # of ensembles, which do not answer here
    drawn = designs.resamples(seed)
    of_design = _of_design(designs, of_arm)
    reference = of_design[ROUTED]
    rows = []
    for design, counts in of_design.items():
        low, high = np.quantile(_bits_per_word(drawn @ counts) / _bits_per_word(drawn @ reference), [0.025, 0.975]) - 1
        (_, words, unknown), routed = counts.sum(axis=0), reference.sum(axis=0)
        rows.append(
            {
                "design": design,
                "bits_per_word": _bits_per_word(counts.sum(axis=0)),
                "more_bits": _bits_per_word(counts.sum(axis=0)) / _bits_per_word(routed) - 1,
                "ci95_low": low,
                "ci95_high": high,
                "words": int(words),
                "unknown": unknown / (words + unknown),
                "texts": len(counts),
            }
        )
    return pd.DataFrame(rows).sort_values("bits_per_word", ignore_index=True)


def _of_design(designs: Designs, of_arm: dict[str, Floats]) -> dict[str, Floats]:
    """Bits, judged and unknown words of each text's answers, (texts, 3); where several experts answer, of all."""
    experts = np.array([of_arm[f"expert-{i}"] for i in range(designs.k)])
    nearest = designs.seen(PROMPT).argmin(axis=1)[designs.position == 1]
    routed, all_experts = experts[nearest, np.arange(len(nearest))], experts.sum(axis=0)
    return {
        "the text itself": of_arm[TEXT],
        **{LABELS[arm]: of_arm[arm] for arm in (SEED, ADAPTED, DENSE) if arm in of_arm},
        ROUTED: routed,
        RANDOM_ROUTING: all_experts,
        OTHER: all_experts - routed,
        RANDOM_CLUSTERS: np.sum([of for arm, of in of_arm.items() if arm.startswith("random-")], axis=0),
    }


def _bits_per_word(counts: Floats) -> Floats:
    return counts[..., 0] / counts[..., 1]
