"""Triton Python-backend model: one OpenVINO engine with in-flight batching and a paged KV cache."""

import json

import inflight
import numpy as np
import openvino as ov
import openvino_genai as genai

KV_BLOCK_TOKENS = 32


class Engine(inflight.NoEviction):
    def __init__(self, parameters):
        slots, kv_blocks, context = (int(parameters[k]) for k in ("max_batch_size", "kv_blocks", "context_tokens"))
        super().__init__(slots, kv_blocks, KV_BLOCK_TOKENS, context)
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

    def step(self):
        for number, sequence in self.admit():
            tokens = ov.Tensor(np.array([sequence.token_ids], dtype=np.int64))
            sequence.handle = self.pipeline.add_request(number, tokens, _generation_config(sequence))
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
                self.release(number)
        return ready


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
