"""The script that measures what adapters cost a GPU's step, here on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from erlib import paths

SCRIPT = paths.ROOT / "scripts" / "measure_adapters.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_every_way_is_measured_on_a_cpu_and_two_of_them_are_the_same_adapters(tmp_path: Path) -> None:
    """The script itself refuses to measure if gathered and masked adapters gave different results."""
    table = tmp_path / "tiny.csv"
    ran = run(table, "--device", "cpu", "--models", "tiny:fp16", "--ranks", 4)
    assert ran.returncode == 0, ran.stderr
    rows = pd.read_csv(table)
    assert set(rows["way"]) == {"none", "one", "gathered", "masked"}
    assert rows.groupby("x")["way"].count().to_dict() == {1: 4, 2: 4}
    assert (rows["p10_ms"] <= rows["ms"]).all() and (rows["p10_ms"] > 0).all()
    assert json.loads(table.with_suffix(".json").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--device", "cpu", "--models", "huge:fp16"], "no shape is called 'huge'"),
        (["--device", "cpu", "--models", "tiny:int4"], "PyTorch alone measures fp16 and fp8"),
        ([], "PyTorch finds no CUDA device here"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path: Path, arguments: list[str], why: str) -> None:
    ran = run(tmp_path / "out.csv", *arguments)
    assert ran.returncode == 2
    assert why in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "out.csv").exists()
