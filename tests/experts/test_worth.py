"""What routing is worth, from tables whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib import claims, experts
from erlib.experts import tables, worth
from erlib.experts.tables import Judged

K = 4


def table(seed: int = 0, per_cluster: int = 6, length: int = 200, gain: float = 0.5, noise: float = 0.2) -> Judged:
    """Texts of `K` clusters, on each of which its own expert loses `gain` nats less per token than another would.

    What a router has seen points to the right cluster from the twentieth token on, and to the next one before.
    """
    rng = np.random.default_rng(seed)
    documents, tokens, scores = [], [], []
    for document in range(K * per_cluster):
        cluster = document % K
        other = (cluster + 1) % K
        near, far = np.full(K, 1.2), np.full(K, 1.2)
        near[cluster], far[other] = 0.4, 0.4
        documents.append(
            {"document": document, "cluster": cluster, "topic": "", **dict(zip(COLUMNS, near, strict=True))}
        )
        position = np.arange(1, length + 1)
        distances = np.where((position > 20)[:, None], near, far)
        common = pd.DataFrame({"document": document, "position": position})
        tokens.append(common.assign(token=7, n_bytes=4).join(pd.DataFrame(distances, columns=COLUMNS)))
        hard = 3 + noise * rng.standard_normal(length)
        for arm in ARMS:
            loss = hard - gain * (arm == f"expert-{cluster}") + 0.3 * (arm == "seed")
            scores.append(common.assign(cluster=cluster, arm=arm, log_probability=-loss))
    training = pd.DataFrame({"arm": ARMS, "tokens": 10})
    return Judged(pd.DataFrame(documents), *(pd.concat(part, ignore_index=True) for part in (tokens, scores)), training)


COLUMNS = [f"d{i}" for i in range(K)]
ARMS = ["seed", "adapted", *(f"expert-{i}" for i in range(K)), "random-0", "random-1", "dense", "average"]


def by_design(judged: Judged, **options: int) -> pd.DataFrame:
    return experts.compare(judged, 0.1, 0, **options).set_index("design")


def test_the_matrix_has_the_loss_of_each_expert_on_each_cluster() -> None:
    found = experts.matrix(table(noise=0))
    nats = pd.DataFrame(3.0, found.index, found.columns)
    nats.loc["seed"] = 3.3
    for cluster in range(K):
        nats.loc[f"expert-{cluster}", cluster] = 2.5
    np.testing.assert_allclose(found, nats / np.log(2) / 4)  # four bytes a token
    assert worth.best_on_own(found) == K


def test_designs_lose_what_they_should() -> None:
    found = by_design(table(noise=0))
    bits = found["bits_per_byte"] * np.log(2) * 4
    assert bits["routed by the whole text"] == pytest.approx(2.5)
    assert bits["wrong expert"] == pytest.approx(3.0)
    assert bits["random routing"] == pytest.approx(3 - 0.5 / K)
    assert bits["best expert per text"] == pytest.approx(2.5)
    assert found.loc["routed by the whole text", "worse_by"] == 0
    assert found.loc["dense: one model, the same tokens in all", "worse_by"] == pytest.approx(0.2)
    assert found.loc["seed, as it is", "perplexity"] == pytest.approx(np.exp(3.3))
    # 0.4 against 1.2 at T = 0.1: the other experts have e^-8 of the nearest one's weight each.
    assert bits["ensemble of all experts"] == pytest.approx(2.5, abs=1e-3)


def test_a_prompt_too_short_goes_to_the_wrong_expert() -> None:
    seen = experts.by_seen_tokens(table(noise=0), 0.1, 0)
    once = seen[(seen["experts"] == 1) & seen["seen"].notna()].set_index("seen")
    assert list(once.index) == [8, 16, 32, 64, 128]
    assert once["worse_by"].to_list() == pytest.approx([0.2, 0.2, 0, 0, 0])
    assert once["agrees"].to_list() == [0, 0, 1, 1, 1]
    again = seen[(seen["design"] == "every token") & (seen["experts"] == 1)]
    assert again["worse_by"].item() == 0  # beyond the 128th token it has seen enough
    assert again["agrees"].item() == pytest.approx(1 - 20 / 200)


@given(seed=st.integers(0, 50), gain=st.floats(-1, 1), noise=st.floats(0, 1), after=st.sampled_from([0, 32]))
@settings(max_examples=15, deadline=None)
def test_no_one_beats_the_best_expert_and_ensembles_are_mixtures(
    seed: int, gain: float, noise: float, after: int
) -> None:
    judged = table(seed, per_cluster=2, length=40, gain=gain, noise=noise)
    designs = worth.Designs(judged, 0.1)
    losses = {name: designs.losses(values, after) for name, values in designs.all.items()}
    best = designs.losses(designs.oracle())
    for expert in range(K):
        assert (best <= designs.losses(designs.experts[:, expert]) + 1e-9).all()
    every = designs.experts.max(axis=1), designs.experts.min(axis=1)
    mixed = designs.routed(designs.whole, K)
    assert (mixed <= every[0] + 1e-9).all()
    assert (mixed >= every[1] - 1e-9).all()
    np.testing.assert_allclose(
        losses["random routing"] * K, losses["wrong expert"] * (K - 1) + losses["routed by the whole text"]
    )


def test_intervals_are_of_texts_and_paired() -> None:
    judged = table(noise=1.0)
    found = by_design(judged)
    row = found.loc["wrong expert"]
    assert row["ci95_low"] < row["worse_by"] < row["ci95_high"]
    # Texts differ much more than designs do: unpaired, the interval would be as wide as that of the loss itself.
    assert row["ci95_high"] - row["ci95_low"] < 0.05
    assert row["texts"] == len(judged.documents)


@pytest.mark.parametrize(
    ("gain", "specialise", "routing"),
    [(0.5, "holds", "holds"), (-0.5, "fails", "fails")],
)
def test_verdicts_cross_over(gain: float, specialise: str, routing: str) -> None:
    found = claims.judge_experts(table(gain=gain), 0.1, 0).set_index("id")["verdict"]
    assert found["E1"] == specialise
    assert found[["E2", "E3", "E4", "E6"]].to_list() == [routing] * 4


def noisy(judged: Judged) -> Judged:
    """The same tables, in which each arm finds each token a little likelier or less likely by chance."""
    noise = 0.3 * np.random.default_rng(3).standard_normal(len(judged.scores))
    return judged._replace(scores=judged.scores.assign(log_probability=judged.scores["log_probability"] + noise))


@pytest.mark.parametrize(("gain", "verdict"), [(0.2, "holds"), (0.02, "cannot be told"), (-0.2, "fails")])
def test_how_many_experts_are_best_on_their_own_is_as_sure_as_texts_make_it(gain: float, verdict: str) -> None:
    judged = noisy(table(gain=gain))
    row = claims.judge_experts(judged, 0.1, 0).set_index("id").loc["E1"]
    assert row["verdict"] == verdict
    assert row["effect"] == worth.best_on_own(experts.matrix(judged)) / K
    assert row["ci95_low"] <= row["effect"] <= row["ci95_high"]


def test_what_is_in_the_noise_cannot_be_told() -> None:
    found = claims.judge_experts(noisy(table(gain=0.0)), 0.1, 0).set_index("id")
    assert found.loc["E2", "verdict"] == "cannot be told"
    assert found.loc["E2", "ci95_low"] < 0 < found.loc["E2", "ci95_high"]


def test_figures_follow_from_the_tables_and_run_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = table()
    for name, frame in kept._asdict().items():
        frame.to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.setattr("erlib.engines.worker.Workers.do", lambda *_: pytest.fail("a model was started"))
    monkeypatch.delitem(sys.modules, "erlib.experts.scoring", raising=False)
    again = tables.read(tmp_path)
    pd.testing.assert_frame_equal(experts.matrix(again), experts.matrix(kept))
    pd.testing.assert_frame_equal(experts.compare(again, 0.1, 0), experts.compare(kept, 0.1, 0))
    pd.testing.assert_frame_equal(experts.by_seen_tokens(again, 0.1, 0), experts.by_seen_tokens(kept, 0.1, 0))
    assert "erlib.experts.scoring" not in sys.modules  # which alone loads transformers and PEFT


def test_what_is_served_is_judged_by_what_follows_the_prompt() -> None:
    judged = table()
    found = experts.served(judged, 0.1, 0)
    same = by_design(judged, after=32)
    assert found["bits_per_byte"]["routed"] == pytest.approx(same["bits_per_byte"][worth.routed_by_first(32)])
    assert found["bits_per_byte"]["other expert"] == pytest.approx(same["bits_per_byte"][worth.WRONG])
    assert found["worse_by"]["routed"] == 0
    assert found["worse_by"]["other expert"] > 0.1
    early = experts.served(judged, 0.1, 0, prompt=10)  # where the router is wrong
    assert early["worse_by"]["dense"] == pytest.approx(0, abs=1e-9)
    assert early["worse_by"]["other expert"] < 0


def test_a_design_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match="no design 'sparse'; there are seed"):
        worth.against(worth.Designs(table(per_cluster=1), 0.1), 0, "sparse", "wrong expert")
