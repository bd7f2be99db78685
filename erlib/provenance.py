"""Which code, on which machine, has made something."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import subprocess
from pathlib import Path

from erlib import cache, paths
from erlib.machine import hardware

_PACKAGES = ("numpy", "openvino", "openvino-genai", "nvidia-pytriton", "grpcio", "tokenizers")


class MissingRecords(RuntimeError):
    """Records that a figure needs have not been measured; the message names the notebook to run."""


@functools.cache
def columns() -> dict[str, str]:
    """Columns of every measured record that say which code on which machine made it."""
    return {"git_commit": git_commit(), "host": hardware.machine(), "versions": versions(*_PACKAGES)}


def versions(*packages: str) -> str:
    """Versions of installed packages, as JSON."""
    return json.dumps({name: importlib.metadata.version(name) for name in packages})


def git_commit() -> str:
    """Short commit of the repository, ``-dirty`` if changed since; ``unknown`` outside git."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!figures")  # a run redraws figures
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def code_digest(*places: Path | str) -> str:
    """Hash of source code: of files, and of all files below folders; what has no path is named from this package's top.

    Of Python, neither comments nor docstrings nor layout count.
    """
    found = [_PACKAGE / place for place in places]
    assert all(place.exists() for place in found), places
    files = [
        (str(file.relative_to(place.parent)), _content(file))
        for place in found
        for file in (place.rglob("*") if place.is_dir() else [place])
        if _is_code(file)
    ]
    return cache.digest(sorted(files))


def _is_code(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def _content(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        match node:
            case (
                ast.Module(body=[ast.Expr(value=ast.Constant()), *_])
                | ast.ClassDef(body=[ast.Expr(value=ast.Constant()), *_])
                | ast.FunctionDef(body=[ast.Expr(value=ast.Constant()), *_])
                | ast.AsyncFunctionDef(body=[ast.Expr(value=ast.Constant()), *_])
            ):
                del node.body[0]
    return repr(_said(tree))


def _said(node: object) -> object:
    """What a syntax tree says, in the same words in every version of Python.

    Which fields a node might have had differs between them; some find an empty string at the end of an f-string.
    """
    if isinstance(node, list):
        return [_said(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.JoinedStr):
        node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return type(node).__name__, [(name, _said(value)) for name, value in fields]


_PACKAGE = Path(__file__).resolve().parent
