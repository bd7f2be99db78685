"""Answers of a tiny Llama's experts, and the real trigram model that judges answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from erlib import experts
from erlib.config import ConfigError, Profile
from erlib.experts import arms
from erlib.experts.base import check
from erlib.experts.judge import OTHER, ROUTED, Trigrams
from erlib.experts.tables import PROMPT, Judged
from erlib.experts.worth import RANDOM_ROUTING
from tests.support.tiny_experts import TOPICS, load

N = 8


@pytest.fixture(scope="module")
def profile(corpus_file: Path, llama: Path) -> Profile:
    return load(corpus_file, llama, answer_tokens=N)


def test_every_arm_answers_every_text_and_is_not_asked_twice(
    profile: Profile, judged: Judged, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arms, "_KEPT", home / "experts")
    answers = experts.answered(profile, judged)
    asked = answers[answers["arm"] != "text"].groupby(["arm", "document"], observed=True).size().unstack()
    assert set(asked.index) == {"seed", *judged.training["arm"]}
    assert (asked == 4).all(axis=None)
    # An expert goes on with words of its own texts' topic, which no other has, far more than the seed does.
    shares = []
    for document, cluster in judged.documents["cluster"].items():
        of = answers[answers["document"] == document].groupby("arm")["answer"].agg(" ".join)
        topic = np.bincount(_topics(of["text"])).argmax()
        shares.append([np.mean(_topics(of[arm]) == topic) for arm in (f"expert-{cluster}", "seed")])
    own, seed = np.mean(shares, axis=0)
    assert own > seed + 0.3
    monkeypatch.setattr(arms, "_do", lambda workers, jobs, *_: jobs and pytest.fail("somebody was asked again"))
    assert experts.answered(profile, judged).equals(answers)


def _topics(answer: str) -> np.ndarray:
    """Topic of each word that is one of the corpus'."""
    numbers = [int(word[1:]) for word in answer.split() if word[1:].isdigit()]
    return np.array([(number - 10) // 60 for number in numbers if 10 <= number < 10 + 60 * TOPICS])


def test_the_text_itself_is_among_the_answers(profile: Profile, judged: Judged, home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "_KEPT", home / "experts")
        answers = experts.answered(profile, judged)
    texts = answers[answers["arm"] == "text"].set_index("document")
    assert len(texts) == len(judged.documents)
    tokenizer = arms.base_of(profile).tokenizer
    for document, tokens in judged.tokens.groupby("document")["token"]:
        expected = tokenizer.decode(tokens.to_list()[: PROMPT + N])
        assert texts.loc[document, "prompt"] + texts.loc[document, "answer"] == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer_tokens": 32}, "answer_tokens=32, but with experts.sequence=64 .* only 31 tokens .* or raise"),
        ({"answer_tokens": 0}, "no answers are asked for"),
    ],
)
def test_answers_that_texts_cannot_stand_beside_are_refused(
    corpus_file: Path, llama: Path, judged: Judged, changed: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        experts.answered(load(corpus_file, llama, **changed), judged)
    check(load(corpus_file, llama, answer_tokens=128, sequence=512))


def test_the_judge_knows_english_and_the_two_words_before() -> None:
    trigrams = Trigrams()
    sentence, shuffled = (
        "He said that he would like to go to the store.",
        "Store the to go to like would he that said he.",
    )
    right, words, unknown = trigrams.bits("", sentence)
    wrong, same_words, _ = trigrams.bits("", shuffled)
    assert words == same_words == 11
    assert unknown == 0
    assert right < 0.7 * wrong
    # What was said before makes the next word likelier, and not only the last word of it.
    alone, after_one, after_two = (trigrams.bits(prompt, " states.")[0] for prompt in ("", "united", "the united"))
    assert after_two < after_one < alone
    assert trigrams.bits("x1 the united", " States of America.") == trigrams.bits("the United", " states of america.")


def test_words_that_the_judge_does_not_know_are_counted_and_not_judged() -> None:
    trigrams = Trigrams()
    bits, words, unknown = trigrams.bits("", "the zzqxish house.")
    assert (words, unknown) == (2, 1)
    assert bits == pytest.approx(trigrams.bits("", "the ")[0] + trigrams.bits("", "house ")[0])
    assert trigrams.bits("", "42 + 17 = ...") == (0.0, 0, 0)
    # Nor does the judge look past one, wherever it stands.
    assert trigrams.bits("the united zzqxish", " states.") == trigrams.bits("", " states.")


def test_words_that_may_have_been_cut_are_not_judged() -> None:
    trigrams = Trigrams()
    assert trigrams.bits("the uni", "ted states of ame") == trigrams.bits("", " states of ")
    assert trigrams.bits("the united", " states of america.")[1] == 3
    assert trigrams.bits("", "house") == (0.0, 0, 0)


def test_designs_are_those_of_the_experts_that_answer(judged: Judged) -> None:
    sense, nonsense = " that he would like to go to the store.", " store like the to to would go that he."
    rows = []
    for document, cluster in judged.documents["cluster"].items():
        for arm in ("seed", "adapted", "dense", "random-0", "random-1", *(f"expert-{i}" for i in range(TOPICS))):
            rows.append((document, arm, "He said", sense if arm == f"expert-{cluster}" else nonsense))
        rows.append((document, "text", "He said", sense))
    answers = pd.DataFrame(rows, columns=["document", "arm", "prompt", "answer"])
    table = experts.judge_answers(judged, answers, seed=0).set_index("design")
    assert table.loc[ROUTED, "more_bits"] == table.loc["the text itself", "more_bits"] == 0
    wrong = table.loc[OTHER, "more_bits"]
    assert wrong > 0.3
    assert table.loc[RANDOM_ROUTING, "more_bits"] == pytest.approx(wrong * (TOPICS - 1) / TOPICS)
    assert table.loc[OTHER, "ci95_low"] == pytest.approx(table.loc[OTHER, "ci95_high"])  # every text says the same
    assert table.loc[RANDOM_ROUTING, "words"] == TOPICS * table.loc[ROUTED, "words"]
    assert (table["unknown"] == 0).all()
