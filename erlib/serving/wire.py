"""What travels between clients, gateways and servers: KServe v2 ``ModelStreamInfer`` messages for ``ensemble``.

Inputs ``text_input`` BYTES, ``max_tokens`` INT32, ``stream`` BOOL and, optionally, ``end_id`` INT32 (-1: never stop
early); outputs ``text_output`` BYTES and ``output_ids`` INT32. Every expert and the gateway speak it, so a client need
not know which of them it talks to. One response is one token; without ``stream``, the whole answer is one response.
Special tokens have an id, but no text.

What a model says of itself (``ModelConfig``) has the parameter ``context_tokens``: how many tokens a prompt and its
answer may have together.

An error within a stream is a text without a code. Gateways' and experts' begin with the name of the status that a unary
call would have, where that says more than UNKNOWN: ``INVALID_ARGUMENT: max_tokens must be at least 1, not 0``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb

from erlib.serving.spans import GATEWAY_SPANS, header

SERVICE = "inference.GRPCInferenceService"
INFER = f"/{SERVICE}/ModelInfer"
STREAM_INFER = f"/{SERVICE}/ModelStreamInfer"
MODEL_NAME = "ensemble"

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),  # a channel is a connection of its own
    ("grpc.enable_http_proxy", 0),
]
MAX_PROMPT_BYTES = 4 << 20
MAX_TOKENS = 2**31 - 1
"""More cannot be asked for."""
COMPLETE = ("er-complete", "1")
"""Metadata of a client's promise that its stream ends with its first request."""
STATUS_ON_ERROR = "triton_grpc_error"
"""Metadata by which, if "true", Triton ends a stream with the status of the first error, in place of telling it there.

A gateway does it for its clients and never asks an expert for it: Triton 2.51 dies, its heap corrupted, where it ends
streams in that way and clients cancel.
"""
NEVER_STOP = -1
"""``end_id`` of a forced answer length."""
CONTEXT = "context_tokens"
"""The parameter of a model's configuration that says how many tokens a prompt and its answer may have together."""
MODEL_CONFIG = f"/{SERVICE}/ModelConfig"
ASK_MODEL_CONFIG = pb.ModelConfigRequest(name=MODEL_NAME).SerializeToString()

_OF_AN_ENSEMBLE = f"in ensemble '{MODEL_NAME}', "
"""What Triton puts before the errors of an ensemble's models."""
_NOT_NOW = ("Exceeds maximum queue size", "Server is stopping", "Server not ready")
"""What Triton says of a request that it has no place for, or comes too late."""
_OF_A_REQUEST = re.compile(
    r"(\[request id: .*?\] )?(inference (input|request)|input |expected |unexpected )"
    r"|Unable to find shared memory region|failed to get model version|Request for unknown model: '\w+' version"
)
"""How Triton begins to say what is wrong with a request's tensors."""


def message_of(body: bytes) -> bytes | None:
    """The message that is all of a stream's `body`; None: there is none, or several, or it is in part or compressed."""
    is_one = len(body) >= 5 and body[0] == 0 and len(body) == 5 + int.from_bytes(body[1:5], "big")
    return body[5:] if is_one else None


class BadRequest(ValueError):
    """A request that no expert can serve; the message says what is wrong with it."""


class UnknownModel(BadRequest):
    """A request for a model that is not served."""


class Response(NamedTuple):
    """One message of a response stream."""

    error: str
    text: bytes
    token_ids: tuple[int, ...]


def encode_request(prompt: str, max_tokens: int, end_id: int | None = None, request_id: str = "") -> bytes:
    """Serialise a streaming request; `end_id` None lets the engine stop at its own end-of-sequence token.

    Raises
    ------
    BadRequest
        If it cannot be written: the prompt is not Unicode, or `max_tokens` no number of 32 bits.
    """
    try:
        text = prompt.encode()
    except UnicodeEncodeError:
        raise BadRequest("the prompt holds half of a surrogate pair, which is no character") from None
    if not -MAX_TOKENS <= max_tokens <= MAX_TOKENS:
        raise BadRequest(f"max_tokens must be at most {MAX_TOKENS}")
    request = pb.ModelInferRequest(model_name=MODEL_NAME, id=request_id)
    tensors = [
        ("text_input", "BYTES", struct.pack("<I", len(text)) + text),
        ("max_tokens", "INT32", struct.pack("<i", max_tokens)),
        ("stream", "BOOL", b"\x01"),
    ]
    if end_id is not None:
        tensors.append(("end_id", "INT32", struct.pack("<i", end_id)))
    for name, datatype, raw in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        request.raw_input_contents.append(raw)
    return request.SerializeToString()


def prompt_of(message: bytes, max_prompt_bytes: int = MAX_PROMPT_BYTES) -> tuple[str, str]:
    """Request id and prompt of a serialised request: all that the gateway needs to know.

    Raises
    ------
    UnknownModel
        If it asks for a model other than ``ensemble``.
    BadRequest
        If the message is not a request with one non-empty UTF-8 ``text_input`` of at most `max_prompt_bytes`.
    """
    try:
        request = pb.ModelInferRequest.FromString(message)
    except Exception:
        raise BadRequest("not a KServe v2 ModelInferRequest") from None
    if request.model_name != MODEL_NAME:
        raise UnknownModel(f"unknown model {request.model_name!r}: the gateway serves {MODEL_NAME!r}")
    position = next((i for i, tensor in enumerate(request.inputs) if tensor.name == "text_input"), None)
    if position is None:
        raise BadRequest("the request has no input 'text_input'")
    tensor = request.inputs[position]
    if tensor.datatype != "BYTES":
        raise BadRequest(f"text_input must be BYTES, not {tensor.datatype}")
    if tensor.contents.bytes_contents:
        values = list(tensor.contents.bytes_contents)
    else:
        # Inputs that carry their own contents have no raw entry.
        raw_position = sum(1 for other in request.inputs[:position] if not other.HasField("contents"))
        if raw_position >= len(request.raw_input_contents):
            raise BadRequest("text_input has no data")
        values = _bytes_elements(request.raw_input_contents[raw_position])
    if len(values) != 1:
        raise BadRequest(f"text_input must hold exactly one prompt, not {len(values)}")
    if len(values[0]) > max_prompt_bytes:
        raise BadRequest(f"the prompt has {len(values[0]):,} bytes; at most {max_prompt_bytes:,} are taken")
    try:
        prompt = values[0].decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("text_input is not valid UTF-8") from None
    if not prompt.strip():
        raise BadRequest("text_input is empty")
    return request.id, prompt


def decode_response(message: bytes) -> Response:
    """Error (empty if none), text and token ids of one serialised response message."""
    reply = pb.ModelStreamInferResponse.FromString(message)
    if reply.error_message:
        return Response(reply.error_message, b"", ())
    text, tokens = b"", ()
    for tensor, raw in zip(reply.infer_response.outputs, reply.infer_response.raw_output_contents, strict=False):
        if tensor.name == "text_output":
            text = b"".join(_bytes_elements(raw))
        elif tensor.name == "output_ids":
            tokens = struct.unpack(f"<{len(raw) // 4}i", raw)
    return Response("", text, tokens)


def context_tokens(reply: bytes) -> int | None:
    """How many tokens a prompt and its answer may have together, by a serialised ``ModelConfig``; None if unsaid."""
    parameters = pb.ModelConfigResponse.FromString(reply).config.parameters
    return int(parameters[CONTEXT].string_value) if CONTEXT in parameters else None


def status_of(error: str) -> tuple[StatusCode, str]:
    """Status and details of an in-stream error, which has no code, but may begin with its name: UNKNOWN if not.

    What Triton itself finds wrong with a request, before the model sees it, is the client's mistake, too.
    """
    name, colon, details = error.removeprefix(_OF_AN_ENSEMBLE).partition(": ")
    if colon and name in StatusCode.__members__ and name != StatusCode.OK.name:
        return StatusCode[name], details
    if any(text in error for text in _NOT_NOW):
        return StatusCode.UNAVAILABLE, error
    return StatusCode.INVALID_ARGUMENT if _OF_A_REQUEST.match(error) else StatusCode.UNKNOWN, error


def is_error(message: bytes) -> bool:
    """Whether a serialised response message reports an error, told by its first byte.

    Serialisers write fields in the order of their numbers, and ``error_message`` is the first.
    """
    return message[:1] == b"\x0a"


def with_parameters(message: bytes, parameters: Mapping[str, int | str]) -> bytes:
    """A serialised response message with more parameters; what else it holds, unknown fields included, stays."""
    reply = pb.ModelStreamInferResponse.FromString(message)
    target = reply.infer_response.parameters
    for name, value in parameters.items():
        if isinstance(value, int):
            target[name].int64_param = value
        else:
            target[name].string_param = value
    return reply.SerializeToString()


def unary(message: bytes) -> bytes:
    """What ``ModelInfer`` answers where a stream would have this serialised response message and no other.

    Raises
    ------
    DecodeError
        If it is none.
    """
    return pb.ModelStreamInferResponse.FromString(message).infer_response.SerializeToString()


def encode_error(message: str, request_id: str = "") -> bytes:
    """An in-stream error as Triton sends it: the stream lives on, the request does not."""
    reply = pb.ModelStreamInferResponse(error_message=message)
    reply.infer_response.id = request_id
    return reply.SerializeToString()


def _bytes_elements(raw: bytes) -> list[bytes]:
    """Elements of a BYTES tensor: each behind its length as a little-endian uint32."""
    elements = []
    position = 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise BadRequest("malformed BYTES tensor: truncated length")
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        if position + length > len(raw):
            raise BadRequest("malformed BYTES tensor: truncated element")
        elements.append(raw[position : position + length])
        position += length
    return elements


FAILED = "er-failed"

EXPERT = "er-expert"
"""Which expert a request is for: said to its client, and to the server, which may have several experts' adapters."""

TOLD = ["er-gateway", EXPERT, *map(header, GATEWAY_SPANS)]
"""What NGINX tells a client about a request that it was handed."""

BODY_BYTES = 1 << 20
"""Of a complete request; a gateway's own limit on prompts is half of it."""
