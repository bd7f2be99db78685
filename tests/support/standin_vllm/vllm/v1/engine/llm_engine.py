import os
import time
from types import SimpleNamespace

STEP_S = 0.005
FIRST, PER_ADAPTER = 1, 20


class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        if not args.said["is_there"]:
            raise ValueError("no such model")
        return cls(args.said)

    def __init__(self, said):
        cache = SimpleNamespace(num_gpu_blocks=said["kv_blocks"] + 1)
        self.vllm_config = SimpleNamespace(cache_config=cache)
        self.slots = said["max_num_seqs"]
        self.loaded, self.requests = set(), {}

    def add_lora(self, adapter):
        self.loaded.add(adapter.lora_int_id)

    def add_request(self, request_id, prompt, params, lora_request=None):
        match prompt["prompt_token_ids"]:
            case [_]:
                raise ValueError("refused")
            case [_, _]:
                os._exit(3)
        assert len(self.requests) < self.slots, "more at a time than there are slots"
        assert lora_request is None or lora_request.lora_int_id in self.loaded
        first = FIRST + (PER_ADAPTER * lora_request.lora_int_id if lora_request else 0)
        self.requests[request_id] = [first, params, 0]

    def abort_request(self, names):
        for name in names:
            self.requests.pop(name, None)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        if self.requests:
            time.sleep(STEP_S)
        outputs = []
        for name, request in list(self.requests.items()):
            first, params, n = request
            token, request[2] = first + n, n + 1
            finished = n + 1 == params.max_tokens or token in params.stop_token_ids
            if finished:
                del self.requests[name]
            output = SimpleNamespace(token_ids=(token,))
            outputs.append(SimpleNamespace(request_id=name, finished=finished, outputs=[output]))
        return outputs
