import weakref
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erlib import config
from erlib.load import metrics, records
from erlib.paper_scale import batching, clock, presets, simulation
from erlib.paper_scale.batching import CannotServe, System
from erlib.paper_scale.clock import HARDWARE, Harness
from erlib.paper_scale.instances import Request
from erlib.paper_scale.presets import HARNESS
from erlib.workload import prompts
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt
from tests.support.linear import Linear


class Crowded(Linear):
    """Instances on one machine that carries only one of them at full speed."""

    at_full_speed = 1.0


def system(**changes):
    sizes = {"instances": 1, "batch_size": 4, "kv_tokens": 6400}
    return System(**{"config": "p1.D", "routing": "direct", "steps": Linear(), **sizes, **changes})


def users(n, input_tokens=100, output_tokens=20, clusters=8):
    return [Prompt(i, i % clusters, "", input_tokens, output_tokens, FORCED) for i in range(n)]


def by_user(trace):
    return {(r.user, r.turn): tokens for r, tokens in zip(trace.requests, trace.token_ns(), strict=True)}


# --- properties ---------------------------------------------------------------------------------------------------

_lengths = st.tuples(st.integers(1, 400), st.integers(1, 60), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(_lengths, min_size=1, max_size=25),
    routing=st.sampled_from(["direct", "round_robin", "expert_router", "replicas"]),
    batch_size=st.integers(1, 6),
    kv_tokens=st.integers(640, 3000),
    max_step_tokens=st.integers(520, 1200),
    steps=st.sampled_from([Linear(), Crowded()]),
    continues=st.booleans(),
    around=st.sampled_from(
        [
            HARDWARE,
            HARNESS["p1"],
            Harness("tight", 2, 0.3, 0.2, client_tokens_per_s=300, client_knee=3, client_slope=4, per_request_s=0.01),
        ]
    ),
)
def test_whatever_is_asked(lengths, routing, batch_size, kv_tokens, max_step_tokens, steps, continues, around):
    drawn = [Prompt(n, cluster, "", tokens, answer, FORCED) for n, (tokens, answer, cluster) in enumerate(lengths)]
    under_test = system(
        routing=routing,
        steps=steps,
        instances=1 if routing == "direct" else 4,
        batch_size=batch_size,
        kv_tokens=kv_tokens,
        max_step_tokens=max_step_tokens,
    )
    seen = clock.trace(under_test, drawn, continues, around, seed=1)
    stamps = seen.token_ns()
    # tokens conserved: every request answered, and by the servers' own count
    assert Counter(r.user for r in seen.requests) == dict.fromkeys(range(len(drawn)), 1 + continues)
    assert [len(tokens) for tokens in stamps] == [r.prompt.max_tokens for r in seen.requests]
    assert sum(map(len, stamps)) == sum(sum(server.sequences) for server in seen.servers)
    for server in seen.servers:
        assert max(server.kv_blocks, default=0) <= kv_tokens // 64
        assert max(server.sequences, default=0) <= batch_size
        assert all(np.diff(server.ends_s) > 0)
        assert all(np.diff(server.taken_s) > 0)
        assert all(taken >= end for taken, end in zip(server.taken_s, server.ends_s, strict=True))
        _check_reservations(server, [r for r in seen.requests if seen.servers[r.server] is server])
    for request, tokens in zip(seen.requests, stamps, strict=True):
        assert round(request.sent_s * 1e9) < tokens[0]
        assert all(np.diff(tokens) > 0)
    if continues:
        sent = {(r.user, r.turn): (r.sent_s, r.input_tokens) for r in seen.requests}
        for (user, turn), tokens in by_user(seen).items():
            if turn == "base":
                assert sent[user, "continuation"][0] == pytest.approx(tokens[-1] * 1e-9, abs=1e-9)
                assert sent[user, "continuation"][1] == drawn[user].input_tokens + drawn[user].max_tokens


def _check_reservations(server, requests):
    """Count again, from the requests alone, what was reserved and decoded in each step."""
    blocks, sequences = np.zeros(len(server.ends_s), int), np.zeros(len(server.ends_s), int)
    for r in requests:
        part = slice(r.first_step, r.first_step + r.output_tokens)
        blocks[part] += -(-(r.input_tokens + r.output_tokens) // 64)
        sequences[part] += 1
    assert blocks.tolist() == server.kv_blocks
    assert sequences.tolist() == server.sequences


@pytest.mark.parametrize(("name", "preset"), [("p1.C", "harness"), ("p1.D", "hardware"), ("p2.E", "harness")])
def test_steps_that_are_one_event_are_those_that_were_one_each(name, preset, monkeypatch):
    paper = name[:2]
    workload = simulation.textless_workload(config.load_profile("dgx-h100"), paper)
    drawn = prompts.draw(workload, 120, "uniform", seed=3, repeat=0)

    def run():
        around = presets.preset(preset, paper)
        return clock.trace(batching.paper_system(name), drawn, paper == "p1", around, seed=1)

    together = run()
    begun = Counter()

    def one(engine):
        begun["steps"] += 1
        return np.array([engine.begin_step()])

    monkeypatch.setattr(batching.Engine, "begin_steps", one)
    apart = run()
    assert begun["steps"] == sum(len(server.ends_s) for server in together.servers)
    assert [(r.user, r.turn, r.server, r.first_step) for r in together.requests] == [
        (r.user, r.turn, r.server, r.first_step) for r in apart.requests
    ]
    for tokens, same in zip(together.token_ns(), apart.token_ns(), strict=True):
        assert abs(tokens - same).max() <= 1  # nanosecond


def test_one_user_waits_for_the_prefill_only():
    for name in ("p1.A", "p1.C", "p2.D", "p2.E"):
        under_test = batching.paper_system(name)
        seen = by_user(clock.trace(under_test, users(1, 335, 50), continues=True))
        base, continuation = seen[0, "base"], seen[0, "continuation"]
        assert base[0] * 1e-9 == pytest.approx(under_test.steps.prefill_s(335), abs=1e-9)
        assert (continuation[0] - base[-1]) * 1e-9 == pytest.approx(under_test.steps.prefill_s(385), abs=2e-9)
        gaps_s = [under_test.steps.decode_s(1, 335 + n) for n in range(1, 50)]
        assert np.diff(base) * 1e-9 == pytest.approx(gaps_s, abs=2e-9)


@pytest.mark.parametrize("name", ["p1.A", "p1.C", "p2.A", "p2.D"])
def test_tpot_of_a_full_batch_is_the_tables(name):
    under_test = batching.paper_system(name)
    crowd = users(3 * under_test.batch_size, 100, 200, clusters=1)
    server = clock.trace(under_test, crowd, continues=False).servers[0]
    full = [n for n in range(1, len(server.ends_s)) if server.sequences[n - 1 : n + 1] == [under_test.batch_size] * 2]
    decoding = [n for n in full if n < 200]  # the first wave, all of whose members have come
    assert len(decoding) > 50
    start = full[0] - 1
    for n in decoding[:: len(decoding) // 5]:
        gap = server.ends_s[n] - server.ends_s[n - 1]
        # sequences of one wave differ in context by the few steps in which their prompts were read
        low, high = (under_test.steps.decode_s(under_test.batch_size, c) for c in (100 + n - start, 100 + n))
        assert low * (1 - 1e-4) <= gap <= high * (1 + 1e-4)  # measured tables are not quite monotone


def test_a_schedule_worked_out_by_hand():
    """Two slots, three users: 4 ms a step, 1 ms a decoded sequence, 0.1 ms a prompt token."""
    drawn = [Prompt(n, 0, "", 10 * (n + 1), tokens, FORCED) for n, tokens in enumerate((2, 3, 2))]
    seen = by_user(clock.trace(system(batch_size=2), drawn, continues=False))
    # 0 and 1 are read (4 + 3), decoded (6); 0 is done; 2 is read while 1 is decoded (4 + 1 + 3); 2 is decoded (5)
    expected = {0: [7, 13], 1: [7, 13, 21], 2: [21, 26]}
    assert {user: (tokens * 1e-6).round(6).tolist() for (user, _), tokens in seen.items()} == expected


def test_first_come_first_served_even_if_a_later_one_would_fit():
    drawn = [Prompt(0, 0, "", 600, 40, FORCED), Prompt(1, 0, "", 600, 40, FORCED), Prompt(2, 0, "", 10, 5, FORCED)]
    seen = clock.trace(system(kv_tokens=1000), drawn, continues=False)
    first, big, small = seen.requests
    assert big.first_step == small.first_step == 40
    assert first.first_step == 0


def test_prompts_share_a_step_up_to_its_limit():
    seen = clock.trace(system(max_step_tokens=250), users(4, 100, 5), continues=False)
    # two are read; then two sequences are decoded and 200 + 2 tokens fit again
    assert [r.first_step for r in seen.requests] == [0, 0, 1, 1]
    seen = clock.trace(system(max_step_tokens=201), users(4, 100, 5), continues=False)
    assert [r.first_step for r in seen.requests] == [0, 0, 1, 2]


def test_kv_cache_is_reserved_for_the_longest_answer():
    def together(**changes):
        return max(clock.trace(system(kv_tokens=1280, **changes), users(4, 100, 20), False).servers[0].sequences)

    assert together() == 4
    assert together(answer_limit=1000) == 1


def test_instances_share_a_machine_evenly():
    """4 ms a step, 1 ms a decoded sequence, 0.1 ms a prompt token; twice as long while both are at work."""
    drawn = [Prompt(0, 0, "", 10, 3, FORCED), Prompt(1, 1, "", 60, 1, FORCED)]
    shared = system(steps=Crowded(), instances=2, routing="expert_router")
    seen = by_user(clock.trace(shared, drawn, continues=False))
    # both read until 10 ms, when 0 has done its 5 and 1 half of its 10; both go on until 1 is done at 20, and 0 at 20
    assert (seen[0, "base"] * 1e-6).round(6).tolist() == [10, 20, 25]
    assert (seen[1, "base"] * 1e-6).round(6).tolist() == [20]
    apart = by_user(clock.trace(system(instances=2, routing="expert_router"), drawn, continues=False))
    assert (apart[0, "base"] * 1e-6).round(6).tolist() == [5, 10, 15]
    assert (apart[1, "base"] * 1e-6).round(6).tolist() == [10]


def test_continuations_may_be_given():
    drawn, follow_up = [Prompt(0, 0, "", 100, 20, FORCED)], [Prompt(0, 1, "", 70, 5, FORCED)]
    routed = system(routing="expert_router", instances=2)
    base, continuation = clock.trace(routed, drawn, follow_up).requests
    assert (base.turn, base.server, base.input_tokens, base.output_tokens) == ("base", 0, 100, 20)
    assert (continuation.turn, continuation.server) == ("continuation", 1)
    assert (continuation.input_tokens, continuation.output_tokens) == (70, 5)
    with pytest.raises(ValueError, match="zip"):
        clock.trace(routed, [*drawn, *drawn], follow_up)


def test_requests_go_where_the_routing_says():
    def experts(routing, drawn):
        return [r.server for r in clock.trace(system(routing=routing, instances=4), drawn, False).requests]

    drawn = [Prompt(n, cluster, "", 10, 2, FORCED) for n, cluster in enumerate([3, 3, 0, 2, 1, 3])]
    assert experts("expert_router", drawn) == [3, 3, 0, 2, 1, 3]
    assert experts("round_robin", drawn) == experts("replicas", drawn) == [0, 1, 2, 3, 0, 1]
    with pytest.raises(CannotServe, match="4 experts, but a prompt belongs to cluster 4"):
        experts("expert_router", [Prompt(0, 4, "", 10, 2, FORCED)])
    with pytest.raises(CannotServe, match="cluster -1"):
        experts("expert_router", [Prompt(0, -1, "", 10, 2, FORCED)])


@pytest.mark.parametrize("around", [HARDWARE, HARNESS["p1"], HARNESS["p2"]], ids=["hardware", "p1", "p2"])
@pytest.mark.parametrize("steps", [Linear(), Crowded()], ids=["apart", "together"])
def test_what_happened_is_gone_with_its_trace_and_leaves_nothing_to_collect(around, steps):
    with clock.without_collections():
        happened = clock.trace(system(instances=8, routing="expert_router", steps=steps), users(9), True, around)
        server = weakref.ref(happened.servers[0])
        assert server() is not None
        del happened
        assert server() is None


def test_what_can_never_be_served_is_an_error():
    for changes, drawn, message in [
        ({"kv_tokens": 64}, users(1), "needs 2 KV blocks"),
        ({"max_step_tokens": 99}, users(1), "a step takes 99 tokens"),
        ({}, [], "at least one user"),
        ({}, users(1, output_tokens=0), "at least one token"),
        ({}, users(1, input_tokens=0), "at least one token"),
        ({"batch_size": 0}, users(1), "sizes must be at least 1"),
    ]:
        with pytest.raises(CannotServe, match=message):
            clock.trace(system(**changes), drawn, continues=False)


# --- the harness --------------------------------------------------------------------------------------------------


def test_the_gateway_relays_no_more_streams_than_it_can():
    around = Harness("narrow", gateway_streams=3, routing_mean_s=0.4, routing_sd_s=0.3)
    routed = system(routing="expert_router", instances=8)
    seen = clock.trace(routed, users(30), continues=True, around=around)
    begins = [r.sent_s + r.queued_s + 1e-9 for r in seen.requests]
    ends = [seen.servers[r.server].ends_s[r.first_step + r.output_tokens - 1] for r in seen.requests]
    relayed = [sum(b <= at < e for b, e in zip(begins, ends, strict=True)) for at in begins]
    assert max(relayed) == 3
    assert max(r.queued_s for r in seen.requests) > 0
    direct = clock.trace(system(), users(30), continues=True, around=around)
    assert all(r.queued_s == r.routed_s == 0 for r in direct.requests)


@pytest.mark.parametrize("routing", ["direct", "expert_router"])
def test_a_crowd_is_sent_one_after_the_other(routing):
    around = Harness("sender", per_request_s=0.5)
    crowd = users(4, output_tokens=2)
    seen = clock.trace(system(routing=routing, instances=8), crowd, continues=False, around=around)
    first_s = [tokens[0] * 1e-9 for tokens in seen.token_ns()]
    assert first_s == pytest.approx([0.5 * (n + 1) + Linear().prefill_s(100) for n in range(4)], abs=1e-6)


def test_routing_latency_has_the_papers_mean_and_spread():
    routed = system(routing="expert_router", instances=8)
    seen = clock.trace(routed, users(4000, 10, 1), continues=False, around=HARNESS["p1"])
    latencies = np.array([r.routed_s for r in seen.requests])
    assert latencies.mean() == pytest.approx(0.442, rel=0.05)
    assert latencies.std() == pytest.approx(0.302, rel=0.1)
    replicas = clock.trace(replace(routed, routing="replicas"), users(8), False, HARNESS["p1"])
    assert all(r.routed_s == 0 for r in replicas.requests)  # nothing is classified


def test_a_slow_client_takes_tokens_at_its_own_speed_and_in_order():
    crowd = users(8, 100, 100)
    slow = Harness("slow", client_tokens_per_s=200, client_knee=100)
    seen = clock.trace(system(instances=8, routing="expert_router"), crowd, continues=False, around=slow)
    assert max(tokens[-1] for tokens in seen.token_ns()) * 1e-9 == pytest.approx(800 / 200, rel=0.05)
    steps = [pair for server in seen.servers for pair in zip(server.ends_s, server.taken_s, strict=True)]
    assert all(sooner[1] <= later[1] for sooner, later in pairwise(sorted(steps)))
    slower = replace(slow, client_knee=0, client_slope=8)  # 8 open streams: half as fast
    seen = clock.trace(system(batch_size=8), crowd, continues=False, around=slower)
    assert max(tokens[-1] for tokens in seen.token_ns()) * 1e-9 == pytest.approx(800 / 100, rel=0.05)


def test_a_slow_client_takes_one_step_after_the_other():
    around = Harness("slow", 6, 0.3, 0.2, client_tokens_per_s=300, client_knee=3, client_slope=4)
    seen = clock.trace(
        system(instances=4, routing="expert_router", batch_size=2), users(20, clusters=4), True, around, 1
    )
    opened = [r.sent_s + r.queued_s + r.routed_s for r in seen.requests]
    closed = [seen.servers[r.server].ends_s[r.first_step + r.output_tokens - 1] for r in seen.requests]
    steps = sorted(
        step for server in seen.servers for step in zip(server.ends_s, server.sequences, server.taken_s, strict=True)
    )
    free_s = 0.0
    for end_s, messages, taken_s in steps:
        streams = sum(o < end_s <= c for o, c in zip(opened, closed, strict=True))
        free_s = max(end_s, free_s) + messages * (1 + max(0, streams - 3) / 4) / 300
        assert taken_s == pytest.approx(free_s, rel=1e-12)
    assert max(taken_s - end_s for end_s, _, taken_s in steps) > 0.1  # it falls behind


# --- the papers' systems and workloads ----------------------------------------------------------------------------


def test_paper_systems_have_the_kv_cache_that_fits():
    held = {name: batching.paper_system(name).kv_tokens for name in ("p1.A", "p1.B", "p1.C", "p1.D", "p1.R")}
    assert held == {"p1.A": 1116943, "p1.B": 72000, "p1.C": 65917, "p1.D": 159000, "p1.R": 65917}


def test_a_workload_at_paper_scale_keeps_the_routers_decisions():
    profile = config.load_profile("laptop")
    columns = {"prompt": [0, 1, 2], "paper": "p1", "cluster": [2, 0, 1], "text": ["a", "b", "c"]}
    small = {"input_tokens": [14, 15, 13], "paper_input_tokens": [335, 360, 320], "max_tokens": 50, "end_id": -1}
    frame = pd.DataFrame(columns | small)
    full = simulation.at_paper_scale(prompts.Workload(frame, 3, 2.0), profile, "p1").frame
    assert full[["prompt", "cluster", "text"]].equals(frame[["prompt", "cluster", "text"]])
    assert full["input_tokens"].tolist() == [335, 360, 320]
    assert full["max_tokens"].tolist() == [1200, 1200, 1200]


def test_textless_workloads_have_the_papers_lengths():
    profile = config.load_profile("dgx-h100")
    one = simulation.textless_workload(profile, "p1").frame
    assert (one["input_tokens"].mean(), one["input_tokens"].std()) == pytest.approx((335, 30), rel=0.01)
    two = simulation.textless_workload(profile, "p2").frame
    assert two["input_tokens"].max() <= 1021
    assert two["max_tokens"].max() <= 1000
    means = two.groupby("cluster")["input_tokens"].mean()
    assert means.max() / means.min() < 1.02  # every cluster has the same spread of lengths


# --- records ------------------------------------------------------------------------------------------------------


def _small(**overrides):
    configs = {"paper1.configs": ["p1.A", "p1.D"], "paper2.configs": ["p2.C", "p2.E"], "preliminary.dtypes": ["int4"]}
    loads = {
        f"{experiment}.{key}": value
        for experiment in ("paper1", "paper2", "preliminary")
        for key, value in {"users": [1, 9], "repeats": 2}.items()
    }
    return config.load_profile("dgx-h100", configs | loads | {"workload.p1_output_tokens": 30} | overrides)


def test_both_papers_become_records_that_metrics_read(tmp_path, capsys):
    profile = _small()
    files = simulation.simulate_papers(profile, "harness", tmp_path, workers=1)
    seen = records.read_files(files)
    assert len(files) == 2 * 2 * (2 + 1 + 2 + 2 * 5)  # users, repeats; p2.E has two mixes; TP x batch sizes
    assert set(seen["source"]) == {"simulated"}
    assert set(seen["host"]) == {"8 x H100 in virtual time, preset harness"}
    assert set(seen["status"]) == {"ok"}
    assert seen["t_send_ns"].notna().all()
    assert set(seen[seen["paper"] == "p1"]["turn"]) == {"base", "continuation"}
    assert set(seen[seen["paper"] == "p2"]["turn"]) == {"base"}
    summary = metrics.summarise(seen)
    assert (summary["failures"] == 0).all()
    account = metrics.accounting(seen[seen["experiment"] == "load"])
    assert (account["received_tokens"] == account["counted_tokens"]).all()
    assert set(metrics.routing_spans(seen)["config"]) == {"p1.D", "p2.E"}
    before = [(path, path.stat().st_mtime_ns) for path in files]
    assert simulation.simulate_papers(profile, "harness", tmp_path, workers=1) == files
    assert [(path, path.stat().st_mtime_ns) for path in files] == before
    assert f"{len(files)} of {len(files)} points found" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_records_and_repeats_differ(tmp_path):
    def run(name, repeats):
        profile = _small(**{"paper1.configs": ["p1.D"], "paper1.repeats": repeats})
        workloads = {"p1": simulation.textless_workload(profile, "p1")}
        files = simulation.simulate_papers(profile, "harness", tmp_path / name, workloads, workers=1)
        return records.read_files(files)

    one, again = run("one", 2), run("again", 2)
    assert [list(tokens) for tokens in one["token_ns"]] == [list(tokens) for tokens in again["token_ns"]]
    first, second = (one[(one["repeat"] == repeat) & (one["users"] == 9)] for repeat in (0, 1))
    assert (first["route_forward_ns"].to_numpy() != second["route_forward_ns"].to_numpy()).all()


def test_the_reader_may_move_the_harness(tmp_path):
    wide = {"p1": replace(HARNESS["p1"], name="320 streams", gateway_streams=320)}
    profile = _small(**{"paper1.configs": ["p1.D"]})
    workloads = {"p1": simulation.textless_workload(profile, "p1")}
    files = simulation.simulate_papers(profile, wide, tmp_path, workloads, workers=1)
    assert {path.parents[1].name for path in files} == {"320 streams"}
    assert set(records.read_files(files)["host"]) == {"8 x H100 in virtual time, preset 320 streams"}


def test_the_preliminary_experiment_is_paper_2s(tmp_path):
    profile = _small(**{"preliminary.batch_sizes": [4, 20], "preliminary.dtypes": ["fp16", "fp8", "int4"]})
    workloads = {"preliminary": simulation.textless_workload(profile, "preliminary")}
    seen = records.read_files(simulation.simulate_papers(profile, "hardware", tmp_path, workloads, workers=1))
    assert set(seen["paper"]) == {"p2"}
    assert set(seen["experiment"]) == {"preliminary"}
    grid = {f"p2.{dtype}-tp{n}-bs{batch}" for dtype in ("fp16", "fp8", "int4") for n in (4, 8) for batch in (4, 20)}
    assert set(seen["config"]) == grid
    assert set(seen["mix"]) == {"uniform"}
    assert set(seen["turn"]) == {"base"}
    assert set(seen["output_tokens"]) == {200}
    assert seen["input_tokens"].mean() == pytest.approx(335, rel=0.05)
    assert set(seen["expert"]) == {0}  # one instance, and no gateway on the way
    assert seen["route_forward_ns"].isna().all()
    assert (
        seen.groupby("point_hash")["output_tokens"].sum() == seen.groupby("point_hash")["server_tokens"].first()
    ).all()
    response_s = metrics.answers(seen).groupby(["config", "users"])["response_s"].mean().unstack()
    # four slots for nine users make three waves; with twenty all are served at once
    assert (response_s[9].filter(like="-bs4") > 1.2 * response_s[9].filter(like="-bs20").to_numpy()).all()
    assert response_s[1].filter(like="-bs4").tolist() == response_s[1].filter(like="-bs20").tolist()


@pytest.mark.parametrize("dtype", ["fp16", "fp8", "int4"])
@pytest.mark.parametrize("tensor_parallel", [4, 8])
def test_preliminary_systems_have_room_for_the_largest_batch(dtype, tensor_parallel):
    engine = batching.Engine(batching.preliminary_system(dtype, tensor_parallel, 600))
    longest = Request(0, "base", Prompt(0, 0, "", 335 + 4 * 30, 200, FORCED), 335 + 4 * 30, 0, 0.0)
    assert 600 * engine.blocks(longest) <= engine.kv_blocks_total


def test_columns_may_be_replaced():
    table = simulation.simulate(system(), users(3), paper="p2", columns={"source": "simulated/hardware"})
    assert table.schema == records.SCHEMA
    assert set(table["source"].to_pylist()) == {"simulated/hardware"}
    with pytest.raises(KeyError, match="no column sauce"):
        simulation.simulate(system(), users(3), paper="p2", columns={"sauce": "simulated/hardware"})


def test_only_full_scale_is_simulated(tmp_path):
    with pytest.raises(config.ConfigError, match=r"divides users by 20"):
        simulation.simulate_papers(config.load_profile("laptop"), "hardware", tmp_path)
