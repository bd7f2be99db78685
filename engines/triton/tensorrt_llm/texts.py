"""What the Python models of TensorRT-LLM's repositories share (copied beside each): requests, and tokens as text."""

import json
import re
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer, decoders

EXPERT = "er-expert"


class BadRequest(ValueError):
    """The request cannot be served; the message goes to the client."""


class Texts:
    """A tokenizer's two ways: prompts to ids, ids to text.

    Text is bytes that only together are UTF-8, because a character may be cut between two tokens.
    """

    def __init__(self, directory):
        self.tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
        end = json.loads((Path(directory) / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        self.end_id = self.tokenizer.token_to_id(end if isinstance(end, str) else end["content"])
        if self.end_id is None:
            raise ValueError(f"{directory}: the end of sequence, {end!r}, is no token of tokenizer.json")
        self.token_bytes = _token_bytes(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder().values()  # as a prompt may spell them
        self.max_token_bytes = max(*map(len, self.token_bytes), *(len(token.content.encode()) for token in added))

    def read(self, request, max_input_tokens, context_tokens):
        """Ids of a request's prompt, how many tokens it asks for, and which one ends the answer (-1: none).

        Refuses what the engine has no room for: prompts of more than `max_input_tokens`, and prompts and answers of
        more than `context_tokens` together. The engine would not say that it is the client's mistake.
        """
        text = value(request, "text_input")
        if len(text) > max_input_tokens * self.max_token_bytes:  # to tokenise what is too long anyway may take seconds
            raise BadRequest(
                f"the prompt's {len(text):,} bytes exceed the {max_input_tokens} tokens that a prompt may have, of at "
                f"most {self.max_token_bytes} bytes each"
            )
        try:
            prompt = text.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest("text_input is not valid UTF-8") from None
        if not prompt.strip():
            raise BadRequest("text_input is empty")
        max_tokens = int(value(request, "max_tokens"))
        if max_tokens < 1:
            raise BadRequest(f"max_tokens must be at least 1, not {max_tokens}")
        ids = self.tokenizer.encode(prompt).ids
        if len(ids) > max_input_tokens:
            raise BadRequest(f"{len(ids)} input tokens exceed the {max_input_tokens} that a prompt may have")
        if len(ids) + max_tokens > context_tokens:
            raise BadRequest(
                f"{len(ids)} input tokens + {max_tokens} output tokens exceed the {context_tokens} that a sequence may "
                "have"
            )
        return ids, max_tokens, int(value(request, "end_id", self.end_id))

    def response(self, tokens):
        """Tokens on their way to a client."""
        text = b"".join(self.token_bytes[token] for token in tokens)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_)),
                pb_utils.Tensor("output_ids", np.array([tokens], dtype=np.int32)),
            ]
        )


class TokenCounter:
    """Tokens handed to clients; all processes of a model share it."""

    def __init__(self):
        self.family = pb_utils.MetricFamily(  # kept, because a metric does not outlive it
            name="expert_generated_tokens",
            description="tokens handed to clients",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self.increment = self.family.Metric(labels={"model": "ensemble"}).increment


def parameters(args):
    """What ``config.pbtxt`` says to the model."""
    said = json.loads(args["model_config"])["parameters"]
    return {key: value["string_value"] for key, value in said.items()}


def value(request, name, default=None):
    """The one value of an input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        if default is None:
            raise BadRequest(f"{name} is missing: the request has no input {name!r}")
        return default
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise BadRequest(f"{name} must hold exactly one value, not {len(values)}")
    return values[0]


def expert(request, experts):
    """Which of so many experts a request is for, as the gateway has said.

    Triton makes a parameter of the metadata, and an ensemble hands it on to its steps.
    """
    said = json.loads(request.parameters() or "{}").get(EXPERT)
    if said is None or not said.isdecimal() or int(said) >= experts:
        raise BadRequest(f"this server has {experts} experts, and metadata {EXPERT} must name one, not {said!r}")
    return int(said)


def error(reason):
    """A response that says why there is none; a client's mistake in its text as well, because streams show no code."""
    if isinstance(reason, BadRequest):
        text, code = f"INVALID_ARGUMENT: {reason}", pb_utils.TritonError.INVALID_ARG
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(reason)))


def _token_bytes(tokenizer):
    """Bytes of every token, of a byte-level BPE (Llama 3) or a SentencePiece one with byte fallback (Llama 2).

    Special tokens, such as the end of sequence, have none.
    """
    to_bytes = _byte_level() if isinstance(tokenizer.decoder, decoders.ByteLevel) else _sentencepiece
    added = {
        number: b"" if token.special else token.content.encode()
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    pieces = (tokenizer.id_to_token(token) or "" for token in range(tokenizer.get_vocab_size()))
    return [added[token] if token in added else to_bytes(piece) for token, piece in enumerate(pieces)]


def _sentencepiece(piece):
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def _byte_level():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in printable):
        byte_of[chr(256 + offset)] = byte
    return lambda piece: bytes(byte_of[char] for char in piece)
