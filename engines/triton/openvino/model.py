"""Triton Python-backend model: one OpenVINO engine with in-flight batching and a paged KV cache.

Requests are admitted first come, first served, when a batch slot is free and the KV blocks of the whole sequence
(prompt + max_tokens) can be reserved, so that a running sequence is never evicted: TensorRT-LLM's
``guaranteed_no_evict`` policy.
"""

import collections
import itertools
import json

import inflight
import numpy as np
import openvino as ov
import openvino_genai as genai

KV_BLOCK_TOKENS = 32


class Engine:
    def __init__(self, parameters):
        self.max_batch_size = int(parameters["max_batch_size"])
        self.free_blocks = int(parameters["kv_blocks"])
        self.max_sequence_tokens = self.max_prompt_tokens = int(parameters["context_tokens"])
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = self.free_blocks + 1  # OpenVINO keeps one for itself
        scheduler.max_num_seqs = self.max_batch_size
        scheduler.max_num_batched_tokens = int(parameters["max_batched_tokens"])
        scheduler.dynamic_split_fuse = True  # prompts join running sequences within a step
        scheduler.enable_prefix_caching = False
        properties = {
            "KV_CACHE_PRECISION": parameters["kv_cache"],
            "INFERENCE_NUM_THREADS": int(parameters["threads"]),
            **json.loads(parameters["compute"]),
        }
        if "adapter" in parameters:  # dynamic ones are ignored by add_request() and step(), without a word
            adapter = genai.Adapter(f"{parameters['adapter']}/adapter_model.safetensors")
            static = genai.AdapterConfig.Mode.MODE_STATIC
            properties["adapters"] = genai.AdapterConfig(adapter, float(parameters["adapter_alpha"]), static)
        self.pipeline = genai.ContinuousBatchingPipeline(parameters["engine"], scheduler, "CPU", properties)
        self.numbers = itertools.count(1)
        self.waiting = collections.deque()
        self.running = {}

    def check(self, sequence):
        needed = len(sequence.token_ids) + sequence.max_tokens
        if needed > self.max_sequence_tokens:
            raise inflight.BadRequest(
                f"{len(sequence.token_ids)} input tokens + {sequence.max_tokens} output tokens exceed the "
                f"{self.max_sequence_tokens} that this engine's KV cache holds"
            )
        sequence.kv_blocks = -(-needed // KV_BLOCK_TOKENS)

    def submit(self, sequence):
        self.waiting.append(sequence)

    @property
    def is_idle(self):
        return not self.running and not self.waiting

    def unfinished(self):
        return [*self.running.values(), *self.waiting]

    def step(self):
        self._admit()
        if not self.running:  # those who waited have gone
            return []
        self.pipeline.step()
        ready = []
        for number, sequence in list(self.running.items()):
            tokens = []
            while sequence.handle.can_read():
                for output in sequence.handle.read().values():
                    tokens += output.generated_ids
            done = sequence.handle.get_status() != genai.GenerationStatus.RUNNING
            if tokens or done:
                ready.append((sequence, tokens, done))
            if done or sequence.cancelled:
                if not done:
                    sequence.handle.cancel()
                self.free_blocks += sequence.kv_blocks
                del self.running[number]
        return ready

    def _admit(self):
        while self.waiting:
            head = self.waiting[0]
            if head.sender.is_cancelled():
                self.waiting.popleft().sender.send(flags=inflight.FINAL)
                continue
            if len(self.running) >= self.max_batch_size or head.kv_blocks > self.free_blocks:
                return
            number = next(self.numbers)
            self.running[number] = self.waiting.popleft()
            tokens = ov.Tensor(np.array([head.token_ids], dtype=np.int64))
            head.handle = self.pipeline.add_request(number, tokens, _generation_config(head))
            self.free_blocks -= head.kv_blocks


def _generation_config(sequence):
    config = genai.GenerationConfig()
    config.max_new_tokens = sequence.max_tokens
    config.do_sample = False
    if sequence.end_id < 0:  # never stop early: the papers' forced answer length
        config.min_new_tokens = sequence.max_tokens
        config.ignore_eos = True
    else:
        config.eos_token_id = sequence.end_id
        config.stop_token_ids = {sequence.end_id}
    return config


class TritonPythonModel(inflight.Model):
    def load(self, parameters):
        return Engine(parameters)
