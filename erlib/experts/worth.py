"""What it is worth to be routed: every figure of the experts, from one table of log-probabilities and no model.

Bits per byte is the loss of language, -log2 of a text's probability over its bytes: other than perplexity it does not
depend on the tokenizer. Intervals are 95 %, by bootstrap over the texts within their clusters; differences are paired,
since all designs are judged by the same texts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import logsumexp

from erlib.experts.tables import ADAPTED, AVERAGE, DENSE, PROMPT, SEED, Judged

Floats = npt.NDArray[np.float64]

SEEN = (8, 16, 32, 64, 128)
"""Tokens that a router has seen when it decides, beside all of them and all those before each token."""
ROUTED, RANDOM_ROUTING, WRONG, RANDOM_CLUSTERS, ORACLE = (
    "routed by the whole text", "random routing", "wrong expert", "experts of random clusters", "best expert per text",
)  # fmt: skip
TWO_NEAREST, ALL_EXPERTS = "ensemble of the two nearest experts", "ensemble of all experts"
LABELS = {
    SEED: "seed, as it is",
    ADAPTED: "adapted seed (where all branch off)",
    DENSE: "dense: one model, the same tokens in all",
    AVERAGE: "mean of the experts' weights",
}
_RESAMPLES = 4000


def routed_by_first(n: int) -> str:
    """Name of the design that routes once, by so many tokens."""
    return f"routed by the first {n} tokens"


class Designs:
    """Losses of everything that could answer, per text.

    Parameters
    ----------
    judged : Judged
    temperature : float
        Of an ensemble's weights, exp(-distance² / temperature), as in c-BTM.
    """

    def __init__(self, judged: Judged, temperature: float) -> None:
        self.documents, self.tokens = judged.documents, judged.tokens
        self.wide = judged.wide()
        columns = [column for column in self.documents if column[1:].isdigit()]
        self.k = len(columns)
        self.temperature = temperature
        self.of_document = self.tokens["document"].to_numpy()
        self.position = self.tokens["position"].to_numpy()
        self.before = self.tokens[columns].to_numpy(np.float64)
        self.whole = self.documents[columns].to_numpy(np.float64)[self.of_document]
        self.experts = self.wide[[f"expert-{i}" for i in range(self.k)]].to_numpy(np.float64)

    def seen(self, n: int) -> Floats:
        """Squared distances (tokens, clusters) of each text's first `n` tokens, or of all that it has."""
        length = self.tokens.groupby("document")["position"].transform("max").to_numpy()
        row = np.arange(len(self.tokens)) - (self.position - 1) + np.minimum(n, length - 1)
        return np.where((n < length)[:, None], self.before[row], self.whole)

    def routed(self, distances: Floats, top: int = 1) -> Floats:
        """Log-probability of each token under the mixture of the `top` nearest experts."""
        order = np.argsort(distances, axis=1, kind="stable")[:, :top]
        weights = -np.take_along_axis(distances, order, axis=1) / self.temperature
        weights -= logsumexp(weights, axis=1, keepdims=True)
        return logsumexp(weights + np.take_along_axis(self.experts, order, axis=1), axis=1)

    def of_arms(self, prefix: str) -> Floats:
        """Mean log-probability over the arms whose name begins so."""
        return self.wide[[arm for arm in self.wide if str(arm).startswith(prefix)]].to_numpy(np.float64).mean(axis=1)

    def oracle(self) -> Floats:
        """Under the expert that is best for the whole text, which nobody knows beforehand."""
        per_text = pd.DataFrame(self.experts).groupby(self.of_document).sum().to_numpy()
        best = per_text.argmax(axis=1)[self.of_document]
        return np.take_along_axis(self.experts, best[:, None], axis=1)[:, 0]

    @functools.cached_property
    def all(self) -> dict[str, Floats]:
        """Log-probabilities of all tokens under every design."""
        own = self.whole.argmin(axis=1)
        right = np.take_along_axis(self.experts, own[:, None], axis=1)[:, 0]
        found = {LABELS[arm]: self.wide[arm].to_numpy(np.float64) for arm in LABELS if arm in self.wide}
        found[ROUTED] = right
        found |= {routed_by_first(n): self.routed(self.seen(n)) for n in (PROMPT, 64, 128)}
        found |= {
            TWO_NEAREST: self.routed(self.whole, 2),
            ALL_EXPERTS: self.routed(self.whole, self.k),
            RANDOM_CLUSTERS: self.of_arms("random-"),
            RANDOM_ROUTING: self.experts.mean(axis=1),
            WRONG: (self.experts.sum(axis=1) - right) / (self.k - 1),
            ORACLE: self.oracle(),
        }
        return found

    def losses(self, log_probability: Floats, after: int = 0) -> npt.NDArray[np.float64]:
        """Bits of each text's tokens beyond the first `after`."""
        bits = np.where(self.position > after, -log_probability / np.log(2), 0.0)
        return np.bincount(self.of_document, bits, len(self.documents)).astype(np.float64)

    def counts(self, after: int = 0) -> tuple[Floats, Floats]:
        """Bytes and tokens of each text beyond the first `after` tokens."""
        counted = (self.position > after).astype(np.float64)
        n_bytes = np.bincount(self.of_document, counted * self.tokens["n_bytes"], len(self.documents))
        n_tokens = np.bincount(self.of_document, counted, len(self.documents))
        return n_bytes.astype(np.float64), n_tokens.astype(np.float64)

    def resamples(self, seed: int) -> npt.NDArray[np.int64]:
        """How often each text is drawn, (resamples, texts), as many of each cluster as there are."""
        rng = np.random.default_rng(seed)
        drawn = np.zeros((_RESAMPLES, len(self.documents)), dtype=np.int64)
        for _, group in self.documents.groupby("cluster"):
            n = len(group)
            drawn[:, group["document"]] = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
        return drawn


def compare(judged: Judged, temperature: float, seed: int, after: int = 0) -> pd.DataFrame:
    """Every design beside the others.

    Parameters
    ----------
    judged : Judged
        What :func:`erlib.experts.judged` returned.
    temperature : float
    seed : int
        Of the resamples.
    after : int
        Only tokens beyond the first so many count: those that answer a prompt of so many.

    Returns
    -------
    DataFrame
        ``design``; ``bits_per_byte`` and ``perplexity`` (per token); ``worse_by``, how much greater its loss is than
        that of experts routed by the whole text (0.01: one per cent), with ``ci95_low`` and ``ci95_high``; ``texts``.
    """
    designs = Designs(judged, temperature)
    rows = _beside(designs, designs.all, ROUTED, seed, after)
    return pd.DataFrame(rows).sort_values("bits_per_byte", ignore_index=True)


def _beside(
    designs: Designs, of: dict[str, Floats], reference: str, seed: int, after: int
) -> Iterator[dict[str, float | str]]:
    drawn = designs.resamples(seed)
    n_bytes, n_tokens = designs.counts(after)
    against = designs.losses(of[reference], after)
    for name, log_probability in of.items():
        bits = designs.losses(log_probability, after)
        low, high = np.quantile((drawn @ bits) / (drawn @ against), [0.025, 0.975]) - 1
        yield {
            "design": name,
            "bits_per_byte": bits.sum() / n_bytes.sum(),
            "perplexity": 2 ** (bits.sum() / n_tokens.sum()),
            "worse_by": bits.sum() / against.sum() - 1,
            "ci95_low": low,
            "ci95_high": high,
            "texts": len(bits),
        }


def against(designs: Designs, seed: int, design: str, reference: str, after: int = 0) -> pd.Series:
    """How one design's loss compares with another's: the row of :func:`compare` with another reference."""
    every = designs.all
    for name in (design, reference):
        if name not in every:
            raise KeyError(f"no design {name!r}; there are {', '.join(every)}")
    of = {name: every[name] for name in (design, reference)}
    return pd.DataFrame(_beside(designs, of, reference, seed, after)).iloc[0]


def served(judged: Judged, temperature: float, seed: int, prompt: int = PROMPT) -> pd.DataFrame:
    """What each way to serve costs in language: experts are chosen by a prompt of so many tokens, what follows counts.

    Returns
    -------
    DataFrame
        One row per ``design`` (``routed``, ``other expert``: the mean over all but the routed one, ``two experts``: the
        mixture of the two nearest, ``dense``), with the columns of :func:`compare`, relative to ``routed``.
    """
    designs = Designs(judged, temperature)
    prompt = min(prompt, int(designs.tokens.groupby("document")["position"].max().min()) - 1)
    distances = designs.seen(prompt)
    routed = designs.routed(distances)
    of = {
        "routed": routed,
        "other expert": (designs.experts.sum(axis=1) - routed) / (designs.k - 1),
        "two experts": designs.routed(distances, 2),
        "dense": designs.wide[DENSE].to_numpy(np.float64),
    }
    return pd.DataFrame(_beside(designs, of, "routed", seed, prompt)).set_index("design")


def matrix(judged: Judged) -> pd.DataFrame:
    """Bits per byte of every arm (rows) on the texts of every cluster (columns)."""
    wide = judged.wide()
    tokens = judged.tokens
    cluster = judged.documents.set_index("document")["cluster"].loc[tokens["document"]].to_numpy()
    bits = (-wide / np.log(2)).groupby(cluster).sum()
    n_bytes = tokens.groupby(cluster)["n_bytes"].sum()
    return bits.div(n_bytes, axis=0).T.rename_axis(index="arm", columns="cluster")


def best_on_own(table: pd.DataFrame) -> int:
    """On how many clusters their own expert is the best of all, of what :func:`matrix` returned."""
    experts = table.loc[[f"expert-{cluster}" for cluster in table.columns]]
    return int((experts.to_numpy().argmin(axis=0) == np.arange(experts.shape[1])).sum())


def share_best_on_own(designs: Designs, seed: int) -> tuple[float, float, float]:
    """On which share of the clusters their own expert is the best of all, with its 95 % interval over texts."""
    bits = np.column_stack([designs.losses(designs.experts[:, expert]) for expert in range(designs.k)])
    clusters = designs.documents["cluster"].to_numpy()

    def share(drawn: npt.NDArray[np.int64]) -> Floats:
        of_cluster = [(drawn[:, clusters == own] @ bits[clusters == own]).argmin(axis=1) for own in range(designs.k)]
        return np.mean([best == own for own, best in enumerate(of_cluster)], axis=0, dtype=np.float64)

    low, high = np.quantile(share(designs.resamples(seed)), [0.025, 0.975])
    return float(share(np.ones((1, len(clusters)), dtype=np.int64))[0]), float(low), float(high)


def by_seen_tokens(judged: Judged, temperature: float, seed: int) -> pd.DataFrame:
    """The loss of what follows, against how much of a text the router has seen when it decides.

    Expert Router decides once, by the prompt; c-BTM again at every token. All are judged by the tokens beyond the first
    128, which none of those that decide once has seen.

    Returns
    -------
    DataFrame
        ``design``, ``seen`` (tokens; missing where it is not a number), ``experts`` (how many of the nearest make the
        mixture), and the columns of :func:`compare`, beside routing by the whole text; ``agrees``, the share of the
        texts that go where the whole text goes.
    """
    designs = Designs(judged, temperature)
    after = min(max(SEEN), int(designs.tokens.groupby("document")["position"].max().min()) - 1)
    ways: list[tuple[str, float, Floats]] = [(f"first {n} tokens", n, designs.seen(n)) for n in SEEN if n <= after]
    ways += [("whole text", np.nan, designs.whole), ("every token", np.nan, designs.before)]
    tops = sorted({1, 2, designs.k})
    of = {f"{name}|{top}": designs.routed(distances, top) for name, _, distances in ways for top in tops}
    of["best expert per text|1"] = designs.oracle()
    rows = pd.DataFrame(_beside(designs, of, "whole text|1", seed, after))
    rows[["design", "experts"]] = rows["design"].str.split("|", expand=True)
    seen = {name: n for name, n, _ in ways}
    agrees = {name: _agreement(designs, distances) for name, _, distances in ways}
    return rows.assign(
        seen=rows["design"].map(seen), agrees=rows["design"].map(agrees), experts=rows["experts"].astype(int)
    )


def _agreement(designs: Designs, distances: Floats) -> float:
    """Share of the texts whose tokens go to the whole text's expert."""
    same = distances.argmin(axis=1) == designs.whole.argmin(axis=1)
    return float(pd.Series(same).groupby(designs.of_document).mean().mean())
