"""What does a host pay for a streamed token? The papers' ensemble on real Triton, bound to cores or not.

Open MPI's ``mpirun -n 1`` binds a job of one or two processes to a core, with all that they start; jobs that know
nothing of each other get the same one; a job of more than two gets a socket. NVIDIA's own script starts Triton with
it. Eight servers that were started so share a core of a DGX with all their Python processes, while an engine on eight
GPUs has half of the machine. Whether the papers' authors started their servers so, they do not say.

If they did, then, whatever the engines:

1. eight servers on one core do not carry more tokens per second with more users, once the core is busy;
2. what they carry is of the size of paper 1's 200 to 2,000 tokens per second, and TPOT at 200 users of its 0.1 s;
3. two cores carry more than one.

It is refuted as an explanation if eight servers on one core carry more than twice 2,000 tokens per second (taking
it that no core of the papers' machine is half as fast as this one), if they carry ever more with more users, or if
two cores carry no more. It cannot explain a difference between routed systems that differ in nothing but the model.

In an engine's place stands a model that only keeps time (a step of 20 ms): its CPU time, which is Python's and not
TensorRT-LLM's, is written apart and counts for nothing. The users, one process, have the last core; where servers have
all cores, they share it. For each condition servers are started anew, under the binding that they run with; users ask
again and again until the time is up. Rows that are in the file already are not measured again.

    python -m benchmarks.host_binding [--rounds N] [--users N ...] [--conditions NAME ...] [--file FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import grpc.aio
import numpy as np
import pandas as pd
import psutil
from tqdm import tqdm

from benchmarks.cpu import bound, process_cpu_s
from benchmarks.on_cpu import ServerOnCpu
from erlib import cache, config, paths, provenance
from erlib.dgx import repository, tensorrt_llm
from erlib.engines import checkpoint
from erlib.machine import processes
from erlib.serving import triton, wire
from erlib.workload import corpus

USERS = (1, 8, 25, 50, 100, 200)
SYSTEM = "p1.B"
PROMPT_WORDS = 335  # of the papers' base prompts
ANSWER_TOKENS = 60
STEP_S = 0.02
SETTLE_S, SECONDS = 3.0, 10.0
ANSWER_TIMEOUT_S = 120
START_TIMEOUT_S = 600
BASE_PORT = 26000
PROGRAMS = ("tritonserver", *repository.MODELS[:3])
"""Whose CPU time is written: the server's own process, and the Python processes of its models."""


class Condition(NamedTuple):
    """How servers are started."""

    servers: int
    cores: int
    """That all of them share."""
    processes: int
    """Of preprocessing and of postprocessing each, per server."""
    tokens_per_response: int


CONDITIONS = {
    "one core": Condition(8, 1, 1, 1),
    "two cores": Condition(8, 2, 1, 1),
    "one core, 8 processes": Condition(8, 1, 8, 1),
    "two cores, 8 processes": Condition(8, 2, 8, 1),
    "one core, every 8th token": Condition(8, 1, 1, 8),
    "two cores, every 8th token": Condition(8, 2, 1, 8),
    "one core, 8 processes, every 8th token": Condition(8, 1, 8, 8),
    "two cores, 8 processes, every 8th token": Condition(8, 2, 8, 8),
    "one server, two cores": Condition(1, 2, 1, 1),
    "one server, two cores, 8 processes": Condition(1, 2, 8, 1),
}
"""Eight servers: the routed systems. One: an engine on all GPUs."""


@contextlib.contextmanager
def running(condition: Condition, tokenizer: Path, work: Path) -> Iterator[list[ServerOnCpu]]:
    """Servers that answer, bound to the first cores; gone after the block."""
    plan = tensorrt_llm.plan(config.load_profile("dgx-h100"), config.load_configuration(SYSTEM))
    models = repository.render(plan, tokenizer, work / "models", n_processes=condition.processes)
    engine = models / repository.ENGINE_MODEL
    shutil.copy(Path(__file__).with_name("engine_on_time.py"), engine / "1" / "model.py")
    said = (engine / "config.pbtxt").read_text(encoding="utf-8").replace('backend: "tensorrtllm"', 'backend: "python"')
    for key, value in (("step_s", STEP_S), ("tokens_per_response", condition.tokens_per_response)):
        said += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    (engine / "config.pbtxt").write_text(said, encoding="utf-8")
    ports = [BASE_PORT + i * triton.TritonServer.PORTS for i in range(condition.servers)]
    servers = [ServerOnCpu(f"server {i}", models, port, work) for i, port in enumerate(ports)]
    try:
        with bound(set(range(condition.cores))):
            for server in servers:
                server.start()
        for server in servers:
            server.wait_ready(START_TIMEOUT_S)
        yield servers
    finally:
        processes.stop([server.process for server in servers if server.process], 0)
        for server in servers:
            server.clean_up()


@dataclass
class Heard:
    """What users have heard until now; times in seconds."""

    tokens: int = 0
    responses: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    """Of answers that have ended."""


async def point(servers: Sequence[ServerOnCpu], users: int, prompts: Sequence[str]) -> dict[str, float]:
    """Let users come at once and ask again and again; what happened in the :data:`SECONDS` after they settled."""
    heard, over = Heard(), asyncio.Event()
    pids = _pids(servers)
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(server.url, options=wire.CHANNEL_OPTIONS))
            for server in servers
        ]
        async with asyncio.TaskGroup() as everybody:
            for user in range(users):
                channel, prompt = channels[user % len(channels)], prompts[user % len(prompts)]
                everybody.create_task(_ask_until(over, channel, prompt, heard))
            while len(heard.ttft_s) < users:
                await asyncio.sleep(0.05)
            first_s = heard.ttft_s[:users]
            await asyncio.sleep(SETTLE_S)
            tokens, responses, answers = heard.tokens, heard.responses, len(heard.tpot_s)
            cpu_s, own_s, began_s = _cpu_s(pids), time.process_time(), time.monotonic()
            await asyncio.sleep(SECONDS)
            seconds = time.monotonic() - began_s
            spent_s = {name: after - cpu_s[name] for name, after in _cpu_s(pids).items()}
            own_s = time.process_time() - own_s
            tokens, responses, tpot_s = heard.tokens - tokens, heard.responses - responses, heard.tpot_s[answers:]
            over.set()
    return {
        "tokens_per_s": tokens / seconds,
        "responses_per_s": responses / seconds,
        "tpot_mean_s": float(np.mean(tpot_s)) if tpot_s else float("nan"),
        "ttft_mean_s": float(np.mean(first_s)),
        **{f"{name}_us_per_token": 1e6 * spent / tokens for name, spent in spent_s.items()},
        "users_us_per_token": 1e6 * own_s / tokens,
        "busy_cores": sum(spent_s.values()) / seconds,
    }


async def _ask_until(over: asyncio.Event, channel: grpc.aio.Channel, prompt: str, heard: Heard) -> None:
    call = channel.stream_stream(wire.STREAM_INFER)
    while not over.is_set():
        sent_s, first_s, answer = time.monotonic(), 0.0, 0
        async for message in call(
            iter([wire.encode_request(prompt, ANSWER_TOKENS, wire.NEVER_STOP)]), timeout=ANSWER_TIMEOUT_S
        ):
            response = wire.decode_response(message)
            if response.error:
                raise processes.StartError(f"a server answers {response.error}")
            now_s = time.monotonic()
            if not answer:
                first_s = now_s
                heard.ttft_s.append(now_s - sent_s)
                at_once = len(response.token_ids)
            answer += len(response.token_ids)
            heard.tokens += len(response.token_ids)
            heard.responses += 1
        heard.tpot_s.append((now_s - first_s) / (answer - at_once))


def _pids(servers: Sequence[ServerOnCpu]) -> dict[str, list[int]]:
    """Process ids by program."""
    found: dict[str, list[int]] = {name: [] for name in PROGRAMS}
    for server in servers:
        assert server.process is not None
        top = psutil.Process(server.process.pid)
        for member in (top, *top.children(recursive=True)):
            words = " ".join(member.cmdline())
            # a Python process of a model has the path of its code among its arguments
            model = next((name for name in PROGRAMS[1:] if f"/{name}/" in words), PROGRAMS[0])
            found[model].append(member.pid)
    return found


def _cpu_s(pids: dict[str, list[int]]) -> dict[str, float]:
    return {name: sum(map(process_cpu_s, its)) for name, its in pids.items()}


def main() -> None:
    """Measure what is missing in the file, print each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    parser.add_argument("--file", type=Path, default=paths.RUNS / "benchmarks" / "host_binding.csv")
    options = parser.parse_args()
    processes.end_on_signals()

    cores = sorted(os.sched_getaffinity(0))
    if cores[:2] != [0, 1]:
        parser.error(f"servers are bound to the machine's first two cores; this process may use {cores} only")
    profile = config.load_profile("laptop")
    tokenizer = checkpoint.checkpoint(profile.engines)
    texts = corpus.load_corpus(profile.corpus, profile.seed, "holdout").texts
    prompts = [" ".join(words[:PROMPT_WORDS]) for text in texts if len(words := text.split()) >= PROMPT_WORDS]
    about = provenance.columns()
    os.sched_setaffinity(0, {cores[-1]})
    rows = pd.read_csv(options.file).to_dict("records") if options.file.exists() else []
    known = {(*(row[name] for name in Condition._fields), row["users"], row["round"]) for row in rows}
    wanted = [(name, n) for n in range(options.rounds) for name in options.conditions]
    with tqdm(total=len(wanted) * len(options.users), unit="point") as progress:
        for name, n in wanted:
            condition = CONDITIONS[name]
            todo = [users for users in options.users if (*condition, users, n) not in known]
            progress.set_description(f"{name}, round {n}")
            progress.update(len(options.users) - len(todo))
            if not todo:
                continue
            with (
                tempfile.TemporaryDirectory(prefix="host-binding-") as work,
                running(condition, tokenizer, Path(work)) as servers,
            ):
                for users in todo:
                    seen = asyncio.run(point(servers, users, prompts))
                    key = {**condition._asdict(), "users": users, "round": n, "answer_tokens": ANSWER_TOKENS}
                    tqdm.write("  ".join(f"{what} {value:.4g}" for what, value in seen.items()))
                    rows.append({**key, **seen, **about})
                    with cache.writing(options.file) as partial:
                        pd.DataFrame(rows).to_csv(partial, index=False)
                    progress.update()


if __name__ == "__main__":
    main()
