"""Tokens per second of an engine, as a process of its own: ``python -m erlib.engines.speed``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from erlib import config
from erlib.engines import inference, worker


def _speed_worker(jobs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for job in jobs:
        length = job["prompt_tokens"] + job["tokens"]
        blocks = max(job["batches"]) * -(-(length + 1) // config.KV_BLOCK_TOKENS)
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = blocks
        scheduler.max_num_seqs = max(job["batches"])
        scheduler.max_num_batched_tokens = max(256, length)
        scheduler.dynamic_split_fuse = False
        scheduler.enable_prefix_caching = False
        pipeline = genai.ContinuousBatchingPipeline(
            job["engine"],
            scheduler,
            "CPU",
            {"KV_CACHE_PRECISION": job["kv_cache"], **inference.COMPUTE},
        )
        generation = genai.GenerationConfig()
        generation.max_new_tokens = generation.min_new_tokens = job["tokens"]
        generation.ignore_eos, generation.do_sample = True, False
        random = np.random.default_rng(0)
        for warm, batch in [(False, 1), *((True, batch) for batch in job["batches"])]:
            started_s = time.perf_counter()
            handles = [
                pipeline.add_request(
                    i, openvino.Tensor(random.integers(100, 40000, (1, job["prompt_tokens"]))), generation
                )
                for i in range(batch)
            ]
            while pipeline.has_non_finished_requests():
                pipeline.step()
            wall_s = time.perf_counter() - started_s
            generated = sum(len(output.generated_ids) for handle in handles for output in handle.read_all())
            if generated != batch * job["tokens"]:
                raise RuntimeError(f"{job['engine']} generated {generated} tokens, not {batch * job['tokens']}")
            if not warm:
                continue
            yield {
                "batch": batch,
                "tokens_per_s": generated / wall_s,
                "kv_bytes_per_token": pipeline.get_metrics().cache_size_in_bytes / blocks / config.KV_BLOCK_TOKENS,
            }


if __name__ == "__main__":
    worker.do_jobs(_speed_worker)
