"""Stand-in for the package ``tensorrt_llm``: as much of 1.2's LLM API as serving uses.

Tests put it beside the model that imports it. At most ``max_batch_size`` sequences get a token per step; the others
wait. A message brings ``stream_interval`` tokens, and ids are cumulative, as with the real one. An answer repeats the
prompt, with the end of sequence as its sixth token; it is cut where the KV cache is full, and a prompt that does not
fit there is an error. What is generated is counted as ``expert_engine_tokens``.
"""

import asyncio
import queue
import sys
import threading
import time
import types
from dataclasses import dataclass, field

import triton_python_backend_utils as pb_utils

ARGUMENTS = {
    "model", "backend", "dtype", "tensor_parallel_size", "max_batch_size", "max_input_len", "max_seq_len",
    "max_num_tokens", "enable_chunked_prefill", "kv_cache_config", "scheduler_config", "stream_interval", "lora_config",
}  # fmt: skip
"""Of those that the real one takes."""
STEP_S = 0.002
END_AT = 5


class RequestError(RuntimeError):
    """One request failed."""


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    max_tokens: int = 32
    ignore_eos: bool = False
    detokenize: bool = True


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class RequestOutput:
    """The answer so far; iterating waits for the next message and yields itself."""

    def __init__(self, prompt, sampling, streaming, kv_tokens, adapter):
        self.prompt_token_ids, self.sampling, self.streaming = prompt, sampling, streaming
        self.adapter = adapter
        self.outputs = [CompletionOutput(0)]
        self.finished = False
        self.limit = min(sampling.max_tokens, kv_tokens - len(prompt))
        self.generated = []
        self.aborted = False
        self.messages = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def abort(self):
        self.aborted = True

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.finished:
            raise StopAsyncIteration
        new, reason = await self.messages.get()
        if isinstance(reason, Exception):
            self.finished = True
            raise reason
        self.outputs[0].token_ids.extend(new)
        self.outputs[0].finish_reason = reason
        self.finished = reason is not None
        return self

    def step(self, interval):
        """Generate a token; returns whether it was the last."""
        at = len(self.generated)
        token = self.prompt_token_ids[at % len(self.prompt_token_ids)] + self.adapter
        token = self.sampling.end_id if at == END_AT else token
        self.generated.append(token)
        reason = None
        if token == self.sampling.end_id and not self.sampling.ignore_eos:
            reason = "stop"
        elif len(self.generated) == self.limit:
            reason = "length"
        if reason or (self.streaming and len(self.generated) % interval == 0):
            new = self.generated[-((len(self.generated) - 1) % interval + 1) :] if self.streaming else self.generated
            self.tell(new, reason)
        return reason is not None

    def tell(self, new, reason):
        self.loop.call_soon_threadsafe(self.messages.put_nowait, (list(new), reason))


@dataclass(slots=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class LoraConfig:
    lora_dir: list[str]
    max_lora_rank: int
    max_loras: int
    max_cpu_loras: int


# Where 1.2 has them.
for module, its in (("executor", LoRARequest), ("lora_helper", LoraConfig)):
    sys.modules[f"{__name__}.{module}"] = types.SimpleNamespace(**{its.__name__: its})


class LLM:
    def __init__(self, **kwargs):
        for name in kwargs:
            if name not in ARGUMENTS:
                raise ValueError(f"LLM got invalid argument: {name}")
        self.kwargs = kwargs
        self.family = pb_utils.MetricFamily(
            name="expert_engine_tokens", description="tokens generated", kind=pb_utils.MetricFamily.COUNTER
        )
        self.generated = self.family.Metric(labels={"model": "llm"})
        self.mixed = pb_utils.MetricFamily(
            name="expert_mixed_steps", description="steps of several adapters", kind=pb_utils.MetricFamily.COUNTER
        )
        self.mixed_steps = self.mixed.Metric(labels={"model": "llm"})
        self.waiting, self.running, self.stopping = queue.SimpleQueue(), [], False
        self.thread = threading.Thread(target=self._steps, daemon=True)
        self.thread.start()

    def generate_async(self, inputs, sampling_params=None, *, lora_request=None, streaming=False):
        assert not sampling_params.detokenize, "this one has no text"
        if len(inputs) > self.kwargs["max_num_tokens"]:
            raise ValueError(f"prompt length ({len(inputs)}) should not exceed max_num_tokens")
        adapter = lora_request.lora_int_id if lora_request else 0
        kv_tokens = self.kwargs["kv_cache_config"]["max_tokens"]
        request = RequestOutput(inputs, sampling_params, streaming, kv_tokens, adapter)
        if request.limit < 1:
            request.tell([], RequestError("the prompt does not fit into the KV cache"))
        else:
            self.waiting.put(request)
        return request

    def shutdown(self):
        self.stopping = True
        self.thread.join()

    def _steps(self):
        while not self.stopping:
            self.running = [request for request in self.running if not request.aborted]
            while len(self.running) < self.kwargs["max_batch_size"] and not self.waiting.empty():
                if not (request := self.waiting.get()).aborted:
                    self.running.append(request)
            time.sleep(STEP_S)
            if self.running:
                self.generated.increment(len(self.running))
                self.mixed_steps.increment(len({request.adapter for request in self.running}) > 1)
                interval = self.kwargs.get("stream_interval", 1)
                self.running = [request for request in self.running if not request.step(interval)]
