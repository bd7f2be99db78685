"""Two ways to serve a trained expert here: its adapter merged into an engine of its own, or put on a shared one.

Both answer the same prompts with the real Triton, and should say the same; the engine without adapter, and the adapter
with the factor that OpenVINO takes where nobody tells it PEFT's, are there to show that the comparison can fail. Memory
is what a server and its processes have to themselves, after the prompts; alone, that includes the engine's file and the
libraries, of which servers that run together have one copy. So all experts are started together, too.

    python -m benchmarks.served_experts [--profile laptop] [--set KEY=VALUE] [--prompts 10] [--tokens 32] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import grpc
import psutil

from erlib import config
from erlib.engines import build
from erlib.experts import arms, texts
from erlib.load import experiments, on_cores
from erlib.machine import hardware, processes
from erlib.serving import wire
from erlib.serving.triton import ServerPlan

BATCH, KV_BLOCKS, CLUSTER, PORT = 8, 64, 0, 26900


def measured(name: str, plan: ServerPlan, prompts: list[str], tokens: int, port: int) -> dict[str, Any]:
    """Start a server, ask it one prompt after the other, stop it."""
    with tempfile.TemporaryDirectory() as scratch:
        server = plan.server(name, port, Path(scratch), "127.0.0.1")
        started_s = time.monotonic()
        try:
            server.start()
            server.wait_ready(300)
            ready_s = time.monotonic() - started_s
            assert server.process is not None
            family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
            before_s = sum(sum(process.cpu_times()[:2]) for process in family)
            answers = [answer(server.url, prompt, tokens) for prompt in prompts]
            cpu_s = sum(sum(process.cpu_times()[:2]) for process in family) - before_s
            own = sum(process.memory_full_info().uss for process in family)
        finally:
            processes.stop([server.process] if server.process else [])
            server.clean_up()
    adapter = Path(plan.parameters["adapter"]) if "adapter" in plan.parameters else None
    return {
        "answers": answers,
        "ready_s": ready_s,
        "tokens_per_cpu_s": sum(map(len, answers)) / cpu_s,
        "own_memory_mb": own / 1e6,
        "engine_mb": size_mb(Path(plan.parameters["engine"])),
        "adapter_mb": size_mb(adapter) if adapter else 0.0,
    }


def together(plans: list[ServerPlan], prompt: str, tokens: int, port: int) -> dict[str, float]:
    """Start all servers, ask each one prompt, and add up their memory: what several share counts once (Linux' PSS)."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as started:
        servers = [plan.server(f"all-{i}", port + 10 * i, Path(scratch), "127.0.0.1") for i, plan in enumerate(plans)]
        for server in servers:
            started.callback(server.clean_up)
            server.start()
            assert server.process is not None
            started.callback(processes.stop, [server.process])
        for server in servers:
            server.wait_ready(600)
        for server in servers:
            answer(server.url, prompt, tokens)
        roots = [psutil.Process(server.process.pid) for server in servers if server.process]
        family = [process for root in roots for process in (root, *root.children(recursive=True))]
        return {
            "servers": len(servers),
            "memory_mb": sum(process.memory_full_info().pss for process in family) / 1e6,
            "own_memory_mb": sum(process.memory_full_info().uss for process in family) / 1e6,
        }


def answer(url: str, prompt: str, tokens: int) -> list[int]:
    """Token ids of one answer."""
    request = wire.encode_request(prompt, tokens, wire.NEVER_STOP)
    with grpc.insecure_channel(url) as channel:
        responses = channel.stream_stream(wire.STREAM_INFER)(iter([request]))
        return [token for response in map(wire.decode_response, responses) for token in response.token_ids]


def size_mb(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    profile = config.load_profile(options.profile, config.read_overrides(options.set))
    at = texts.on_own_corpus(profile)
    pool = experiments.build_workload(at, "p2").frame
    prompts = list(pool[pool["cluster"] == CLUSTER]["text"][: options.prompts])
    adapters = arms.adapters(profile, profile.clusterer.n_clusters)
    adapter = adapters[CLUSTER]
    (shared,) = build.build_all(profile, [("whole", "fp16")])
    (own,) = build.build_all(profile, [("whole", "fp16")], arms.merged(profile, adapter))
    base = on_cores.server_plan(shared.path, BATCH, KV_BLOCKS, "f16", hardware.cores())
    static = on_cores.with_adapter(base, adapter)
    as_read = dataclasses.replace(static, parameters={**static.parameters, "adapter_alpha": "1.0"})
    ways = {
        "merged": on_cores.server_plan(own.path, BATCH, KV_BLOCKS, "f16", hardware.cores()),
        "static": static,
        "static, factor as OpenVINO reads it": as_read,
        "no adapter": base,
    }
    found = {
        name: measured(f"experts-{i}", plan, prompts, options.tokens, PORT + 10 * i)
        for i, (name, plan) in enumerate(ways.items())
    }
    print(f"{len(prompts)} prompts, {options.tokens} tokens each, one after the other, on {hardware.machine()}")
    for name, row in found.items():
        same = sum(a == b for a, b in zip(row["answers"], found["merged"]["answers"], strict=True))
        print(
            f"  {name:<36} {same:3d} answers as merged, ready in {row['ready_s']:5.1f} s, "
            f"{row['tokens_per_cpu_s']:6.1f} tokens per CPU second, {row['own_memory_mb']:6.0f} MB of its own, "
            f"{row['engine_mb']:4.0f} MB engine, {row['adapter_mb']:4.1f} MB adapter"
        )
    plans = [on_cores.with_adapter(base, each) for each in adapters]
    all_of_them = together(plans, prompts[0], options.tokens, PORT + 100)
    print(
        f"  {all_of_them['servers']} servers together, static: {all_of_them['memory_mb'] / 1e3:.2f} GB, of which "
        f"{all_of_them['own_memory_mb'] / 1e3:.2f} GB are shared with nobody"
    )
    if options.json:
        options.json.write_text(json.dumps({**found, "together": all_of_them}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
