"""What would make Triton's wheel hang or corrupt data is an error before a server starts."""

import importlib.metadata

import pytest

from erlib.machine.processes import StartError
from erlib.serving import wheel


def test_numpy_2_is_refused(monkeypatch):
    wheel.preflight()
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.3" if name == "numpy" else real(name))
    with pytest.raises(StartError, match=r"corrupts tensors under numpy 2\.1\.3; install numpy<2"):
        wheel.preflight()
