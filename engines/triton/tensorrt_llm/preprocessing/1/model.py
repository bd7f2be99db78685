"""Triton Python-backend model: a prompt's token ids, and where its answer ends."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class BadRequest(ValueError):
    """The request cannot be served; the message goes to the client."""


class TritonPythonModel:
    def initialize(self, args):
        directory = Path(json.loads(args["model_config"])["parameters"]["tokenizer"]["string_value"])
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        end = json.loads((directory / "tokenizer_config.json").read_text())["eos_token"]
        self.end_id = self.tokenizer.token_to_id(end if isinstance(end, str) else end["content"])
        if self.end_id is None:
            raise ValueError(f"{directory}: the end of sequence, {end!r}, is no token of tokenizer.json")

    def execute(self, requests):
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        try:
            prompt = self._prompt(request)
            max_tokens = int(_input(request, "max_tokens"))
            if max_tokens < 1:
                raise BadRequest(f"max_tokens must be at least 1, not {max_tokens}")
            token_ids = self.tokenizer.encode(prompt).ids
            outputs = {
                "input_ids": token_ids,
                "input_lengths": [len(token_ids)],
                "request_output_len": [max_tokens],
                # A client's -1 is passed on: no token has that id, so the answer has its full length.
                "stop_at_id": [int(_input(request, "end_id", self.end_id))],
                "pad_id": [self.end_id],
            }
        except BadRequest as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensors = [pb_utils.Tensor(name, np.array([values], dtype=np.int32)) for name, values in outputs.items()]
        return pb_utils.InferenceResponse(tensors)

    @staticmethod
    def _prompt(request):
        try:
            prompt = _input(request, "text_input").decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest("text_input is not valid UTF-8") from None
        if not prompt.strip():
            raise BadRequest("text_input is empty")
        return prompt


def _input(request, name, default=None):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        if default is None:
            raise BadRequest(f"the request has no input {name!r}")
        return default
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise BadRequest(f"{name} must hold exactly one value, not {len(values)}")
    return values[0]
