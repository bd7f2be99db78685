"""serve.py and what else is started by hand: what it takes, what it refuses in one line, what it says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from erlib import config, paths
from erlib.load import backends, experiments
from erlib.machine import processes
from erlib.serving import wire
from scripts import serve
from tests.support.ports import BASE_PORT

STARTED_BY_HAND = [
    *(
        ["scripts/" + name]
        for name in (
            "compare_step_times.py",
            "distill_step_times.py",
            "measure_step_times.py",
            "run_all.py",
            "serve.py",
        )
    ),
    *(["benchmarks/" + name] for name in ("gateways.py", "router.py")),
    ["-m", "benchmarks.gateway"],
    ["-m", "erlib.gateway"],
]


@pytest.mark.parametrize("command", STARTED_BY_HAND, ids=" ".join)
def test_a_python_without_the_packages_is_told_in_one_line(command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare = [sys.executable, "-S", *command]  # -S: as one that has nothing installed
    ended = subprocess.run(bare, cwd=paths.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p2.e"], "did you mean 'p2.E'"),
        (["p2.E", "--profile", "Smoke"], "did you mean 'smoke'"),
        (["p2.E", "--set", "paper1.repeat=3"], "did you mean 'paper1.repeats'"),
        (["p2.E", "--set", "seed=1", "serving.gateways"], "KEY=VALUE"),
        (["p2.E", "--set", "corpus.text_field=@text"], "'@text' is not YAML"),
        (["p2.A", "--metrics", "9100"], "p2.A has no gateways"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    assert serve.main() == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_ports_that_are_none_are_refused(port, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "p2.E", f"--openai={port}"])
    with pytest.raises(SystemExit):
        serve.main()
    assert f"--openai: {port!r} is no port" in capsys.readouterr().err.replace("\n", " ")


def test_what_set_says_reaches_the_system(monkeypatch):
    asked = []
    monkeypatch.setattr(serve, "_serve", lambda profile, system, context, *_: asked.append((profile, context)) or 0)
    monkeypatch.setattr(experiments, "systems", lambda profile, configurations: configurations)
    command = ["serve.py", "p2.E", "--set", "scale.tokens=1", "seed=5", "--set", "serving.base_port=26500"]
    monkeypatch.setattr(sys, "argv", command)
    assert serve.main() == 0
    ((profile, context),) = asked
    assert (profile.scale.tokens, profile.seed, profile.serving.base_port) == (1, 5, 26500)
    assert context > 2000  # a prompt and an answer of paper 2


@pytest.mark.parametrize("scale", [60, 1])
def test_the_context_is_what_an_instance_takes(profile, scale):
    scaled = profile.model_copy(update={"scale": profile.scale.model_copy(update={"tokens": scale})})
    (system,) = experiments.systems(scaled, backends.of(scaled).configurations(scaled, ["p2.E"]))
    taken = int(system.servers[0].parameters[wire.CONTEXT])
    assert backends.of(scaled).context_tokens(scaled, config.load_configuration("p2.E")) == taken


def test_help_says_each_context(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])
    with pytest.raises(SystemExit):
        serve.main()
    said = " ".join(capsys.readouterr().out.split())
    laptop = config.load_profile("laptop")
    for name in config.config_ids():
        assert f"{name} {backends.of(laptop).context_tokens(laptop, config.load_configuration(name))}" in said


# --- how it ends ------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGHUP, 0),  # its terminal is closed
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGINT, 0, marks=SLOW),
        pytest.param(signal.SIGTERM, 0, marks=SLOW),
    ],
)
def test_nothing_of_it_is_left_however_it_ends(number, status, profile):
    port = BASE_PORT + 650
    # Whoever runs the tests may have told them not to hear these signals.
    command = ["env", "--default-signal=INT,HUP", sys.executable, "scripts/serve.py", "p2.A", "--profile", "smoke"]
    settings = [f"serving.base_port={port}", f"serving.start_timeout_s={profile.serving.start_timeout_s}"]
    command += ["--openai", str(port + 50), "--set", *settings]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    with subprocess.Popen(command, cwd=paths.ROOT, env=environment, stdout=subprocess.PIPE, text=True) as served:
        try:
            while "Ctrl-C stops everything" not in (line := served.stdout.readline()):
                assert line, "it has ended"
            family = psutil.Process(served.pid).children(recursive=True)
            assert {"tritonserver", "triton_python_b"} <= {process.name()[:15] for process in family}
            served.send_signal(number)
            assert served.wait(20) == status
        finally:
            served.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    deadline = time.monotonic() + 5
    while left := list(Path("/dev/shm").glob(f"er{port + 3}-*")):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert [each for each in range(port, port + 60) if processes.listening(each)] == []
