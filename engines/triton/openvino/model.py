"""Triton Python-backend model: one OpenVINO engine with in-flight batching and a paged KV cache.

``execute`` validates and enqueues; one engine loop admits, steps and reads; sender threads stream one response per
token. The process is Triton's own per-model stub, which suits the engine: a step holds the interpreter lock.

Requests are admitted first come, first served, when a batch slot is free and the KV blocks of the whole sequence
(prompt + max_tokens) can be reserved, so that a running sequence is never evicted: TensorRT-LLM's
``guaranteed_no_evict`` policy.
"""

import collections
import contextlib
import json
import queue
import threading
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
KV_BLOCK_TOKENS = 32
SENDERS = 2
CANCEL_CHECK_EVERY_TOKENS = 8  # is_cancelled() is a round trip to the server


class BadRequest(ValueError):
    """The request cannot be served; the message goes to the client."""


class Sequence:
    """A request on its way through the engine."""

    def __init__(self, request, tokenizer, eos_token_id, max_sequence_tokens):
        self.sender = request.get_response_sender()
        text = _input(request, "text_input")
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
        self.end_id = int(_input(request, "end_id", eos_token_id))
        self.token_ids = tokenizer.encode(prompt).ids
        needed = len(self.token_ids) + self.max_tokens
        if needed > max_sequence_tokens:
            raise BadRequest(
                f"{len(self.token_ids)} input tokens + {self.max_tokens} output tokens exceed the "
                f"{max_sequence_tokens} that this engine's KV cache holds"
            )
        self.kv_blocks = -(-needed // KV_BLOCK_TOKENS)
        self.sent = 0
        self.answer = []
        self.cancelled = False
        self.handle = None

    def generation_config(self):
        config = genai.GenerationConfig()
        config.max_new_tokens = self.max_tokens
        config.do_sample = False
        if self.end_id < 0:  # never stop early: the papers' forced answer length
            config.min_new_tokens = self.max_tokens
            config.ignore_eos = True
        else:
            config.eos_token_id = self.end_id
            config.stop_token_ids = {self.end_id}
        return config


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        get = {key: value["string_value"] for key, value in parameters.items()}.__getitem__
        engine = Path(get("engine"))
        self.max_batch_size = int(get("max_batch_size"))
        self.free_blocks = int(get("kv_blocks"))
        self.max_sequence_tokens = self.free_blocks * KV_BLOCK_TOKENS
        self.tokenizer = Tokenizer.from_file(str(engine / "tokenizer.json"))
        self.token_bytes = _token_bytes(self.tokenizer)
        self.eos_token_id = json.loads((engine / "config.json").read_text())["eos_token_id"]

        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = self.free_blocks + 1  # OpenVINO keeps one for itself
        scheduler.max_num_seqs = self.max_batch_size
        scheduler.max_num_batched_tokens = int(get("max_batched_tokens"))
        scheduler.dynamic_split_fuse = True  # prompts join running sequences within a step
        scheduler.enable_prefix_caching = False
        properties = {
            "KV_CACHE_PRECISION": get("kv_cache"),
            "INFERENCE_NUM_THREADS": int(get("threads")),
            **json.loads(get("compute")),
        }
        self.pipeline = genai.ContinuousBatchingPipeline(str(engine), scheduler, "CPU", properties)

        self.metric_family = pb_utils.MetricFamily(
            name="expert_generated_tokens", description="tokens handed to senders", kind=pb_utils.MetricFamily.COUNTER
        )
        self.token_counter = self.metric_family.Metric(labels={"model": "ensemble"})
        self.number = 0
        self.inbox = queue.SimpleQueue()
        self.outboxes = [queue.SimpleQueue() for _ in range(SENDERS)]
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
                self.inbox.put(Sequence(request, self.tokenizer, self.eos_token_id, self.max_sequence_tokens))
            except BadRequest as error:
                _fail(request.get_response_sender(), str(error))
            except Exception as error:  # a broken request must not stop the others
                _fail(request.get_response_sender(), f"{type(error).__name__}: {error}")

    def finalize(self):
        self.stopping = True
        for box in self.outboxes:
            box.put(None)
        for thread in self.threads:
            thread.join(timeout=2)

    def _engine_loop(self):
        waiting = collections.deque()
        running = {}
        try:
            while not self.stopping:
                self._receive(waiting, block=not running and not waiting)
                self._admit(waiting, running)
                if running:
                    self.pipeline.step()
                    self._read(running)
        except Exception as error:  # the engine is lost: say so to everybody, now and later, instead of hanging
            failure = f"the engine failed: {type(error).__name__}: {error}"
            pb_utils.Logger.log_error(failure)
            for sequence in [*running.values(), *waiting]:
                _fail(sequence.sender, failure)
            while not self.stopping:
                with contextlib.suppress(queue.Empty):
                    _fail(self.inbox.get(timeout=0.1).sender, failure)

    def _admit(self, waiting, running):
        while waiting:
            head = waiting[0]
            if head.sender.is_cancelled():
                waiting.popleft().sender.send(flags=FINAL)
                continue
            if len(running) >= self.max_batch_size or head.kv_blocks > self.free_blocks:
                return
            self.number += 1
            running[self.number] = waiting.popleft()
            tokens = ov.Tensor(np.array([head.token_ids], dtype=np.int64))
            head.handle = self.pipeline.add_request(self.number, tokens, head.generation_config())
            self.free_blocks -= head.kv_blocks

    def _receive(self, waiting, block):
        try:
            if block:
                waiting.append(self.inbox.get(timeout=0.1))
            while True:
                waiting.append(self.inbox.get_nowait())
        except queue.Empty:
            pass

    def _read(self, running):
        """Hand the step's tokens to the senders and wait until they are out: no token is buffered behind a step."""
        ready = []
        for number, sequence in list(running.items()):
            tokens = []
            while sequence.handle.can_read():
                for output in sequence.handle.read().values():
                    tokens += output.generated_ids
            done = sequence.handle.get_status() != genai.GenerationStatus.RUNNING
            if tokens or done:
                ready.append((number, sequence, tokens, done))
            if done or sequence.cancelled:
                if not done:
                    sequence.handle.cancel()
                self.free_blocks += sequence.kv_blocks
                del running[number]
        if generated := sum(len(tokens) for _, _, tokens, _ in ready):
            self.token_counter.increment(generated)  # before anybody can have received them
        with self.all_sent:
            self.unsent += len(ready)
        for number, *step in ready:
            self.outboxes[number % SENDERS].put(step)
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
            _fail(sequence.sender, f"the engine ended the sequence without a token ({sequence.handle.get_status()})")
            return
        if not sequence.stream:
            sequence.answer += tokens
            if done:
                sequence.sender.send(self._response(sequence.answer), flags=FINAL)
            return
        for index, token in enumerate(tokens):
            last = done and index == len(tokens) - 1
            if sequence.sent % CANCEL_CHECK_EVERY_TOKENS == 0 and sequence.sender.is_cancelled():
                sequence.cancelled = True
                sequence.sender.send(flags=FINAL)
                return
            sequence.sender.send(self._response([token]), flags=FINAL if last else 0)
            sequence.sent += 1

    def _response(self, tokens):
        text = b"".join(self.token_bytes[token] for token in tokens)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_)),
                pb_utils.Tensor("output_ids", np.array([tokens], dtype=np.int32)),
            ]
        )


def _input(request, name, default=None):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return default
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise BadRequest(f"{name} must hold exactly one value, not {len(values)}")
    return values[0]


def _fail(sender, message):
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message)), flags=FINAL)


def _token_bytes(tokenizer):
    """Bytes of every token of a byte-level BPE, so that an answer cut anywhere is still exact."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in printable):
        byte_of[chr(256 + offset)] = byte
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
    table = []
    for token in range(tokenizer.get_vocab_size()):
        piece = tokenizer.id_to_token(token) or ""
        plain = piece in special or any(char not in byte_of for char in piece)
        table.append(piece.encode() if plain else bytes(byte_of[char] for char in piece))
    return table
