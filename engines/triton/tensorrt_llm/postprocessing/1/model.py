"""Triton Python-backend model: the text of an answer's next token, as bytes, and its id.

A character may be cut between two tokens, so text is bytes that only together are UTF-8.
"""

import json
import re
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer, decoders


class TritonPythonModel:
    def initialize(self, args):
        directory = Path(json.loads(args["model_config"])["parameters"]["tokenizer"]["string_value"])
        self.token_bytes = _token_bytes(Tokenizer.from_file(str(directory / "tokenizer.json")))
        # The processes of this model share one metric; it does not outlive its family.
        self.family = pb_utils.MetricFamily(
            name="expert_generated_tokens",
            description="tokens handed to clients",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self.generated = self.family.Metric(labels={"model": "ensemble"})

    def execute(self, requests):
        answers = [self._tokens(request) for request in requests]
        self.generated.increment(sum(map(len, answers)))  # before anybody can have received them
        return [self._response(tokens) for tokens in answers]

    @staticmethod
    def _tokens(request):
        beams = pb_utils.get_input_tensor_by_name(request, "beams").as_numpy()
        length = pb_utils.get_input_tensor_by_name(request, "sequence_length").as_numpy()
        return beams[0, 0, : length[0, 0]].tolist()

    def _response(self, tokens):
        text = b"".join(self.token_bytes[token] for token in tokens)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_)),
                pb_utils.Tensor("output_ids", np.array([tokens], dtype=np.int32)),
            ]
        )


def _token_bytes(tokenizer):
    """Bytes of every token, of a byte-level BPE (Llama 3) or a SentencePiece one with byte fallback (Llama 2)."""
    to_bytes = _byte_level() if isinstance(tokenizer.decoder, decoders.ByteLevel) else _sentencepiece
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
    pieces = (tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size()))
    return [piece.encode() if piece in special else to_bytes(piece) for piece in pieces]


def _sentencepiece(piece):
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def _byte_level():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in printable):
        byte_of[chr(256 + offset)] = byte
    return lambda piece: bytes(byte_of[char] for char in piece)
