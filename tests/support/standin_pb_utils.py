"""Stand-in for the module with which Triton's Python backend talks to a model: as much of it as engines use.

:func:`model` loads a model's code with it, without a server; a test then plays the server.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from erlib.serving import triton

FINAL = 1


class Tensor:
    def __init__(self, name: str, values: np.ndarray):
        self.name = name
        self.as_numpy = lambda: values


class TritonError:
    INTERNAL, INVALID_ARG = "INTERNAL", "INVALID_ARG"

    def __init__(self, message: str, code: str = INTERNAL):
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, tensors: list[Tensor] = [], error: TritonError | None = None):  # noqa: B006
        self.outputs = {tensor.name: tensor.as_numpy() for tensor in tensors}
        self.error = error


class Request:
    """One request, and what has been answered to it; None as a response is the bare end.

    Parameters
    ----------
    inputs : object
        Values of the inputs by name.
    """

    def __init__(self, **inputs: Any):
        self.inputs = inputs
        self.metadata: dict[str, str] = {}
        self.responses: list[InferenceResponse | None] = []
        self.ended = threading.Event()
        self.is_cancelled: Callable[[], bool] = lambda: False

    def parameters(self) -> str:
        """What metadata the server hands on."""
        return json.dumps(self.metadata)

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "a response behind the last one"
        if response is not None or not flags:
            self.responses.append(response)
        if flags == FINAL:
            self.ended.set()

    @property
    def error(self) -> TritonError:
        """Of the one response."""
        (response,) = self.responses
        assert response is not None
        assert response.error is not None
        return response.error

    def joined(self) -> tuple[bytes, list[int]]:
        """Text and token ids of all responses."""
        text, tokens = b"", []
        for response in self.responses:
            assert response is not None
            assert response.error is None, response.error.message
            text += response.outputs["text_output"].item()
            tokens += response.outputs["output_ids"].ravel().tolist()
        return text, tokens


class _MetricFamily:
    COUNTER = "counter"

    def __init__(self, **_: str):
        self.value = 0.0

    def Metric(self, labels: dict[str, str]) -> _MetricFamily:
        return self

    def increment(self, by: float) -> None:
        self.value += by


def _input(request: Request, name: str) -> Tensor | None:
    return Tensor(name, np.array([[request.inputs[name]]])) if name in request.inputs else None


def backend(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Code of a model below ``engines/triton``, or of what they share, with the stand-in in Triton's place."""
    utilities = ModuleType("triton_python_backend_utils")
    vars(utilities).update(
        Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse, MetricFamily=_MetricFamily,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL, get_input_tensor_by_name=_input, Logger=None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, utilities.__name__, utilities)
    monkeypatch.syspath_prepend(triton.MODEL_CODE)
    monkeypatch.delitem(sys.modules, "inflight", raising=False)
    spec = importlib.util.spec_from_file_location(name, triton.MODEL_CODE / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(model: Any, engine: Path, **parameters: str) -> Any:
    """Initialise a model as the server does."""
    said = {"engine": str(engine)} | parameters
    config = {"parameters": {name: {"string_value": value} for name, value in said.items()}}
    model.initialize({"model_config": json.dumps(config)})
    return model
