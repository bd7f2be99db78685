"""Answers of a tiny Llama's experts, and the real trigram model that judges answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from erlib import experts, paths
from erlib.config import ConfigError, Profile
from erlib.experts import arms
from erlib.experts.judge import ROUTED, Trigrams
from erlib.experts.tables import PROMPT, Judged
from erlib.experts.worth import RANDOM_ROUTING, WRONG
from tests.support.tiny_experts import TOPICS, load

N = 8


@pytest.fixture(scope="module")
def profile(corpus_file: Path, llama: Path) -> Profile:
    return load(corpus_file, llama, answer_tokens=N)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def judged(profile: Profile, home: Path) -> Judged:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "_KEPT", home / "experts")
        patch.setattr(paths, "RUNS", home / "runs")
        return experts.judged(profile)


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


def test_answers_longer_than_texts_are_refused(corpus_file: Path, llama: Path, judged: Judged) -> None:
    with pytest.raises(ConfigError, match=r"answer_tokens=32 after a prompt of 32, but a held-out text has 63 tokens"):
        experts.answered(load(corpus_file, llama, answer_tokens=32), judged)


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
    alone, after_one, after_two = (trigrams.bits(prompt, "states")[0] for prompt in ("", "united", "the united"))
    assert after_two < after_one < alone
    assert (
        trigrams.bits("x1 the united", "States of America.")[0] == trigrams.bits("the United", "states of america")[0]
    )


def test_words_that_the_judge_does_not_know_are_counted_and_not_judged() -> None:
    trigrams = Trigrams()
    bits, words, unknown = trigrams.bits("", "the zzqxish house")
    assert (words, unknown) == (2, 1)
    assert bits == pytest.approx(trigrams.bits("", "the")[0] + trigrams.bits("", "house")[0])
    assert trigrams.bits("", "42 + 17 = ...") == (0.0, 0, 0)


def test_designs_are_those_of_the_experts_that_answer(judged: Judged) -> None:
    sense, nonsense = " that he would like to go to the store", " store like the to to would go that he"
    rows = []
    for document, cluster in judged.documents["cluster"].items():
        for arm in ("seed", "adapted", "dense", "random-0", "random-1", *(f"expert-{i}" for i in range(TOPICS))):
            rows.append((document, arm, "He said", sense if arm == f"expert-{cluster}" else nonsense))
        rows.append((document, "text", "He said", sense))
    answers = pd.DataFrame(rows, columns=["document", "arm", "prompt", "answer"])
    table = experts.judge_answers(judged, answers, seed=0).set_index("design")
    assert table.loc[ROUTED, "worse_by"] == table.loc["the text itself", "worse_by"] == 0
    wrong = table.loc[WRONG, "worse_by"]
    assert wrong > 0.3
    assert table.loc[RANDOM_ROUTING, "worse_by"] == pytest.approx(wrong * (TOPICS - 1) / TOPICS)
    assert table.loc[WRONG, "ci95_low"] == pytest.approx(table.loc[WRONG, "ci95_high"])  # every text says the same
    assert table.loc[RANDOM_ROUTING, "words"] == TOPICS * table.loc[ROUTED, "words"]
    assert (table["unknown"] == 0).all()
