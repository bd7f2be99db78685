"""How far can the simulation be trusted? Beside others' numbers, and beside engines that were measured here.

:func:`published` compares with throughputs that NVIDIA measured, :func:`aisimulate` with NVIDIA's own simulator of the
same systems. :func:`calibrated` asks what remains to be trusted when nothing is known of the hardware but some
measured loads: step times are fitted to those, and loads that were held out are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd

from erlib import config, paths
from erlib.config import KV_BLOCK_TOKENS, Profile
from erlib.engines import laptop, llama
from erlib.load import backends, metrics, on_cores, records
from erlib.machine import processes
from erlib.paper_scale import batching, clock, fitting, simulation, steptimes
from erlib.paper_scale.clock import Harness
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt

PUBLISHED = paths.FACTS / "h100_published_throughput.csv"
AISIMULATE = paths.FACTS / "aisimulate_200_users.csv"
OTHER_PRICES = ("p1.B", "p2.D")
"""Configurations whose weight-only matrices AISimulate prices as FP16; our table has measurements of them."""

Weights = Literal["parameters", "loaded"]

METRICS = {
    "ttft_mean_s": "TTFT",
    "tpot_mean_s": "TPOT",
    "response_p99_s": "p99 response time",
    "session_tokens_per_s": "throughput",
}
"""Metrics that are predicted (:func:`erlib.load.metrics.summarise`), and what a figure calls them."""
AISIMULATE_METRICS = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "response_p99_s": "p99 response time",
    "output_tokens_per_s": "throughput",
}
"""Likewise, of :func:`aisimulate`."""
BAR = 0.15
"""Largest error of a prediction that counts as met, on a noisy machine."""

# Of the published runs, as far as the document behind the NOTICE says
_MAX_BATCH, _MAX_STEP_TOKENS = 4096, 8192
_WORKERS = 2


# --- beside others' numbers ---------------------------------------------------------------------------------------


def all_at_once(system: batching.System, requests: int, input_tokens: int, output_tokens: int) -> dict[str, float]:
    """Requests of equal lengths, evenly spread over the instances, all submitted at once.

    Returns
    -------
    dict
        ``output_tokens_per_s`` of the whole system, ``ttft_s`` and ``tpot_s`` (means), ``response_p99_s``.
    """
    drawn = [Prompt(n, n % system.instances, "", input_tokens, output_tokens, FORCED) for n in range(requests)]
    stamps = clock.trace(system, drawn, continues=False).token_ns()
    first_s, last_s = (np.array([tokens[i] for tokens in stamps]) * 1e-9 for i in (0, -1))
    return {
        "output_tokens_per_s": requests * output_tokens / last_s.max(),
        "ttft_s": first_s.mean(),
        "tpot_s": metrics.tpot_s(last_s - first_s, output_tokens).mean(),
        "response_p99_s": float(np.percentile(last_s, 99)),
    }


def aisimulate(points: pd.DataFrame | None = None) -> pd.DataFrame:
    """The papers' configurations on eight H100s, beside what NVIDIA's AISimulate says of them.

    Parameters
    ----------
    points : DataFrame, optional
        Columns as in ``data/aisimulate_200_users.csv``, which is the default.

    Returns
    -------
    DataFrame
        One row per configuration and metric: ``config``, ``metric``, ``aisimulate``, ``simulated``, ``difference``
        (relative), ``same_prices`` (whether both price the steps with the same measurements).
    """
    rows = []
    for point in (pd.read_csv(AISIMULATE) if points is None else points).itertuples():
        system = batching.paper_system(point.config)
        ours = all_at_once(system, point.users, point.input_tokens, point.output_tokens)
        rows += [
            {"config": point.config, "metric": metric, "aisimulate": getattr(point, metric), "simulated": value}
            for metric, value in ours.items()
        ]
    table = pd.DataFrame(rows)
    difference = table["simulated"] / table["aisimulate"] - 1
    return table.assign(difference=difference, same_prices=~table["config"].isin(OTHER_PRICES))


def published(
    points: pd.DataFrame | None = None,
    weights: Sequence[Weights] = ("parameters", "loaded"),
    workspace_bytes: float = llama.WORKSPACE_BYTES,
) -> pd.DataFrame:
    """Throughputs of TensorRT-LLM 0.17 on H100s in FP8, as NVIDIA published them, beside simulated ones.

    How large the KV cache was is not published. It is what weights and workspace leave of a GPU's memory, and both can
    be read in more than one way. That matters where little is left, for 70B on one GPU, and hardly anywhere else.

    Parameters
    ----------
    points : DataFrame, optional
        Columns as in ``data/h100_published_throughput.csv``, which is the default. Points whose prompts do not fit into
        a step are left out.
    weights : sequence of {"parameters", "loaded"}
        One byte per parameter, or with embedding and output layer in FP16, as quantised engines keep them (2 GB more
        for 70B).
    workspace_bytes : float
        What runtime and activations take of each GPU: an assumption.

    Returns
    -------
    DataFrame
        The points, once per reading: ``weights``, ``simulated_tokens_per_s`` and ``ratio`` (simulated over published).
    """
    points = pd.read_csv(PUBLISHED) if points is None else points
    points = points[points["input_tokens"] <= _MAX_STEP_TOKENS].reset_index(drop=True)
    table = pd.concat([points.assign(weights=reading) for reading in weights], ignore_index=True)
    systems = [
        _published_system(point.model, point.tensor_parallel, point.weights, workspace_bytes)
        for point in table.itertuples()
    ]
    loads = (table[name] for name in ("requests", "input_tokens", "output_tokens"))
    with processes.pool(_WORKERS) as pool:
        simulated = [answered["output_tokens_per_s"] for answered in pool.map(all_at_once, systems, *loads)]
    return table.assign(simulated_tokens_per_s=simulated, ratio=simulated / table["output_tokens_per_s"])


def _published_system(model: str, tensor_parallel: int, weights: Weights, workspace_bytes: float) -> batching.System:
    model = model.replace("3.1", "3")  # Llama 3.1 has the shapes of Llama 3
    loaded = llama.shape(model).loaded_bytes("fp8", tensor_parallel) if weights == "loaded" else None
    return batching.System(
        config=f"{model} TP{tensor_parallel}",
        routing="direct",
        steps=steptimes.Table(model, "fp8", "fp8", tensor_parallel),
        instances=1,
        batch_size=_MAX_BATCH,
        kv_tokens=llama.most_kv_tokens(model, "fp8", "fp8", tensor_parallel, loaded, workspace_bytes),
        max_step_tokens=_MAX_STEP_TOKENS,
    )


def mape(ratio: pd.Series) -> float:
    """Mean absolute relative error of predictions, given as ratios to what is true."""
    return float((ratio - 1).abs().mean())


# --- beside measured engines --------------------------------------------------------------------------------------


def calibrated(measured: pd.DataFrame, profile: Profile, held_out: Sequence[int] | None = None) -> pd.DataFrame:
    """Fit a simulation to some of the measured loads of each configuration, and let it predict the others.

    Of a load that is predicted it is only told what was asked of whom: lengths of prompts and answers, and the server
    to which the router sent them. When anything happens, and the order in which it does, is predicted.

    Parameters
    ----------
    measured : DataFrame
        Records of the load experiment.
    profile : Profile
        That they were measured with: it says which engines stand for a configuration.
    held_out : sequence of int, optional
        User levels to be predicted; all others are fitted to. By default all but the lowest two and the highest, which
        should be near saturation.

    Returns
    -------
    DataFrame
        One row per configuration, mix, level, turn and metric: ``measured`` and ``predicted`` (means over repeats),
        ``error`` (relative), ``between_repeats`` (mean difference between two repeats of the point, relative; NaN for
        one repeat) and ``refused`` (why nothing was predicted, empty otherwise).

    Raises
    ------
    ValueError
        If a single user is held out: without one, time in queues looks like work.
    """
    levels = sorted(measured["users"].unique())
    held_out = levels[2:-1] if held_out is None else held_out
    keys = ["config", "mix", "users", "turn", "metric"]
    parts = [pd.DataFrame(columns=[*keys, "measured", "predicted", "error", "between_repeats", "refused"])]
    for name, mine in measured.groupby("config"):
        asked = mine[mine["users"].isin(held_out)]
        if asked.empty:
            continue
        known = mine.drop(asked.index)
        try:
            system, unfit = measured_system(name, profile, fitting.Fitted(known)), ""
        except fitting.TooFewRecords as reason:
            system, unfit = None, str(reason)
        around = Harness("fitted", per_request_s=_per_request_s(known))
        for _, level in asked.groupby(["mix", "users"]):
            truth = _over_repeats(level)
            predicted, refused = pd.Series(np.nan, truth.index), unfit
            if system:
                try:
                    predicted = _over_repeats(predict(level, system, around))["mean"]
                except steptimes.OutOfRange as refusal:
                    refused = str(refusal)
            table = truth.rename(columns={"mean": "measured"}).assign(predicted=predicted, refused=refused)
            parts.append(table.assign(error=predicted / truth["mean"] - 1).reset_index())
    return pd.concat(parts[1:] or parts, ignore_index=True)[parts[0].columns]


def leave_one_out(measured: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Predict each load from all others, but for the single user, whom every fit needs; see :func:`calibrated`."""
    levels = sorted(measured["users"].unique())
    return pd.concat([calibrated(measured, profile, [level]) for level in levels[1:]], ignore_index=True)


def errors(table: pd.DataFrame, by: str | list[str] = "metric") -> pd.DataFrame:
    """How large the errors of predictions are.

    Parameters
    ----------
    table : DataFrame
        What :func:`calibrated` or :func:`leave_one_out` returned.
    by : str or list of str
        E.g. ``["config", "metric"]``.

    Returns
    -------
    DataFrame
        Mean and largest absolute ``error``, the share of predictions that meet :data:`BAR`, what repeats differ by, and
        the numbers of predictions made and refused.
    """
    size = table.assign(size=table["error"].abs())
    return size.groupby(by).agg(
        mean_error=("size", "mean"),
        largest_error=("size", "max"),
        within_bar=("size", lambda size: (size.dropna() <= BAR).mean()),
        between_repeats=("between_repeats", "mean"),
        predictions=("size", "count"),
        refused=("size", lambda size: size.isna().sum()),
    )


def measured_system(name: str, profile: Profile, steps: steptimes.StepTimes) -> batching.System:
    """What stood for a configuration when `profile` was measured, with step times of its own.

    Requests go to the server that their ``cluster`` names, whatever the configuration's routing.
    """
    if profile.serving.backend == "tensorrt_llm":
        (carried,) = backends.of(profile).configurations(profile, [name])  # by the GPUs that there are
        held = carried.system
        return batching.System(
            config=name,
            routing="expert_router",
            steps=steps,
            instances=held.instances,
            batch_size=held.batch_size,
            kv_tokens=llama.kv_tokens(held),
            max_step_tokens=llama.step_tokens(carried.per_gpu),
        )
    plan = laptop.laptop_system(profile, config.load_configuration(name))
    return batching.System(
        config=name,
        routing="expert_router",
        steps=steps,
        instances=plan.instances,
        batch_size=plan.batch_size,
        kv_tokens=plan.kv_tokens,
        kv_block_tokens=KV_BLOCK_TOKENS,
        max_step_tokens=on_cores.MAX_BATCHED_TOKENS,
    )


def predict(asked: pd.DataFrame, system: batching.System, around: Harness) -> pd.DataFrame:
    """Records that a simulation makes of the requests that others ask for; no time in those is looked at.

    Raises
    ------
    OutOfRange
        If a step is larger than the step times know.
    """
    parts = []
    for (paper, mix, repeat, _), point in asked[asked["status"] == "ok"].groupby(["paper", "mix", "repeat", "users"]):
        by_turn = {turn: list(_prompts(requests)) for turn, requests in point.groupby("turn")}
        answered = simulation.simulate(
            system,
            by_turn["base"],
            paper=paper,
            mix=mix,
            repeat=repeat,
            around=around,
            columns={"host": "virtual time, step times fitted to records"},
            continues=by_turn.get("continuation", False),
        )
        parts.append(answered)
    return records.frame(parts)


def _prompts(requests: pd.DataFrame) -> Iterator[Prompt]:
    for row in requests.sort_values("user").itertuples():
        yield Prompt(row.prompt, row.expert, "", row.input_tokens, row.output_tokens, FORCED)


def _per_request_s(known: pd.DataFrame) -> float:
    """Seconds by which each request of a crowd reaches its server later than the one before."""
    ranks, delays_s = [], []
    for _, crowd in known[known["turn"] == "base"].groupby(["mix", "users", "repeat"]):
        arrived_ns = np.sort(fitting.arrived_ns(crowd))
        ranks.append(np.arange(1, len(crowd) + 1))
        delays_s.append((arrived_ns - crowd["t_send_ns"].min()) * 1e-9)
    rank, delay_s = np.concatenate(ranks), np.concatenate(delays_s)
    return float(rank @ delay_s / (rank @ rank))


def _over_repeats(some: pd.DataFrame) -> pd.DataFrame:
    """Mean of each metric over repeats, and how much two repeats differ, relative to it."""
    keys = ["config", "mix", "users", "turn", "metric"]
    long = metrics.summarise(some).melt([*keys[:-1], "repeat"], list(METRICS), "metric")
    return long.groupby(keys)["value"].agg(mean="mean", between_repeats=_mean_difference)


def _mean_difference(values: pd.Series) -> float:
    """Mean absolute difference between two of the `values`, relative to their mean."""
    pairs = [abs(a - b) for a, b in combinations(values, 2)]
    return float(np.mean(pairs) / values.mean()) if pairs else np.nan
