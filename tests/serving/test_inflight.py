"""What all engines inside Triton share, with a stand-in for Triton and an engine that says what it is told to."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from erlib.paper_scale import batching
from tests.support.standin_pb_utils import Request, TritonError, backend, start

PROMPT = "The goalie stopped thirty shots"
END = 0


class Scripted:
    """An engine with one slot that gives a token per step, of `script` again and again."""

    max_prompt_tokens = 20

    def __init__(self, script):
        self.script = script
        self.waiting, self.running = collections.deque(), None
        self.generated = 0
        self.may_step = threading.Event()
        self.may_step.set()

    def check(self, sequence):
        pass

    def submit(self, sequence):
        self.waiting.append(sequence)

    @property
    def is_idle(self):
        return not self.running and not self.waiting

    def unfinished(self):
        return [one for one in (self.running, *self.waiting) if one]

    def step(self):
        self.may_step.wait()
        if self.running and self.running.cancelled:
            self.running = None
        if not self.running:
            if not self.waiting:
                return []
            self.running = self.waiting.popleft()
            self.position = 0
        sequence, token = self.running, self.script[self.position % len(self.script)]
        self.position += 1
        self.generated += 1
        done = self.position == sequence.max_tokens or token == sequence.end_id
        if done:
            self.running = None
        return [(sequence, [token], done)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of an engine, with a byte-level tokenizer as small as they come."""
    pieces = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    home = tmp_path_factory.mktemp("engine")
    tokenizer.save(str(home / "tokenizer.json"))
    (home / "config.json").write_text(json.dumps({"eos_token_id": END}))
    return home


@pytest.fixture
def model(monkeypatch, directory):
    """Its engine says `` the`` and then a lion, whose character is cut, then the end of sequence."""
    shared = backend("inflight.py", monkeypatch)

    class Model(shared.Model):
        def load(self, parameters):
            return Scripted([*self.tokenizer.encode(" the 🦁").ids, END])

    running = start(Model(), directory)
    yield running
    running.engine.may_step.set()
    running.finalize()


def asked(**inputs):
    return Request(**{"text_input": PROMPT.encode(), "max_tokens": 9, "end_id": -1, "stream": True} | inputs)


def answered(model, request):
    model.execute([request])
    assert request.ended.wait(10)
    return request


@pytest.mark.parametrize("stream", [True, False])
def test_special_tokens_have_an_id_but_no_text(model, stream):
    script = model.engine.script
    text, tokens = answered(model, asked(stream=stream, max_tokens=len(script) + 1)).joined()
    assert tokens == [*script, script[0]]
    assert text.decode() == " the 🦁 the"


def test_the_end_of_sequence_ends_the_answer_without_being_said(model):
    request = asked(max_tokens=50)
    del request.inputs["end_id"]
    text, tokens = answered(model, request).joined()
    assert tokens == model.engine.script
    assert tokens[-1] == END
    assert text.decode() == " the 🦁"


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_request_ends_whether_it_streams_or_not(model, stream):
    """Triton says so, whoever it was: the client, its deadline, or its connection's end."""
    request = asked(stream=stream, max_tokens=10_000)
    request.is_cancelled = lambda: model.engine.generated > 20
    answered(model, request)
    time.sleep(0.05)
    assert 20 < model.engine.generated < 40
    assert answered(model, asked(max_tokens=3)).joined()[1] == model.engine.script[:3]


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_cancelled_while_it_waits_costs_a_token_at_most(model, stream):
    model.engine.may_step.clear()
    first, second = asked(max_tokens=5), asked(stream=stream, max_tokens=10_000)
    model.execute([first, second])
    second.is_cancelled = lambda: True
    model.engine.may_step.set()
    assert second.ended.wait(10)
    assert len(first.joined()[1]) == 5
    assert second.responses == []
    time.sleep(0.05)
    assert model.engine.generated <= 5 + 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_tokens": None}, "max_tokens is missing: the request has no input 'max_tokens'"),
        ({"text_input": None}, "text_input is missing"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": -1}, "max_tokens must be at least 1, not -1"),
        ({"max_tokens": [1, 2]}, "max_tokens must hold exactly one value, not 2"),
        ({"max_tokens": []}, "max_tokens must hold exactly one value, not 0"),
        ({"stream": [True, True]}, "stream must hold exactly one value, not 2"),
        ({"text_input": b" \n"}, "text_input is empty"),
        ({"text_input": b"\xff"}, "text_input is not valid UTF-8"),
    ],
)
def test_a_clients_mistake_is_told_as_one(model, changes, reason):
    request = asked(**changes)
    request.inputs = {name: value for name, value in request.inputs.items() if value is not None}
    error = answered(model, request).error
    assert reason in error.message
    assert error.message.startswith("INVALID_ARGUMENT: ")
    assert error.code == TritonError.INVALID_ARG
    assert model.engine.generated == 0


def test_what_breaks_here_is_not_told_as_the_clients_mistake(model):
    model.engine.check = lambda sequence: 1 / 0
    error = answered(model, asked()).error
    assert (error.message, error.code) == ("ZeroDivisionError: division by zero", TritonError.INTERNAL)


def test_a_prompt_that_must_be_too_long_is_not_tokenised(model):
    """Its bytes are more than the longest tokens, as many as the engine holds, could have."""
    encoded = []

    class Recording:
        def encode(self, text):
            encoded.append(text)
            return tokenizer.encode(text)

    tokenizer, model.tokenizer = model.tokenizer, Recording()
    error = answered(model, asked(text_input=b"a" * 500_000)).error
    assert "the prompt's 500,000 bytes exceed the 20 tokens that this engine holds" in error.message
    assert error.code == TritonError.INVALID_ARG
    assert encoded == []
    fits = "a" * Scripted.max_prompt_tokens * model.max_token_bytes
    answered(model, asked(text_input=fits.encode())).joined()
    assert encoded == [fits]


def test_the_bound_of_a_prompts_size_is_never_too_low(monkeypatch, tokenizer):
    """Of SmolLM2's tokens; not even for special ones, which a prompt may spell, and whose text is not answered."""
    shared = backend("inflight.py", monkeypatch)
    model = shared.Model()
    model.load = lambda parameters: Scripted([END])
    start(model, tokenizer.parent).finalize()
    for token in range(model.tokenizer.get_vocab_size()):
        text = model.tokenizer.decode([token], skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert len(text.encode()) <= model.max_token_bytes, text


@pytest.mark.parametrize("stream", [True, False])
def test_an_emulated_engine_notices_as_well(monkeypatch, directory, stream):
    """One request is cancelled amid its answer, one while it waits, and the third has the slot."""
    code, paper_system = backend("emulated/model.py", monkeypatch), batching.paper_system
    monkeypatch.setattr(batching, "paper_system", lambda *of: dataclasses.replace(paper_system(*of), batch_size=1))
    model = start(
        code.TritonPythonModel(), directory, config="p2.D", slow_motion="0.01", answer_limit="null",
    )  # fmt: skip
    try:
        first, second, third = asked(stream=stream, max_tokens=50_000), asked(max_tokens=50_000), asked()
        first.is_cancelled = lambda: model.engine.batch.steps > 30
        second.is_cancelled = lambda: True
        model.execute([first, second, third])
        assert all(request.ended.wait(10) for request in (first, second, third))
        assert third.joined() == (b" the" * 9, [model.engine.token] * 9)
        assert model.engine.batch.steps < 100
    finally:
        model.finalize()
