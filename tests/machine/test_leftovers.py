"""What nobody owns any more is swept up; what somebody owns who lives is not touched."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from erlib.machine import leftovers, processes, runfolder
from tests.support.ports import BASE_PORT

PREFIX = f"er{BASE_PORT + 600}-"
OWNER = """
import os, sys, time
from erlib.machine import leftovers, runfolder
claim = leftovers.claim(leftovers.claim_of(sys.argv[1]), make=True)
region = leftovers.SHARED_MEMORY / (sys.argv[1] + "region")
region.write_text("")
folder = runfolder.RunFolder()
(folder.path / "models").mkdir()
print(folder.path, region, flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner():
    """Another process with a run folder and shared memory; it, the folder and the region."""
    with subprocess.Popen([sys.executable, "-c", OWNER, PREFIX], stdout=subprocess.PIPE, text=True) as process:
        folder, region = map(Path, process.stdout.readline().split())
        yield process, folder, region
        process.kill()
    leftovers.sweep()


def test_what_a_living_process_owns_stays(owner):
    _, folder, region = owner
    leftovers.sweep()
    assert (folder / "models").is_dir()
    assert region.exists()


def test_what_we_own_ourselves_stays():
    folder = runfolder.RunFolder()
    leftovers.sweep()
    assert folder.path.is_dir()
    folder.remove()
    assert not folder.path.exists()


def test_what_a_killed_process_has_left_is_swept_up_whoever_comes_next(owner):
    process, folder, region = owner
    process.kill()
    process.wait()
    leftovers.sweep()
    assert not folder.exists()
    assert not region.exists()
    assert not leftovers.claim_of(PREFIX).exists()


def test_the_sweep_touches_nothing_that_only_looks_alike(tmp_path, monkeypatch):
    """Regions without a claim (another program's), folders of other names, and links."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    precious = tmp_path / "precious"
    precious.mkdir()
    alike = [tmp_path / "expert-router-run-notes", tmp_path / "expert-router-run-abcdefgh.bak"]
    for folder in alike:
        folder.mkdir()
    (tmp_path / "expert-router-run-abcdefgh").symlink_to(precious)
    region = leftovers.SHARED_MEMORY / f"{PREFIX}another"
    region.write_text("")
    try:
        leftovers.sweep()
        assert region.exists()
    finally:
        region.unlink()
    assert precious.is_dir()
    assert all(folder.is_dir() for folder in alike)


def test_what_is_claimed_cannot_be_claimed_again_until_its_owner_is_gone(owner):
    process, *_ = owner
    assert leftovers.claim(leftovers.claim_of(PREFIX)) is None
    process.kill()
    process.wait()
    lock = leftovers.claim(leftovers.claim_of(PREFIX))
    assert lock is not None
    os.close(lock)


@pytest.fixture
def server_alike(tmp_path):
    """A process that looks as a Triton server does that has just started."""
    (tmp_path / "tritonserver").symlink_to(shutil.which("sleep"))
    with subprocess.Popen([tmp_path / "tritonserver", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def folders_of_triton():
    """One that was made an hour ago, and one that was made just now."""
    old, new = (Path("/tmp") / f"python_env_{secrets.token_hex(3)}" for _ in range(2))
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    yield old, new
    for folder in (old, new):
        shutil.rmtree(folder, ignore_errors=True)


def test_empty_folders_of_triton_go_but_for_those_that_a_living_server_may_have_made(server_alike, folders_of_triton):
    old, new = folders_of_triton
    leftovers.sweep()
    assert not old.exists()
    assert new.exists()


def test_folders_of_triton_that_are_used_stay(folders_of_triton):
    old, _ = folders_of_triton
    (old / "1").mkdir()
    leftovers.sweep()
    assert (old / "1").exists()


@pytest.mark.parametrize("name", ["a b", "a;b", "a$(b)", "ä", "a\nb", "a'b"])
def test_a_folder_for_temporary_files_that_no_shell_takes_is_left_for_another(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    folder = runfolder.RunFolder()
    try:
        assert folder.path.parent in (Path("/tmp"), Path("/var/tmp"))
        assert folder.path.stat().st_mode & 0o777 == 0o700
    finally:
        folder.remove()


def test_without_any_place_for_temporary_files_each_is_named_with_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(leftovers, "temporary_folders", lambda: [tmp_path / "a b", tmp_path / "missing"])
    with pytest.raises(processes.StartError, match=r"TMPDIR \(.*a b: .*character ' '.*missing: No such file"):
        runfolder.RunFolder()


def test_the_guard_sweeps_up_behind_a_process_that_is_killed(tmp_path):
    code = OWNER.replace("time.sleep(60)", "") + (
        "from pathlib import Path; from erlib.machine import processes\n"
        "processes.spawn(['sleep', '60'], Path(sys.argv[2]))\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, PREFIX, tmp_path / "log"], stdout=subprocess.PIPE, text=True
    ) as process:
        folder, region = map(Path, process.stdout.readline().split())
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while folder.exists() or region.exists():
        assert time.monotonic() < deadline, "nobody has swept up"
        time.sleep(0.05)
