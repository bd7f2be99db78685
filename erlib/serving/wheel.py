"""``tritonserver`` as the wheel ``nvidia-pytriton`` carries it, and what would make it hang or corrupt data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from erlib.machine import leftovers
from erlib.machine.processes import StartError

SHARED_MEMORY_BYTES = 4 << 20
"""Of a server: it begins with 1 MiB and adds as much whenever requests that wait need it, seldom more than once."""


def preflight(n_servers: int = 1) -> None:
    """Check everything that would make `n_servers` servers hang or corrupt data instead of failing.

    Raises
    ------
    StartError
        If the wheel, ``libpython`` or room in shared memory is missing, or numpy is 2 or newer (Triton 2.51's Python
        backend then corrupts tensors without an error).
    """
    root = installed()
    free, needed = shutil.disk_usage(leftovers.SHARED_MEMORY).free, n_servers * SHARED_MEMORY_BYTES
    if free < needed:
        raise StartError(
            f"{leftovers.SHARED_MEMORY} has {free / 2**20:.1f} MiB free; Triton servers need {needed >> 20} MiB: "
            f"{n_servers} times {SHARED_MEMORY_BYTES >> 20}. Make it larger: docker run --shm-size=1g, or, as root, "
            f"mount -o remount,size=1g {leftovers.SHARED_MEMORY}"
        )
    for variable, value in {"PATH": Path(sys.executable).parent, "LD_LIBRARY_PATH": _libraries()}.items():
        if unsafe := re.search("[:;]" if variable == "LD_LIBRARY_PATH" else ":", str(value)):
            raise StartError(f"{str(value)!r} holds {unsafe[0]!r}, which ends a folder's name in {variable}: rename it")
    numpy = importlib.metadata.version("numpy")  # every command asks, and would wait for numpy itself to be imported
    if int(numpy.split(".")[0]) >= 2:
        raise StartError(f"Triton 2.51's Python backend corrupts tensors under numpy {numpy}; install numpy<2")
    stub = _stub(root)
    if not stub.exists():
        raise StartError(f"the Triton wheel has no stub for Python {_python_version()}; use Python 3.11 or 3.12")
    if not os.access(stub, os.R_OK):
        raise StartError(f"{stub} cannot be read: chmod 755 it (Triton changes the mode of a stub that does not start)")
    # A stub that cannot load libpython makes the server wait for ever.
    linked = subprocess.run(["ldd", stub], capture_output=True, text=True, env=environment(), check=False)
    missing = [line.split("=>")[0].strip() for line in linked.stdout.splitlines() if "not found" in line]
    if missing or linked.returncode:
        raise StartError(
            f"Triton's Python backend cannot load {', '.join(missing) or stub}; "
            f"install it (Debian, Ubuntu: apt-get install libpython{_python_version()})"
        )


def backend_directory(root: Path, folder: Path) -> Path:
    """Triton wants library, utilities and stub side by side; the wheel ships the stub elsewhere."""
    python = folder / "triton" / "lib" / "backends" / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (python / name).symlink_to(root / "backends" / "python" / name)
    # Copied, because Triton may change its mode; it looks for its libraries four folders up.
    stub = python / "triton_python_backend_stub"
    shutil.copyfile(_stub(root), stub)
    stub.chmod(0o700)
    (folder / "nvidia_pytriton.libs").symlink_to(root.parent.parent / "nvidia_pytriton.libs")
    return python.parent


def _stub(root: Path) -> Path:
    return root / "python_backend_stubs" / _python_version() / "triton_python_backend_stub"


def installed() -> Path:
    """Where the wheel has put ``tritonserver``.

    Raises
    ------
    StartError
        If it is not installed.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise StartError("the package nvidia-pytriton, which carries tritonserver, is not installed; run ./run_all.sh")
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def _python_version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _libraries() -> str:
    """Where this interpreter's library is."""
    return str(sysconfig.get_config_var("LIBDIR"))


def environment() -> dict[str, str]:
    """The embedded interpreter takes its packages from PATH's python and its library from LD_LIBRARY_PATH."""
    libraries = [_libraries(), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": ":".join(part for part in libraries if part),
        "PYTHONUTF8": "1",  # without a locale, it would take the names of files for ASCII
    }
