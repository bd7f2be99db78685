"""Parts placed on several nodes: the arithmetic alone, then on a Ray cluster of four nodes that share this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from erlib import config, paths
from erlib.cluster import placement
from erlib.cluster.placement import Node
from erlib.dgx.repository import RepositoryPlan
from erlib.load import backends, experiments, records, sweep
from erlib.machine import hardware, processes
from erlib.serving import triton
from erlib.workload import lengths, prompts

PROMPT = "The goalie stopped thirty shots and the team went home with two points"


def node(name, **resources):
    return Node(f"{name * 8}", name, f"10.0.0.{ord(name) - 96}", {"CPU": 4.0, "memory": 1e9, **resources})


def names(seats):
    return "".join(node.name for node in seats.servers), seats.users.name


GPU, EXPERT = {"GPU": 1}, {"experts": 1}


@pytest.mark.parametrize(
    ("nodes", "demands", "expected"),
    [
        # evenly, over the nodes that the users leave
        (
            [node("a", experts=3), node("b", experts=3), node("c", experts=3), node("d")],
            [EXPERT] * 8,
            ("abcabcab", "d"),
        ),
        # as far as resources allow
        ([node("a", GPU=2), node("b", GPU=8), node("c")], [GPU] * 8, ("ababbbbb", "c")),
        # two instances of tensor parallelism 4, one of 8
        ([node("a", GPU=8), node("b")], [{"GPU": 4}] * 2, ("aa", "b")),
        ([node("a", GPU=4), node("b", GPU=8), node("c", GPU=4)], [{"GPU": 8}], ("b", "a")),
        # a reserved node, even if it has more than others
        ([node("a", GPU=4), node("b", GPU=8, users=1), node("c", GPU=4)], [GPU] * 8, ("acacacac", "b")),
        # by exclusion: the one that is missed least
        ([node("a", GPU=4), node("b", GPU=2), node("c", GPU=4)], [GPU] * 8, ("acacacac", "b")),
        # on CPUs
        ([node("a", CPU=2), node("b", CPU=6), node("c", CPU=1)], [{"CPU": 2}] * 4, ("abbb", "c")),
    ],
)
def test_servers_are_spread_and_users_kept_apart(nodes, demands, expected):
    assert names(placement.place(nodes, demands)) == expected


def test_users_may_share_a_node_if_the_profile_says_so():
    nodes = [node("a", GPU=4), node("b", GPU=4)]
    with pytest.raises(
        processes.StartError, match=r"8 servers leave no node for the users.*all of a, b.*cluster_users"
    ):
        placement.place(nodes, [GPU] * 8)
    assert names(placement.place(nodes, [GPU] * 8, "anywhere")) == ("abababab", "a")
    assert names(placement.place(nodes, [GPU] * 4, "anywhere")) == ("bbbb", "a")
    reserved = [node("a", GPU=4), node("b", GPU=4, users=1)]
    assert names(placement.place(reserved, [GPU] * 8, "anywhere")) == ("abababab", "b")


@pytest.mark.parametrize(
    ("nodes", "demands", "message"),
    [
        (
            [node("a", GPU=2), node("b", GPU=4), node("c")],
            [GPU] * 8,
            r"room for 6 of 8 servers, which ask for 8 x 1 GPU: a has 4 CPU, 2 GPU; b has 4 CPU, 4 GPU; c has 4 CPU$",
        ),
        ([node("a", GPU=4), node("b", GPU=4)], [{"GPU": 8}], r"room for 0 of 1 servers, which ask for 1 x 8 GPU"),
        ([], [EXPERT], r"room for 0 of 1"),
    ],
)
def test_what_is_lacking_is_said(nodes, demands, message):
    with pytest.raises(processes.StartError, match=message):
        placement.place(nodes, demands, "anywhere")


def test_servers_ask_for_gpus_or_seats_or_cores():
    on_gpus = RepositoryPlan("tensorrt_llm", {}, 8, gpus=(0, 1, 2, 3))
    on_cores = triton.ServerPlan("openvino", {"threads": "2"}, 8)
    emulated = triton.ServerPlan("emulated", {}, 8)
    plain, counted = [node("a")], [node("a"), node("b", experts=2)]
    assert placement.demands_of([on_gpus, on_cores, emulated], plain) == [{"GPU": 4}, {"CPU": 2}, {"CPU": 1}]
    assert placement.demands_of([on_gpus, on_cores], counted) == [{"GPU": 4}, EXPERT]


def test_gpus_are_those_of_all_nodes_for_experts(monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.H100] * 4)
    monkeypatch.setattr(
        placement, "living_nodes", lambda address: [node("a", GPU=4), node("b", GPU=4), node("c", GPU=4, users=1)]
    )
    assert placement.gpus(None) == [hardware.H100] * 4
    assert placement.gpus("auto") == [hardware.H100] * 8
    monkeypatch.setattr(hardware, "gpus", list)
    assert placement.gpus("auto") == []


def test_users_have_one_place():
    with pytest.raises(config.ConfigError, match=r"either serving\.cluster or serving\.users_on"):
        config.load_profile(
            "smoke", {"serving.cluster": "auto", "serving.users_on": "other", "serving.host": "10.0.0.1"}
        )


# --- on Ray -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several_nodes():
    """Three nodes with room for four experts each and one for the users, all on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: scripts/install.py cluster")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 1, "resources": {"users": 1}, "include_dashboard": False, "node_name": "load"}
    running = Cluster(initialize_head=True, head_node_args=head)
    try:
        running.by_name = {
            name: running.add_node(num_cpus=1, resources={"experts": 4}, node_name=name)
            for name in ("left", "middle", "right")
        }
        yield running
    finally:
        ray.shutdown()
        running.shutdown()


@pytest.fixture
def own(profile, several_nodes, tmp_path):
    """The smoke profile in that cluster, with ports and records of its own."""
    serving = profile.serving.model_copy(
        update={"base_port": profile.serving.base_port + 300, "cluster": several_nodes.address}
    )
    own = profile.model_copy(update={"serving": serving, "name": f"smoke-{tmp_path.name}"})
    yield own
    shutil.rmtree(paths.run_dir(own.name), ignore_errors=True)


def series(tokenizer, router, server_plan, users, tokens):
    columns = {"prompt": range(16), "paper": "p2", "cluster": np.arange(16) % 8, "text": PROMPT, "input_tokens": 14}
    columns |= {"paper_input_tokens": 14, "max_tokens": tokens, "end_id": lengths.FORCED, "follow_up": None}
    pool = pd.DataFrame(columns)
    system = experiments.System("p2.E", "expert_router", [server_plan] * 8, tokenizer, router)
    return experiments.Series("p2", "load", system, prompts.Workload(pool, 8, 2.0), users, 2, ["uniform"])


def filled(frame):
    return {name for name in frame if frame[name].notna().any()}


@pytest.mark.slow
def test_a_lost_node_spoils_one_point_and_records_are_as_from_one_machine(
    own, several_nodes, tokenizer, router, server_plan, monkeypatch, capfd
):
    """Eight experts over three nodes, users on a fourth; one node is killed while a point is measured."""
    wanted = series(tokenizer, router, server_plan, [2, 8], 120)
    written = []

    def write(rows, path, really=records.write):
        really(rows, path)
        written.append(path)

    monkeypatch.setattr(records, "write", write)

    def kill() -> None:
        while len(written) < 2:
            time.sleep(0.02)
        time.sleep(0.5)
        several_nodes.remove_node(several_nodes.by_name.pop("right"), allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    frame = sweep.run(own, [wanted])
    killer.join(30)
    said = capfd.readouterr()
    assert "node right is lost, and with it Triton server p2.E-" in said.out + said.err

    assert len(written) == len(set(written)) == 4
    hosts = frame.drop_duplicates("point_hash").set_index("point_hash")["host"]
    by_point = [hosts[path.stem.rpartition("-")[2]] for path in written]
    assert [host.split(" ")[0] for host in by_point] == ["3", "3", "2", "2"]
    assert all("users on" in host for host in by_point)

    local = own.model_copy(update={"serving": own.serving.model_copy(update={"cluster": None})})
    beside = sweep.run(local, [dataclasses.replace(wanted, users=[2], repeats=1)])
    assert set(beside["point_hash"]).isdisjoint(frame["point_hash"])
    assert frame.dtypes.equals(beside.dtypes)
    assert filled(frame) == filled(beside)
    assert (frame["output_tokens"] == 120).all() and (frame["status"] == "ok").all()
    assert len(frame) == 2 * (2 + 8)
    several_nodes.by_name["right"] = several_nodes.add_node(num_cpus=1, resources={"experts": 4}, node_name="right")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_ends_leaves_nothing_on_the_nodes(
    number, own, several_nodes, tokenizer, router, server_plan, tmp_path
):
    code = (
        "import json, sys, time; from pathlib import Path; from erlib import config\n"
        "from erlib.cluster import on_ray; from erlib.serving import triton\n"
        "settings, plan, router, tokenizer, logs = json.loads(sys.argv[1])\n"
        "settings, plan = config.ServingSettings(**settings), triton.ServerPlan(**plan)\n"
        "with on_ray.ClusterStack('cut', [plan] * 3, 'replicas', settings, Path(router), Path(logs)) as served:\n"
        "    with on_ray.ClusterUsers(served, Path(tokenizer), 2, Path(logs) / 'users.log', 'asyncio'):\n"
        "        print('up', flush=True); time.sleep(60)\n"
    )
    logs, base_port = paths.run_dir(own.name) / "logs", own.serving.base_port
    own_tokenizer = shutil.copy(tokenizer, tmp_path)  # by which the users' processes are known
    settings, plan = own.serving.model_dump(), dataclasses.asdict(server_plan)
    arguments = json.dumps([settings, plan, str(router), str(own_tokenizer), str(logs)])
    marks = [str(logs), str(own_tokenizer), *(f"erlib.gateway --port {base_port + i} " for i in (1, 2))]

    def left() -> list[str]:
        commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        found = [command for command in commands if any(mark in command for mark in marks) and arguments not in command]
        ports = range(base_port, base_port + 20)
        found += [f"port {port}" for port in ports if processes.listening(port)]
        return found + [str(region) for port in ports for region in Path("/dev/shm").glob(f"er{port}-*")]

    with subprocess.Popen([sys.executable, "-c", code, arguments], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "up\n"
        assert len(left()) >= 3 + 2 + 2 + 1
        os.kill(run.pid, number)
        run.wait(60)
    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left() == []


@pytest.mark.slow
def test_resources_that_another_job_holds_are_an_error(own, several_nodes, tokenizer, router, server_plan):
    import ray

    class Job:
        def is_running(self) -> bool:
            return True

    placement.living_nodes(several_nodes.address)
    holder = ray.remote(Job).options(num_cpus=0, resources={"experts": 4}).remote()
    ray.get(holder.is_running.remote())
    impatient = own.serving.model_copy(update={"start_timeout_s": 10.0})
    try:
        with (
            pytest.raises(processes.StartError, match="does not answer within 10 s"),
            backends.on_ray().ClusterStack(
                "held", [server_plan] * 8, "replicas", impatient, router, paths.run_dir(own.name) / "logs"
            ),
        ):
            pass
    finally:
        ray.kill(holder)
