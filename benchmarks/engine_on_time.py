"""Triton Python-backend model in an engine's place: it reads no weights and only keeps time.

All sequences get a token per step of ``step_s`` seconds, as with in-flight batching, and a response every
``tokens_per_response`` tokens.
"""

import json
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class Sequence:
    def __init__(self, request: Any):
        self.sender = request.get_response_sender()
        self.left = int(pb_utils.get_input_tensor_by_name(request, "request_output_len").as_numpy().ravel()[0])
        self.token = int(pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().ravel()[-1])
        self.unsent = 0

    def step(self, tokens_per_response: int) -> bool:
        """Generate a token, and send those that make a response; returns whether it was the last."""
        self.left -= 1
        self.unsent += 1
        if self.left and self.unsent < tokens_per_response:
            return False
        outputs = [
            pb_utils.Tensor("output_ids", np.full((1, 1, self.unsent), self.token, np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[self.unsent]], np.int32)),
        ]
        flags = 0 if self.left else pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self.sender.send(pb_utils.InferenceResponse(outputs), flags=flags)
        self.unsent = 0
        return self.left == 0


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        said = json.loads(args["model_config"])["parameters"]
        self.step_s = float(said["step_s"]["string_value"])
        self.tokens_per_response = int(said["tokens_per_response"]["string_value"])
        self.active: list[Sequence] = []
        self.came, self.stopping = threading.Condition(), False
        self.loop = threading.Thread(target=self._run, daemon=True)
        self.loop.start()

    def execute(self, requests: list[Any]) -> None:
        with self.came:
            self.active += map(Sequence, requests)
            self.came.notify()

    def finalize(self) -> None:
        with self.came:
            self.stopping = True
            self.came.notify()
        self.loop.join()

    def _run(self) -> None:
        while True:
            with self.came:
                self.came.wait_for(lambda: self.active or self.stopping)
                if self.stopping:
                    return
                running = list(self.active)
            time.sleep(self.step_s)
            finished = {sequence for sequence in running if sequence.step(self.tokens_per_response)}
            with self.came:
                self.active = [sequence for sequence in self.active if sequence not in finished]
