"""Stand-in for vLLM: as much of its API as ``engines/triton/vllm/process.py`` uses, around no model.

The first token is ``FIRST`` and what the number of an adapter adds, each further one is one more. A step takes
``STEP_S``. A prompt of one token is refused; at one of two, the process ends.
"""


class SamplingParams:
    def __init__(
        self, max_tokens, temperature, detokenize, output_kind, ignore_eos=False, min_tokens=0, stop_token_ids=()
    ):
        assert (temperature, detokenize, output_kind) == (0, False, "delta")
        assert min_tokens == (max_tokens if ignore_eos else 0)
        self.max_tokens, self.stop_token_ids = max_tokens, stop_token_ids
