"""The benchmark of a client with a thread per user, in small."""

import os

import pytest

from benchmarks import client_threads
from erlib.machine import processes
from tests.support.ports import BASE_PORT


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(client_threads, "BASE_PORT", BASE_PORT + 620)
    monkeypatch.setattr(client_threads, "TOKENS", 300)


def test_what_a_client_takes_is_counted_per_second_and_per_token(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(client_threads, "OFFERED_TOKENS_PER_S", 500)  # which it can take
    before = os.sched_getaffinity(0)
    one, three = client_threads.measure([1, 3], [0], tmp_path, tokenizer)
    assert os.sched_getaffinity(0) == before
    assert (one["users"], one["cores"], one["answer_tokens"], three["answer_tokens"]) == (1, 1, 300, 100)
    for row in (one, three):
        assert 1e6 * row["busy_cores"] / row["us_per_token"] == pytest.approx(500, rel=0.2)  # tokens per second
    assert one["sending_us_per_request"] == 0 < three["sending_us_per_request"]


def test_a_request_that_fails_ends_it(small, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(client_threads, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(client_threads, "OFFERED_TOKENS_PER_S", 100)
    with pytest.raises(processes.StartError, match="2 of 2 requests failed: DEADLINE_EXCEEDED"):
        client_threads.measure([2], [0], tmp_path, tokenizer)
