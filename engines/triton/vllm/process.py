"""vLLM, in an environment of its own: the process behind ``model.py``, with which it talks over one connection.

Each message is JSON behind its length (``multiprocessing.connection``). The first says what to load; the answer is
``{"kv_blocks": n}`` or ``{"failed": why}``. Then, at any time, ``{"abort": number}`` and ``{"add": number, "prompt":
[token ids], "max_tokens": n, "end_id": id or -1, "expert": number or null}``; and back, after every step, a list of
``[number, [new token ids], whether it is done]``.

The engine is in this process, not in one more as with vLLM's own server: what comes before a step joins it, there is no
shared memory, and nothing to be left when this process ends, which it does with the one that has started it, however
that ends.
"""

import json
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main():
    threading.Thread(target=_end_with_the_model, daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    try:
        engine = Engine(**json.loads(connection.recv_bytes()))
    except Exception as error:
        traceback.print_exc()
        connection.send_bytes(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    connection.send_bytes(json.dumps({"kv_blocks": engine.kv_blocks}).encode())
    try:
        while True:
            while connection.poll(0 if engine.is_busy else None):
                engine.take(json.loads(connection.recv_bytes()))
            if ready := engine.step():
                connection.send_bytes(json.dumps(ready).encode())
    except (EOFError, ConnectionError):  # the model has gone
        pass


def _end_with_the_model():
    """Its end of our standard input closes when it ends; this thread does not wait for a step, or for the loading."""
    sys.stdin.buffer.read()
    os._exit(0)


class Engine:
    """vLLM's, which takes token ids and gives token ids.

    Parameters
    ----------
    engine_args : dict
        Of vLLM's ``EngineArgs``.
    adapters : list of str
        Folders of the experts' adapters (LoRA, PEFT's format), all of which are loaded at once.
    """

    def __init__(self, engine_args, adapters):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.llm_engine import LLMEngine

        more = {"skip_tokenizer_init": True, "disable_log_stats": True, "distributed_executor_backend": "uni"}
        self.vllm = LLMEngine.from_engine_args(EngineArgs(**engine_args, **more))
        self.kv_blocks = self.vllm.vllm_config.cache_config.num_gpu_blocks - 1  # vLLM keeps one for itself
        self.adapters = [LoRARequest(f"expert-{i}", i + 1, folder) for i, folder in enumerate(adapters)]
        for adapter in self.adapters:
            self.vllm.add_lora(adapter)
        self.refused = []

    @property
    def is_busy(self):
        return bool(self.refused) or self.vllm.has_unfinished_requests()

    def take(self, message):
        if "abort" in message:
            self.vllm.abort_request([str(message["abort"])])
            return
        number = message["add"]
        try:
            self._add(number, **{name: value for name, value in message.items() if name != "add"})
        except Exception:
            traceback.print_exc()
            self.refused.append([number, [], True])

    def _add(self, number, prompt, max_tokens, end_id, expert):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        forced = {"ignore_eos": True, "min_tokens": max_tokens} if end_id < 0 else {"stop_token_ids": [end_id]}
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, detokenize=False, output_kind=RequestOutputKind.DELTA, **forced
        )
        adapter = None if expert is None else self.adapters[expert]
        self.vllm.add_request(str(number), {"prompt_token_ids": prompt}, sampling, lora_request=adapter)

    def step(self):
        refused, self.refused = self.refused, []
        outputs = self.vllm.step()
        return refused + [[int(one.request_id), list(one.outputs[0].token_ids), one.finished] for one in outputs]


if __name__ == "__main__":
    main()
