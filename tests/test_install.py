"""What installs the workbench: nothing but what is locked, and an environment that stays its folder's own.

Wheels of a few bytes stand for the packages, and copies of the scripts for the repository.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires

import pytest

from erlib import paths

ODD_NAMES = {
    "plain": "plain",
    "space": "the workbench (copy)",
    "shell": 'it\'s; $(touch pwned) `touch pwned` "it" \\ & ü',
    "long": "/".join(["long" * 25] * 3),
}
LOCKS = {path.stem: path.read_text() for path in (paths.ROOT / "locks").glob("*.txt")}
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==([^\s;#\\]+)", re.MULTILINE)


def pins(text):
    """Names, as the index spells them, to versions."""
    return {re.sub(r"[-_.]+", "-", name.lower()): version for name, version in PIN.findall(text)}


def wheel(directory, name, version="1.0", needs=""):
    """Write a wheel with a command that says which Python runs it; its path."""
    written = {
        f"{name}.py": "import sys\ndef main(): print(sys.prefix, *sys.argv[1:], sep='\\n')\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-{version}.dist-info/entry_points.txt": f"[console_scripts]\nsay-{name} = {name}:main\n",
    }
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in written.items():
            archive.writestr(file, text)
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "".join(f"{file},,\n" for file in written))
    return path


def locked(*wheels):
    lines = []
    for path in wheels:
        name, version, *_ = path.name.split("-")
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    return "".join(lines)


class Clone:
    """What is copied of the repository, with locks of its own and an environment that has pip."""

    def __init__(self, directory, wheels, **locks):
        self.directory, self.wheels = directory, wheels
        for name in ("run_all.sh", "run_tests.sh", "scripts/environment.sh", "scripts/install.py"):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(paths.ROOT / name, directory / name)
        (directory / "locks").mkdir()
        for name, text in locks.items():
            (directory / "locks" / f"{name.replace('_', '-')}.txt").write_text(text)
        made = [sys.executable, "-m", "venv", "--without-pip", directory / ".venv"]
        subprocess.run(made, check=True, capture_output=True)
        (self.site / "borrowed.pth").write_text(
            sysconfig.get_path("purelib") + "\n"
        )  # for pip, which takes seconds to make

    @property
    def site(self):
        return next(self.directory.glob(".venv/lib/python3*/site-packages"))

    def run(self, *command, **environment):
        """Run something of it, in a folder beside it, with no index but the wheels."""
        known = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "CONDA"))}
        known |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), **environment}
        return subprocess.run(
            [self.directory / command[0], *command[1:]],
            cwd=self.wheels, env=known, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def install(self, *what):
        return self.run(".venv/bin/python", self.directory / "scripts" / "install.py", *what)

    def has(self, name):
        return (self.site / f"{name}.py").exists()

    def copy(self, directory):
        """Another clone, copied as a file manager would."""
        shutil.copytree(self.directory, directory, symlinks=True)
        copied = object.__new__(Clone)
        copied.directory, copied.wheels = directory, self.wheels
        return copied


def refusal(ended):
    """The one line that is said."""
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def wheels(tmp_path):
    return tmp_path / "wheels"


# --- nothing but what is locked ---------------------------------------------------------------------------------


def test_a_wheel_that_differs_in_one_byte_is_refused(tmp_path, wheels):
    good, bad = wheel(wheels, "good"), wheel(wheels, "bad")
    clone = Clone(tmp_path / "clone", wheels, workbench=locked(good, bad))
    content = bytearray(bad.read_bytes())
    content[content.index(b"sys.prefix")] ^= 1
    bad.write_bytes(content)
    said = refusal(clone.install("workbench"))
    assert "bad" in said
    assert "hash" in said
    assert not clone.has("good")  # all or nothing


@pytest.mark.parametrize("lock", ["one==1.0\n", "{hashed}two==1.0\n"])
def test_what_has_no_hash_is_refused(tmp_path, wheels, lock):
    one, _ = wheel(wheels, "one"), wheel(wheels, "two")
    clone = Clone(tmp_path / "clone", wheels, workbench=lock.format(hashed=locked(one)))
    assert "hash" in refusal(clone.install("workbench")).lower()
    assert not clone.has("one")


def test_what_a_wheel_asks_for_is_not_fetched(tmp_path, wheels):
    clone = Clone(tmp_path / "clone", wheels, workbench=locked(wheel(wheels, "one", needs="Requires-Dist: two\n")))
    wheel(wheels, "two")
    assert clone.install("workbench").returncode == 0
    assert clone.has("one")
    assert not clone.has("two")


def test_nothing_is_built(tmp_path, wheels):
    wheels.mkdir()
    source = wheels / "one-1.0.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("one-1.0/setup.py", f"open({str(tmp_path / 'pwned')!r}, 'w')")
    clone = Clone(tmp_path / "clone", wheels, workbench=locked(source).replace("1.0.zip", "1.0"))
    assert "one==1.0" in refusal(clone.install("workbench"))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("constraint", ["", "torch<=3"])  # which changes what pip says where it finds no build
def test_torch_is_the_build_for_cpus_where_there_is_one(tmp_path, wheels, constraint):
    cuda, cpu = wheel(wheels, "torch", "2.0"), wheel(wheels, "torch", "2.0+cpu")
    clone = Clone(tmp_path / "clone", wheels, torch_cpu=locked(cpu), torch_cuda=locked(cuda))
    (tmp_path / "constraints.txt").write_text(constraint)

    def install():
        script = clone.directory / "scripts" / "install.py"
        return clone.run(".venv/bin/python", script, "torch", PIP_CONSTRAINT=str(tmp_path / "constraints.txt"))

    content = cpu.read_bytes()
    cpu.write_bytes(content + b" ")  # then it is not passed over in silence
    assert "torch==2.0+cpu" in refusal(install())
    cpu.unlink()
    assert install().returncode == 0
    assert [path.name for path in clone.site.glob("torch-*")] == ["torch-2.0.dist-info"]
    cpu.write_bytes(content)
    assert install().returncode == 0
    assert [path.name for path in clone.site.glob("torch-*")] == ["torch-2.0+cpu.dist-info"]


def test_direct_dependencies_are_locked_as_they_are_written():
    wanted = pins((paths.ROOT / "requirements.txt").read_text())
    found = pins(LOCKS["workbench"]) | pins(LOCKS["torch-cuda"])
    assert {name: found.get(name) for name in wanted} == wanted
    assert pins(LOCKS["torch-cpu"]) == {"torch": f"{wanted['torch']}+cpu"}
    for extra, packages in tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ].items():
        wanted = pins("\n".join(packages))
        assert {name: pins(LOCKS[extra]).get(name) for name in wanted} == wanted
    for path in (paths.ROOT / "locks").glob("*.in"):
        wanted = pins(path.read_text())
        wanted.pop("torch", None)
        assert {name: pins(LOCKS[path.stem]).get(name) for name in wanted} == wanted


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_hashes_and_no_address(name):
    text = re.sub(r"\\\n", " ", LOCKS[name])
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(
            r"\S+==\S+(?: ; .*?)?(?:\s+--hash=sha256:[0-9a-f]{64})+\s*", line
        ), line
    assert "://" not in text


def test_locks_name_all_that_their_packages_ask_for():
    """Nothing is resolved when they are installed."""
    from packaging.requirements import Requirement

    unneeded = {"torchvision", "sentence-transformers", "sounddevice"}  # see scripts/lock.sh
    locked_here = pins("".join(LOCKS[name] for name in ("workbench", "torch-cuda", "embeddings")))
    missing, seen = {}, set()
    todo = [(name, "") for name in locked_here]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            asked_for = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # an extra that is not installed, or the other build of torch
            continue
        for wanted in asked_for:
            if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
                continue
            needed = re.sub(r"[-_.]+", "-", wanted.name.lower())
            todo += [(needed, each) for each in wanted.extras]
            locked = locked_here.get(needed)
            if needed not in unneeded and not (locked and wanted.specifier.contains(locked, prereleases=True)):
                missing[needed] = f"{name} asks for {wanted}, locked is {locked_here.get(needed)}"
    assert not missing


# --- an environment that stays its folder's own -----------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_commands_start_the_python_beside_them_wherever_they_are(tmp_path, wheels, name):
    clone = Clone(tmp_path / name, wheels, workbench=locked(wheel(wheels, "tool")))
    (clone.directory / "here.py").write_text("")
    ended = clone.install("workbench", ".")
    assert (ended.returncode, ended.stderr) == (0, "")
    copied = clone.copy(tmp_path / "copy of" / name)
    for each in (clone, copied):
        said = each.run(".venv/bin/say-tool", "it's", "$(touch pwned)")
        assert said.stdout.splitlines() == [str(each.directory / ".venv"), "it's", "$(touch pwned)"], said.stderr
        found = each.run(".venv/bin/python", "-c", "import here; print(here.__file__)")
        assert found.stdout.strip() == str(each.directory / "here.py")
    clone.directory.rename(tmp_path / "moved")
    clone.directory = tmp_path / "moved"
    assert clone.run(".venv/bin/say-tool").stdout.strip() == str(tmp_path / "moved" / ".venv")
    assert not list(tmp_path.rglob("pwned"))


@pytest.fixture
def shell(tmp_path):
    """Environment in which the scripts find an NGINX, and another folder where they do not name theirs in full."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nginx").touch(mode=0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CDPATH": str(tmp_path)}


@pytest.mark.parametrize("name", ["shell", "long"])
def test_both_scripts_work_in_folders_of_any_name_and_notice_a_copy(tmp_path, wheels, shell, name):
    wheels.mkdir()
    said = "import os, sys\nprint(os.path.basename(__file__), sys.prefix, *sys.argv[1:], sep='|')\n"
    stubs = dict.fromkeys(["scripts/run_all.py", "pytest.py", "ruff.py", "mypy.py"], said)
    stubs |= {"scripts/install.py": said, "erlib/__init__.py": "", "erlib/serving/wheel.py": "def preflight(): pass\n"}
    clone = Clone(tmp_path / ODD_NAMES[name], wheels, torch_cpu="", torch_cuda="", workbench="")
    for file, text in stubs.items():
        (clone.directory / file).parent.mkdir(exist_ok=True)
        (clone.directory / file).write_text(text)
    for each in (clone, clone.copy(tmp_path / "copy of" / ODD_NAMES[name])):
        first, second = (each.run("run_all.sh", "--set", "a b=$(touch pwned)", **shell) for _ in range(2))
        prefix, log = each.directory / ".venv", each.directory / "data" / "runs" / "install.log"
        assert first.stdout == second.stdout == f"run_all.py|{prefix}|--set|a b=$(touch pwned)\n", first.stderr
        assert first.stderr.startswith("installing the locked packages")
        assert second.stderr == ""
        assert log.read_text() == f"install.py|{prefix}|torch|workbench|.\n"
        assert (prefix / "pyvenv.cfg").read_text().splitlines()[-1].endswith(f" {prefix}")
        tests = each.run("run_tests.sh", "-k", "a b", **shell)
        assert tests.stdout.splitlines() == [
            f"ruff.py|{prefix}|check|.", f"ruff.py|{prefix}|format|--check|.", f"mypy.py|{prefix}",
            f"pytest.py|{prefix}|-n|2|--dist|loadfile|--no-loadscope-reorder|-k|a b",
        ], tests.stderr  # fmt: skip
        assert log.read_text().splitlines()[1:] == [f"install.py|{prefix}|embeddings"]
    assert not list(tmp_path.rglob("pwned"))


def test_run_all_ends_where_a_package_is_not_the_one_that_was_locked(tmp_path, wheels, shell):
    torch, bad = wheel(wheels, "torch", "2.0+cpu"), wheel(wheels, "bad")
    clone = Clone(tmp_path / "clone", wheels, torch_cpu=locked(torch), workbench=locked(bad))
    bad.write_bytes(bad.read_bytes() + b" ")
    for _ in range(2):  # nothing is taken for installed
        ended = clone.run("run_all.sh", **shell)
        assert ended.returncode == 1
        said = ended.stderr.splitlines()
        assert said[0].startswith("installing")
        assert said[1:] == [line for line in said if line.startswith("error: bad==1.0")]
