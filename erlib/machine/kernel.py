"""The kernel that runs the notebooks: this interpreter and this repository, and nothing of the user's own settings.

What Jupyter, IPython, matplotlib or Python itself are told by the user's environment or home directory (another kernel
of the same name, start-up files, a module search path, styles) would reach the results.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from erlib import paths
from erlib.machine import processes

NAME = "python3"
"""What notebooks call it."""
_USERS_OWN = ("PYTHON", "IPYTHON", "JUPYTER", "MPL", "MATPLOTLIB")
"""How the names of variables begin that a kernel does not inherit."""


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter, whatever kernels are installed on this machine under its name."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir="", **get_kernel_dict())

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        """Start it, and see to its end: a kernel asks every second whether we live, but not amid a long computation."""
        await super()._async_launch_kernel(kernel_cmd, **kw)
        processes.guard(self.provisioner.pid)  # type: ignore[union-attr]


@contextlib.contextmanager
def environment(directory: Path) -> Iterator[None]:
    """This process' environment while kernels run; what they keep for themselves goes to `directory`.

    The home directory need not be there, nor be writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    for name in before:
        if name.startswith(_USERS_OWN):
            del os.environ[name]
    own = {
        "PYTHONPATH": paths.ROOT,  # a notebook runs in a directory of its own
        "PYTHONNOUSERSITE": 1,
        "PYTHONUTF8": 1,
        **{f"JUPYTER_{kind}_DIR": directory / kind.lower() for kind in ("CONFIG", "DATA", "RUNTIME")},
        "IPYTHONDIR": directory / "ipython",
        "MPLCONFIGDIR": directory / "matplotlib",
    }
    os.environ.update({name: str(value) for name, value in own.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
