"""A gateway as a process: limits, TLS, metrics, logs, and where it listens."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import grpc
import grpc.aio
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from erlib import paths
from erlib.gateway import experts
from erlib.gateway.limits import Limits, Peers, peer_of
from erlib.gateway.telemetry import Request, Telemetry
from erlib.serving import wire
from tests.support.gateways import ends, free_port, request, start
from tests.support.processes import gateway_command, gateway_process, metrics
from tests.support.standin_expert import eventually, setting, standin

PROMPT = "0 the colour of my secret is octarine"

METRIC = re.compile(r"\b(?:er|process)_\w+")


def test_a_prompt_that_is_too_long_is_refused_and_one_that_is_not_is_served():
    async def run():
        async with setting(1, limits=Limits(prompt_bytes=1000)) as (door, (expert,)):
            refused = await request(door.channel, "0 " + "x" * 999)
            huge = await request(door.channel, "0 " + "x" * 2_000_000)
            served = await request(door.channel, "0 " + "x" * 998)
            assert len(expert.requests) == 1
            return refused, huge, served

    refused, huge, served = asyncio.run(run())
    assert refused.ends == ["INVALID_ARGUMENT: the prompt has 1,001 bytes; at most 1,000 are taken"]
    assert huge.end == "RESOURCE_EXHAUSTED"  # by gRPC, which does not even read it
    assert served.end == "OK"


def test_a_peer_may_hold_so_many_streams_and_another_peer_is_not_affected():
    def of(peer):
        return {"metadata": (("x-real-ip", peer),)}

    async def run():
        async with setting(1, limits=Limits(streams_per_peer=3), behind_proxy=True) as (door, (expert,)):
            held = start(door.channel, *["0 n=20 gap=0.05"] * 3, **of("10.0.0.1"))
            await eventually(lambda: len(expert.requests) == 3)
            more = await asyncio.gather(*start(door.channel, *["0"] * 4, **of("10.0.0.1")))
            other = await asyncio.gather(*start(door.channel, "0", **of("10.0.0.2")))
            held = await asyncio.gather(*held)
            again = await asyncio.gather(*start(door.channel, "0", **of("10.0.0.1")))
            counted = door.gateway.telemetry.registry.get_sample_value
            refused = counted("er_errors_total", {"expert": "none", "kind": "RESOURCE_EXHAUSTED"})
            return [ends(outcomes) for outcomes in (held, more, other, again)], refused

    assert asyncio.run(run()) == ([{"OK": 3}, {"RESOURCE_EXHAUSTED": 4}, {"OK": 1}, {"OK": 1}], 4)


def test_a_peer_may_send_so_many_requests_per_second_over_all_its_streams():
    async def run():
        async with setting(1, limits=Limits(requests_per_s=5)) as (door, _):
            messages = [wire.encode_request("0 n=1", 1)] * 4
            one_stream = [wire.decode_response(one).error async for one in door.stream(*messages)]
            others = await asyncio.gather(*start(door.channel, *["0"] * 4))
            await asyncio.sleep(0.5)
            later = await asyncio.gather(*start(door.channel, *["0"] * 2))
            return one_stream, ends(others), ends(later)

    one_stream, others, later = asyncio.run(run())
    assert one_stream == [""] * 4
    assert others == {"OK": 1, "RESOURCE_EXHAUSTED": 3}
    assert later == {"OK": 2}


def test_a_gateway_may_hold_so_many_streams_of_all_peers():
    async def run():
        async with setting(1, max_streams=3) as (door, (expert,)):
            held = start(door.channel, *["0 n=20 gap=0.03"] * 3)
            await eventually(lambda: len(expert.requests) == 3)
            more = await asyncio.gather(*start(door.channel, *["0"] * 4))
            return ends(await asyncio.gather(*held)), ends(more)

    assert asyncio.run(run()) == ({"OK": 3}, {"RESOURCE_EXHAUSTED": 4})


def test_peers_that_come_and_go_leave_nothing_behind(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("erlib.gateway.limits.time.monotonic", lambda: next(clock) * 1e-3)
    peers = Peers(Limits(requests_per_s=1000))
    for number in range(20_000):
        with peers.stream(f"peer {number}"):
            peers.charge(f"peer {number}")
    assert len(peers._accounts) < 3000


@pytest.mark.parametrize(
    ("address", "behind_proxy", "peer"),
    [
        ("ipv4:10.1.2.3:5000", False, "10.1.2.3"),
        ("ipv6:%5B::1%5D:5000", False, "[::1]"),
        ("ipv4:127.0.0.1:5000", True, "192.0.2.7"),
        ("unix:", False, "unix:"),
    ],
)
def test_a_peer_is_a_host_or_whom_the_proxy_names(address, behind_proxy, peer):
    assert peer_of(address, {"x-real-ip": "192.0.2.7"}, behind_proxy) == peer


def exposed(*requests: Request) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of all that a gateway before two experts, one of which has two replicas, shows."""

    async def read() -> str:
        telemetry = Telemetry(experts.connect("127.0.0.1:1|127.0.0.1:2,127.0.0.1:3"))
        telemetry.watch(asyncio.get_running_loop())
        for one in requests:
            telemetry.note(one)
        return prometheus_client.generate_latest(telemetry.registry).decode()

    families = text_string_to_metric_families(asyncio.run(read()))
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


FAILED = Request("stream", "peer", expert=0, responses=3, retries=1, code="UNAVAILABLE", spans_ns={"svd": 1})

REFUSED = Request("unary", "peer", code="INVALID_ARGUMENT")


def expressions() -> list[str]:
    """What the dashboard asks for."""
    panels = json.loads((paths.ROOT / "docs" / "grafana.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_asks_for_metrics_that_there_are():
    known = {name for name, _, _ in exposed()}
    asked = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert asked
    assert asked <= known
    of_ours = {name for name in known if name.startswith("er_") and not name.endswith(("_created", "_sum", "_count"))}
    assert of_ours <= asked


def test_everything_that_the_dashboard_asks_for_is_of_the_chosen_job():
    for expression in expressions():
        for metric in METRIC.finditer(expression):
            assert expression[metric.end() :].startswith('{job=~"$job"'), expression


def test_every_metric_is_there_for_every_expert_before_anything_has_happened():
    """Else the first event is no increase, and what it is divided by is missing."""
    before, after = exposed(), exposed(FAILED, REFUSED)
    counted = {(name, *labels.values()): value for name, labels, value in before if name.endswith("_total")}
    assert {name for name, *_ in counted if name.startswith("er_")} == {
        f"er_{what}_total" for what in ("requests", "errors", "tokens", "retries")
    }
    assert not [name for name, value in counted.items() if value and name[0].startswith("er_")]
    new = {(name, *labels.values()) for name, labels, _ in after} - {
        (name, *labels.values()) for name, labels, _ in before
    }
    assert not new
    for expert in ("0", "1"):
        for name, *labels in (("retries",), ("tokens",), ("requests", "stream"), ("errors", "UNAVAILABLE")):
            assert (f"er_{name}_total", expert, *labels) in counted
    changed = {(name, *labels.values()) for name, labels, value in after if value and name.endswith("_total")}
    assert {name for name in changed if name[0].startswith("er_")} == {
        ("er_requests_total", "0", "stream"),
        ("er_requests_total", "none", "unary"),
        ("er_errors_total", "0", "UNAVAILABLE"),
        ("er_errors_total", "none", "INVALID_ARGUMENT"),
        ("er_tokens_total", "0"),
        ("er_retries_total", "0"),
    }


def test_metrics_and_log_lines_tell_what_happened_but_not_what_was_asked(tmp_path):
    log, metrics_port = tmp_path / "gateway.log", free_port()

    async def use(url: str) -> None:
        async with grpc.aio.insecure_channel(url) as channel:
            outcomes = await asyncio.gather(*start(channel, *[PROMPT] * 3, "0 fail_after=1", "0 error=no", "  0"))
            assert ends(outcomes) == {"OK": 4, "UNAVAILABLE": 1, "no": 1}
            await channel.unary_unary(wire.INFER)(wire.encode_request("0 n=1", 1))

    async def run() -> dict[tuple[str, ...], float]:
        async with standin() as expert:
            options = ["--metrics-port", str(metrics_port), "--log-level", "debug"]
            with gateway_process(log, expert.url, *options) as (url, process):
                await use(url)
                listeners = [one.laddr.ip for one in process.net_connections("tcp") if one.status == "LISTEN"]
                assert len(listeners) == 2
                assert {ip.removeprefix("::ffff:") for ip in listeners} == {"127.0.0.1"}  # unless told otherwise
                return await metrics(metrics_port)

    seen = asyncio.run(run())
    assert seen["er_requests_total", "0", "stream"] == 6
    assert seen["er_requests_total", "0", "unary"] == 1
    assert seen["er_errors_total", "0", "UNAVAILABLE"] == 1
    assert seen["er_errors_total", "0", "UNKNOWN"] == 1
    assert seen["er_tokens_total", "0"] == 4 * 3 + 1 + 1
    assert seen["er_streams",] == 0
    assert seen["er_span_seconds_count", "first_byte"] == 7
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert len(lines) == 7 == len(log.read_text().splitlines())
    assert sorted(line["code"] for line in lines) == ["OK"] * 6 + ["UNAVAILABLE"]
    assert {line["prompt_chars"] for line in lines} >= {len(PROMPT)}
    assert all(line["peer"] == "127.0.0.1" and line["total_ns"] > 0 for line in lines)
    assert "octarine" not in log.read_text() + str(seen)


def test_prompts_are_logged_if_asked_for(tmp_path):
    async def run() -> None:
        async with standin() as expert:
            with gateway_process(tmp_path / "log", expert.url, "--log-level", "debug", "--log-prompts") as (url, _):
                async with grpc.aio.insecure_channel(url) as channel:
                    await request(channel, PROMPT)

    asyncio.run(run())
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["prompt"] == PROMPT


@pytest.fixture(scope="module")
def pems(tmp_path_factory) -> Path:
    """A directory with an authority, a certificate of this host's and one of a client's."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificates, is not installed")
    directory = tmp_path_factory.mktemp("pems")

    def make(name: str, *more: str) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem", *more]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)

    make("authority")
    for name in ("host", "client"):
        make(name, "-CA", "authority.pem", "-CAkey", "authority.key", "-addext", "subjectAltName=IP:127.0.0.1")
    make("stranger")
    return directory


def test_tls_is_spoken_with_clients_and_experts_and_only_with_those_who_can_prove_who_they_are(pems, tmp_path):
    """mTLS on both sides."""
    pem = {path.name: path.read_bytes() for path in pems.iterdir()}
    server = grpc.ssl_server_credentials([(pem["host.key"], pem["host.pem"])], pem["authority.pem"], True)

    async def one(url: str, credentials: grpc.ChannelCredentials | None) -> str:
        channel = (
            grpc.aio.secure_channel(url, credentials) if credentials else grpc.aio.insecure_channel(url)
        )  # fmt: skip
        async with channel:
            return (await request(channel, "0", timeout=10)).end

    async def run() -> list[str]:
        async with standin(credentials=server) as expert:
            ours = ["--tls-certificate", pems / "host.pem", "--tls-key", pems / "host.key"]
            ours += ["--tls-client-ca", pems / "authority.pem", "--expert-ca", pems / "authority.pem"]
            ours += ["--expert-client-certificate", pems / "client.pem", "--expert-client-key", pems / "client.key"]
            with gateway_process(tmp_path / "log", expert.url, *ours) as (url, _):
                known = grpc.ssl_channel_credentials(pem["authority.pem"], pem["client.key"], pem["client.pem"])
                stranger = grpc.ssl_channel_credentials(pem["authority.pem"], pem["stranger.key"], pem["stranger.pem"])
                nobody = grpc.ssl_channel_credentials(pem["authority.pem"])
                return [await one(url, credentials) for credentials in (known, stranger, nobody, None)]

    assert asyncio.run(run()) == ["OK", "UNAVAILABLE", "UNAVAILABLE", "UNAVAILABLE"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--port {taken}", "cannot listen at 127.0.0.1:{taken}: the port is in use"),
        ("--metrics-port {taken}", "cannot serve metrics at 127.0.0.1:{taken}"),
        ("--experts a", "an expert's address is HOST:PORT, not 'a'"),
        ("--experts a:1,,b:1", "an expert's address is HOST:PORT, not ''"),
        ("--experts a:1|b:x", "an expert's address is HOST:PORT, not 'b:x'"),
        ("--policy classify --clusterer nowhere", "nowhere holds no readable clusterer"),
        ("--policy embeddings --clusterer nowhere", "nowhere holds no sentence-embedding model"),
        ("--tls-client-ca authority.pem", "--tls-client-ca needs --tls-certificate"),
        ("--tls-key host.key", "--tls-certificate and --tls-key go together"),
        ("--tls-certificate no.pem --tls-key no.key", "no.key"),
        ("--expert-client-key client.key", "--expert-client-certificate and --expert-client-key go together"),
        ("--expert-client-certificate c --expert-client-key c", "--expert-client-certificate needs --expert-ca"),
        ("--max-requests-per-s 0", "--max-requests-per-s: must be more than 0, not 0"),
        ("--max-waiting-per-stream 0", "--max-waiting-per-stream: must be more than 0, not 0"),
        ("--silence-s nan", "--silence-s: must be more than 0, not nan"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(options, reason, tmp_path):
    """Least of all is plain text spoken where TLS was asked for."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = taken.getsockname()[1]
        command = [*gateway_command(free_port()), "--experts", "127.0.0.1:1", *options.format(taken=at).split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert reason.format(taken=at) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
