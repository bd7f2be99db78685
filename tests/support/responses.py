"""Responses that an expert might send."""

from __future__ import annotations

from tests.support.standin_expert import response

CAT = "a 猫 and a 🦁".encode()

RESPONSES = {
    "none": [],
    "one": [response(b"a", 1)],
    "empty messages": [b"", b"", b""],
    "empty text": [response(b"", 1), response(b"", 2)],
    "NUL": [b"\x00", response(b"\x00a\x00", 1), b"\x00\x00"],
    "characters cut in the middle": [response(CAT[i : i + 1], i) for i in range(len(CAT))],
    "no protobuf at all": [bytes(range(256)), b"\xff" * 1000],
    "large": [response(b"x" * (5 << 20), 1), response(b"y" * (9 << 20), 2)],
    "many": [response(str(i).encode(), i) for i in range(2000)],
}
