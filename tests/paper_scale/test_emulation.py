"""Engines that only keep time, in a real Triton; and what is said of those that could not."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from tokenizers import Tokenizer

from erlib import config, paths
from erlib.load import experiments, points, records, sweep, users
from erlib.machine import hardware, processes
from erlib.paper_scale import batching, clock, emulation, steptimes
from erlib.paper_scale.batching import CannotServe
from erlib.serving import stack, triton, wheel, wire
from erlib.workload import lengths, prompts  # fmt: skip
from tests.support.stacks import answer, generated_tokens

PROMPT = "The goalie stopped thirty shots and the team went home with two points"


@pytest.fixture(scope="module")
def own_ports(profile):
    serving = profile.serving.model_copy(update={"base_port": profile.serving.base_port + 200})
    return profile.model_copy(update={"serving": serving})


@pytest.fixture(scope="module")
def emulated(own_ports, tmp_path_factory):
    """One server of p2.A: 70B FP16 on eight H100s, asked without a gateway."""
    system = emulation.system(own_ports, "p2.A")
    logs = tmp_path_factory.mktemp("logs")
    with stack.Stack("emulated", system.servers, "direct", own_ports.serving, None, logs) as running:
        yield running


def test_it_answers_as_every_expert_does(emulated):
    before = generated_tokens(emulated)
    responses = answer(emulated.targets[0], PROMPT, 25)
    assert [len(response.token_ids) for response in responses] == [1] * 25
    assert b"".join(response.text for response in responses) == b" the" * 25
    assert generated_tokens(emulated) == before + 25


def test_its_steps_take_as_long_as_the_table_says(emulated, tokenizer, tmp_path):
    """Never less; how much more depends on the machine, which is what the counters are for."""
    script = users.Script(0, 0, 0, PROMPT, 40, wire.NEVER_STOP, 0, f"{PROMPT} And then?")
    steps = batching.paper_system("p2.A").steps
    with users.UserSimulator(tokenizer, 1, tmp_path / "users.log") as simulator:
        before = emulated.counters()
        base, continuation = simulator.run([script], emulated.targets, 60).answers
    counted = {name: value - before[name] for name, value in emulated.counters().items()}
    assert continuation.input_tokens == len(Tokenizer.from_file(str(tokenizer)).encode(script.follow_up).ids)
    planned_s = 0.0
    for one in (base, continuation):
        contexts = range(one.input_tokens + 1, one.input_tokens + 40)
        should_s = steps.prefill_s(one.input_tokens), sum(steps.decode_s(1, context) for context in contexts)
        assert one.t_first_ns - one.t_send_ns >= should_s[0] * 1e9
        assert one.t_last_ns - one.t_first_ns >= should_s[1] * 0.95e9  # the first token itself may have been late
        planned_s += sum(should_s)
    assert counted["expert_steps"] == 80
    assert counted["expert_step_seconds"] == pytest.approx(planned_s, rel=1e-6)


def test_engines_keep_the_time_of_any_table(own_ports, tokenizer, tmp_path):
    """Of an H200 that was measured; known by its content, not by its place."""
    table = tmp_path / "a table.csv"
    shutil.copy(paths.FACTS / "h200_pytorch_step_times.csv", table)
    asked = own_ports.emulation.model_copy(update={"configs": ["p2.E"], "steps": str(table)})
    (series,) = emulation.emulated_load(own_ports.model_copy(update={"emulation": asked}))
    server, others = series.system.servers[0], emulation.system(own_ports, "p2.E").servers[0]
    assert server.description["parameters"]["stands_for"] != others.description["parameters"]["stands_for"]
    again = emulation.system(own_ports, "p2.E", asked.slow_motion, steps=table)
    assert again.servers[0].description == server.description
    assert str(tmp_path) not in str(server.description)
    beside = own_ports.serving.model_copy(update={"base_port": own_ports.serving.base_port + 40})
    with stack.Stack("other", [again.servers[0]], "direct", beside, None, tmp_path) as running:
        before = running.counters()["expert_step_seconds"]
        answer(running.targets[0], PROMPT, 10)
        took_s = running.counters()["expert_step_seconds"] - before
    n = len(Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids)
    steps = steptimes.Table("llama-3-8b", "fp16", "fp16", 1, table)
    should_s = steps.prefill_s(n) + sum(steps.decode_s(1, n + i) for i in range(1, 10))
    assert took_s == pytest.approx(should_s, rel=1e-6)
    with pytest.raises(config.ConfigError, match=r"emulation\.configs: a table\.csv holds no llama-3-70b in int4"):
        emulation.system(own_ports, "p2.D", steps=table)


def test_a_table_that_was_cut_is_refused(own_ports, tmp_path):
    """As a measurement leaves it that was stopped."""
    table = tmp_path / "cut.csv"
    table.write_text((paths.FACTS / "h200_pytorch_step_times.csv").read_text(encoding="utf-8")[:-30], encoding="utf-8")
    with pytest.raises(config.ConfigError, match=r"emulation\.configs: .*cut\.csv, line \d+: cut off") as error:
        emulation.system(own_ports, "p2.E", steps=table)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("prompt", "tokens", "reason"), [("word " * 9000, 1, "a step takes 8192 tokens"), (PROMPT, 2**31 - 1, "KV blocks")]
)
def test_what_it_could_never_serve_is_refused_at_once(emulated, prompt, tokens, reason):
    (response,) = answer(emulated.targets[0], prompt, tokens)
    assert reason in response.error
    assert len(answer(emulated.targets[0], PROMPT, 2)) == 2


def test_what_binds_a_server_is_seen(emulated):
    """As mpirun or a batch system would; the one process with fewer cores than the others is what counts."""
    everything = os.sched_getaffinity(0)
    if len(everything) == 1:
        pytest.skip("there is only one core")
    assert emulated.cores() == [everything]
    (stub,) = psutil.Process(emulated.servers[0].process.pid).children()
    stub.cpu_affinity([min(everything)])
    try:
        assert emulated.cores() == [{min(everything)}]
    finally:
        stub.cpu_affinity(list(everything))
    assert emulated.cores() == [everything]


@pytest.mark.parametrize(
    ("says", "then"),
    [
        ("boost::interprocess::lock_exception", "kill -ABRT $$"),
        ("TRITONBACKEND_ModelInstanceInitialize: ensemble_0_0", "exec sleep 60"),
        ("TRITONBACKEND_ModelInstanceInitialize: ensemble_0_0", "echo \"successfully loaded 'other'\"; exec sleep 60"),
        ("no space left on device", "kill -ABRT $$"),
    ],
)
def test_a_server_that_loses_its_python_backend_while_it_loads_is_started_once_more(
    says, then, own_ports, tmp_path, monkeypatch, capsys
):
    """The real server behind a program that dies the first time, as a busy machine's sometimes does."""
    real = wheel.installed()
    carried = tmp_path / "packages" / "pytriton" / "tritonserver"
    (carried / "bin").mkdir(parents=True)
    for name in ("backends", "python_backend_stubs"):
        (carried / name).symlink_to(real / name)
    (tmp_path / "packages" / "nvidia_pytriton.libs").symlink_to(real.parent.parent / "nvidia_pytriton.libs")
    program = carried / "bin" / "tritonserver"
    program.write_text(
        f'#!/bin/bash\n[ -e {tmp_path}/died ] && exec {shlex.quote(str(real / "bin" / "tritonserver"))} "$@"\n'
        f'touch {tmp_path}/died; echo "  what():  {says}"; {then}\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(triton, "installed", lambda: carried)
    system = emulation.system(own_ports, "p2.A")
    server = system.servers[0].server("p2.A-0", own_ports.serving.base_port + 40, tmp_path, "127.0.0.1")
    try:
        server.start()
        if says == "no space left on device":
            with pytest.raises(processes.StartError, match=f"code -6 while starting(.|\n)*{says}"):
                server.wait_ready(30)
            return
        server.wait_ready(15)
        assert len(answer(server.url, PROMPT, 3)) == 3
    finally:
        processes.stop([server.process], grace_s=0)
        server.clean_up()
    assert "p2.A-0 has lost its Python backend while it loaded" in capsys.readouterr().out
    assert says in (tmp_path / "triton-p2.A-0.died.log").read_text()


@pytest.mark.parametrize("hangs", [True, False])
def test_a_server_that_hangs_beside_others_is_not_waited_for_as_long_again(hangs, tmp_path, monkeypatch):
    server = triton.TritonServer("second", "emulated", {}, 1, 59_997, tmp_path)
    server.log.write_text("TRITONBACKEND_ModelInstanceInitialize: ensemble_0_0" if hangs else "not begun")
    server.process = processes.spawn(["sleep", "60"], tmp_path / "log")
    waited_s: list[float] = []
    started: list[bool] = []

    def wait(*arguments):
        waited_s.append(arguments[-1])
        if len(waited_s) == 1:
            raise processes.StartError("not ready")

    monkeypatch.setattr(processes, "wait_until", wait)
    monkeypatch.setattr(server, "_start_again", lambda: started.append(True))
    try:
        time.sleep(1.5)  # while others were waited for
        server.wait_ready(20)
    finally:
        processes.stop([server.process], grace_s=0)
    assert waited_s[0] <= 18.6
    assert started == [True] * hangs
    assert waited_s[1] == 20 if hangs else waited_s[1] > 19  # one that is only slow has all the time it had before


def test_a_server_that_cannot_be_seen_is_bound_to_nobody_knows_what(tmp_path):
    assert triton.cores([triton.TritonServer("elsewhere", "emulated", {}, 1, 59_997, tmp_path)]) == [frozenset()]


def test_a_machine_that_is_too_slow_is_told(own_ports, tokenizer, tmp_path):
    """Ten thousand times faster than an H100: nobody keeps that pace."""
    serving = own_ports.serving.model_copy(update={"base_port": own_ports.serving.base_port + 20})
    apart = own_ports.model_copy(update={"name": f"smoke-{tmp_path.name}", "serving": serving})
    system = emulation.system(own_ports, "p2.A", slow_motion=1e-4)
    pool = prompts.Workload(_pool(8), 8, 2.0)
    series = experiments.Series("p2", "load", system, pool, [4], 1, ["uniform"])
    frame = sweep.run(apart, [series])
    try:
        (row,) = emulation.pace(frame).to_dict("records")
        assert not row["kept_pace"]
        assert row["late"] > 0.5
        assert set(frame["source"]) == {"emulated"}
        assert len(frame) == 4
        assert (frame["output_tokens"] == 12).all()
        assert frame["server_tokens"].iloc[0] == 48
        assert (frame["server_cores"] == hardware.cores()).all()
        assert (frame["server_cpus"] == f"{hardware.ranges(os.sched_getaffinity(0))} x 1").all()
    finally:
        shutil.rmtree(paths.run_dir(apart.name))


def _pool(n):
    columns = {"prompt": range(n), "paper": "p2", "cluster": np.arange(n) % 8, "text": PROMPT, "input_tokens": 14}
    columns |= {
        "paper_input_tokens": 14,
        "max_tokens": 12,
        "end_id": lengths.FORCED,
        "follow_up": f"{PROMPT} And then?",
    }
    return pd.DataFrame(columns)


# --- arithmetic of the comparison ---------------------------------------------------------------------------------


TIMES = ("t_first_ns", "t_last_ns", "token_ns")


def _row(**changes):
    token_ns = np.arange(1, 5) * 10**8 + 10**12
    shared = {"config": "p2.D", "mix": "uniform", "users": 1, "repeat": 0, "turn": "base", "user": 0, "status": "ok"}
    times = {"t_send_ns": 10**12, "t_first_ns": token_ns[0], "t_last_ns": token_ns[-1], "token_ns": token_ns}
    run = {"source": "emulated", "paper": "p2", "experiment": "load", "client": "asyncio", "classifier": "ours"}
    pace = {"slow_motion": 4.0, "steps": 100, "late_steps": 3, "lost_time": 0.01}
    return shared | times | run | pace | {"output_tokens": 4, "input_tokens": 9, "point_hash": "h"} | changes


def test_pace_and_difference():
    late = {"users": 2, "late_steps": 60, "lost_time": 0.3}
    emulated = pd.DataFrame([_row(), _row(**late), _row(**late, user=1)])
    slower = _row(source="simulated-hardware")
    slower |= {name: np.asarray(slower[name]) - 5 * 10**7 for name in TIMES}
    kept = emulation.pace(emulated).set_index("users")
    assert kept["kept_pace"].to_dict() == {1: True, 2: False}
    assert kept["late"].to_dict() == {1: 0.03, 2: 0.6}
    replayed = (
        slower | {"source": "simulated-replay"} | {n: np.asarray(slower[n]) + 10**7 for n in slower if n in TIMES}
    )
    virtual = pd.DataFrame([slower, replayed]).reindex(columns=records.SCHEMA.names)
    table = emulation.beside_simulation(emulated, virtual).set_index("metric")
    assert table.loc["ttft_mean_s", ["off_simulated", "off_replayed"]].tolist() == pytest.approx([1.0, 2 / 3])
    assert table.loc["tpot_mean_s", "off_simulated"] == pytest.approx(0.0)
    assert set(table["users"]) == {1}


def test_an_unknown_configuration_is_an_error_before_anything_starts(own_ports):
    with pytest.raises(config.ConfigError, match="no configuration"):
        emulation.system(own_ports, "p2.Z")


def test_slow_motion_is_part_of_a_points_name(own_ports):
    pool = prompts.Workload(_pool(8), 8, 2.0)

    def name(**changes):
        system = emulation.system(own_ports, "p2.A", **changes)
        (point,) = points.points(own_ports, experiments.Series("p2", "load", system, pool, [4], 1, ["uniform"]))
        assert "emulated" in point.path.parts
        return point.hash

    names = [name(), name(slow_motion=2.0), name(slow_motion=3.0)]
    assert len(set(names)) == 3


@pytest.mark.parametrize(("experiment", "turns"), [("ablation", {"base"}), ("load", {"base", "continuation"})])
def test_what_is_simulated_beside_it_has_the_same_requests(own_ports, experiment, turns):
    """Paper 1's users send continuation prompts, but not in the ablation."""
    pool = prompts.Workload(_pool(8), 8, 2.0)
    series = experiments.Series("p1", experiment, emulation.system(own_ports, "p1.D"), pool, [1, 4], 2, ["uniform"])
    virtual = emulation.simulated_beside(own_ports, [series])
    assert set(virtual["turn"]) == turns
    assert set(virtual["experiment"]) == {experiment}
    requests = virtual.groupby(["users", "repeat"]).size()
    assert requests.to_dict() == {(users, repeat): users * len(turns) for users in (1, 4) for repeat in (0, 1)}


def test_a_cancelled_request_frees_what_it_held():
    @dataclasses.dataclass
    class Request:
        input_tokens: int
        output_tokens: int
        first_step: int = -1

    steps = batching.paper_system("p2.A").steps
    engine = batching.Engine(batching.System("p2.A", "direct", steps, 1, 2, 640))
    first, second, third = Request(300, 20), Request(200, 50), Request(100, 5)
    for request in (first, second, third):
        engine.submit(request)
    engine.begin_step()
    assert engine.end_step().joined == [first, second]
    engine.cancel(first)
    engine.begin_step()
    assert engine.end_step().joined == [third]
    alone = 0
    while not engine.is_idle:
        engine.begin_step()
        alone = engine.end_step().kv_blocks
    assert alone == engine.blocks(second)
    with pytest.raises(CannotServe):
        engine.submit(Request(640, 1))


def test_a_step_reads_no_more_prompts_than_there_are_times_for():
    """p1.A has 600 slots, and its first step would read as many short prompts; there are times for 256."""
    target = batching.paper_system("p1.A")
    assert target.batch_size > target.steps.limits.prompts == 256
    happened = clock.trace(target, [prompts.Prompt(i, 0, "", 4, 2, None, None) for i in range(600)], continues=False)
    first_s = [int(stamps[0]) for stamps in happened.token_ns()]
    assert len(set(first_s)) == 3  # 256, 256 and 88
