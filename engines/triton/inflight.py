"""What all engines inside Triton share: requests in, one response per token out (linked beside each ``model.py``).

``execute`` validates and enqueues; one loop lets the engine step; sender threads stream one response per token. The
process is Triton's own per-model stub, which suits the engine: a step may hold the interpreter lock.
"""

import collections
import contextlib
import itertools
import json
import queue
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
SENDERS = 2
CANCEL_CHECK_EVERY_TOKENS = 8  # is_cancelled() is a round trip to the server


class BadRequest(ValueError):
    """The request cannot be served; the message goes to the client."""


class Sequence:
    """A request on its way through the engine."""

    def __init__(self, request, model):
        self.sender = request.get_response_sender()
        text = _input(request, "text_input")
        if len(text) > model.max_prompt_bytes:  # to tokenise what is too long anyway may take seconds
            raise BadRequest(
                f"the prompt's {len(text):,} bytes exceed the {model.engine.max_prompt_tokens} tokens that this engine "
                f"holds, of at most {model.max_token_bytes} bytes each"
            )
        try:
            prompt = text.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest("text_input is not valid UTF-8") from None
        if not prompt.strip():
            raise BadRequest("text_input is empty")
        self.max_tokens = int(_input(request, "max_tokens"))
        if self.max_tokens < 1:
            raise BadRequest(f"max_tokens must be at least 1, not {self.max_tokens}")
        self.stream = bool(_input(request, "stream", False))
        self.end_id = int(_input(request, "end_id", model.eos_token_id))
        self.token_ids = model.tokenizer.encode(prompt).ids
        self.answered = 0  # tokens
        self.answer = []  # they, where they are sent as one
        self.cancelled = False  # by the client; the engine drops it after the step


class NoEviction:
    """What an engine may be derived from: sequences waiting and running, no more than it has room for.

    They are admitted first come, first served, when a batch slot is free and the KV blocks of the whole sequence
    (prompt + max_tokens) can be reserved, so that a running sequence is never evicted: TensorRT-LLM's
    ``guaranteed_no_evict`` policy.
    """

    def __init__(self, max_batch_size, kv_blocks, block_tokens, context_tokens):
        self.max_batch_size = max_batch_size
        self.free_blocks = kv_blocks
        self.block_tokens = block_tokens
        self.max_sequence_tokens = self.max_prompt_tokens = context_tokens
        self.numbers = itertools.count(1)
        self.waiting = collections.deque()
        self.running = {}  # by number

    def check(self, sequence):
        needed = len(sequence.token_ids) + sequence.max_tokens
        if needed > self.max_sequence_tokens:
            raise BadRequest(
                f"{len(sequence.token_ids)} input tokens + {sequence.max_tokens} output tokens exceed the "
                f"{self.max_sequence_tokens} that this engine's KV cache holds"
            )
        sequence.kv_blocks = -(-needed // self.block_tokens)

    def submit(self, sequence):
        self.waiting.append(sequence)

    @property
    def is_idle(self):
        return not self.running and not self.waiting

    def unfinished(self):
        return [*self.running.values(), *self.waiting]

    def admit(self):
        """Let those run whose turn it is; yields each with its number."""
        while self.waiting:
            head = self.waiting[0]
            if head.sender.is_cancelled():
                self.waiting.popleft().sender.send(flags=FINAL)
                continue
            if len(self.running) >= self.max_batch_size or head.kv_blocks > self.free_blocks:
                return
            number = next(self.numbers)
            self.running[number] = self.waiting.popleft()
            self.free_blocks -= head.kv_blocks
            yield number, head

    def release(self, number):
        """One that ran has ended."""
        self.free_blocks += self.running.pop(number).kv_blocks


class Model:
    """A ``TritonPythonModel`` but for its engine, which :meth:`load` makes.

    An engine has ``max_prompt_tokens``, ``check(sequence)`` (raises BadRequest), ``submit(sequence)``, ``is_idle``,
    ``unfinished()`` and ``step()``, which returns (sequence, new token ids, whether it is done) of all sequences that
    it moved on.
    """

    def load(self, parameters):
        raise NotImplementedError

    def read(self, request):
        """A request as a sequence; raises BadRequest."""
        return Sequence(request, self)

    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        parameters = {key: value["string_value"] for key, value in parameters.items()}
        directory = Path(parameters["engine"])
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.token_bytes = _token_bytes(self.tokenizer)
        ends = json.loads((directory / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
        self.eos_token_id = ends[-1] if isinstance(ends, list) else ends  # of several, Llama 3's end of a turn
        self.engine = self.load(parameters)
        added = self.tokenizer.get_added_tokens_decoder().values()  # as a prompt may spell them
        self.max_token_bytes = max(*map(len, self.token_bytes), *(len(token.content.encode()) for token in added))
        self.max_prompt_bytes = self.engine.max_prompt_tokens * self.max_token_bytes
        self.count_tokens = counter("expert_generated_tokens", "tokens handed to senders")

        self.inbox = queue.SimpleQueue()
        self.outboxes = [queue.SimpleQueue() for _ in range(SENDERS)]
        self.received = 0
        self.unsent = 0
        self.all_sent = threading.Condition()
        self.stopping = False
        self.threads = [threading.Thread(target=self._engine_loop, daemon=True)]
        self.threads += [threading.Thread(target=self._sender_loop, args=(box,), daemon=True) for box in self.outboxes]
        for thread in self.threads:
            thread.start()

    def execute(self, requests):
        for request in requests:
            try:
                sequence = self.read(request)
                self.engine.check(sequence)
                self.inbox.put(sequence)
            except BadRequest as error:
                _fail(request.get_response_sender(), error)
            except Exception as error:  # a broken request must not stop the others
                _fail(request.get_response_sender(), f"{type(error).__name__}: {error}")

    def finalize(self):
        self.stopping = True
        for box in self.outboxes:
            box.put(None)
        for thread in self.threads:
            thread.join(timeout=2)

    def _engine_loop(self):
        try:
            while not self.stopping:
                self._receive(block=self.engine.is_idle)
                if not self.engine.is_idle:
                    self._deliver(self.engine.step())
        except Exception as error:  # the engine is lost: say so to everybody, now and later, instead of hanging
            failure = f"the engine failed: {type(error).__name__}: {error}"
            pb_utils.Logger.log_error(failure)
            for sequence in self.engine.unfinished():
                with contextlib.suppress(Exception):  # one that has had its last response already
                    _fail(sequence.sender, failure)
            while not self.stopping:
                with contextlib.suppress(queue.Empty):
                    _fail(self.inbox.get(timeout=0.1).sender, failure)

    def _receive(self, block):
        try:
            if block:
                self._submit(self.inbox.get(timeout=0.1))
            while True:
                self._submit(self.inbox.get_nowait())
        except queue.Empty:
            pass

    def _submit(self, sequence):
        sequence.outbox = self.outboxes[self.received % SENDERS]  # one sender per sequence keeps its tokens in order
        self.received += 1
        self.engine.submit(sequence)

    def _deliver(self, ready):
        """Hand the step's tokens to the senders and wait until they are out: no token is buffered behind a step."""
        if generated := sum(len(tokens) for _, tokens, _ in ready):
            self.count_tokens(generated)  # before anybody can have received them
        with self.all_sent:
            self.unsent += len(ready)
        for step in ready:
            step[0].outbox.put(step)
        with self.all_sent:
            self.all_sent.wait_for(lambda: self.unsent == 0, timeout=1)

    def _sender_loop(self, outbox):
        while (item := outbox.get()) is not None:
            try:
                self._send(*item)
            except Exception as error:
                pb_utils.Logger.log_error(f"sender: {type(error).__name__}: {error}")
                item[0].cancelled = True
            with self.all_sent:
                self.unsent -= 1
                self.all_sent.notify()

    def _send(self, sequence, tokens, done):
        if sequence.cancelled:
            return
        if not tokens and not (done and sequence.answer):
            _fail(sequence.sender, "the engine ended the sequence without a token")
            return
        for index, token in enumerate(tokens):
            if sequence.answered % CANCEL_CHECK_EVERY_TOKENS == 0 and sequence.sender.is_cancelled():
                sequence.cancelled = True
                sequence.sender.send(flags=FINAL)
                return
            sequence.answered += 1
            if sequence.stream:
                last = done and index == len(tokens) - 1
                sequence.sender.send(self._response([token]), flags=FINAL if last else 0)
            else:
                sequence.answer.append(token)
        if done and not sequence.stream:
            sequence.sender.send(self._response(sequence.answer), flags=FINAL)

    def _response(self, tokens):
        text = b"".join(self.token_bytes[token] for token in tokens)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_)),
                pb_utils.Tensor("output_ids", np.array([tokens], dtype=np.int32)),
            ]
        )


def counter(name, description):
    """Make a counter of the server's metrics endpoint; returns what increments it."""
    family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
    metric = family.Metric(labels={"model": "ensemble"})

    def increment(by, _family=family):  # a metric does not outlive its family
        metric.increment(by)

    return increment


def _input(request, name, default=None):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        if default is None:
            raise BadRequest(f"{name} is missing: the request has no input {name!r}")
        return default
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise BadRequest(f"{name} must hold exactly one value, not {len(values)}")
    return values[0]


def _fail(sender, reason):
    error = pb_utils.TritonError(str(reason))
    if isinstance(reason, BadRequest):  # said in the text as well, because an error within a stream has no code
        error = pb_utils.TritonError(f"INVALID_ARGUMENT: {reason}", pb_utils.TritonError.INVALID_ARG)
    sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)


def _token_bytes(tokenizer):
    """Bytes of every token of a byte-level BPE, so that an answer cut anywhere is still exact.

    Special tokens, such as the end of sequence, have none.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in printable):
        byte_of[chr(256 + offset)] = byte
    added = tokenizer.get_added_tokens_decoder()
    table = []
    for token in range(tokenizer.get_vocab_size()):
        piece = tokenizer.id_to_token(token) or ""
        if token in added:
            table.append(b"" if added[token].special else piece.encode())
        else:
            table.append(bytes(byte_of[char] for char in piece))
    return table
