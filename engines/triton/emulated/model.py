"""Triton Python-backend model that only keeps time: its steps last as long as those of an engine on H100s would.

Which requests share a step and how long it lasts are the simulation's (``erlib.paper_scale.batching``,
``erlib.paper_scale.steptimes``), the clock is the wall's. Every token is the same word, one that the router ignores, so
that a continuation prompt stays in its cluster; answers never end early.

A machine that is busy elsewhere ends steps late. A step more than 5 % late counts as late, and the time is lost;
smaller delays are caught up with. Both are counted, so that nobody takes a slow laptop for a slow H100.
"""

import json
import time
from pathlib import Path

import inflight

from erlib.paper_scale import batching

WORD = " the"
LATE = 0.05


class Request:
    """A sequence as ``batching`` sees it."""

    def __init__(self, sequence):
        self.sequence = sequence
        self.input_tokens = len(sequence.token_ids)
        self.output_tokens = sequence.max_tokens
        self.first_step = -1
        self.kv_blocks = 0


class Engine:
    def __init__(self, parameters, token):
        answer_limit = json.loads(parameters["answer_limit"])
        steps = Path(parameters["steps"]).resolve() if "steps" in parameters else None
        self.batch = batching.Engine(batching.paper_system(parameters["config"], answer_limit, steps))
        self.max_prompt_tokens = self.batch.system.max_step_tokens
        self.slow_motion = float(parameters["slow_motion"])
        self.token = token
        self.running = []
        self.due_s = None  # when the step before this one should have ended; None after a rest
        self.count_step = inflight.counter("expert_steps", "engine steps")
        self.count_step_s = inflight.counter("expert_step_seconds", "what they should have taken")
        self.count_late_step = inflight.counter("expert_late_steps", "steps that ended more than 5 % late")
        self.count_lost_s = inflight.counter("expert_lost_seconds", "by which late steps were late")

    def check(self, sequence):
        sequence.request = Request(sequence)
        try:
            self.batch.check(sequence.request)
        except batching.CannotServe as error:
            raise inflight.BadRequest(str(error)) from None

    def submit(self, sequence):
        self.batch.submit(sequence.request)

    @property
    def is_idle(self):
        return self.batch.is_idle

    def unfinished(self):
        return [request.sequence for request in [*self.running, *self.batch.joining, *self.batch.waiting]]

    def step(self):
        for request in [request for request in self.running if request.sequence.cancelled]:
            self.batch.cancel(request)
            self.running.remove(request)
        while self.batch.waiting and self.batch.waiting[0].sequence.sender.is_cancelled():
            self.batch.waiting.popleft().sequence.sender.send(flags=inflight.FINAL)
        if self.batch.is_idle:
            self.due_s = None
            return []
        self._pass_time(self.batch.begin_step() * self.slow_motion)
        done = self.batch.end_step()
        self.running += done.joined
        finished = {id(request) for request in done.finished}
        ready = [(request.sequence, [self.token], id(request) in finished) for request in self.running]
        self.running = [request for request in self.running if id(request) not in finished]
        if self.batch.is_idle:
            self.due_s = None
        return ready

    def _pass_time(self, step_s):
        due_s = (self.due_s or time.monotonic()) + step_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        late_s = time.monotonic() - due_s
        self.count_step(1)
        self.count_step_s(step_s)
        if late_s > LATE * step_s:
            self.count_late_step(1)
            self.count_lost_s(late_s)
            due_s += late_s
        self.due_s = due_s


class TritonPythonModel(inflight.Model):
    def load(self, parameters):
        (token,) = self.tokenizer.encode(WORD).ids
        return Engine(parameters, token)
