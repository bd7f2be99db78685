"""Do all gateways decide alike, and does NGINX spread requests evenly?

Starts 16 gateways behind NGINX, sends prompts of the held-out corpus to each of them and through NGINX, both to be
relayed by a gateway and to be relayed by NGINX, and compares the expert that each names. One engine that only keeps
time stands for all experts.

    python benchmarks/gateways.py [--prompts 10000] [--gateways 16] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import grpc
import grpc.aio
import numpy as np
from tqdm import tqdm

from erlib import config
from erlib.machine import processes
from erlib.routing import building, clusterer
from erlib.serving import wire
from erlib.serving.nginx import Nginx
from erlib.workload import corpus

BASE_PORT = 26000
IN_FLIGHT = 64


async def decisions(url: str, prompts: list[str], progress: tqdm, relayed_by_nginx: bool = False) -> np.ndarray:
    """(gateway, expert) of every prompt as `url` routes it; int array (n, 2)."""
    sent = (wire.COMPLETE,) if relayed_by_nginx else ()
    seen = np.full((len(prompts), 2), -1)
    async with grpc.aio.insecure_channel(url, options=wire.CHANNEL_OPTIONS) as channel:
        infer = channel.unary_stream(wire.STREAM_INFER)
        numbers = iter(range(len(prompts)))

        async def one_after_the_other() -> None:
            for number in numbers:
                call = infer(wire.encode_request(prompts[number], 1, wire.NEVER_STOP), metadata=sent, timeout=60)
                metadata = dict(await call.initial_metadata())
                seen[number] = int(metadata["er-gateway"]), int(metadata["er-expert"])
                call.cancel()
                progress.update()

        await asyncio.gather(*(one_after_the_other() for _ in range(IN_FLIGHT)))
    return seen


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--gateways", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    profile = config.load_profile("laptop")
    router = building.build_clusterer(profile)
    texts = corpus.load_corpus(profile.corpus, profile.seed, "holdout").texts
    words = [text.split() for text in texts if len(text.split()) > 5]
    prompts = [" ".join(words[i % len(words)][i // len(words) * 7 :][:300]) or "x" for i in range(args.prompts)]
    expected = clusterer.Clusterer.load(router).predict(prompts)

    ports = [BASE_PORT + 1 + index for index in range(args.gateways)]
    asked_at = [BASE_PORT + 200 + index for index in range(args.gateways)]
    engine_ports = [BASE_PORT + 500, BASE_PORT + 501]
    processes.require_free_ports([BASE_PORT, *ports, *asked_at, *engine_ports])
    experts_at = [f"127.0.0.1:{engine_ports[0]}"] * profile.clusterer.n_clusters
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch)
        urls, questions = ([f"127.0.0.1:{port}" for port in each] for each in (ports, asked_at))
        nginx = Nginx(BASE_PORT, urls, logs, experts=experts_at, questions=questions)
        engine = processes.spawn(
            processes.python("-m", "benchmarks.paced", *map(str, engine_ports)),
            logs / "engine.log",
            stdin=subprocess.PIPE,
        )
        running = [
            processes.spawn(
                processes.python(
                    *("-m", "erlib.gateway", "--port", str(port), "--experts", ",".join(experts_at)),
                    *("--clusterer", router, "--index", str(index), "--insist-s", "30"),
                    *("--hands-over", str(asked_at[index])),
                ),
                logs / f"{index}.log",
            )
            for index, port in enumerate(ports)
        ]
        try:
            for index, (process, port) in enumerate(zip(running, ports, strict=True)):
                processes.wait_until(
                    partial(processes.listening, port), process, f"gateway {index}", logs / f"{index}.log", 60
                )
            nginx.start()
            with tqdm(total=(args.gateways + 2) * len(prompts), unit="request") as progress:
                each = [asyncio.run(decisions(f"127.0.0.1:{port}", prompts, progress)) for port in ports]
                balanced = asyncio.run(decisions(nginx.url, prompts, progress))
                relayed = asyncio.run(decisions(nginx.url, prompts, progress, relayed_by_nginx=True))
        finally:
            processes.stop([engine, *running, *([nginx.process] if nginx.process else [])])

    experts = np.array([seen[:, 1] for seen in each])
    shares, asked = (np.bincount(seen[:, 0], minlength=args.gateways) for seen in (balanced, relayed))
    result = {
        "prompts": len(prompts),
        "distinct_prompts": len(set(prompts)),
        "gateways": args.gateways,
        "prompts_with_one_expert_on_all_gateways": int((experts == experts[0]).all(axis=0).sum()),
        "agree_with_the_model": int((experts[0] == expected).sum()),
        "agree_through_nginx": int((balanced[:, 1] == expected).sum()),
        "requests_per_gateway_through_nginx": f"{shares.min()}..{shares.max()}",
        "agree_relayed_by_nginx": int((relayed[:, 1] == expected).sum()),
        "questions_per_gateway_relayed_by_nginx": f"{asked.min()}..{asked.max()}",
        "requests_per_expert": np.bincount(expected, minlength=profile.clusterer.n_clusters).tolist(),
    }
    for name, value in result.items():
        print(f"{name:<42} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
