"""How far can the simulation be trusted? Beside NVIDIA's own simulator and beside throughputs that NVIDIA published.

Both references are files that are not part of this repository:

- a JSON object ``{"P1A-200": {"thr": ..., "ttft": ..., "tpot": ..., "p99": ...}, ...}``: AISimulate's results for 200
  users who start together, one request each, constant lengths (335 + 1,200 tokens in paper 1, 294 + 300 in paper 2);
  tokens/s and seconds. p1.B and p2.D differ by design: AISimulate prices their weight-only GEMMs as FP16, the table
  here was distilled from measurements of them.
- a CSV ``model,tensor_parallel,input_tokens,output_tokens,requests,output_tokens_per_s`` of the "performance overview"
  of TensorRT-LLM 0.17: H100, FP8, all requests submitted at once.

    python -m benchmarks.simulation DIRECTORY [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from erlib import batching, engines, simulation, steptimes
from erlib.prompts import FORCED, Prompt

GOLDEN, PUBLISHED = "aisimulate_golden_200_users.json", "trtllm_0_17_h100_fp8_offline_throughput.csv"
OTHER_SOURCE = ("p1.B", "p2.D")
"""Configurations whose GEMM times AISimulate borrows."""
LENGTHS = {"p1": (335, 1200), "p2": (294, 300)}
LONGEST_PROMPT = 8192
MAX_BATCH = 4096


def all_at_once(system: batching.System, requests: int, input_tokens: int, output_tokens: int) -> dict[str, float]:
    """Requests of equal lengths, evenly spread over the instances, all submitted at once.

    Returns
    -------
    dict
        ``thr`` output tokens/s, ``ttft`` and ``tpot`` (means) and ``p99`` (response time) in seconds.
    """
    drawn = [Prompt(n, n % system.instances, "", input_tokens, output_tokens, FORCED) for n in range(requests)]
    stamps = simulation.trace(system, drawn, continues=False).token_ns()
    first, last = (np.array([tokens[i] for tokens in stamps]) * 1e-9 for i in (0, -1))
    return {
        "thr": requests * output_tokens / last.max(),
        "ttft": first.mean(),
        "tpot": ((last - first) / (output_tokens - 1)).mean(),
        "p99": float(np.percentile(last, 99)),
    }


def against_aisimulate(golden: Path) -> pd.DataFrame:
    """One row per point: simulated values, and the relative difference of each from AISimulate's."""
    rows = []
    for key, reference in json.loads(golden.read_text()).items():
        name = f"{key[:2].lower()}.{key[2]}"
        ours = all_at_once(batching.paper_system(name), int(key.split("-")[1]), *LENGTHS[name[:2]])
        off = {f"{metric}_off": ours[metric] / reference[metric] - 1 for metric in reference}
        rows.append({"config": name, **ours, **off})
    return pd.DataFrame(rows).set_index("config")


def against_published(published: Path) -> pd.DataFrame:
    """The published points whose prompts fit into one step, with ``simulated`` tokens/s and their ``ratio``."""
    points = pd.read_csv(published)
    points = points[points["input_tokens"] <= LONGEST_PROMPT].reset_index(drop=True)
    simulated = []
    for point in tqdm(list(points.itertuples()), unit="point", leave=False):
        # Llama 3.1 has the shapes of Llama 3
        model, tensor_parallel = point.model.replace("3.1", "3"), int(point.tensor_parallel)
        system = batching.System(
            config=f"{point.model} TP{tensor_parallel}",
            routing="direct",
            steps=steptimes.Table(model, "fp8", "fp8", tensor_parallel),
            instances=1,
            batch_size=MAX_BATCH,
            kv_tokens=engines.most_kv_tokens(model, "fp8", "fp8", tensor_parallel),
        )
        simulated.append(all_at_once(system, point.requests, point.input_tokens, point.output_tokens)["thr"])
    return points.assign(simulated=simulated, ratio=simulated / points["output_tokens_per_s"])


def mape(ratio: pd.Series) -> float:
    """Mean absolute relative error."""
    return float((ratio - 1).abs().mean())


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help=f"where {GOLDEN} and {PUBLISHED} are")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    missing = [name for name in (GOLDEN, PUBLISHED) if not (arguments.directory / name).exists()]
    if missing:
        parser.error(f"{arguments.directory} lacks {' and '.join(missing)}")
    started = time.perf_counter()
    golden, published = (
        against_aisimulate(arguments.directory / GOLDEN),
        against_published(arguments.directory / PUBLISHED),
    )
    off = golden.filter(like="_off")
    print("difference from AISimulate, 200 users at once (thr: tokens/s of the system, p99: response time)\n")
    print(off.map("{:+.2%}".format).to_string())
    same = ~golden.index.isin(OTHER_SOURCE)
    held = off[["thr_off", "tpot_off", "p99_off"]].abs()
    print(f"\nlargest of thr, tpot, p99: {held[same].max(axis=None):.2%} where both use the same measurements, ")
    print(f"{held[~same].max(axis=None):.2%} for {' and '.join(OTHER_SOURCE)}\n")
    print("simulated over published throughput, TensorRT-LLM 0.17, H100 FP8, all requests at once\n")
    print(published.to_string(index=False, float_format="{:.2f}".format))
    by_tp = published.groupby(["model", "tensor_parallel"])["ratio"].agg(points="size", mape=mape)
    print(f"\n{by_tp.to_string(float_format='{:.3f}'.format)}\n")
    geometric = float(np.exp(np.log(published["ratio"]).mean()))
    print(f"{len(published)} points: MAPE {mape(published['ratio']):.1%}, geometric mean {geometric:.3f}", end="; ")
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.json:
        result = {
            "aisimulate": golden.to_dict("index"),
            "published": published.to_dict("records"),
            "published_mape": mape(published["ratio"]),
            "published_geometric_mean": geometric,
        }
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
