"""End to end on real parts: all notebooks of the smoke profile, killed in mid-sweep, resumed, and run once more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from erlib import paths
from erlib.load import records
from erlib.machine import processes
from tests.support import ports

BASE_PORT = ports.BASE_PORT + 1000
FIGURES = {
    "paper1": "fig01_architecture fig02_ttft_base fig03_ttft_continuation fig04_tpot_base fig05_tpot_continuation "
    "fig06_user_throughput fig07_p99_response_time fig08_session_throughput fig09_bucket_throughput table1_models",
    "paper2": "fig01_architecture fig02_input_tokens fig03_preliminary fig04_ttft fig05_tpot "
    "fig06_user_throughput_p99 fig07_system_throughput table1_models",
}
POINTS = {"load": 10 + 16, "preliminary": 2, "overhead": 2 * 2}  # both ways of relaying


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_thin_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 30_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    parameters = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in parameters] == ['profile = "laptop"\noverrides = {}']


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A place of its own for everything that a run makes, except downloads and engines, which take minutes."""
    for made in (paths.CACHE, paths.ENGINE_BUILDS):
        made.mkdir(parents=True, exist_ok=True)
    (tmp_path / "engines").mkdir()
    (tmp_path / "cache").symlink_to(paths.CACHE)
    (tmp_path / "engines" / "build").symlink_to(paths.ENGINE_BUILDS)
    return tmp_path


def _start(home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, paths.ROOT / "scripts" / "run_all.py", "--profile", "smoke"]
    command += ["--set", f"serving.base_port={BASE_PORT}"]
    output = (home / "output.log").open("w")
    environment = {**os.environ, "ERLIB_HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def _run(home: Path) -> str:
    run = _start(home)
    code = run.wait(timeout=900)
    output = (home / "output.log").read_text()
    assert code == 0, output
    return output


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _points(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (home / "runs/smoke/records").rglob("[!.]*.parquet")}


def test_smoke_run_survives_a_kill_and_draws_every_figure(home: Path) -> None:
    killed = _start(home)
    deadline = time.monotonic() + 600
    family: list[psutil.Process] = []
    while len(_points(home)) < 8 or "tritonserver" not in [_name(process) for process in family]:
        assert killed.poll() is None, (home / "output.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
        family = psutil.Process(killed.pid).children(recursive=True)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert psutil.wait_procs(family, timeout=15)[1] == []
    of_the_run = range(BASE_PORT, BASE_PORT + 60)
    assert [port for port in of_the_run if processes.listening(port)] == []
    before = _points(home)

    output = _run(home)
    after = _points(home)
    assert {path: after[path] for path in before} == before  # what was complete was not measured again
    by_experiment = {name: sum(f"/{name}/" in str(path) for path in after) for name in POINTS}
    assert by_experiment == POINTS
    assert [region for port in of_the_run for region in Path("/dev/shm").glob(f"er{port}-*")] == []
    assert "05_load_sweep            ran" in output

    frame = records.read(home / "runs/smoke/records")
    assert set(frame["status"]) == {"ok"}
    assert frame["output_tokens"].sum() == frame.groupby("point_hash")["server_tokens"].first().sum()
    paper1 = frame[(frame["paper"] == "p1") & (frame["experiment"] == "load")]
    assert set(paper1["output_tokens"]) == {20}
    for paper, slugs in FIGURES.items():
        folder = home / "figures/smoke/measured" / paper
        assert {path.name for path in folder.iterdir()} == {
            f"{slug}.{kind}" for slug in slugs.split() for kind in ("png", "svg", "csv", "json")
        }
    for source in ("simulated-hardware", "simulated-harness"):
        assert (home / "figures/smoke" / source / "paper1/fig08_session_throughput.png").exists()
    assert {"index.html", "scorecard.html", "scorecard.csv", "scorecard.md"} <= {
        path.name for path in (home / "figures/smoke").iterdir()
    }

    started = time.monotonic()
    output = _run(home)
    assert output.count(" cached ") == len(list(paths.NOTEBOOKS.glob("*.ipynb")))
    assert time.monotonic() - started < 60
    assert _points(home) == after
