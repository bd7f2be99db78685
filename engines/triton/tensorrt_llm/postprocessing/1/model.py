"""Triton Python-backend model: the text of an answer's next token, as bytes, and its id."""

import texts
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.texts = texts.Texts(texts.parameters(args)["tokenizer"])
        self.generated = texts.TokenCounter()

    def execute(self, requests):
        answers = [self._tokens(request) for request in requests]
        self.generated.increment(sum(map(len, answers)))  # before anybody can have received them
        return [self.texts.response(tokens) for tokens in answers]

    @staticmethod
    def _tokens(request):
        beams = pb_utils.get_input_tensor_by_name(request, "beams").as_numpy()
        length = pb_utils.get_input_tensor_by_name(request, "sequence_length").as_numpy()
        return beams[0, 0, : length[0, 0]].tolist()
