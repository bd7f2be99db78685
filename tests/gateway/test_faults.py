"""What breaks, when, what should come of it and what does: every request ends with exactly one status.

Each test notes what it has seen; together they are the fault matrix, written to ``data/runs/fault_matrix.md`` (or
below ``ERLIB_HOME``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tabulate import tabulate
from tritonclient.grpc import service_pb2 as pb

from erlib import paths
from erlib.gateway import experts, process, service
from erlib.gateway.limits import Limits
from erlib.machine import processes
from erlib.serving import wire
from erlib.serving.nginx import Nginx
from tests.support.gateways import Line, Outcome, ends, free_port, relay_before, start
from tests.support.ports import BASE_PORT
from tests.support.standin_expert import eventually, first_word, setting, standin

STANDIN = paths.ROOT / "tests" / "support" / "standin_expert.py"

NGINX_PORT, RELAY_PORT = BASE_PORT + 400, BASE_PORT + 410


async def ended(tasks: list[asyncio.Task[Outcome]], within_s: float = 20.0) -> list[Outcome]:
    """All outcomes: a request that does not end within `within_s` fails the test."""
    return list(await asyncio.wait_for(asyncio.gather(*tasks), within_s))


@pytest.fixture(scope="module")
def matrix() -> Iterator[list[dict[str, str]]]:
    """Rows of the fault matrix; written down when all tests of this module are through."""
    rows: list[dict[str, str]] = []
    yield rows
    paths.RUNS.mkdir(parents=True, exist_ok=True)
    (paths.RUNS / "fault_matrix.md").write_text(tabulate(rows, headers="keys", tablefmt="github") + "\n")


@pytest.fixture
def note(matrix):
    """Write a row: what was done, what should come of it, and how the requests ended."""

    def write(fault: str, phase: str, expectation: str, outcomes: list[Outcome], remark: str = "") -> None:
        seen = ", ".join(f"{n} {end}" for end, n in sorted(ends(outcomes).items()))
        row = {"fault": fault, "phase": phase, "expectation": expectation}
        matrix.append(row | {"requests": str(len(outcomes)), "seen": "; ".join(filter(None, [seen, remark]))})

    return write


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Breakers act within a second."""
    monkeypatch.setattr(experts, "ABANDON_AFTER_S", 0.5)
    monkeypatch.setattr(experts, "FRONT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(experts, "PROBE_AFTER_S", 0.05)
    monkeypatch.setattr(experts, "PROBE_AT_MOST_AFTER_S", 0.2)


class Process:
    """A stand-in expert as a process."""

    def __init__(self, log: Path, port: int | None = None):
        self.url = f"127.0.0.1:{port or free_port()}"
        self.log = log
        self.start()

    def start(self) -> None:
        self.process = processes.spawn([sys.executable, STANDIN, self.url], self.log, env={"PYTHONPATH": _PYTHONPATH})

    def wait_ready(self) -> None:
        port = int(self.url.rpartition(":")[2])
        processes.wait_until(lambda: processes.listening(port), self.process, "stand-in", self.log, 60)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


_PYTHONPATH = os.pathsep.join([str(STANDIN.parent), str(paths.ROOT), os.environ.get("PYTHONPATH", "")])


@contextlib.contextmanager
def process_experts(n: int, log: Path) -> Iterator[list[Process]]:
    running = [Process(log) for _ in range(n)]
    try:
        for one in running:
            one.wait_ready()
        yield running
    finally:
        processes.stop([one.process for one in running], grace_s=0)


STEADY = ["1 n=20 gap=0.02", "2 n=20 gap=0.02"]
"""Requests to two other experts, which nothing should disturb."""

UNDISTURBED = {"OK": 2}


@pytest.mark.parametrize("spare", [0, 1], ids=["alone", "with a spare replica"])
@pytest.mark.parametrize(
    ("phase", "prompt"),
    [("before connecting", "0"), ("before the first response", "0 first=1.5"), ("mid-stream", "0 n=30 gap=0.05")],
)
def test_a_killed_expert_harms_only_its_own_requests(phase, prompt, spare, note, tmp_path):
    """kill -9. What has had no response goes to a spare replica; what has had one ends UNAVAILABLE, not repeated."""

    async def run(victim: Process) -> list[Outcome]:
        async with setting(spare, 1, 1, before=[victim.url]) as (door, stand_ins):
            if phase == "before connecting":
                victim.kill()
            tasks = start(door.channel, *[prompt] * 10, *STEADY)
            if phase != "before connecting":
                at_victim = door.gateway.experts[0].replicas[0].calls
                await eventually(lambda: len(at_victim) == (5 if spare else 10))
                await asyncio.sleep(0.3)
                victim.kill()
            outcomes = await ended(tasks, 10)
            if spare:
                assert len(stand_ins[0].requests) == (5 if phase == "mid-stream" else 10)
            return outcomes

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        outcomes = asyncio.run(run(victim))
    lost = (5 if phase == "mid-stream" else 0) if spare else 10
    assert ends(outcomes, 0) == {end: n for end, n in {"OK": 10 - lost, "UNAVAILABLE": lost}.items() if n}
    assert ends(outcomes[10:]) == UNDISTURBED
    assert all(one.took_s < 1.4 for one in outcomes if one.end == "UNAVAILABLE")
    note(
        f"expert killed, {'one spare replica' if spare else 'the only replica'}", phase,
        f"{lost} of its 10 requests end UNAVAILABLE, the 2 of others complete", outcomes,
    )  # fmt: skip


def test_requests_of_one_stream_share_no_fate(note, tmp_path):
    """Half of them are at an expert that is killed: each of these gets one error, on a stream that goes on."""
    n = 60

    async def run(victim: Process) -> tuple[list[Outcome], grpc.StatusCode]:
        async with setting(0, 1, before=[victim.url]) as (door, _):
            stream = door.stream(
                *[wire.encode_request(f"{i % 2} n=20 gap=0.1", 1, request_id=str(i)) for i in range(n)]
            )
            outcomes = [Outcome(i % 2) for i in range(n)]
            async for message in stream:
                reply = pb.ModelStreamInferResponse.FromString(message)
                outcome = outcomes[int(reply.infer_response.id)]
                if reply.error_message:
                    outcome.ends.append(reply.error_message)
                else:
                    outcome.responses += 1
                if sum(one.responses for one in outcomes) == 5 * n:
                    victim.kill()
            return outcomes, await stream.code()

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        outcomes, status = asyncio.run(run(victim))
    assert ends(outcomes, 0) == {"UNAVAILABLE": n // 2}
    assert [one.responses for one in outcomes if one.expert == 1] == [20] * (n // 2)
    assert ends(outcomes, 1) == {"OK": n // 2}
    assert status is grpc.StatusCode.OK
    note(
        "expert killed, requests of both on one stream",
        "mid-stream",
        "30 UNAVAILABLE, 30 OK; the stream ends OK",
        outcomes,
    )


def test_a_dead_expert_comes_back_without_costing_a_request(note, tmp_path):
    """The breaker opens with the first failure, refuses at once, and closes when a canary has been answered."""

    async def run(victim: Process) -> list[Outcome]:
        async with setting(0, 1, before=[victim.url]) as (door, _):
            replica = door.gateway.experts[0].replicas[0]
            assert ends(await ended(start(door.channel, "0"))) == {"OK": 1}
            victim.kill()
            first = await ended(start(door.channel, "0"))
            await eventually(lambda: not replica.is_up)
            refused = await ended(start(door.channel, *["0"] * 20))
            assert all(one.took_s < 0.2 for one in refused)
            victim.start()
            await eventually(lambda: replica.is_up, 20)
            return first + refused + await ended(start(door.channel, *["0"] * 20))

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        outcomes = asyncio.run(run(victim))
    assert ends(outcomes[:21]) == {"UNAVAILABLE": 21}
    assert ends(outcomes[21:]) == {"OK": 20}
    note("expert killed and restarted", "between requests", "21 UNAVAILABLE while it is gone, then 20 OK", outcomes)


@pytest.mark.parametrize("spare", [0, 1], ids=["alone", "with a spare replica"])
def test_a_dead_backend_behind_a_healthy_front_is_found_by_the_canary(spare, note):
    """The server goes on saying that it is ready, as Triton does, and every inference fails."""

    async def run():
        async with setting(1 + spare, 1, 1) as (door, stand_ins):
            replica = door.gateway.experts[0].replicas[0]
            stand_ins[0].broken = "Stub process is not healthy"
            before = []
            while replica.is_up:  # while the canary is under way, requests get the server's own error
                before += await ended(start(door.channel, "0"))
                assert len(before) < 100
            after = await ended(start(door.channel, *["0"] * 10, *STEADY))
            stand_ins[0].broken = ""
            await eventually(lambda: replica.is_up)
            repaired = await ended(start(door.channel, *["0"] * 10))
            assert sum(len(one.requests) for one in stand_ins[: 1 + spare]) >= 10
            return before, after, repaired

    before, after, repaired = asyncio.run(run())
    assert len(before) <= 10
    early, last = before[:-1], before[-1:]  # the last may still have been on its way when the canary failed
    assert ends(early) == ({"OK" if spare else "Stub process is not healthy": len(early)} if early else {})
    assert set(ends(last)) <= ({"OK"} if spare else {"Stub process is not healthy", "UNAVAILABLE"})
    assert ends(after, 0) == {"OK" if spare else "UNAVAILABLE": 10}
    assert ends(after[10:]) == UNDISTURBED
    assert ends(repaired) == {"OK": 10}
    note(
        f"dead backend, {'one spare replica' if spare else 'the only replica'}", "before the first response",
        "all OK" if spare else "the server's error until a canary has failed, then UNAVAILABLE; OK once repaired",
        before + after + repaired,
    )  # fmt: skip


@pytest.mark.parametrize("spare", [0, 1], ids=["alone", "with a spare replica"])
@pytest.mark.parametrize("how", ["in the stream", "as status"])
def test_a_clients_own_mistake_makes_no_server_suspect_and_is_tried_nowhere_else(how, spare, note):
    own = "INVALID_ARGUMENT:~too~long" if how == "in the stream" else ""
    prompt = f"0 error={own}" if own else "0 fail_after=0 code=INVALID_ARGUMENT reason=too-long"

    async def run():
        async with setting(1 + spare) as (door, stand_ins):
            outcomes = [one for _ in range(20) for one in await ended(start(door.channel, prompt, "0"))]
            await asyncio.sleep(0.1)
            assert sum(len(one.seen) for one in stand_ins) == 40  # no canary
            return outcomes

    outcomes = asyncio.run(run())
    assert ends(outcomes) == {"INVALID_ARGUMENT": 20, "OK": 20}
    note(f"expert refuses a request, {how}", "before the first response", "20 refused, 20 others OK", outcomes)


def test_an_error_that_may_be_the_servers_fault_does_not_open_the_breaker_if_it_is_not(note):
    async def run():
        async with setting(1) as (door, (expert,)):
            outcomes = []
            for _ in range(20):
                outcomes += await ended(start(door.channel, "0 error=no~idea", "0"))
                assert door.gateway.experts[0].replicas[0].is_up
            assert len(expert.seen) > len(expert.requests)  # canaries have been sent
            return outcomes

    outcomes = asyncio.run(run())
    assert ends(outcomes) == {"no idea": 20, "OK": 20}
    note("expert says something odd", "before the first response", "20 told what it says, 20 others OK", outcomes)


def test_a_full_queue_refuses_some_and_opens_no_breaker(note):
    """What streams goes on; a spare replica takes what the first refuses."""

    async def run(spare: int):
        async with setting(1 + spare) as (door, stand_ins):
            stand_ins[0].slots = 5
            outcomes = await ended(start(door.channel, *["0 n=20 gap=0.02"] * 12))
            assert all(replica.is_up for replica in door.gateway.experts[0].replicas)
            return outcomes

    alone, with_spare = asyncio.run(run(0)), asyncio.run(run(1))
    assert ends(alone) == {"OK": 5, "Exceeds maximum queue size": 7}
    assert ends(with_spare) == {"OK": 12}
    note("full queue, the only replica", "before the first response", "7 of 12 refused as it says", alone)
    note("full queue, one spare replica", "before the first response", "all OK", with_spare)


def test_a_slow_expert_is_waited_for(note):
    """Slow is not dead: it answers when asked whether it is ready."""

    async def run():
        async with setting(1, 1, 1, silence_s=0.1) as (door, (expert, *_)):
            tasks = start(door.channel, *["0 first=1.5"] * 5, "0 n=3 gap=0.7", *STEADY)
            await eventually(lambda: "ServerReady" in expert.questions)
            outcomes = await ended(tasks)
            assert door.gateway.experts[0].replicas[0].is_up
            assert len(expert.seen) == 6  # no canary, which would only stand in line
            return outcomes

    outcomes = asyncio.run(run())
    assert ends(outcomes) == {"OK": 8}
    note("expert slow", "before the first response, mid-stream", "all OK", outcomes)


@pytest.mark.parametrize("phase", ["before the first response", "mid-stream"])
def test_a_frozen_expert_is_given_up_and_taken_back(phase, note, tmp_path):
    """SIGSTOP: its connections stay, but it does not even say whether it is ready. A deadline is kept anyway."""
    prompt = "0 first=0.5" if phase == "before the first response" else "0 n=60 gap=0.05"

    async def run(victim: Process):
        async with setting(0, 1, 1, before=[victim.url], silence_s=0.5) as (door, _):
            replica = door.gateway.experts[0].replicas[0]
            tasks = start(door.channel, *[prompt] * 5, *STEADY) + start(door.channel, prompt, timeout=0.8)
            await eventually(lambda: len(replica.calls) == 6)
            await asyncio.sleep(0.2)
            victim.signal(signal.SIGSTOP)
            outcomes = await ended(tasks, 10)
            assert not replica.is_up
            victim.signal(signal.SIGCONT)
            await eventually(lambda: replica.is_up)
            return outcomes, await ended(start(door.channel, *["0"] * 5))

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        outcomes, later = asyncio.run(run(victim))
    assert ends(outcomes, 0) == {"UNAVAILABLE": 5, "DEADLINE_EXCEEDED": 1}
    assert ends(outcomes[5:7]) == UNDISTURBED
    assert ends(later) == {"OK": 5}
    note(
        "expert frozen, then thawed", phase,
        "5 UNAVAILABLE, 1 with a deadline DEADLINE_EXCEEDED; 2 of others and 5 later ones OK", outcomes + later,
    )  # fmt: skip


def test_a_frozen_expert_is_found_though_no_request_waits_for_it_for_long(note, tmp_path):
    """Each has a deadline shorter than the time after which silence is suspicious."""

    async def run(victim: Process):
        async with setting(0, 1, before=[victim.url], silence_s=0.5) as (door, _):
            replica = door.gateway.experts[0].replicas[0]
            assert ends(await ended(start(door.channel, "0"))) == {"OK": 1}  # so that the connection stands
            victim.signal(signal.SIGSTOP)
            outcomes: list[Outcome] = []
            while replica.is_up:
                assert len(outcomes) < 50
                outcomes += await ended(start(door.channel, "0", timeout=0.3))
            return outcomes, await ended(start(door.channel, *["0"] * 5))

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        outcomes, later = asyncio.run(run(victim))
    assert ends(outcomes)["DEADLINE_EXCEEDED"] >= len(outcomes) - 1  # the last may be given up before its deadline
    assert ends(later) == {"UNAVAILABLE": 5}
    note(
        "expert frozen, clients with short deadlines", "before the first response",
        "DEADLINE_EXCEEDED, then UNAVAILABLE at once", outcomes + later,
    )  # fmt: skip


def test_a_frozen_expert_keeps_no_question_waiting(tmp_path):
    """Others answer what every server knows; statistics are those of the others."""

    async def run(victim: Process):
        async with setting(0, 1, before=[victim.url]) as (door, _):
            assert ends(await ended(start(door.channel, "0"))) == {"OK": 1}  # so that the connection stands
            victim.signal(signal.SIGSTOP)
            ask = {name: door.channel.unary_unary(f"/{wire.SERVICE}/{name}") for name in _QUESTIONS}
            began_s = time.monotonic()
            replies = {name: await question(b"", timeout=10) for name, question in ask.items()}
            took_s = time.monotonic() - began_s
            return replies, took_s, door.gateway.experts[0].replicas[0].is_up

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        replies, took_s, is_up = asyncio.run(run(victim))
    assert took_s < 4 * experts.FRONT_TIMEOUT_S
    assert len(pb.ModelStatisticsResponse.FromString(replies["ModelStatistics"]).model_stats) == 1
    assert not is_up


_QUESTIONS = ["ModelStatistics", "ServerReady", "ModelReady", "ModelMetadata"]


def test_a_slow_client_slows_nobody_else_and_fills_no_memory(note):
    """It takes 1 byte per second of 200 MB. Its expert's responses wait where they are made."""

    async def run():
        async with setting(1) as (door, (expert,)), Line(door.url) as line:
            alone = await ended(start(door.channel, *["0 n=50 gap=0.01"] * 20))
            before = psutil.Process().memory_info().rss
            async with grpc.aio.insecure_channel(line.url, options=wire.CHANNEL_OPTIONS) as channel:
                await channel.channel_ready()
                slow = start(channel, "0 n=2000 bytes=100000", timeout=4)
                await eventually(lambda: len(expert.requests) == 21)
                line.bytes_per_s = 1
                await asyncio.sleep(1)
                beside = await ended(start(door.channel, *["0 n=50 gap=0.01"] * 20))
                sent = expert.requests[20].sent
                grown = psutil.Process().memory_info().rss - before
                (outcome,) = await ended(slow)
            return alone, beside, outcome, sent, grown

    alone, beside, outcome, sent, grown = asyncio.run(run())
    assert ends(beside) == {"OK": 20}
    assert outcome.end == "DEADLINE_EXCEEDED"
    assert sent < 200  # of 2,000: the rest was never made
    assert grown < 50e6
    longest_s, before_s = (median(one.longest_gap_s for one in outcomes) for outcomes in (beside, alone))
    assert longest_s < before_s + 0.1
    note(
        "client takes 1 byte/s", "mid-stream", "20 others OK and no slower; its own ends with its deadline",
        [*beside, outcome], f"{sent} of 2,000 responses made, memory {grown / 1e6:+.0f} MB",
    )  # fmt: skip


def test_a_client_that_vanishes_frees_the_experts_slot(note):
    """Its connection is reset, as when its process is killed."""

    async def run():
        async with setting(1) as (door, (expert,)), Line(door.url) as line:
            channel = grpc.aio.insecure_channel(line.url, options=wire.CHANNEL_OPTIONS)
            tasks = start(channel, *["0 n=1000 gap=0.01"] * 5)
            others = start(door.channel, *["0 n=50 gap=0.01"] * 5)
            await eventually(lambda: len(expert.requests) == 10)
            await asyncio.sleep(0.2)
            line.cut()
            took_s = await eventually(lambda: [seen.end for seen in expert.requests].count("cancelled") == 5)
            await channel.close()
            for task in tasks:
                task.cancel()
            return took_s, await ended(others)

    took_s, others = asyncio.run(run())
    assert took_s < 0.2  # one sample, and the machine may be busy; see test_service for the 100 ms
    assert ends(others) == {"OK": 5}
    note("client gone", "mid-stream", "its 5 are cancelled at the expert within 100 ms, 5 others OK", others)


def test_a_flooding_client_is_not_read_faster_than_it_is_served(note):
    """It sends 20,000 requests on one stream and reads no answer."""

    async def run():
        limits = Limits(in_flight_per_stream=50)
        async with setting(1, limits=limits) as (door, (expert,)):
            async with grpc.aio.insecure_channel(door.url, options=wire.CHANNEL_OPTIONS) as channel:
                flood = channel.stream_stream(wire.STREAM_INFER)()
                message = wire.encode_request("0 n=20 bytes=10000 " + "x" * 1000, 1)

                async def send() -> None:
                    for _ in range(20_000):
                        await flood.write(message)

                sending = asyncio.create_task(send())
                await eventually(lambda: len(expert.requests) >= 50)
                before = psutil.Process().memory_info().rss
                others = await ended(start(door.channel, *["0 n=50 gap=0.01"] * 20))
                at_once = len(door.gateway.experts[0].replicas[0].calls)
                grown = psutil.Process().memory_info().rss - before
                assert not sending.done()
                sending.cancel()
                flood.cancel()
            await eventually(lambda: not door.gateway.experts[0].replicas[0].calls)
            return others, at_once, grown

    others, at_once, grown = asyncio.run(run())
    assert at_once <= 50
    assert grown < 50e6
    assert ends(others) == {"OK": 20}
    note(
        "client floods", "sending", "at most 50 of its requests in flight, 20 others OK", others, f"{at_once} in flight"
    )


def test_draining_lets_requests_end_and_takes_no_more(note):
    async def run():
        async with standin() as expert, AsyncExitStack() as exits:
            routing = service.Gateway(first_word, experts.connect(expert.url))
            url = f"127.0.0.1:{await exits.enter_async_context(process.serving(routing, '127.0.0.1:0'))}"
            async with grpc.aio.insecure_channel(url) as channel, grpc.aio.insecure_channel(url) as late_channel:
                idle = channel.stream_stream(wire.STREAM_INFER)()  # a stream that its client keeps open
                await idle.write(wire.encode_request("0 n=1", 1))
                await idle.read()
                health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
                running = start(channel, *["0 n=40 gap=0.02"] * 5)
                await eventually(lambda: len(routing.experts[0].replicas[0].calls) == 5)
                closing = asyncio.create_task(exits.aclose())
                assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                await idle.write(wire.encode_request("0 n=1", 1))
                late = wire.decode_response(await idle.read())
                assert late.error == "UNAVAILABLE: this gateway is shutting down"
                refused = await ended(start(late_channel, "0"))
                outcomes = await ended(running)
                began_s = time.monotonic()
                await closing
                assert time.monotonic() - began_s < 1  # an idle stream is not waited for
                return outcomes, refused

    outcomes, refused = asyncio.run(run())
    assert ends(outcomes) == {"OK": 5}
    assert ends(refused) == {"UNAVAILABLE": 1}
    note("gateway drained", "mid-stream", "5 running ones OK, a new one UNAVAILABLE", outcomes + refused)


class House:
    """Two experts, three gateways that take them in turn, and NGINX, which `relays` or lets them: all processes."""

    def __init__(self, logs: Path, expert_processes: list[Process], relays: bool = False):
        self._logs = logs
        self.experts = expert_processes
        port = RELAY_PORT if relays else NGINX_PORT
        self._ports, self._asked_at = [port + 1 + i for i in range(3)], [port + 4 + i for i in range(3)]
        self._relays = relays
        urls, questions = ([f"127.0.0.1:{port}" for port in each] for each in (self._ports, self._asked_at))
        known = ([one.url for one in expert_processes], questions) if relays else ()
        self.front = Nginx(port, urls, logs, "127.0.0.1", *known)
        self.gateways = [self._gateway(i) for i in range(3)]
        for i in range(3):
            self._wait(i)
        self.front.start()

    async def restart(self, index: int, number: int) -> None:
        """End a gateway by a signal and start it anew; returns when it listens."""
        self.gateways[index].send_signal(number)
        await asyncio.to_thread(self.gateways[index].wait, 20)
        self.gateways[index] = self._gateway(index)  # not in a thread: a child ends with the thread that began it
        await eventually(lambda: processes.listening(self._ports[index]) or self.gateways[index].poll() is not None, 60)
        assert self.gateways[index].poll() is None

    def stop(self) -> None:
        processes.stop([self.front.process, *self.gateways], grace_s=3)

    def _gateway(self, index: int):
        command = ["-m", "erlib.gateway", "--port", str(self._ports[index]), "--policy", "replicas", "--clusterer", ""]
        command += ["--experts", ",".join(one.url for one in self.experts), "--index", str(index)]
        command += ["--hands-over", str(self._asked_at[index])] if self._relays else []
        return processes.spawn(processes.python(*command), self._logs / f"gateway-{index}.log")

    def _wait(self, index: int) -> None:
        log = self._logs / f"gateway-{index}.log"
        listening = lambda: processes.listening(self._ports[index])  # noqa: E731
        processes.wait_until(listening, self.gateways[index], "gateway", log, 60)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    logs = tmp_path_factory.mktemp("house")
    processes.require_free_ports(range(NGINX_PORT, NGINX_PORT + 4))
    with process_experts(2, logs / "experts.log") as running:
        built = House(logs, running)
        yield built
        built.stop()


_AT_ONCE = [*wire.CHANNEL_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]


def through(house: House) -> grpc.aio.Channel:
    """A channel to what is in front, which connects again at once."""
    return grpc.aio.insecure_channel(house.front.url, options=_AT_ONCE)


async def steadily(channel: grpc.aio.Channel, prompt: str, every_s: float, stop: asyncio.Event) -> list[Outcome]:
    """A request every `every_s` until `stop` is set; all outcomes."""
    tasks: list[asyncio.Task[Outcome]] = []
    while not stop.is_set():
        tasks += start(channel, prompt)
        await asyncio.sleep(every_s)
    return await ended(tasks)


async def kill_a_gateway(house: House) -> tuple[list[Outcome], list[Outcome]]:
    """What becomes of 30 running requests when one of three gateways is killed, and of 30 that come then."""
    async with through(house) as channel:
        running = start(channel, *["0 n=40 gap=0.05"] * 30)
        await asyncio.sleep(1)
        house.gateways[1].kill()
        house.gateways[1].wait()
        later = await ended(start(channel, *["0"] * 30))
        outcomes = await ended(running)
        await house.restart(1, signal.SIGKILL)
        return outcomes, later


async def restart_gateways(house: House) -> list[Outcome]:
    """What becomes of running and new requests while all gateways are restarted by SIGTERM, and NGINX by SIGHUP.

    A request that reaches a gateway in the very moment in which it stops listening may be turned away by gRPC.
    """
    stop = asyncio.Event()
    async with through(house) as channel:
        running = start(channel, *["0 n=50 gap=0.05"] * 10)
        load = asyncio.create_task(steadily(channel, "0 n=5 gap=0.02", 0.02, stop))
        for step in ("reload", 0, 1, 2, "reload"):
            await asyncio.sleep(0.5)
            if isinstance(step, int):
                await house.restart(step, signal.SIGTERM)
            else:
                house.front.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.5)
        stop.set()
        long, short = await ended(running), await load
    assert ends(long) == {"OK": 10}
    assert ends(short)["OK"] >= 0.99 * len(short)
    assert set(ends(short)) <= {"OK", "UNAVAILABLE", "CANCELLED"}
    return long + short


def test_a_gateway_killed_under_nginx_takes_only_its_own_streams_along(house, note):
    running, later = asyncio.run(kill_a_gateway(house))
    seen = ends(running)
    assert seen.pop("OK") == 20
    assert sum(seen.values()) == 10
    assert set(seen) <= {"UNAVAILABLE", "INTERNAL"}  # NGINX resets a stream whose response it cannot complete
    assert ends(later) == {"OK": 30}
    note("gateway killed under NGINX", "mid-stream", "its 10 of 30 end with one status each, the others OK", running)
    note("gateway killed under NGINX", "before connecting", "the other gateways do it: all OK", later)


def test_nginx_asks_whether_a_client_that_says_nothing_is_still_there(house):
    """The kernel shows which timer each of its connections has; 2 is keepalive's."""

    def timers() -> list[str]:
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        at_nginx = [fields for fields in lines if int(fields[1].split(":")[1], 16) == NGINX_PORT]
        return [fields[5].split(":")[0] for fields in at_nginx if fields[3] == "01"]

    async def run() -> list[str]:
        async with through(house) as channel:
            idle = channel.stream_stream(wire.STREAM_INFER)()
            await idle.write(wire.encode_request("0 n=1", 1))
            await idle.read()
            await eventually(lambda: timers() == ["02"] * len(timers()))
            return timers()

    assert asyncio.run(run())


def test_no_gateway_at_all_is_unavailable(house, note):
    async def run():
        for gateway_process in house.gateways:
            gateway_process.kill()
            gateway_process.wait()
        async with through(house) as channel:
            outcomes = await ended(start(channel, *["0"] * 5))
        for index in range(3):
            await house.restart(index, signal.SIGKILL)
        return outcomes

    outcomes = asyncio.run(run())
    assert ends(outcomes) == {"UNAVAILABLE": 5}
    note("all gateways killed under NGINX", "before connecting", "UNAVAILABLE", outcomes)


def test_nginx_is_reloaded_and_gateways_are_restarted_under_load_and_hardly_anybody_notices(house, note):
    outcomes = asyncio.run(restart_gateways(house))
    expectation = "all running and 99 % of new ones OK"
    note("NGINX reloaded, gateways restarted one by one (SIGTERM)", "under load", expectation, outcomes)


def test_everything_is_killed_and_restarted_under_load(house, note):
    """NGINX, gateways and experts, by SIGKILL: every request has one end, and in the end all is as before."""

    async def run():
        stop = asyncio.Event()
        async with through(house) as channel:
            load = asyncio.create_task(steadily(channel, "0 n=5 gap=0.02", 0.02, stop))
            await asyncio.sleep(0.3)
            for expert in house.experts:
                expert.kill()
            await asyncio.sleep(0.3)
            processes.stop([house.front.process], grace_s=0)  # its worker, which would live on, too
            for index in range(3):
                await house.restart(index, signal.SIGKILL)
            for expert in house.experts:
                expert.start()
            for expert in house.experts:
                await asyncio.to_thread(expert.wait_ready)
            house.front.start()
            await asyncio.sleep(3)
            stop.set()
            during = await load
            return during, await ended(start(channel, *["0"] * 30))

    during, later = asyncio.run(run())
    assert set(ends(during)) <= {"OK", "UNAVAILABLE", "INTERNAL"}
    assert ends(during)["OK"] > 20
    assert ends(later) == {"OK": 30}
    note("everything killed and restarted", "under load", "one status each", during)
    note("everything killed and restarted", "afterwards", "all OK", later)


@pytest.fixture(scope="module")
def relay_house(tmp_path_factory):
    logs = tmp_path_factory.mktemp("relay")
    processes.require_free_ports(range(RELAY_PORT, RELAY_PORT + 7))
    with process_experts(2, logs / "experts.log") as running:
        built = House(logs, running, relays=True)
        yield built
        built.stop()


def test_a_gateway_killed_under_a_relaying_nginx_takes_no_streams_along(relay_house, note):
    running, later = asyncio.run(kill_a_gateway(relay_house))
    assert ends(running) == {"OK": 30}
    assert ends(later) == {"OK": 30}
    note("gateway killed under a relaying NGINX", "mid-stream", "all OK: tokens do not pass it", running)
    note("gateway killed under a relaying NGINX", "before connecting", "the other gateways do it: all OK", later)


def test_no_gateway_at_all_is_unavailable_under_a_relaying_nginx_and_running_streams_go_on(relay_house, note):
    async def run():
        async with through(relay_house) as channel:
            running = start(channel, *["0 n=40 gap=0.05"] * 10)
            await asyncio.sleep(1)
            for gateway_process in relay_house.gateways:
                gateway_process.kill()
                gateway_process.wait()
            refused = await ended(start(channel, *["0"] * 5))
            outcomes = await ended(running)
            for index in range(3):
                await relay_house.restart(index, signal.SIGKILL)
            return outcomes, refused, await ended(start(channel, *["0"] * 30))

    running, refused, later = asyncio.run(run())
    assert ends(running) == {"OK": 10}
    assert ends(refused) == {"UNAVAILABLE": 5}
    assert ends(later) == {"OK": 30}
    note("all gateways killed under a relaying NGINX", "mid-stream", "all OK", running)
    note("all gateways killed under a relaying NGINX", "before connecting", "UNAVAILABLE", refused)
    note("all gateways restarted under a relaying NGINX", "afterwards", "all OK", later)


def test_a_relaying_nginx_is_reloaded_and_gateways_are_restarted_under_load_and_hardly_anybody_notices(
    relay_house, note
):
    outcomes = asyncio.run(restart_gateways(relay_house))
    expectation = "all running and 99 % of new ones OK"
    note("a relaying NGINX reloaded, gateways restarted one by one (SIGTERM)", "under load", expectation, outcomes)


@pytest.mark.parametrize("spare", [0, 1], ids=["alone", "with a spare replica"])
@pytest.mark.parametrize(
    ("phase", "prompt"),
    [("before connecting", "0"), ("before the first response", "0 first=1.5"), ("mid-stream", "0 n=30 gap=0.05")],
)
def test_an_expert_killed_under_a_relaying_nginx_harms_only_its_own_requests(phase, prompt, spare, note, tmp_path):
    """As behind a gateway, but a stream that has begun is reset, which gRPC's clients call INTERNAL."""

    async def run(victim: Process) -> list[Outcome]:
        async with AsyncExitStack() as exits:
            stand_ins = [await exits.enter_async_context(standin()) for _ in range(2 + spare)]
            addresses = [
                "|".join([victim.url, *(one.url for one in stand_ins[2:])]),
                *(one.url for one in stand_ins[:2]),
            ]
            door, _, channel = await exits.enter_async_context(relay_before(tmp_path, *addresses))
            if phase == "before connecting":
                victim.kill()
            tasks = start(channel, *[prompt] * 10, *STEADY)
            if phase != "before connecting":
                await asyncio.sleep(1)
                victim.kill()
            outcomes = await ended(tasks, 10)
            if not spare:
                await eventually(lambda: not door.gateway.experts[0].replicas[0].is_up)
                assert ends(await ended(start(channel, "0"))) == {"UNAVAILABLE": 1}  # at once, by the breaker
            return outcomes

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        outcomes = asyncio.run(run(victim))
    seen = ends(outcomes, 0)
    if spare and phase != "mid-stream":
        assert seen == {"OK": 10}
    elif spare:  # the least busy of two is not always the same for ten at once
        assert set(seen) == {"OK", "INTERNAL"}
        assert seen["INTERNAL"] <= 8
    else:
        assert seen == {"INTERNAL" if phase == "mid-stream" else "UNAVAILABLE": 10}
    assert ends(outcomes[10:]) == UNDISTURBED
    lost = "none" if spare and phase != "mid-stream" else "those on it" if spare else "all"
    note(
        f"expert killed under a relaying NGINX, {'one spare replica' if spare else 'the only replica'}", phase,
        f"{lost} of its 10 requests fail, the 2 of others complete", outcomes,
    )  # fmt: skip


def test_a_dead_backend_under_a_relaying_nginx_is_found_by_the_canary(note, tmp_path):
    """As behind a gateway, but that a spare replica is not asked for the request that got the error."""

    async def run():
        async with (
            standin() as broken,
            standin() as other,
            relay_before(tmp_path, broken.url, other.url) as (door, _, channel),
        ):
            replica = door.gateway.experts[0].replicas[0]
            broken.broken = "Stub process is not healthy"
            before = await ended(start(channel, "0"))
            await eventually(lambda: not replica.is_up)
            after = await ended(start(channel, *["0"] * 10, *["1 n=20 gap=0.02"] * 2))
            broken.broken = ""
            await eventually(lambda: replica.is_up)
            return before, after, await ended(start(channel, *["0"] * 10))

    before, after, repaired = asyncio.run(run())
    assert ends(before) == {"Stub process is not healthy": 1}
    assert ends(after, 0) == {"UNAVAILABLE": 10}
    assert ends(after[10:]) == UNDISTURBED
    assert ends(repaired) == {"OK": 10}
    note(
        "dead backend under a relaying NGINX, the only replica", "before the first response",
        "the server's error until a canary has failed, then UNAVAILABLE; OK once repaired", before + after + repaired,
    )  # fmt: skip


def test_a_slow_client_of_a_relaying_nginx_slows_nobody_else_and_fills_no_memory(note, tmp_path):
    """As of a gateway: 1 byte per second of 200 MB."""

    async def run():
        async with (
            standin() as expert,
            relay_before(tmp_path, expert.url) as (_, built, quick),
            Line(built.url) as line,
            grpc.aio.insecure_channel(line.url, options=wire.CHANNEL_OPTIONS) as channel,
        ):
            relay = psutil.Process(built.process.pid)
            alone = await ended(start(quick, *["0 n=50 gap=0.01"] * 20))
            before = relay.memory_info().rss
            await channel.channel_ready()
            slow = start(channel, "0 n=2000 bytes=100000", timeout=4)
            await eventually(lambda: len(expert.requests) == 21)
            line.bytes_per_s = 1
            await asyncio.sleep(1)
            beside = await ended(start(quick, *["0 n=50 gap=0.01"] * 20))
            sent, grown = expert.requests[20].sent, relay.memory_info().rss - before
            (outcome,) = await ended(slow)
        return alone, beside, outcome, sent, grown

    alone, beside, outcome, sent, grown = asyncio.run(run())
    assert ends(beside) == {"OK": 20}
    assert outcome.end == "DEADLINE_EXCEEDED"
    assert sent < 200
    assert grown < 50e6
    longest_s, before_s = (median(one.longest_gap_s for one in outcomes) for outcomes in (beside, alone))
    assert longest_s < before_s + 0.1
    note(
        "client of a relaying NGINX takes 1 byte/s", "mid-stream",
        "20 others OK and no slower; its own ends with its deadline",
        [*beside, outcome], f"{sent} of 2,000 responses made, memory {grown / 1e6:+.0f} MB",
    )  # fmt: skip


def test_two_hundred_streams_under_a_relaying_nginx_of_which_one_experts_are_killed_add_up(note, tmp_path):
    n, tokens, n_experts = 200, 50, 4

    async def run(victim: Process) -> list[Outcome]:
        async with AsyncExitStack() as exits:
            stand_ins = [await exits.enter_async_context(standin()) for _ in range(n_experts - 1)]
            addresses = [victim.url, *(one.url for one in stand_ins)]
            _, _, channel = await exits.enter_async_context(relay_before(tmp_path, *addresses))
            tasks = start(channel, *(f"{i % n_experts} n={tokens} gap=0.05" for i in range(n)))
            await asyncio.sleep(2)
            victim.kill()
            outcomes = await ended(tasks, 60)
            assert sum(seen.sent for one in stand_ins for seen in one.requests) == n * tokens * 3 // 4
            return outcomes

    with process_experts(1, tmp_path / "experts.log") as (victim,):
        outcomes = asyncio.run(run(victim))
    others = [one for one in outcomes if one.expert]
    assert ends(others) == {"OK": n * 3 // 4}
    assert {one.responses for one in others} == {tokens}
    assert set(ends(outcomes, 0)) <= {"INTERNAL", "UNAVAILABLE"}  # at most one end each: Outcome.end checks it
    assert len(outcomes) == n
    note(
        "expert killed under a relaying NGINX, 200 streams of 50 tokens", "mid-stream",
        "its 50 end with one status each, the others have all tokens", outcomes,
    )  # fmt: skip
