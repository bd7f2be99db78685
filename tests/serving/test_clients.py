"""Clients of others against what serve.py serves: load generators as README calls them, and the usual libraries.

Load generators have environments of their own, made of their locks and kept; where that cannot be, their tests skip.
"""

import json
import os
import queue
import re
import shlex
import subprocess
import sys
import urllib.request

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton_client
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.environments import environment
from erlib import paths
from erlib.machine import processes
from erlib.machine.processes import StartError
from tests.support.ports import BASE_PORT

pytestmark = pytest.mark.slow

PORT, SYSTEM, METRICS = BASE_PORT + 520, BASE_PORT + 530, BASE_PORT + 580
REQUESTS = 20
ANSWER = 20
"""Tokens of each, as README asks for them."""
PROMPT = "The goalie stopped thirty shots and the team went home with two points"


@pytest.fixture(scope="module", params=["front", "gateway"])
def relay(request):
    """Who takes the tokens to the client."""
    return request.param


@pytest.fixture(scope="module")
def served(tmp_path_factory, relay):
    """What serve.py prints of a small system, by the word before the colon."""
    home = tmp_path_factory.mktemp("home")
    (home / "engines").mkdir()
    for made, link in ((paths.CACHE, home / "cache"), (paths.ENGINE_BUILDS, home / "engines" / "build")):
        made.mkdir(parents=True, exist_ok=True)
        link.symlink_to(made)
    log = home / "serve.log"
    settings = ["--profile", "smoke", "--set", f"serving.base_port={SYSTEM}", "scale.tokens=4"]
    settings += ["serving.start_timeout_s=600", f"serving.relay={relay}"]
    command = [sys.executable, paths.ROOT / "scripts" / "serve.py", "p2.E", *settings]
    command += ["--openai", str(PORT), "--metrics", str(METRICS)]
    process = processes.spawn(command, log, env={"ERLIB_HOME": str(home), "PYTHONPATH": str(paths.ROOT)})
    try:
        processes.wait_until(lambda: "Ctrl-C" in processes.tail(log, 1), process, "serve.py", log, 600)
        yield dict(line.split(": ", 1) for line in log.read_text().splitlines() if ": " in line)
    finally:
        processes.stop([process], grace_s=30)


@pytest.fixture
def counted(served, relay):
    """Whether the gateways have counted so many requests and tokens since the test began, and no error."""

    scraped = served["Prometheus scrapes, of every gateway, http://HOST:PORT/metrics"]

    def count():
        sums = dict.fromkeys(("er_requests_total", "er_errors_total", "er_tokens_total"), 0.0)
        for address in re.findall(r"[\d.]+:\d+", scraped):
            with urllib.request.urlopen(f"http://{address}/metrics") as reply:
                families = list(text_string_to_metric_families(reply.read().decode()))
            for sample in (sample for family in families for sample in family.samples if sample.name in sums):
                sums[sample.name] += sample.value
        return np.array(list(sums.values()))

    before = count()

    def check(requests, tokens):
        relayed = tokens if relay == "gateway" else 0  # they do not see what NGINX relays
        assert (count() - before).astype(int).tolist() == [requests, 0, relayed]

    return check


@pytest.fixture
def as_in_readme(served, tmp_path):
    """Runs a command that README gives, from the environment that `locks` make, in a folder of its own."""

    def run(name, *locks):
        try:
            python = environment(*locks)
        except StartError as error:
            pytest.skip(str(error))
        (command,) = re.findall(rf"^{name} (?:.*\\\n)*.*$", (paths.ROOT / "README.md").read_text(), re.MULTILINE)
        command = command.replace(":9000", f":{PORT}").replace("TOKENIZER", shlex.quote(served["tokenizer"]))
        words = shlex.split(command.replace("\\\n", " "))
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        alone |= {"HOME": str(tmp_path)}
        ended = subprocess.run(
            [python.with_name(words[0]), *words[1:]],
            cwd=tmp_path, env=alone, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]

    return run


def test_aiperf(as_in_readme, counted, tmp_path):
    as_in_readme("aiperf", "aiperf")
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    told = json.loads(report.read_text())
    assert (told["request_count"]["avg"], told["error_summary"]) == (REQUESTS, [])
    tokens = REQUESTS * ANSWER
    assert told["total_output_tokens"]["avg"] == told["total_usage_completion_tokens"]["avg"] == tokens
    assert told["inter_chunk_latency"]["count"] == tokens - REQUESTS  # no event that is no token
    counted(REQUESTS, tokens)


def test_guidellm(as_in_readme, counted, tmp_path):
    as_in_readme("guidellm", "torch", "guidellm")
    (report,) = tmp_path.rglob("benchmarks.json")
    (told,) = (benchmark["metrics"] for benchmark in json.loads(report.read_text())["benchmarks"])
    assert told["request_totals"] == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    tokens = REQUESTS * ANSWER
    assert told["output_token_count"]["successful"]["total_sum"] == tokens
    assert told["inter_token_latency_ms"]["successful"]["count"] == tokens - REQUESTS
    counted(REQUESTS, tokens)


def test_openai(counted):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0) as client:
        asked = {"model": "expert-router", "max_tokens": 12, "extra_body": {"ignore_eos": True}}
        chat = client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **asked)
        stream = client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked)
        usages = [event.usage for event in stream if event.usage]
    assert [usage.completion_tokens for usage in (chat.usage, *usages)] == [12, 12]
    counted(2, 24)


def test_litellm(counted):
    try:
        python = environment("litellm")
    except StartError as error:
        pytest.skip(str(error))
    code = f"""
import litellm
asked = dict(model="openai/expert-router", api_base="http://127.0.0.1:{PORT}/v1", api_key="none", max_tokens=12,
             messages=[{{"role": "user", "content": {PROMPT!r}}}], extra_body={{"ignore_eos": True}})
print(litellm.completion(**asked).usage.completion_tokens)
events = list(litellm.completion(stream=True, stream_options={{"include_usage": True}}, **asked))
print(events[-1].usage.completion_tokens)
"""
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    ended = subprocess.run([python, "-c", code], env=alone, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.split() == ["12", "12"]
    counted(2, 24)


def test_tritonclient(served):
    def inputs(stream):
        tensors = {"text_input": ([[PROMPT.encode()]], np.object_, "BYTES"), "max_tokens": ([[12]], np.int32, "INT32")}
        tensors |= {"stream": ([[stream]], np.bool_, "BOOL"), "end_id": ([[-1]], np.int32, "INT32")}
        for name, (value, kind, datatype) in tensors.items():
            tensor = triton_client.InferInput(name, [1, 1], datatype)
            tensor.set_data_from_numpy(np.array(value, kind))
            yield tensor

    replies = queue.Queue()
    with triton_client.InferenceServerClient(served["gRPC (KServe v2, model ensemble)"]) as client:
        whole = client.infer("ensemble", list(inputs(False)))
        client.start_stream(lambda result, error: replies.put(error or result.as_numpy("output_ids")))
        client.async_stream_infer("ensemble", list(inputs(True)))
        tokens = [replies.get(timeout=60) for _ in range(12)]
    assert np.ravel(tokens).tolist() == whole.as_numpy("output_ids").ravel().tolist()
