"""One question to three planners: this workbench, vllm-sr-sim (of vLLM's semantic router) and aiconfigurator (NVIDIA).

5,000 requests with the lengths that vllm-sr-sim bundles as Azure's, a Poisson process of 50 per second, a bound of p99
TTFT. How many H100s serve them, and how many requests per second do eight carry? Llama 3 8B FP16 with a GPU for each
engine, and Llama 3 70B FP16 over eight. Each peer gets an environment of its own from PyPI, made once.

``cpu_s`` is of the whole answer, for a peer with the start of its process. ``of_peak`` is what an answer takes for
granted: the arithmetic of its requests (two operations a token for every parameter of the layers' matrices) over what
the GPUs can do at most; more than 1 cannot be. Rates at which the trace would be over within ten times the bound of
TTFT are not asked about.

    python -m benchmarks.peers [--requests 5000] [--rate 50] [--into benchmarks/results/peers]
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import numpy as np
import pandas as pd
from tabulate import tabulate

from benchmarks import environments
from erlib import paths, provenance
from erlib.engines import llama
from erlib.load import metrics
from erlib.machine import hardware
from erlib.paper_scale import replay, service_levels, steptimes
from erlib.paper_scale.batching import System
from erlib.workload import traces
from erlib.workload.traces import Trace

GPUS, SLOTS, PRECISION = 8, 256, 1.05
PEAK_FLOPS = 989e12
"""Of an H100 SXM in FP16, without sparsity."""
PEERS = {"vllm-sr-sim": "0.1.0.dev20260713123629", "aiconfigurator": "0.12.0"}


class Case(NamedTuple):
    """What is served, as each tool names it."""

    title: str
    ours: str
    fleet_sim: str
    hugging_face: str
    width: int


CASES = (
    Case("Llama 3 8B FP16, a GPU each", "llama-3-8b", "LLAMA_3_1_8B", "meta-llama/Meta-Llama-3.1-8B", 1),
    Case("Llama 3 70B FP16, TP8", "llama-3-70b", "LLAMA_3_1_70B", "meta-llama/Meta-Llama-3.1-70B", 8),
)


def main() -> None:
    """Ask everybody, print the table, write it with what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--into", type=Path, default=paths.ROOT / "benchmarks" / "results" / "peers")
    options = parser.parse_args()
    pythons = {name: environments.from_pypi(name, version) for name, version in PEERS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        trace, dropped = azure_trace(pythons["vllm-sr-sim"], options.requests, options.rate, Path(scratch))
        rows = [
            {"case": case.title, "tool": tool, **timed(answer, case, trace, options.rate, pythons, Path(scratch))}
            for case in CASES
            for tool, answer in (
                ("this workbench", ask_ours),
                ("this workbench, mean lengths", ask_ours_at_the_mean),
                ("vllm-sr-sim", ask_fleet_sim),
                ("aiconfigurator", ask_aiconfigurator),
            )
        ]
    table = pd.DataFrame(rows)
    tokens = trace.input_tokens.mean() + trace.output_tokens.mean()
    flops = table["case"].map({case.title: 2 * llama.shape(case.ours).linear * tokens for case in CASES})
    table["of_peak"] = trace.requests_per_s * flops / (table["gpus"] * PEAK_FLOPS)
    table["of_peak_at_most"] = table["most_requests_per_s"] * flops / (GPUS * PEAK_FLOPS)
    print(tabulate(table, headers="keys", showindex=False, floatfmt=".3g"))
    about = {
        "asked": {"requests": len(trace), "requests_per_s": trace.requests_per_s},
        "mean_tokens": {"input": trace.input_tokens.mean(), "output": trace.output_tokens.mean()},
        "within": {"ttft_p99_s": service_levels.TTFT_S, "tpot_s": service_levels.TPOT_S},
        "rows_of_azures_format_that_vllm_sr_sim_reads": dropped,
        "versions": PEERS,
        "machine": hardware.machine(),
        "git_commit": provenance.git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    options.into.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.into / "peers.csv", index=False)
    (options.into / "peers.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def timed(answer: Callable[..., dict[str, Any]], *asked: Any) -> dict[str, Any]:
    """An answer, with the CPU seconds that it took, ours and the peer's: others may use this machine, too."""

    def spent_s() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    before = spent_s()
    return answer(*asked) | {"cpu_s": spent_s() - before}


def azure_trace(python: Path, requests: int, rate: float, scratch: Path) -> tuple[Trace, int]:
    """A trace in Azure's format with vllm-sr-sim's lengths, and how many of its rows vllm-sr-sim itself reads."""
    rows = _fleet_sim(python, {"workload": "azure", "requests": requests, "rate": rate})
    start, path = datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC), scratch / "azure.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for arrival_s, inputs, outputs in rows:
            when = start + timedelta(seconds=arrival_s)
            writer.writerow([f"{when:%Y-%m-%d %H:%M:%S.%f}0", int(inputs), int(outputs)])
    return traces.read(path), _fleet_sim(python, {"azure": str(path)})


def ask_ours(case: Case, trace: Trace, _: float, __: dict[str, Path], ___: Path) -> dict[str, Any]:
    """One model on all engines, requests in turn; TPOT has a bound, too, which changes nothing below saturation."""

    def rows(instances: int, its: Trace) -> pd.DataFrame:
        kv_tokens = llama.most_kv_tokens(case.ours, "fp16", "fp16", case.width)
        steps = steptimes.Table(case.ours, "fp16", "fp16", case.width)
        system = System(case.title, "replicas", steps, instances, SLOTS, kv_tokens)
        return replay.replay(system, *replay.asked(its, instances))

    def keeps(found: pd.DataFrame) -> bool:
        ttft_s, tpot_s = (
            found[name].fillna(0.0 if name == "tpot_s" else float("inf")) for name in ("ttft_s", "tpot_s")
        )
        return metrics.p99(ttft_s) <= service_levels.TTFT_S and metrics.p99(tpot_s) <= service_levels.TPOT_S

    instances = next(n for n in range(1, 17) if keeps(rows(n, trace)))
    then = rows(instances, trace)
    most = service_levels.most(lambda rate: keeps(rows(GPUS // case.width, trace.at_rate(rate))), PRECISION)
    return {
        **{"gpus": instances * case.width, "ttft_p99_s": metrics.p99(then["ttft_s"].dropna())},
        **{"tpot_p99_s": metrics.p99(then["tpot_s"].dropna()), "most_requests_per_s": most},
    }


def ask_ours_at_the_mean(
    case: Case, trace: Trace, rate: float, pythons: dict[str, Path], scratch: Path
) -> dict[str, Any]:
    """The same arrivals, all requests of the mean lengths: what a planner without lengths' distribution is asked."""
    inputs, outputs = (np.full(len(trace), round(its.mean())) for its in (trace.input_tokens, trace.output_tokens))
    return ask_ours(case, replace(trace, input_tokens=inputs, output_tokens=outputs), rate, pythons, scratch)


def ask_fleet_sim(case: Case, trace: Trace, _: float, pythons: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """Its discrete-event simulation of the same trace, with a profile that it computes of the same GPU and model."""
    path = scratch / "trace.jsonl"
    traces.write(trace, path)
    question = {"trace": str(path), "model": case.fleet_sim, "width": case.width, "slots": SLOTS, "gpus": GPUS}
    question["at_most"] = len(trace) / (10 * service_levels.TTFT_S)
    answer: dict[str, Any] = _fleet_sim(pythons["vllm-sr-sim"], question | {"ttft_s": service_levels.TTFT_S})
    return answer


def _fleet_sim(python: Path, question: dict[str, Any]) -> Any:
    script = Path(__file__).with_name("peers_fleet_sim.py")
    ran = subprocess.run([python, script], input=json.dumps(question), capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def ask_aiconfigurator(
    case: Case, trace: Trace, rate: float, pythons: dict[str, Path], scratch: Path
) -> dict[str, Any]:
    """Its search at the mean lengths, which is all that it takes; TTFT and TPOT are a batch's, not percentiles."""
    into = scratch / f"aiconfigurator-{case.width}"
    lengths = ["--isl", f"{trace.input_tokens.mean():.0f}", "--osl", f"{trace.output_tokens.mean():.0f}"]
    level = ["--ttft", f"{service_levels.TTFT_S * 1e3:g}", "--tpot", f"{service_levels.TPOT_S * 1e3:g}", "--strict-sla"]
    command = ["-m", "aiconfigurator.main", "cli", "recommend", "--model-path", case.hugging_face]
    command += ["--system", "h100_sxm", "--backend", "trtllm", "--target-request-rate", f"{rate:g}"]
    command += [*lengths, *level, "--save-dir", str(into)]
    subprocess.run([pythons["aiconfigurator"], *command], capture_output=True, text=True, check=True)
    (found,) = into.rglob("agg/best_config_topn.csv")
    best = pd.read_csv(found)
    if (best := best[best["num_total_gpus"] == case.width]).empty:
        return {}
    one = best.iloc[0]
    return {
        **{"gpus": int(one["total_gpus_needed"]), "ttft_s": one["ttft"] / 1e3, "tpot_s": one["tpot"] / 1e3},
        **{"most_requests_per_s": one["seq/s/gpu"] * GPUS},
    }


if __name__ == "__main__":
    main()
