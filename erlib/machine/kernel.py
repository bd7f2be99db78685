"""The kernel that runs the notebooks: this interpreter and this repository, and nothing of the user's own settings.

What Jupyter, IPython, matplotlib or Python itself are told by the user's environment or home directory (another kernel
of the same name, start-up files, a module search path, styles) would reach the results.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import papermill
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
_REASON = re.compile(r"[a-z]+( \w+)?: ")
"""How one-line reasons begin: ``sweep: 4 of 4 points found``."""


def execute(notebook: Path, executed: Path, parameters: dict[str, Any], log: Path) -> None:
    """Run a notebook; what is `executed` of it is kept whether or not it succeeds, what its cells print is in `log`."""
    with _Log(log), environment(paths.CACHE / "jupyter"):
        papermill.execute_notebook(
            _literal(notebook), _literal(executed), parameters, kernel_name=NAME,
            kernel_manager_class=Kernel, cwd=str(paths.NOTEBOOKS), log_output=True, progress_bar=False,
            request_save_on_cell_execute=False, coalesce_streams=True,  # of each bar, its last state is kept
        )  # fmt: skip


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


def _literal(path: Path) -> str:
    """A path as papermill takes it, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


class _Log(logging.Handler):
    """Cell output to the step's log and, its last line, to the terminal, where progress bars overwrite themselves."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self._bar = False

    def __enter__(self) -> None:
        self._file = self._path.open("w", encoding="utf-8")
        self._stderr = os.dup(2)
        os.dup2(self._file.fileno(), 2)  # the kernel inherits it: its own warnings belong into the log
        logger = logging.getLogger("papermill")
        logger.handlers, logger.propagate = [self], False
        logger.setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        if self._bar:
            print(flush=True)
        logging.getLogger("papermill").handlers = []
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._file.close()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self._file.write(text.rstrip("\r\n") + "\n")
        self._file.flush()
        lines = [line for line in map(str.strip, re.split(r"[\r\n]", text)) if line]
        if lines and (_is_bar(lines[0]) or _REASON.match(lines[0])):  # the rest is in the log
            for line in lines:
                self._show(line)

    def _show(self, line: str) -> None:
        width = shutil.get_terminal_size((120, 20)).columns - 3
        if not _is_bar(line):
            print(("\n" if self._bar else "") + f"  {line[:width]}", flush=True)
        elif sys.stdout.isatty():
            print(f"\r  {line[:width]:<{width}}", end="", flush=True)
        self._bar = _is_bar(line) and sys.stdout.isatty()


def _is_bar(line: str) -> bool:
    return "%|" in line
