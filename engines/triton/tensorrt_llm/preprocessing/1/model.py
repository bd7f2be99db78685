"""Triton Python-backend model: a prompt's token ids, and where its answer ends."""

import numpy as np
import texts
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        said = texts.parameters(args)
        self.texts = texts.Texts(said["tokenizer"])
        self.limits = int(said["max_input_tokens"]), int(said["context_tokens"])
        self.experts = int(said["experts"])

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        try:
            prompt, max_tokens, end_id = self.texts.read(request, *self.limits)
            adapter = texts.expert(request, self.experts) + 1 if self.experts else None
        except texts.BadRequest as error:
            return texts.error(error)
        outputs = {
            "input_ids": prompt,
            "input_lengths": [len(prompt)],
            "request_output_len": [max_tokens],
            # A client's -1 is passed on: no token has that id, so the answer has its full length.
            "stop_at_id": [end_id],
            "pad_id": [self.texts.end_id],
        }
        tensors = [pb_utils.Tensor(name, np.array([values], dtype=np.int32)) for name, values in outputs.items()]
        if adapter:
            tensors.append(pb_utils.Tensor("lora_task_id", np.array([[adapter]], dtype=np.uint64)))
        return pb_utils.InferenceResponse(tensors)
