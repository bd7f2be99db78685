"""The kernel that runs the notebooks: this interpreter and this repository, and nothing of the user's own settings.

What Jupyter, IPython, matplotlib or Python itself are told by the user's environment or home directory (another kernel
of the same name, start-up files, a module search path, styles) would reach the results.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

from erlib import paths
from erlib.machine import processes
from erlib.machine.runfolder import RunFolder

NAME = "python3"
"""What notebooks call it."""
_USERS_OWN = ("PYTHON", "IPYTHON", "JUPYTER", "MPL", "MATPLOTLIB")
"""How the names of variables begin that a kernel does not inherit."""


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter, whatever kernels are installed on this machine under its name.

    It listens at sockets in a folder of ours. A free TCP port that is chosen for it, as by default, may be another
    program's by the time that it listens, and any user of the machine could connect there.
    """

    @default("transport")
    def _files(self) -> str:
        return "ipc"

    @default("ip")
    def _where(self) -> str:
        return f"{os.environ['JUPYTER_RUNTIME_DIR']}/{secrets.token_hex(4)}"

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
    runtime = RunFolder()  # names of sockets must be short
    before = dict(os.environ)
    for name in before:
        if name.startswith(_USERS_OWN):
            del os.environ[name]
    own = {
        "PYTHONPATH": paths.ROOT,  # a notebook runs in a directory of its own
        "PYTHONNOUSERSITE": 1,
        "PYTHONUTF8": 1,
        **{f"JUPYTER_{kind}_DIR": directory / kind.lower() for kind in ("CONFIG", "DATA")},
        "JUPYTER_RUNTIME_DIR": runtime.path,
        "IPYTHONDIR": directory / "ipython",
        "MPLCONFIGDIR": directory / "matplotlib",
    }
    os.environ.update({name: str(value) for name, value in own.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        runtime.remove()
