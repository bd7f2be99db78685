"""Step times that are easy to compute."""

from __future__ import annotations

from erlib.paper_scale import steptimes


class Linear(steptimes.StepTimes):
    """An engine whose arithmetic can be done by hand."""

    limits = steptimes.Limits(8192, 1000, 8192)

    def __init__(self, fixed_s=0.004, per_sequence_s=0.001, per_prompt_token_s=0.0001):
        self.fixed_s, self.per_sequence_s, self.per_prompt_token_s = fixed_s, per_sequence_s, per_prompt_token_s

    def step_s(self, prompts, prompt_tokens, sequences, context_tokens):
        self._check(prompts, prompt_tokens, sequences, context_tokens)
        return self.fixed_s + self.per_sequence_s * sequences + self.per_prompt_token_s * prompt_tokens
