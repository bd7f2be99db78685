"""Install what is locked into the environment of the Python that runs this: each file by its hashes, nothing else.

    .venv/bin/python scripts/install.py torch workbench .

Nothing is resolved, since a lock names everything, and nothing is built, which would run code that no lock names.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"
UV = LOCKS / "uv.txt"
PIP = [
    *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
    *("--no-deps", "--only-binary=:all:", "--require-hashes"),
]
SHEBANG = re.compile(rb"#!(/bin/sh\n'''exec' [^\n]*\n' '''|[^\n]*/python[\d.]*)\n")
"""How a command begins that pip has written: with the path of its Python, which a shell reads where it is long."""
BESIDE = b"""\
#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")/python" "$0" "$@"
' '''
"""
"""What begins it instead, for a shell and, as a string, for Python."""
TAMPERED = "is not the file that was locked: its hash is another. It may have been tampered with"


def install(lock: Path | str) -> str:
    """Install what `lock` names: with uv, which is many times faster, or with pip, where uv cannot be had or fails.

    Both check the same hashes. Pip alone knows of folders and indexes that pip is pointed at, and says why it fails.

    Returns
    -------
    str
        Why it failed, in one line; empty if it did not.
    """
    return "" if _install_with_uv(lock) else install_with_pip(lock)


def _install_with_uv(lock: Path | str) -> bool:
    if not UV.exists() or (importlib.util.find_spec("uv") is None and install_with_pip(UV)):
        return False
    importlib.invalidate_caches()
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-cache", "--python", sys.executable]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirements", str(lock)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def install_with_pip(lock: Path | str) -> str:
    """Let pip install what `lock` names; its output goes to standard output, and why it fails is returned."""
    with subprocess.Popen(
        [*PIP, "--requirement", lock], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        lines = []
        for line in pip.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    return _reason(lines) if pip.returncode else ""


def _reason(lines: list[str]) -> str:
    """What pip's output says of its failure."""
    expected = next((i for i, line in enumerate(lines) if re.match(r"Expected \w+ [0-9a-f]{16,}", line)), 0)
    if expected:  # the line before names the file
        what = re.sub(r" \(from -r .*", "", lines[expected - 1])
        return f"{what} {TAMPERED}"
    said = [line for line in lines if line.startswith("ERROR: ")]
    return said[-1].removeprefix("ERROR: ") if said else "pip failed"


def install_torch() -> str:
    """The build of torch for CPUs where pip finds it (a folder, an index that it is pointed at), otherwise PyPI's."""
    failed = install_with_pip(LOCKS / "torch-cpu.txt")
    # How pip says that it finds none depends on what else it is told: under a constraint, that there is a conflict.
    return install_with_pip(LOCKS / "torch-cuda.txt") if failed and TAMPERED not in failed else failed


def make_relocatable() -> None:
    """Let the environment's commands start the Python beside them: that which pip names is another's after a copy."""
    for script in Path(sysconfig.get_path("scripts")).iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        with script.open("rb") as file:
            content = file.read() if file.read(2) == b"#!" else b""
        if written := SHEBANG.match(b"#!" + content):
            script.write_bytes(BESIDE + (b"#!" + content)[written.end() :])


def make_importable() -> None:
    """Let the environment find this repository's packages: one inside it by a relative path, which a copy keeps."""
    site = sysconfig.get_path("purelib")
    path = os.path.relpath(ROOT, site) if Path(sys.prefix).is_relative_to(ROOT) else ROOT
    Path(site, "expert-router-workbench.pth").write_text(f"{path}\n", encoding="utf-8")


def main() -> int:
    """Install what is asked for, until something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(lock.stem for lock in LOCKS.glob("*.txt"))
    parser.add_argument(
        "what", nargs="+", metavar="WHAT", help="torch (its build for CPUs, if pip finds that), . (this repository), "
        f"one of {', '.join(known)}, or a file of that kind",
    )  # fmt: skip
    for name in parser.parse_args().what:
        if name == ".":
            make_importable()
            continue
        lock = LOCKS / f"{name}.txt" if name in known else name
        if failed := install_torch() if name == "torch" else install(lock):
            print(f"error: {failed}", file=sys.stderr)
            return 1
    if sys.prefix != sys.base_prefix:  # an environment of venv's; conda's commands are conda's
        make_relocatable()
    return 0


if __name__ == "__main__":
    sys.exit(main())
