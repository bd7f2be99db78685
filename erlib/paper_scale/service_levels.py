"""How much of each system can be used: users and requests that it serves within a service level, per GPU and price.

The papers' systems stand beside some that they left out: the same large model on every GPU without classification, two
tensor-parallel engines behind the router, and the small model on all GPUs together. A service level is MLPerf's for
Llama 2 70B unless another one is asked for; it is met where the p99 of both latencies keeps to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from erlib import cache, config, paths, provenance
from erlib.config import Dtype, Paper, Profile
from erlib.engines import llama
from erlib.load import metrics
from erlib.machine import processes
from erlib.machine.progress import Bar
from erlib.paper_scale import batching, clock, setups
from erlib.paper_scale.batching import System
from erlib.paper_scale.clock import HARDWARE
from erlib.paper_scale.steptimes import Table
from erlib.workload import prompts
from erlib.workload.prompts import Floats, Prompt, Workload

TTFT_S, TPOT_S = 2.0, 0.2
"""MLPerf Inference, Llama 2 70B, server scenario: bounds of the p99."""
GPUS = 8
LOADS = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3)
"""Of what a system carries within the level."""
_MOST = 20_000
_SMALL = "llama-2-13b"
"""Paper 1's smaller model, which it never has on all GPUs together."""


def systems(profile: Profile) -> dict[Paper, dict[str, System]]:
    """Systems on eight H100s that answer each paper's prompts, by what they are called; last those that it left out.

    What is left out has the batch size of the paper's system that is most like it, and all the KV cache that fits.
    """
    limit = profile.workload.p2_max_output_tokens
    p1 = {name: batching.paper_system(name) for name in setups.CONFIGS if config.paper_of(name) == "p1"}
    p2 = {name: batching.paper_system(name, limit) for name in setups.CONFIGS if config.paper_of(name) == "p2"}
    fp8, fp8_kv_tokens = Table("llama-3-70b", "fp8", "fp8", 1), llama.most_kv_tokens("llama-3-70b", "fp8", "fp8", 1)
    p1 |= {"8 × 70B INT8 in turn": replace(p1["p1.B"], routing="replicas")}
    p1 |= {"13B FP16 TP8": _on_all_gpus("fp16"), "13B FP8 TP8": _on_all_gpus("fp8")}
    p2 |= {
        "2 × 70B FP8 TP4 (Expert Router)": replace(p2["p2.C"], routing="expert_router"),
        "8 × 70B INT4 in turn": replace(p2["p2.D"], routing="replicas"),
        "8 × 70B FP8 in turn": replace(p2["p2.D"], routing="replicas", steps=fp8, kv_tokens=fp8_kv_tokens),
    }
    return {"p1": p1, "p2": p2}


def _on_all_gpus(dtype: Dtype) -> System:
    return System(
        config=f"13B {dtype} TP8",
        routing="direct",
        steps=Table(_SMALL, dtype, dtype, GPUS, setups.BESIDE),
        instances=1,
        batch_size=600,
        kv_tokens=llama.most_kv_tokens(_SMALL, dtype, dtype, GPUS),
    )


def goodput(profile: Profile, ttft_s: float = TTFT_S, tpot_s: float = TPOT_S, workers: int = 2) -> pd.DataFrame:
    """What each system serves within a service level, base prompts only.

    Parameters
    ----------
    profile : Profile
        Gives the seed and, in ``sensitivity``, repeats and the price of a GPU's hour.
    ttft_s, tpot_s : float
        Bounds of the p99 of TTFT and TPOT, in seconds.
    workers : int
        Processes.

    Returns
    -------
    DataFrame
        One row per ``paper``, ``system``, ``repeat``: ``users`` (the most that may all ask in the same moment, one
        prompt each), ``users_per_gpu``, ``requests_per_s`` (the most of a Poisson process),
        ``tokens_per_gpu_hour`` (output tokens at this rate), ``price_per_million_tokens`` (in the currency of
        ``sensitivity.gpu_hour``). Zero, and no price, where a lone user's request is not served within the level.
    """
    settings = profile.sensitivity
    own = provenance.code_digest("paper_scale/service_levels.py", "load/metrics.py")
    digest = cache.digest(setups.given(profile), own, settings.model_dump(), ttft_s, tpot_s)
    file = paths.run_dir(profile.name) / "simulated" / "sensitivity" / f"goodput-{digest}.parquet"
    if (kept := cache.recalled(file, pd.read_parquet, "goodput")) is not None:
        return kept
    with processes.pool(workers) as pool:
        jobs = [
            pool.submit(_served, profile, paper, name, its, repeat, (ttft_s, tpot_s))
            for paper, known in systems(profile).items()
            for name, its in known.items()
            for repeat in range(settings.repeats)
        ]
        table = pd.DataFrame([job.result() for job in Bar(jobs, desc="goodput", unit="system")])
    with cache.writing(file) as partial:
        table.to_parquet(partial)
    return table


def _served(
    profile: Profile, paper: Paper, name: str, system: System, repeat: int, level: tuple[float, float]
) -> dict[str, object]:
    pool, window_s = setups.workload(profile, paper), _window_s(profile, paper)

    def keeps(n: int, arrivals_s: float) -> bool:
        found = latencies(system, _drawn(profile, pool, system, n, repeat), arrivals_s, profile.seed + repeat)
        return all(metrics.p99(its) <= bound for its, bound in zip(found, level, strict=True) if len(its))

    within = profile.sensitivity.precision
    users, requests = (most(lambda n: keeps(n, 0.0), within), most(lambda n: keeps(n, window_s), within))
    tokens = sum(prompt.max_tokens for prompt in prompts.draw(pool, max(1, requests), "uniform", profile.seed, repeat))
    tokens_per_gpu_hour = tokens / window_s * 3600 / GPUS * (requests > 0)
    price = profile.sensitivity.gpu_hour / tokens_per_gpu_hour * 1e6 if requests else np.nan
    return {
        **{"paper": paper, "system": name, "repeat": repeat, "ttft_s": level[0], "tpot_s": level[1]},
        **{"users": users, "users_per_gpu": users / GPUS, "requests_per_s": requests / window_s},
        **{"tokens_per_gpu_hour": tokens_per_gpu_hour, "price_per_million_tokens": price},
    }


def _window_s(profile: Profile, paper: Paper) -> float:
    """How long requests come; paper 2's answers are shorter."""
    return profile.sensitivity.window_s / (1 if paper == "p1" else 2)


def _drawn(profile: Profile, pool: Workload, system: System, n: int, repeat: int) -> list[Prompt]:
    """Prompts whose clusters are shared out among the experts of a system that has fewer."""
    return [
        prompt._replace(cluster=prompt.cluster * system.instances // pool.n_clusters)
        for prompt in prompts.draw(pool, n, "uniform", profile.seed, repeat)
    ]


def under_load(profile: Profile, served: pd.DataFrame, workers: int = 2) -> pd.DataFrame:
    """What each system serves within a service level under loads from little to more than it carries, one draw each.

    Parameters
    ----------
    profile : Profile
    served : DataFrame
        What :func:`goodput` returned: how much each carries, and the level.
    workers : int
        Processes.

    Returns
    -------
    DataFrame
        One row per ``paper``, ``system`` and load: its ``model``, ``requests_per_s`` that come, ``ttft_p99_s``,
        ``goodput_per_gpu`` (requests per second and GPU that keep to both bounds) and ``on_frontier``
        (:func:`unbeaten`, among systems with the same model).
    """
    carried = served.groupby(["paper", "system"], sort=False)["requests_per_s"].mean()
    level = (float(served["ttft_s"].iloc[0]), float(served["tpot_s"].iloc[0]))
    known = systems(profile)
    with processes.pool(workers) as pool:
        jobs = [
            pool.submit(_under_load, profile, paper, name, known[paper][name], requests_per_s, level)
            for (paper, name), requests_per_s in carried[carried > 0].items()
        ]
        rows = [row for job in Bar(jobs, desc="systems under load", unit="system") for row in job.result()]
    table = pd.DataFrame(rows).assign(on_frontier=False)
    for _, its in table.groupby(["paper", "model"]):
        table.loc[its.index, "on_frontier"] = unbeaten(its["goodput_per_gpu"], its["ttft_p99_s"])
    return table


def _under_load(
    profile: Profile, paper: Paper, name: str, system: System, carried_per_s: float, level: tuple[float, float]
) -> list[dict[str, object]]:
    pool, window_s = setups.workload(profile, paper), _window_s(profile, paper)
    around = replace(HARDWARE, arrivals_s=window_s)
    known = system.config in config.config_ids()
    model = config.load_configuration(system.config).system.model if known else _SMALL
    rows: list[dict[str, object]] = []
    for n in (max(1, round(load * carried_per_s * window_s)) for load in LOADS):
        drawn = _drawn(profile, pool, system, n, 0)
        happened = clock.trace(system, drawn, continues=False, around=around, seed=profile.seed)
        ttft_s, tpot_s = happened.latencies_s()
        good = ttft_s <= level[0]
        good[[request.output_tokens > 1 for request in happened.requests]] &= tpot_s <= level[1]
        found = {"ttft_p99_s": metrics.p99(ttft_s), "goodput_per_gpu": good.sum() / window_s / GPUS}
        rows.append({"paper": paper, "system": name, "model": model, "requests_per_s": n / window_s, **found})
    return rows


def unbeaten(goodput: npt.ArrayLike, ttft_s: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether no other has both more goodput and an earlier first token; never of what serves nothing."""
    goodputs, ttfts_s = np.asarray(goodput), np.asarray(ttft_s)
    beaten = [((goodputs > mine) & (ttfts_s < its)).any() for mine, its in zip(goodputs, ttfts_s, strict=True)]
    return ~np.array(beaten, bool) & (goodputs > 0)


def latencies(system: System, drawn: Sequence[Prompt], arrivals_s: float, seed: int) -> tuple[Floats, Floats]:
    """TTFT and TPOT of each request, in seconds; TPOT of answers with more than one token only."""
    around = replace(HARDWARE, arrivals_s=arrivals_s)
    return clock.trace(system, drawn, continues=False, around=around, seed=seed).latencies_s()


def most(serves: Callable[[int], bool], precision: float, at_most: int | None = None) -> int:
    """The largest number that is served, if all smaller ones are; within a factor of `precision`, 0 if not even one.

    Where it is known that no more than `at_most` are, the search begins there, and asks less often.
    """
    served, failed = 0, 1
    if at_most is None:
        while failed <= _MOST and serves(failed):
            served, failed = failed, 2 * failed
    elif at_most < 1 or serves(at_most):
        return max(0, at_most)
    else:
        served, failed = math.floor(at_most / precision**4), at_most
        while served and not serves(served):
            served, failed = math.floor(served / precision**4), served
    while failed > max(served + 1, served * precision):
        tried = round((served * failed) ** 0.5)
        if tried in (served, failed):
            break
        served, failed = (tried, failed) if serves(tried) else (served, tried)
    return served
