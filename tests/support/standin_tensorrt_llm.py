"""Stand-in for TensorRT-LLM's Triton backend: its inputs and outputs, and tokens that follow from the prompt.

Tests put it into a rendered repository. All sequences get a token per step, as with in-flight batching; a step lasts
as long as the parameter ``step_s`` says. Where a request names an adapter, each token is moved by its number; one that
is not in the folder that is read at the start is refused, as by the real backend, and steps of several adapters count
as ``expert_mixed_steps``. A sequence of which Triton says that it is cancelled leaves. After an end of sequence comes
a last response without a token. What is generated is counted as ``expert_engine_tokens``. How large the KV cache is
becomes known a while after the first step, as from the real backend, which looks ten times a second.
"""

import json
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
MAX_SEQ_LEN = 4096
BLOCK_TOKENS = 32
CANCEL_CHECK_EVERY_TOKENS = 8
PUBLISHED_AFTER_S = 0.15
END_AT = 5
"""Which token of an answer is the end of sequence, which ends it if the request says so."""


class Sequence:
    def __init__(self, request):
        self.sender = request.get_response_sender()
        self.prompt = self._read(request, "input_ids", (1, -1))[0].tolist()
        assert len(self.prompt) == self._read(request, "input_lengths", (1,))[0]
        self.max_tokens = int(self._read(request, "request_output_len", (1,))[0])
        self.end_id = int(self._read(request, "end_id", (1,))[0])
        self.pad_id = int(self._read(request, "pad_id", (1,))[0])
        self.streaming = pb_utils.get_input_tensor_by_name(request, "streaming") is not None and bool(
            self._read(request, "streaming", (1,))[0]
        )
        tensor = pb_utils.get_input_tensor_by_name(request, "lora_task_id")
        self.adapter = 0 if tensor is None else int(self._read(request, "lora_task_id", (1,))[0])
        self.answer = []

    @staticmethod
    def _read(request, name, shape):
        values = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        assert len(values.shape) == len(shape), f"{name} has shape {values.shape}"
        assert all(wanted in (-1, size) for wanted, size in zip(shape, values.shape, strict=True))
        return values

    def step(self):
        """Send the next token; returns whether it was the last."""
        if len(self.answer) % CANCEL_CHECK_EVERY_TOKENS == 0 and self.sender.is_cancelled():
            self.sender.send(flags=FINAL)
            return True
        token = self.pad_id if len(self.answer) == END_AT else self.prompt[len(self.answer) % len(self.prompt)]
        token += self.adapter if len(self.answer) != END_AT else 0
        self.answer.append(token)
        done = len(self.answer) == self.max_tokens
        if not self.streaming:
            if done or token == self.end_id:
                self._send(self.answer, FINAL)
        elif token == self.end_id:
            self._send([token], 0)
            self._send([], FINAL)
        else:
            self._send([token], FINAL if done else 0)
        return done or token == self.end_id

    def _send(self, tokens, flags):
        outputs = [
            pb_utils.Tensor("output_ids", np.array([[tokens]], dtype=np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[len(tokens)]], dtype=np.int32)),
        ]
        self.sender.send(pb_utils.InferenceResponse(outputs), flags=flags)


class TritonPythonModel:
    def initialize(self, args):
        self.step_s = float(json.loads(args["model_config"])["parameters"]["step_s"]["string_value"])
        self.family = pb_utils.MetricFamily(
            name="expert_engine_tokens", description="tokens generated", kind=pb_utils.MetricFamily.COUNTER
        )
        self.generated = self.family.Metric(labels={"model": "tensorrt_llm"})
        asked = int(json.loads(args["model_config"])["parameters"]["max_tokens_in_paged_kv_cache"]["string_value"])
        self.kv_cache = pb_utils.MetricFamily(
            name="nv_trt_llm_kv_cache_block_metrics", description="KV cache", kind=pb_utils.MetricFamily.GAUGE
        )
        self.kv_sizes = []  # a metric does not outlive its object
        for kind, size in (("max", -(-asked // BLOCK_TOKENS)), ("tokens_per", BLOCK_TOKENS)):
            labels = {"model": "tensorrt_llm", "version": "1", "kv_cache_block_type": kind}
            self.kv_sizes.append((self.kv_cache.Metric(labels=labels), size))
        prefetched = json.loads(args["model_config"])["parameters"].get("lora_prefetch_dir")
        self.adapters = [int(path.name) for path in Path(prefetched["string_value"]).iterdir()] if prefetched else []
        self.mixed = pb_utils.MetricFamily(
            name="expert_mixed_steps", description="steps of several adapters", kind=pb_utils.MetricFamily.COUNTER
        )
        self.mixed_steps = self.mixed.Metric(labels={"model": "tensorrt_llm"})
        self.publish_at = None
        self.active, self.lock, self.stopping = [], threading.Lock(), False
        self.loop = threading.Thread(target=self._loop, daemon=True)
        self.loop.start()

    def execute(self, requests):
        for request in requests:
            sequence = Sequence(request)
            if len(sequence.prompt) + sequence.max_tokens > MAX_SEQ_LEN:
                error = pb_utils.TritonError(f"the engine holds sequences of up to {MAX_SEQ_LEN} tokens")
                sequence.sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
                continue
            if sequence.adapter and sequence.adapter not in self.adapters:
                error = pb_utils.TritonError(f"LoRA task {sequence.adapter} not found in cache")
                sequence.sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
                continue
            with self.lock:
                self.active.append(sequence)

    def finalize(self):
        self.stopping = True
        self.loop.join()

    def _loop(self):
        while not self.stopping:
            with self.lock:
                running = list(self.active)
            time.sleep(self.step_s if running else 0.001)
            if running:
                self.generated.increment(len(running))
                self.mixed_steps.increment(len({sequence.adapter for sequence in running}) > 1)
                self.publish_at = self.publish_at or time.monotonic() + PUBLISHED_AFTER_S
            if self.publish_at and time.monotonic() > self.publish_at:
                for metric, size in self.kv_sizes:
                    metric.set(size)
                self.publish_at = float("inf")
            finished = [sequence for sequence in running if sequence.step()]
            with self.lock:
                self.active = [sequence for sequence in self.active if sequence not in finished]
