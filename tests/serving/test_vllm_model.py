"""vLLM's model and process and what they say to each other, with stand-ins for Triton and for vLLM; tests/load has the
real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from erlib import paths
from tests.support.standin_pb_utils import Request, backend, start

STANDIN = paths.ROOT / "tests" / "support" / "standin_vllm"
SLOTS, BLOCKS, BLOCK_TOKENS, CONTEXT = 2, 4, 32, 128


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Of a checkpoint whose tokens are single letters."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    home = tmp_path_factory.mktemp("engine")
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "config.json").write_text(json.dumps({"eos_token_id": [9, 4]}))  # as Llama 3's instruct models
    environment = home / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").symlink_to(sys.executable)
    return home


@pytest.fixture
def made(monkeypatch, directory):
    """Starts the model with parameters of its own."""
    running = []

    def make(has: int = BLOCKS, is_there: bool = True, **parameters: str):
        code = backend("vllm/model.py", monkeypatch)
        monkeypatch.setattr(code, "_end_with_the_server", lambda server: None)  # it would end us
        model = code.TritonPythonModel()
        running.append(model)
        said = {
            "max_batch_size": str(SLOTS), "kv_blocks": str(BLOCKS), "kv_block_tokens": str(BLOCK_TOKENS),
            "context_tokens": str(CONTEXT), "environment": str(directory / "environment"),
            "engine_args": json.dumps({"kv_blocks": has, "max_num_seqs": SLOTS, "is_there": is_there}),
            "variables": json.dumps({"PYTHONPATH": str(STANDIN)}),
        }  # fmt: skip
        return start(model, directory, **said | parameters)

    yield make
    for model in running:
        if hasattr(model, "threads"):
            model.finalize()


def asked(text: str = "four", max_tokens: int = 5, expert: object = None, **inputs: object) -> Request:
    given = {"text_input": text.encode(), "max_tokens": max_tokens, "end_id": -1, "stream": True} | inputs
    request = Request(**given)
    request.metadata = {} if expert is None else {"er-expert": str(expert)}
    return request


def answered(model, *requests: Request) -> list[Request]:
    model.execute(list(requests))
    assert all(request.ended.wait(20) for request in requests)
    return list(requests)


def tokens(request: Request) -> list[int]:
    return request.joined()[1]


def test_more_requests_than_slots_get_their_tokens_one_by_one_and_exactly_so_many(made):
    model = made()
    requests = answered(model, *[asked(max_tokens=3 + i) for i in range(8)])
    assert [tokens(request) for request in requests] == [list(range(1, 4 + i)) for i in range(8)]
    assert [len(request.responses) for request in requests] == [3 + i for i in range(8)]
    assert model.engine.is_idle
    assert model.engine.free_blocks == BLOCKS


def test_an_answer_may_end_early_or_come_as_one(made):
    model = made()
    early, at_once = answered(model, asked(end_id=3), asked(stream=False))
    assert tokens(early) == [1, 2, 3]
    unsaid = asked(max_tokens=9)
    del unsaid.inputs["end_id"]
    assert tokens(*answered(model, unsaid)) == [1, 2, 3, 4]
    assert [len(at_once.responses), tokens(at_once)] == [1, [1, 2, 3, 4, 5]]


def test_a_cancelled_request_is_aborted_and_its_slot_and_blocks_are_free(made):
    model = made()
    long = [asked(max_tokens=CONTEXT - 4) for _ in range(SLOTS)]  # all blocks, each
    model.execute(long[:1])
    while len(long[0].responses) < 3:
        time.sleep(0.005)
    long[0].is_cancelled = lambda: True
    (served,) = answered(model, asked())  # the stand-in would not have it where the other runs
    assert len(tokens(served)) == 5
    assert long[0].ended.wait(5)
    assert len(long[0].responses) < CONTEXT - 4
    assert model.engine.free_blocks == BLOCKS


def test_what_the_kv_cache_cannot_hold_waits_or_is_refused(made):
    model = made()
    first, second, refused = answered(
        model, asked(max_tokens=90), asked(max_tokens=90), asked(max_tokens=CONTEXT, end_id=2)
    )
    assert (len(tokens(first)), len(tokens(second))) == (90, 90)
    assert "4 input tokens + 128 output tokens exceed the 128" in refused.error.message


def test_a_request_names_its_expert(made, directory):
    model = made(**{f"adapter-{i}": str(directory) for i in range(12)})
    eleven, two = answered(model, asked(expert=11, max_tokens=2), asked(expert=2, max_tokens=2))
    assert [tokens(eleven), tokens(two)] == [[1 + 20 * 12, 2 + 20 * 12], [1 + 20 * 3, 2 + 20 * 3]]
    for expert in (None, 12, "x", -1):
        (refused,) = answered(model, asked(expert=expert))
        assert "this server has 12 experts, and metadata er-expert must name one" in refused.error.message


def test_the_one_adapter_of_a_server_is_on_top_whatever_the_request_names(made, directory):
    model = made(adapter=str(directory))
    for request in answered(model, asked(max_tokens=1), asked(max_tokens=1, expert=7)):
        assert tokens(request) == [21]


def test_what_vllm_refuses_is_an_error_and_the_next_one_is_served(made):
    model = made()
    refused, served = answered(model, asked(text="a"), asked())
    assert "without a token" in refused.error.message
    assert len(tokens(served)) == 5


def test_everybody_is_told_that_the_process_has_ended(made, monkeypatch):
    model = made()
    monkeypatch.setattr(sys.modules["triton_python_backend_utils"], "Logger", type("", (), {"log_error": print}))
    running, fatal = answered(model, asked(max_tokens=50), asked(text="ab"))
    for request in (running, fatal, *answered(model, asked())):
        response = request.responses[-1]
        assert response is not None
        assert response.error is not None
        assert "vLLM's process has ended with code 3" in response.error.message


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"is_there": False}, "vLLM did not start: ValueError: no such model"),
        ({"variables": "{}"}, "vLLM did not start: ModuleNotFoundError: No module named 'vllm'"),
        ({"has": 3}, "vLLM has 3 KV blocks, not the 4"),
    ],
)
def test_why_it_does_not_start_is_said(made, changed, reason):
    with pytest.raises(RuntimeError, match=reason):
        made(**changed)


def test_the_process_ends_with_whoever_started_it_even_if_that_is_killed(directory):
    code = f"""
import json, subprocess, sys, time
from multiprocessing import Pipe
ours, theirs = Pipe()
command = [sys.executable, {str(paths.ENGINE_SPECS / "triton" / "vllm" / "process.py")!r}, str(theirs.fileno())]
process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])
engine_args = dict(model="/", kv_blocks=1, max_num_seqs=1, is_there=True)
ours.send_bytes(json.dumps(dict(engine_args=engine_args, adapters=[])).encode())
print(process.pid, ours.recv_bytes(), flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(STANDIN)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as starter:
        assert starter.stdout is not None
        process = psutil.Process(int(starter.stdout.readline().split()[0]))
        starter.send_signal(signal.SIGKILL)
    process.wait(timeout=5)
