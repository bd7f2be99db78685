"""What stands around simulated engines: the fitted harness, and a host whose cost was measured."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from erlib import config
from erlib.paper_scale import batching, clock, presets, simulation
from erlib.paper_scale.clock import Harness
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Eight servers on a core: 1,000 us a token under load; one server on two: 100 us of postprocessing."""
    rows = []
    for servers, cores, tritonserver, postprocessing in ((8, 1, 600, 400), (1, 2, 50, 100)):
        for users, factor in ((1, 3.0), (100, 0.9), (200, 1.1)):
            rows.append(
                {
                    **{"servers": servers, "cores": cores, "processes": 1, "tokens_per_response": 1, "users": users},
                    **{"round": 0, "answer_tokens": 60, "tritonserver_us_per_token": tritonserver * factor},
                    "postprocessing_us_per_token": postprocessing * factor,
                    "preprocessing_us_per_token": 50 * factor,
                    "tensorrt_llm_us_per_token": 10_000,
                }
            )
    rows.append({**rows[1], "processes": 8, "tritonserver_us_per_token": 9_000})
    rows.append({**rows[1], "tokens_per_response": 8, "tritonserver_us_per_token": 9})
    pd.DataFrame(rows).to_csv(tmp_path / "host.csv", index=False)
    monkeypatch.setattr(presets, "HOST_BINDING", tmp_path / "host.csv")


def test_presets_have_names():
    assert presets.preset("hardware", "p1") == presets.preset("hardware", "p2") == Harness("hardware")
    assert presets.preset("harness", "p2").gateway_streams == 48
    with pytest.raises(config.ConfigError, match="hardware, harness, pinned-host, thread-client"):
        presets.preset("fast", "p1")


@pytest.mark.usefixtures("measured")
def test_a_token_costs_what_it_costs_under_load_and_without_the_stand_in():
    assert presets.host_us(["tritonserver", "postprocessing"], servers=8, cores=1) == pytest.approx(1000)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("core_speed", [0.5, 1.0, 2.0])
def test_no_routed_system_streams_more_than_the_core_carries_whatever_its_engines(core_speed):
    drawn = [Prompt(i, i % 8, "", 335, 200, FORCED) for i in range(400)]
    for name in ("p1.B", "p1.D"):
        system = batching.paper_system(name)
        around = presets.pinned_host(core_speed).around(system)
        stamps = clock.trace(system, drawn, False, around, seed=1).token_ns()
        times_s = np.sort(np.concatenate(stamps)) / 1e9
        busy = times_s[len(times_s) // 4 : len(times_s) // 2]  # all users have come, and none has gone
        assert len(busy) / (busy[-1] - busy[0]) == pytest.approx(1000 * core_speed, rel=0.02)


@pytest.mark.usefixtures("measured")
def test_tensor_parallel_servers_have_a_socket_and_a_postprocessing_process_each():
    pinned = presets.pinned_host()
    for name in ("p1.A", "p2.C"):  # one server, and two
        around = pinned.around(batching.paper_system(name))
        assert around.client_tokens_per_s == pytest.approx(10_000) and around.client_per_server
    assert pinned.around(batching.paper_system("p1.B")).client_tokens_per_s == pytest.approx(1_000)
    assert pinned.around(batching.paper_system("p1.B")).per_request_s == pytest.approx(50e-6 * 60)


@pytest.mark.usefixtures("measured")
def test_points_say_which_host_they_had(tmp_path):
    changes = {"paper2.configs": ["p2.C", "p2.E"], "paper2.users": [1, 9], "paper2.repeats": 1}
    profile = config.load_profile("dgx-h100", changes)
    workloads = {"p2": simulation.textless_workload(profile, "p2")}
    around = {"p2": presets.pinned_host()}
    points = simulation.points(profile, around, tmp_path, workloads)
    assert {point.path.parent.parent.name for point in points} == {"pinned-host"}
    faster = {"p2": dataclasses.replace(presets.pinned_host(), tensor_parallel=None)}
    moved = simulation.points(profile, faster, tmp_path, workloads)
    changed = {a.system.config for a, b in zip(points, moved, strict=True) if a.path != b.path}
    assert changed == {"p2.C"}  # only whoever has another host is simulated again


@pytest.fixture
def threads(tmp_path, monkeypatch):
    """On one core 200 us a token for up to 50 threads, then 2 us more for each; on two cores more."""
    rows = []
    for cores, users in ((cores, users) for cores in (1, 2) for users in (1, 50, 100, 200)):
        cost_us = cores * (200 + 2 * max(0, users - 50))
        rows += [{"cores": cores, "users": users, "us_per_token": cost_us * luck} for luck in (0.9, 1.1)]
    pd.DataFrame(rows).to_csv(tmp_path / "threads.csv", index=False)
    monkeypatch.setattr(presets, "CLIENT_THREADS", tmp_path / "threads.csv")


@pytest.mark.usefixtures("threads")
def test_what_a_thread_costs_is_a_line_with_one_bend():
    cost = presets.client_cost()
    assert cost.loc[(2, 100), "us_per_token"] == pytest.approx(600)
    assert cost.loc[(1, 1), "ci95"] == pytest.approx(12.706 * 20, rel=1e-3)  # two rounds, 40 us apart
    around = presets.preset("thread-client", "p2")
    assert (around.name, around.client_knee) == ("thread-client", 50)
    assert around.client_tokens_per_s == pytest.approx(5000)
    assert around.client_slope == pytest.approx(100)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("core_speed", [0.5, 1.0])
def test_a_client_of_threads_takes_as_much_from_whatever_system(core_speed):
    drawn = [Prompt(i, i % 8, "", 335, 200, FORCED) for i in range(150)]
    for name in ("p1.A", "p1.D"):
        system = batching.paper_system(name)
        stamps = clock.trace(system, drawn, False, presets.thread_client(core_speed).around(system)).token_ns()
        times_s = np.sort(np.concatenate(stamps)) / 1e9
        busy = times_s[len(times_s) // 4 : len(times_s) // 2]  # all 150 are answered, at 200 + 200 us a token
        assert len(busy) / (busy[-1] - busy[0]) == pytest.approx(2500 * core_speed, rel=0.02)
