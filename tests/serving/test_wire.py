"""Messages survive the trip, and broken ones are refused with a reason."""

import struct

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from erlib.serving import wire

prompts = st.text(min_size=1, max_size=200).filter(lambda text: text.strip() and _encodable(text))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(prompts, st.integers(1, 2**31 - 1), st.none() | st.integers(-1, 50_000), st.text("abc-0", max_size=9))
def test_gateway_reads_the_prompt_that_the_client_wrote(prompt, max_tokens, end_id, request_id):
    message = wire.encode_request(prompt, max_tokens, end_id, request_id)
    assert wire.prompt_of(message) == (request_id, prompt)
    request = pb.ModelInferRequest.FromString(message)
    sent = dict(zip([tensor.name for tensor in request.inputs], request.raw_input_contents, strict=True))
    assert struct.unpack("<i", sent["max_tokens"]) == (max_tokens,)
    assert ("end_id" in sent) == (end_id is not None)


@given(prompts)
def test_typed_contents_are_read_like_raw_ones(prompt):
    request = pb.ModelInferRequest(model_name="ensemble")
    first = request.inputs.add(name="max_tokens", datatype="INT32", shape=[1, 1])
    first.contents.int_contents.append(3)
    second = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    second.contents.bytes_contents.append(prompt.encode())
    assert wire.prompt_of(request.SerializeToString())[1] == prompt


@given(st.binary(max_size=60), st.lists(st.integers(0, 2**31 - 1), max_size=4))
def test_responses_round_trip(text, token_ids):
    reply = pb.ModelStreamInferResponse()
    reply.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1, 1])
    reply.infer_response.outputs.add(name="output_ids", datatype="INT32", shape=[1, len(token_ids)])
    reply.infer_response.raw_output_contents.append(struct.pack("<I", len(text)) + text)
    reply.infer_response.raw_output_contents.append(struct.pack(f"<{len(token_ids)}i", *token_ids))
    assert wire.decode_response(reply.SerializeToString()) == ("", text, tuple(token_ids))


@given(st.text(min_size=1, max_size=50).filter(_encodable))
def test_errors_round_trip(reason):
    assert wire.decode_response(wire.encode_error(reason, "7")).error == reason


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_and_never_crash(message):
    with pytest.raises(wire.BadRequest):
        wire.prompt_of(message)


def _request(**changes) -> bytes:
    request = pb.ModelInferRequest.FromString(wire.encode_request("hello there", 4))
    for name, value in changes.items():
        if name == "text":
            request.raw_input_contents[0] = value
        elif name == "datatype":
            request.inputs[0].datatype = value
        elif name == "input_name":
            request.inputs[0].name = value
        else:
            setattr(request, name, value)
    return request.SerializeToString()


def _element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_name": "other"}, "unknown model 'other'"),
        ({"input_name": "prompt"}, "no input 'text_input'"),
        ({"datatype": "INT32"}, "must be BYTES"),
        ({"text": _element(b"")}, "is empty"),
        ({"text": _element(b" \n\t")}, "is empty"),
        ({"text": _element(b"\xff\xfe")}, "not valid UTF-8"),
        ({"text": b""}, "exactly one prompt, not 0"),
        ({"text": _element(b"a") * 2}, "exactly one prompt, not 2"),
        ({"text": b"\x05\x00\x00\x00abc"}, "truncated element"),
        ({"text": b"\x05\x00"}, "truncated length"),
        ({"text": _element(b"a" * (wire.MAX_PROMPT_BYTES + 1))}, "at most 4,194,304"),
    ],
)
def test_bad_requests_say_what_is_wrong(changes, reason):
    with pytest.raises(wire.BadRequest, match=reason):
        wire.prompt_of(_request(**changes))


@pytest.mark.parametrize(
    ("error", "code", "details"),
    [
        ("INVALID_ARGUMENT: max_tokens is 0", "INVALID_ARGUMENT", "max_tokens is 0"),
        ("in ensemble 'ensemble', INVALID_ARGUMENT: a: b", "INVALID_ARGUMENT", "a: b"),
        ("[request id: 7] unexpected shape for input 'max_tokens'", "INVALID_ARGUMENT", None),
        ("[request id: 7] input byte size mismatch for input 'max_tokens'", "INVALID_ARGUMENT", None),
        ("inference input 'max_tokens' data-type is 'INT64'", "INVALID_ARGUMENT", None),
        ("Stub process 'ensemble_0_0' is not healthy.", "UNKNOWN", None),
        ("[request id: 7] Exceeds maximum queue size", "UNAVAILABLE", None),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", "UNAVAILABLE", None),
        ("Request for unknown model: 'ensemble' is not found", "UNKNOWN", None),
        ("MIDNIGHT: no such code", "UNKNOWN", None),
        ("OK: not at all", "UNKNOWN", None),
        ("", "UNKNOWN", None),
    ],
)
def test_the_class_of_an_error_within_a_stream_is_told_by_its_text(error, code, details):
    assert wire.status_of(error) == (StatusCode[code], error if details is None else details)


@pytest.mark.parametrize(("prompt", "max_tokens"), [("a", 2**31), ("a", 10**18), ("a", -(2**31) - 1), ("\ud800", 1)])
def test_what_cannot_be_written_is_a_bad_request(prompt, max_tokens):
    with pytest.raises(wire.BadRequest, match=r"at most 2147483647|half of a surrogate pair"):
        wire.encode_request(prompt, max_tokens)


@pytest.mark.parametrize("said", [None, 512])
def test_a_models_configuration_says_its_context(said):
    reply = pb.ModelConfigResponse()
    if said:
        reply.config.parameters["context_tokens"].string_value = str(said)
    assert wire.context_tokens(reply.SerializeToString()) == said
