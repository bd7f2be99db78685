"""The command: what it takes, what it refuses at once, what it knows of earlier runs, and whose kernel it starts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from erlib import config, paths
from erlib.config import keys
from scripts import run_all


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where everything goes that a run makes."""
    for name in ("CACHE", "RUNS", "FIGURES", "ENGINE_BUILDS"):
        monkeypatch.setattr(paths, name, tmp_path / "home" / name.lower())
    return tmp_path / "home"


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: its status, and what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_all.py", *arguments])
        status = run_all.main()
        return status, *capsys.readouterr()

    return call


def environment(**variables):
    return os.environ | {"PYTHONPATH": str(paths.ROOT)} | variables


# --- what it takes ------------------------------------------------------------------------------------------------


def test_help_says_meaning_type_and_default_of_every_key_and_imports_little():
    code = (
        "import sys; sys.argv = ['run_all.py', '--help']; from scripts import run_all\n"
        "try: run_all.main()\n"
        "except SystemExit: print([name for name in ('numpy', 'pandas', 'httpx', 'grpc') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    reply = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(COLUMNS="80"))
    assert reply.stdout.splitlines()[-1] == "[]"
    text = " ".join(reply.stdout.split())
    for key in keys.of(config.Profile):
        assert key.meaning, key.name
        assert f"{key.name} {' '.join(key.text.split())}" in text


def test_keys_are_described_by_what_they_take():
    described = {key.name: (key.takes, key.default) for key in keys.of(config.Profile)}
    assert described["clusterer.normalizer"] == ("l2|standard", "l2")
    assert described["corpus.holdout"] == ("number > 0 and < 1", "0.4")
    assert described["corpus.path"] == ("text", "none")
    assert described["paper2.mixes"] == ("list of uniform|normal", '["uniform"]')
    assert described["scale.users"][1] == ""  # every profile has to say it
    assert described["paper1.users"][0].startswith("list of integer > 0")


@pytest.mark.parametrize("name", ["05", "5", "05_load_sweep", "05_load_sweep.ipynb", "notebooks/05_load_sweep.ipynb"])
def test_a_notebook_is_named_by_number_name_or_file(run, name):
    status, out, _ = run("--profile", "smoke", "--dry-run", "--only", name)
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["05_load_sweep"]


def test_an_empty_selection_is_no_success(run):
    status, out, err = run("--profile", "smoke", "--only", "05", "--from", "07")
    assert (status, out) == (2, "")
    assert "nothing selected" in err


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--only", "08", "05"], "05_load_sweep makes records of its own"),
        ([], "01_clusterer makes records of its own"),
        (["--only", "08", "09", "10"], "profile 'smoke' has no published records"),
    ],
)
def test_published_records_are_for_notebooks_that_draw(run, given, why):
    status, out, err = run("--profile", "smoke", "--records", "published", *given)
    assert (status, out) == (2, "")
    assert why in err and len(err.splitlines()) == 1


def test_interrupting_ends_as_shells_expect(run, home, monkeypatch):
    def interrupted(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all.Step, "run", interrupted)
    monkeypatch.setattr("erlib.load.readiness.basics", lambda profile: [])
    status, out, err = run("--profile", "smoke", "--only", "01", "02")
    assert status == 130
    assert "goes on where this one left off" in err
    assert re.search(r"02_workload +not run", out)


# --- places and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "meant"), [("out", paths.ROOT / "out"), ("~/out", "{home}/out"), ("", None)])
def test_a_relative_home_is_one_place_wherever_one_stands(tmp_path, given, meant):
    """Notebooks run in a directory of their own."""
    code = "from erlib import paths; print(paths.RUNS)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=directory,
            env=environment(ERLIB_HOME=given, HOME=str(tmp_path)),
        ).stdout.strip()
        for directory in (paths.ROOT, paths.NOTEBOOKS)
    }  # fmt: skip
    expected = paths.ROOT / "data" if meant is None else str(meant).format(home=tmp_path)
    assert seen == {f"{expected}/runs"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["corpus.name=jsonl", "corpus.path={folder}/no.jsonl"], "no corpus file"),
        (["corpus.name=parquet", "corpus.path={folder}"], "no corpus file"),
        (["clusterer.pickles={folder}"], "no tfidf.pkl nor kmeans.pkl"),
        (["scale.distortion=refuse"], "p1.C has one slot (40 slots for an expert, divided by 250)"),
    ],
)
def test_what_cannot_work_is_told_before_the_start(run, home, tmp_path, settings, message):
    settings = [setting.format(folder=tmp_path) for setting in settings]
    status, out, err = run("--profile", "smoke", "--dry-run", "--set", *settings)
    assert status == 0
    assert out.startswith("01_clusterer: run")
    assert "a run would stop here because: " in err and message in err
    status, out, err = run("--profile", "smoke", "--set", *settings)
    assert (status, out) == (2, "")
    assert message in err


def test_a_place_that_cannot_be_written_to_is_told_before_the_start(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("CACHE", "RUNS", "FIGURES", "ENGINE_BUILDS"):
        monkeypatch.setattr(paths, name, tmp_path / "file" / name.lower())
    status, out, err = run("--profile", "smoke")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "ERLIB_HOME" in err
    _, _, err = run("--profile", "smoke", "--dry-run")
    assert f"{tmp_path / 'file'} is a file where a run needs a folder" in err


# --- earlier runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def step(home, tmp_path):
    """A notebook that says where it runs."""
    cells = [
        "import json, os, sys",
        "print(json.dumps([sys.executable, sys.path, dict(os.environ), 'poison' in globals()]))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(notebook, tmp_path / "00_tiny.ipynb")
    return run_all.Step(tmp_path / "00_tiny.ipynb", config.load_profile("smoke"), {}, earlier=[])


STAMP = {"reads": {}, "wrote": {}, "begun": 1.0, "finished": "1.5"}


@pytest.mark.parametrize(
    "stamp",
    ["", "[]", "null", "{", "1", '"text"', "[" * 100_000, b"\xff\x00", *(
        json.dumps(STAMP | wrong) for wrong in ({"reads": None}, {"reads": [1]}, {"wrote": []}, {"wrote": {"a": None}},
                                                {"finished": {}}, {"reads": {"the notebook": 1}})
    ), json.dumps({"reads": {}})],
    ids=lambda stamp: str(stamp)[:30],
)  # fmt: skip
def test_a_damaged_stamp_means_never_run(step, home, stamp):
    path = home / "runs/smoke/notebooks/00_tiny.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(stamp if isinstance(stamp, bytes) else stamp.encode())
    assert step.reason_to_run(again=False) == "not run before with this profile"


BARS = """
import sys
from erlib.machine.progress import Bar, say
for _ in range(5):
    say("clusterer: reused")
with Bar(total=3, unit="user") as bar:
    for i in range(3):
        bar.set_description(f"p1.{i}")
        bar.update(1)
for _ in Bar(range(3), desc="passing", leave=False):
    pass
say("sweep: 3 points")
"""


def test_of_a_bar_the_terminal_sees_every_state_and_the_notebook_the_last(step, monkeypatch, capsys):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BARS) for _ in range(2)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(notebook, step.notebook)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    step.run()
    shown = capsys.readouterr().out
    for state in ("p1.0:   0%|", "p1.1:  33%|", "p1.2: 100%|", "passing: "):
        assert f"\r  {state}" in shown
    assert "00:00<" in shown  # how long it has taken and will take fits as well
    assert "\n  sweep: 3 points" in shown
    executed = nbformat.read(paths.run_dir("smoke") / "notebooks/00_tiny.ipynb", 4)
    for cell in executed.cells:
        (output,) = cell.outputs
        assert output.name == "stdout"
        first, bar, last = output.text.splitlines()
        assert (first, last.strip()) == ("clusterer: reused", "sweep: 3 points")
        assert bar.startswith("p1.2: 100%|") and len(bar) <= 76


def test_names_of_files_that_no_file_can_have_are_gone(step, home):
    path = home / "runs/smoke/notebooks/00_tiny.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(STAMP | {"reads": step._reads(), "wrote": {"x" * 5000: 1, "a\0b": 1}}))
    assert "is gone" in step.reason_to_run(again=False)


@pytest.fixture
def papermill(home, monkeypatch):
    """Stands for papermill: each call does the next of these things in place of a notebook's cells."""
    cells = []
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: cells.pop(0)())
    return cells


def test_records_that_are_not_as_they_were_written_make_a_notebook_run_again(step, home, papermill):
    """Also those of an earlier run, which this one has but found."""
    first, second, table = (home / "runs/smoke" / name for name in ("a.parquet", "b.parquet", "table.csv"))

    def interrupted():
        first.write_text("whole")
        raise KeyboardInterrupt

    papermill += [interrupted, lambda: second.write_text("whole"), lambda: table.write_text("whole")]
    with pytest.raises(KeyboardInterrupt):
        step.run()
    assert step.reason_to_run(again=False) == "not run to its end"
    for _ in range(2):
        step.run()
        assert step.reason_to_run(again=False) == ""
    table.write_text("edited by a reader")
    assert step.reason_to_run(again=False) == ""
    for file in (first, second):
        file.write_text("cut")
        assert step.reason_to_run(again=False) == f"{file} is not as it was written"
        file.write_text("whole")
        assert step.reason_to_run(again=False) == ""
    assert step.reason_to_run(again=True) == "asked for with --again"
    second.unlink()
    assert step.what_would_be(again=False, left_out={}) == f"run: {second} is gone"


# --- the kernel ---------------------------------------------------------------------------------------------------


def test_the_kernel_is_this_interpreter_and_takes_nothing_of_the_users(step, tmp_path, monkeypatch):
    """Neither another kernel of that name, nor start-up files, nor a search path; the home directory is not there."""
    users = tmp_path / "user"
    spec = {"argv": ["/nonexistent/python"], "display_name": "stale", "language": "python"}
    for data in (users, users / "home/.local/share/jupyter"):
        (data / "kernels/python3").mkdir(parents=True)
        (data / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    (users / "profile_default/startup").mkdir(parents=True)
    for file in (users / "profile_default/startup/00.py", users / "startup.py"):
        file.write_text("poison = True")
    monkeypatch.setenv("JUPYTER_PATH", str(users))
    monkeypatch.setattr("jupyter_core.paths.ENV_JUPYTER_PATH", [str(users)])  # as a moved environment has it
    monkeypatch.setenv("IPYTHONDIR", str(users))
    monkeypatch.setenv("PYTHONSTARTUP", str(users / "startup.py"))
    monkeypatch.setenv("PYTHONPATH", str(users))
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    monkeypatch.setenv("HOME", "/nonexistent")
    before = dict(os.environ)
    step.run()
    assert dict(os.environ) == before
    executed = nbformat.read(paths.run_dir("smoke") / "notebooks/00_tiny.ipynb", 4)
    executable, path, seen, poisoned = json.loads(executed.cells[-1].outputs[0].text)
    assert executable == sys.executable
    assert not poisoned
    assert path[0] == str(paths.ROOT)
    assert not [name for name, value in seen.items() if str(users) in value]
    assert seen["MPLBACKEND"] != "TkAgg"
    assert step.reason_to_run(again=False) == ""


def test_braces_in_the_name_of_a_folder_are_part_of_it(step, tmp_path, monkeypatch):
    """papermill fills in what stands in braces."""
    odd = tmp_path / "{x} {0}"
    monkeypatch.setattr(paths, "RUNS", odd)
    odd.mkdir()
    notebook = shutil.copy(step.notebook, odd)
    run_all.Step(Path(notebook), step.profile, {}, earlier=[]).run()
    assert (odd / "smoke/notebooks/00_tiny.ipynb").exists()


# --- signals ------------------------------------------------------------------------------------------------------

BUSY = """
from pathlib import Path
from erlib.machine import processes
processes.end_on_signals()
child = processes.spawn(["sleep", "60"], Path("{log}"))
print("sweep: started", child.pid, flush=True)
while True:  # amid a computation
    sum(range(1000))
"""
RUN = """
import signal, sys
from pathlib import Path
from erlib import config; from erlib.machine import processes
from scripts import run_all
signal.signal(signal.SIGHUP, signal.SIG_DFL)
processes.end_on_signals()
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have told them not to hear
profile = config.load_profile("smoke")
sys.exit(run_all._run([run_all.Step(Path(sys.argv[1]), profile, {}, earlier=[])], profile, again=True))
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGHUP, 129),  # its terminal is closed
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_kernel_and_what_it_has_started(number, status, tmp_path):
    cells = [nbformat.v4.new_code_cell("profile = 1"), nbformat.v4.new_code_cell(BUSY.format(log=tmp_path / "log"))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(notebook, tmp_path / "00_busy.ipynb")
    with subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path / "00_busy.ipynb"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(ERLIB_HOME=str(tmp_path)),
    ) as run:  # fmt: skip
        while "sweep: started" not in (line := run.stdout.readline()):
            assert line, run.stderr.read()
        family = psutil.Process(run.pid).children(recursive=True)
        assert int(line.split()[-1]) in {process.pid for process in family}
        run.send_signal(number)
        out, err = run.communicate(timeout=30)
    assert run.returncode == status
    assert psutil.wait_procs(family, timeout=10)[1] == []
    if number != signal.SIGKILL:
        assert err.strip() == "stopped; the same command goes on where this one left off"
        assert re.search(r"00_busy +stopped", out)
