"""What others measured and published, the same conditions simulated, and how far off further predictions may be.

:func:`beside_published` reads ``data/published_points.csv``; the notice beside it says where each number is from. Every
engine runs alone, in a loop of its own, since what differs between the points is how requests arrive: as fast as
earlier ones are answered, at a rate of their own, all at once, or as one batch that nobody joins.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from erlib import config, paths
from erlib.engines import llama
from erlib.load import metrics
from erlib.machine import processes
from erlib.paper_scale import batching, steptimes, validation
from erlib.paper_scale.steptimes import StepTimes
from erlib.workload import lengths

POINTS = paths.FACTS / "published_points.csv"
METRICS = {
    "ttft_ms": "TTFT",
    "ttft_p99_ms": "p99 of TTFT",
    "tpot_ms": "TPOT",
    "tpot_p99_ms": "p99 of TPOT",
    "tokens_per_s": "throughput",
}
"""Columns of the file that are compared, and what tables and figures call them."""
KINDS = {
    "static": "static batches",
    "at once": "all at once",
    "queue": "queue never empty (Offline)",
    "closed": "closed loop",
    "in flight": "Server, as many in flight as there",
    "open": "open loop near saturation (Server)",
    "host": "Server with the host time that Offline leaves",
}
"""Loads, and what they are called. The last but two are the file's; `in flight` and `host` are the open loop's points,
simulated with what else is known of them."""
LEVEL = 0.9
"""Share of outcomes that an interval should hold."""
KNEE = 0.8
"""Share of capacity from which on a load counts as near it."""

_GPUS = {"a100": steptimes.A100, "h200": steptimes.H200}
_SHAPE_IN_TABLE = {"llama-2-70b": "llama-3-70b"}  # but for the vocabulary, the same in FP8
_LONGEST_ANSWER = 1024  # MLPerf's rule for Llama-2-70B
_ROUNDS, _REQUESTS = 6, 12_000
_WORKERS = 2


@dataclass(eq=False)
class _Request:
    input_tokens: int
    output_tokens: int
    sent_s: float
    first_step: int = -1
    kv_blocks: int = 0
    first_s: float = math.nan
    last_s: float = math.nan


def steady(
    system: batching.System,
    asked: Sequence[tuple[int, int]],
    *,
    in_flight: int = 0,
    sent_s: Sequence[float] = (),
    host_s_per_token: float = 0.0,
) -> dict[str, float]:
    """One engine in steady state: what is measured between a third of the answers and the last request's arrival.

    Parameters
    ----------
    system : System
        One instance of it runs.
    asked : sequence of (int, int)
        Prompt and answer tokens of each request.
    in_flight : int
        Closed loop: so many requests are there at any time.
    sent_s : sequence of float
        Otherwise: when each request arrives, ascending.
    host_s_per_token : float
        How long each token of a step holds up the engine after it, in seconds.

    Returns
    -------
    dict
        :data:`METRICS`; times in milliseconds, tokens per second of this engine.
    """
    arrivals = list(sent_s) or [0.0] * in_flight
    coming = deque(_Request(*mine, sent) for mine, sent in zip(asked, arrivals, strict=False))
    later = iter(asked[len(arrivals) :])
    engine: batching.Engine[_Request] = batching.Engine(system)
    now = 0.0
    answered: list[_Request] = []
    steps: list[tuple[float, int]] = []
    while True:
        while coming and coming[0].sent_s <= now:
            engine.submit(coming.popleft())
        if len(answered) + engine.outstanding == len(asked):
            break
        if engine.is_idle:
            now = coming[0].sent_s
            continue
        now += engine.begin_step() + host_s_per_token * engine.sequences
        done = engine.end_step()
        steps.append((now, done.sequences))
        for request in done.joined:
            request.first_s = now
        for request in done.finished:
            request.last_s = now
            coming.extend(_Request(*mine, now) for mine in [next(later, None)] if mine)
        answered += done.finished
    warm = len(answered) // 3
    begun_s = answered[warm].last_s
    tokens = sum(sequences for end_s, sequences in steps if end_s > begun_s)
    return _metrics(answered[warm + 1 :]) | {"tokens_per_s": tokens / (now - begun_s)}


def _metrics(answered: list[_Request]) -> dict[str, float]:
    sent, first, last, tokens = np.array([(r.sent_s, r.first_s, r.last_s, r.output_tokens) for r in answered]).T
    ttft, tpot = first - sent, metrics.tpot_s(last - first, tokens)
    return {
        "ttft_ms": 1e3 * float(np.mean(ttft)),
        "ttft_p99_ms": 1e3 * float(np.percentile(ttft, 99)),
        "tpot_ms": 1e3 * float(np.mean(tpot)),
        "tpot_p99_ms": 1e3 * float(np.percentile(tpot, 99)),
    }


def static_batch(steps: StepTimes, batch: int, input_tokens: int, output_tokens: int) -> dict[str, float]:
    """One batch that nobody joins or leaves: all prompts, in steps as large as an engine's, then all answers.

    Returns
    -------
    dict
        ``ttft_ms`` and ``tokens_per_s``.
    """
    at_most = max(1, llama.MAX_STEP_TOKENS // input_tokens)
    first_s = sum(steps.prefill_s(input_tokens, min(at_most, batch - n)) for n in range(0, batch, at_most))
    rest_s = sum(steps.decode_steps_s(output_tokens - 1, batch, batch * (input_tokens + 1)))
    return {"ttft_ms": 1e3 * first_s, "tokens_per_s": batch * output_tokens / (first_s + rest_s)}


def mlperf_lengths(n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Prompt and answer lengths of `n` requests of MLPerf's Llama-2-70B, drawn without regard to each other."""
    whole = {"workload.p2_answers": "mlperf", "workload.p2_max_output_tokens": _LONGEST_ANSWER}
    profile = config.load_profile("dgx-h100", whole)
    prompts = rng.permutation(lengths.input_tokens("p2", profile.workload, n))
    answers, _ = lengths.answer_tokens("p2", profile, n, rng)
    return list(zip(prompts.tolist(), answers.tolist(), strict=True))


# --- the points ---------------------------------------------------------------------------------------------------


def beside_published(throughputs: pd.DataFrame | None = None, points: pd.DataFrame | None = None) -> pd.DataFrame:
    """Published measurements beside the same conditions, simulated.

    Of MLPerf's open loop two more things are simulated. `in flight`: a closed loop with as many requests as were there
    on average (requests answered per second times their mean latency). `host`: the open loop, with the time per token
    that the same submitter's queue leaves unexplained added to each step, as if the host held the engine up; nothing
    is fitted to the open loop.

    Parameters
    ----------
    throughputs : DataFrame, optional
        What :func:`erlib.paper_scale.validation.published` returned: one more benchmark.
    points : DataFrame, optional
        Columns as in ``data/published_points.csv``, which is the default.

    Returns
    -------
    DataFrame
        One row per point, load and metric: ``benchmark``, ``source``, ``load``, ``level``, ``input_tokens``,
        ``output_tokens``, ``model``, ``gpu``, ``tensor_parallel``, ``metric``, ``published``, ``simulated``, ``ratio``
        (simulated over published), ``between_runs`` (by how much published runs under the same conditions differ,
        relative to their mean; NaN where there is one), ``at_the_knee`` (whether the published run served at least
        :data:`KNEE` of the most that the same benchmark and date have at these lengths; None where that is unknown, or
        asked otherwise), ``kind``, ``group`` (of which :func:`intervals` are of use), ``host_us_per_token``.
    """
    points = pd.read_csv(POINTS) if points is None else points
    points = points.assign(host_us_per_token=0.0, at_the_knee=_near_capacity(points))
    first = _simulated(points)
    opened = points[points["load"] == "open"]
    answered_per_s = opened["tokens_per_s"] / opened["output_tokens"]
    crowd = opened.assign(load="in flight", level=(answered_per_s * opened["latency_s"]).round())
    queues = points.assign(simulated=first["tokens_per_s"]).query("load == 'queue'")
    left_s = queues["instances"] * (1 / queues["tokens_per_s"] - 1 / queues["simulated"])
    left_us = 1e6 * left_s.clip(lower=0).groupby(queues["source"]).mean()
    held_up = opened.assign(load="host", host_us_per_token=opened["source"].map(left_us)).dropna(
        subset="host_us_per_token"
    )
    more = pd.concat([crowd, held_up]).assign(at_the_knee=None)
    table = _long(pd.concat([points, more]), pd.concat([first, _simulated(more)]))
    if throughputs is not None:
        table = pd.concat([table, _throughputs(throughputs)], ignore_index=True)
    roofline = np.where(table["gpu"] == "h100", "", ", roofline")
    extra = table["load"].map({"open": ", open loop", "host": ", host"}).fillna("")
    return table.assign(
        ratio=table["simulated"] / table["published"],
        kind=table["load"].map(KINDS) + roofline,
        group=table["metric"].str.removeprefix("p99 of ") + extra + roofline,
    )


def _near_capacity(points: pd.DataFrame) -> pd.Series:
    served = points["tokens_per_s"].where(points["load"].isin(["open", "closed", "queue"]))
    alike = served.groupby([points[name] for name in ("benchmark", "date", "input_tokens")], dropna=False)
    return (served >= KNEE * alike.transform("max")).where(served.notna() & (alike.transform("count") > 1), None)


def _simulated(points: pd.DataFrame) -> pd.DataFrame:
    with processes.pool(_WORKERS) as pool:
        return pd.DataFrame(list(pool.map(_point, points.to_dict("records"))), points.index)


def _point(point: dict[str, Any]) -> dict[str, float]:
    """What the simulation says of one row of the file."""
    load, batch = point["load"], point["batch_size"]
    system, instances = _system(point), point["instances"]
    prompt, answer = point["input_tokens"], point["output_tokens"]
    if load == "static":
        return static_batch(system.steps, batch, int(prompt), int(answer))
    if load == "at once":
        one = validation.all_at_once(system, int(point["level"]), int(prompt), int(answer))
        return {"tokens_per_s": one["output_tokens_per_s"]}
    in_flight = {"queue": 2 * batch, "open": 0, "host": 0}.get(load)
    if in_flight is None:
        in_flight = round(point["level"] / instances)
    rng = np.random.default_rng(0)
    n = _ROUNDS * in_flight or _REQUESTS
    asked = mlperf_lengths(n, rng) if math.isnan(prompt) else [(int(prompt), int(answer))] * n
    sent_s: list[float] = []
    if not in_flight:  # requests arrive at random, as many tokens a second as there, and instances take them in turn
        gap_s = np.mean([tokens for _, tokens in asked]) / answer / point["level"]
        sent_s = rng.exponential(gap_s, n * instances).cumsum()[::instances].tolist()
    host_s = 1e-6 * point["host_us_per_token"]
    one = steady(system, asked, in_flight=in_flight, sent_s=sent_s, host_s_per_token=host_s)
    return one | {"tokens_per_s": instances * one["tokens_per_s"]}


def _system(point: dict[str, Any]) -> batching.System:
    """One instance; its KV cache has the share that is published, or else the usual one, of what weights leave."""
    model, gpu, formats = point["model"], point["gpu"], (point["dtype"], point["kv_dtype"], point["tensor_parallel"])
    steps: StepTimes
    if gpu in _GPUS:
        steps = steptimes.Roofline(llama.shape(model), _GPUS[gpu], *formats)
        kv_tokens = point["batch_size"] * int(point["input_tokens"] + point["output_tokens"] + 64)  # all of a batch
    else:
        steps = steptimes.Table(_SHAPE_IN_TABLE.get(model, model), *formats)
        share = llama.KV_SHARE if math.isnan(point["kv_share"]) else point["kv_share"]
        kv_tokens = int(llama.most_kv_tokens(model, *formats) * share / llama.KV_SHARE)
    if point["load"] == "in flight":  # they were there, so there was room for them
        kv_tokens *= 2
    return batching.System(point["source"], "direct", steps, 1, point["batch_size"], kv_tokens)


_CONDITIONS = [
    *("benchmark", "date", "load", "level", "model", "gpu", "tensor_parallel", "dtype"),
    *("batch_size", "kv_share", "input_tokens"),
]
_KEPT = ["benchmark", "source", "load", "level", "input_tokens", "output_tokens", "model", "gpu", "tensor_parallel"]


def _long(points: pd.DataFrame, simulated: pd.DataFrame) -> pd.DataFrame:
    """One row per metric that is published, and not given by the load itself."""
    parts = []
    conditions = [points[name] for name in _CONDITIONS] + [points["output_tokens"].round()]  # answers differ a little
    for metric, name in METRICS.items():
        given = ["open", "host", "in flight"]  # whoever fixes arrivals fixes throughput; in flight, TPOT does
        published = points[metric].mask((metric == "tokens_per_s") & points["load"].isin(given))
        if metric.startswith("ttft"):  # who waits for a slot is not said by how many there are
            published = published.mask(points["load"] == "in flight")
        alike = published.groupby(conditions, dropna=False)
        between = (alike.transform("max") - alike.transform("min")) / alike.transform("mean")
        part = points[[*_KEPT, "at_the_knee", "host_us_per_token"]]
        part = part.assign(metric=name, published=published, simulated=simulated[metric])
        parts.append(part.assign(between_runs=between.where(alike.transform("count") > 1)))
    return pd.concat(parts).dropna(subset="published").reset_index(drop=True)


def _throughputs(published: pd.DataFrame) -> pd.DataFrame:
    rows = published[published["weights"] == "parameters"].rename(
        columns={"output_tokens_per_s": "published", "simulated_tokens_per_s": "simulated", "requests": "level"}
    )
    name = "TensorRT-LLM 0.17"
    rows = rows.assign(benchmark=name, source=name, load="at once", gpu="h100", metric="throughput")
    return rows[[*_KEPT, "metric", "published", "simulated"]]


# --- what follows for predictions ---------------------------------------------------------------------------------


def error_table(beside: pd.DataFrame, by: Sequence[str] = ("kind", "metric")) -> pd.DataFrame:
    """Points, mean absolute error, smallest, median and largest ratio, spread of runs, of what :func:`beside_published`
    returned."""
    rows = beside.groupby(list(by))
    return (
        rows["ratio"]
        .agg(points="count", mean_error=validation.mape, lowest="min", median="median", highest="max")
        .assign(between_runs=rows["between_runs"].mean())
    )


def at_the_knee(predictions: pd.DataFrame) -> pd.Series:
    """Whether a prediction is of a load with at least 0.8 of the most tokens per second that its configuration had.

    Parameters
    ----------
    predictions : DataFrame
        What :func:`erlib.paper_scale.validation.leave_one_out` returned. Its users wait for their answers, so that no
        load is beyond what is served.
    """
    served = predictions["measured"].where(predictions["metric"] == "session_tokens_per_s")
    load = [predictions[name] for name in ("config", "mix", "users", "turn")]
    most = served.groupby(predictions["config"]).transform("max")
    return served.groupby(load).transform("max") >= KNEE * most


def intervals(predictions: pd.DataFrame, by: str, held_out: str) -> pd.DataFrame:
    """Between which multiples of a prediction the truth lies with 90 % probability, if it errs as these do.

    The interval is between the k-th smallest and the k-th largest ratio of truth to prediction, k being 5 % of n + 1:
    right for one more prediction from the same source of errors, whatever their distribution. There is none for fewer
    than 19 ratios.

    Parameters
    ----------
    predictions : DataFrame
        With ``ratio``, prediction over truth.
    by : str
        Column of the groups that have an interval of their own.
    held_out : str
        Column of what is held out as a whole to see whether the interval of the others holds it.

    Returns
    -------
    DataFrame
        Per group: ``predictions``, ``sources`` (values of `held_out`), ``low`` and ``high`` (NaN where there is no
        interval), ``tested`` (predictions that an interval of other sources could be tested on) and ``covered``
        (the share of these inside it).
    """
    rows = {}
    for group, mine in predictions.dropna(subset="ratio").groupby(by):
        truth, source = 1 / mine["ratio"], mine[held_out]
        inside = [
            truth[source == one].between(*bounds)
            for one in source.unique()
            if not math.isnan((bounds := _bounds(truth[source != one]))[0])
        ]
        tested = pd.concat(inside) if inside else pd.Series(dtype=float)
        low, high = _bounds(truth)
        rows[group] = [len(mine), source.nunique(), low, high, len(tested), tested.mean()]
    columns = ["predictions", "sources", "low", "high", "tested", "covered"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis(by)


def _bounds(ratios: pd.Series) -> tuple[float, float]:
    k = math.floor(round((1 - LEVEL) / 2 * (len(ratios) + 1), 9))
    ordered = np.sort(ratios)
    return (ordered[k - 1], ordered[-k]) if k else (math.nan, math.nan)
