"""What the papers report, computed from records and nothing else.

Only requests with ``status == "ok"`` count as answers; the others are counted as failures and never averaged away.
Definitions: paper 1, section V; paper 2, section V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from erlib import config
from erlib.serving.spans import GATEWAY_SPANS, SPANS, column

POINT = ["source", "paper", "experiment", "config", "mix", "users", "repeat"]
"""Columns that name one run of the user simulator."""


_NS = 1e-9


def answers(records: pd.DataFrame) -> pd.DataFrame:
    """The answered requests, with each answer's latencies.

    Parameters
    ----------
    records : DataFrame
        One row per request, as :func:`erlib.load.records.read` returns it.

    Returns
    -------
    DataFrame
        The rows that are ok, with ``ttft_s`` (t_first - t_send), ``tpot_s`` ((t_last - t_first) / (n - 1); NaN for an
        answer of one token), ``response_s`` (t_last - t_send) and ``user_tokens_per_s`` (n / (t_e - t_s)) added.

    Raises
    ------
    ValueError
        If a request stands in the records twice, or an ok request has no token, fewer timestamps than tokens, or
        timestamps out of order.
    """
    _each_request_once(records)
    done = records[records["status"] == "ok"].reset_index(drop=True)
    tokens = done["output_tokens"].to_numpy()
    send, first, last = (done[f"t_{name}_ns"].to_numpy() for name in ("send", "first", "last"))
    broken = (tokens < 1) | (done["token_ns"].map(len).to_numpy() != tokens) | ~((send < first) & (first <= last))
    if broken.any():
        row = done[broken].iloc[0]
        raise ValueError(
            f"{broken.sum()} of {len(done)} ok requests do not have one ordered timestamp per token (damaged records), "
            f"the first of them {row['config']}, {row['users']} users, repeat {row['repeat']}, user {row['user']}"
        )
    return latencies(done)


def latencies(done: pd.DataFrame) -> pd.DataFrame:
    """Answered requests, also such without ``token_ns``, with the columns that :func:`answers` adds."""
    tokens = done["output_tokens"].to_numpy()
    send, first, last = (done[f"t_{name}_ns"].to_numpy() for name in ("send", "first", "last"))
    return done.assign(
        ttft_s=(first - send) * _NS,
        tpot_s=tpot_s((last - first) * _NS, tokens),
        response_s=(last - send) * _NS,
        user_tokens_per_s=tokens / ((last - send) * _NS),
    )


def tpot_s(lasted_s: npt.ArrayLike, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Seconds per token after an answer's first, if it took so long from its first to its last; NaN for one token."""
    after_the_first = np.asarray(tokens, float) - 1
    return np.asarray(lasted_s) / np.where(after_the_first > 0, after_the_first, np.nan)


LATENCIES = ["ttft_s", "tpot_s", "response_s", "user_tokens_per_s"]
"""The columns that :func:`latencies` adds."""


Answers: TypeAlias = pd.DataFrame | Mapping[str, npt.NDArray[Any]]
"""Columns of :func:`answers`, of one point and turn: as a frame, or, where there are thousands of points, as arrays."""


def token_gaps(done: Answers) -> npt.NDArray[np.float64]:
    """Seconds between consecutive tokens of the same answer, all answers of `done` together."""
    answers_ns = list(done["token_ns"])
    if not answers_ns:
        return np.empty(0)
    gaps_ns = np.diff(np.concatenate(answers_ns))
    last_tokens = np.cumsum([len(token_ns) for token_ns in answers_ns[:-1]], dtype=np.int64) - 1
    of_one_answer = np.ones(len(gaps_ns), dtype=bool)
    of_one_answer[last_tokens] = False
    return gaps_ns[of_one_answer] * _NS


def p99(values: Sequence[float] | pd.Series) -> float:
    """Smallest of `values` that at least 99 % of them do not exceed (the nearest rank, no interpolation).

    Both papers: 99 % of the requests are answered within this time. With fewer than 100 values it is the largest; an
    interpolated percentile would lie below it, and Eq. 1-3 would then lose more than 1 % of the users.
    """
    return float(np.quantile(values, 0.99, method="inverted_cdf"))


def session_throughput(done: Answers) -> float:
    """Tokens per second of one session (paper 1, Eq. 1-3).

    Parameters
    ----------
    done : Answers

    Returns
    -------
    float
        Tokens of the n99 users answered within the p99 response time, over the time from the first of these users'
        requests (Eq. 1) to the last of their tokens (Eq. 2).
    """
    n99 = done["response_s"] <= p99(done["response_s"])
    lasted_s = (done["t_last_ns"][n99].max() - done["t_send_ns"][n99].min()) * _NS
    return float(done["output_tokens"][n99].sum() / lasted_s)


def bucket_width_s(records: pd.DataFrame, paper_s: float) -> float:
    """The papers' width, or less: 1, 2 or 5 times a power of ten, so that the longest point has twenty intervals.

    Parameters
    ----------
    records : DataFrame
        Requests of all points that are to be compared.
    paper_s : float
        The papers' width at these records' scale.
    """
    ended = answers(records).groupby(POINT).agg({"t_send_ns": "min", "t_last_ns": "max"})
    most_s = float((ended["t_last_ns"] - ended["t_send_ns"]).max()) * _NS / 20
    if not most_s < paper_s:  # also if there are none
        return paper_s
    power = 10.0 ** math.floor(math.log10(most_s))
    return max(n for n in (power, 2 * power, 5 * power) if n <= most_s * (1 + 1e-9))


LEAST_BUCKETS = 6
"""A run over fewer time buckets has no shape."""


def bucket_throughput(records: pd.DataFrame, width_s: float) -> pd.DataFrame:
    """Tokens received in consecutive intervals, whoever received them (paper 1, section V-B; paper 2, section V-B).

    Parameters
    ----------
    records : DataFrame
        Requests; select one turn beforehand where only that turn is wanted.
    width_s : float
        Width of an interval; see :func:`bucket_width_s`.

    Returns
    -------
    DataFrame
        One row per point and interval, empty intervals included: the point's columns, ``bucket``, ``t_s`` (its start,
        seconds after the point's first request), ``tokens``, ``tokens_per_s``.

    Raises
    ------
    ValueError
        If `width_s` is not a positive number of nanoseconds.
    """
    width_ns = round(width_s * 1e9)
    if width_ns < 1:
        raise ValueError(f"a time bucket must have a positive width, got {width_s} s")
    parts = []
    for point, group in answers(records).groupby(POINT):
        stamps = np.concatenate(group["token_ns"].to_list())
        tokens = np.bincount((stamps - group["t_send_ns"].min()) // width_ns)
        bucket = np.arange(len(tokens))
        measured = {"bucket": bucket, "t_s": bucket * width_s, "tokens": tokens, "tokens_per_s": tokens / width_s}
        parts.append(pd.DataFrame(dict(zip(POINT, point, strict=True)) | measured))
    columns = [*POINT, "bucket", "t_s", "tokens", "tokens_per_s"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def average_buckets(buckets: pd.DataFrame) -> pd.DataFrame:
    """Mean over repeats of :func:`bucket_throughput`; a repeat that has ended counts as 0 tokens per second."""
    keys = [key for key in POINT if key != "repeat"]
    repeats = buckets.groupby(keys)["repeat"].nunique().rename("repeats")
    total = buckets.groupby([*keys, "bucket", "t_s"], as_index=False)["tokens_per_s"].sum()
    mean = total.merge(repeats, on=keys)
    return mean.assign(tokens_per_s=mean["tokens_per_s"] / mean["repeats"])


def summarise(records: pd.DataFrame) -> pd.DataFrame:
    """One row per point and turn.

    Returns
    -------
    DataFrame
        The point's columns and ``turn``; ``answers`` and ``failures`` (counts); means, sds and medians over answers of
        ``ttft``, ``tpot`` and ``response`` (seconds) and ``user_tokens_per_s``; ``gap_median_s`` over all inter-token
        gaps; ``response_p99_s``; ``session_tokens_per_s`` (Eq. 3). NaN where no request was answered.

    Raises
    ------
    ValueError
        If two different measurements claim to be the same point, or a record is damaged (see :func:`answers`).
    """
    _one_measurement_per_point(records)
    keys = [*POINT, "turn"]
    done = answers(records)
    arrays = {name: done[name].to_numpy() for name in _SUMMARISED}
    answered = done.groupby(keys).indices
    rows = []
    for key, requests in records.groupby(keys).size().items():
        mine = answered.get(key, np.empty(0, dtype=np.int64))
        row = dict(zip(keys, key, strict=True)) | {"answers": len(mine), "failures": requests - len(mine)}
        rows.append(row | (_summary({name: array[mine] for name, array in arrays.items()}) if len(mine) else {}))
    return pd.DataFrame(rows, columns=[*keys, "answers", "failures", *METRICS])


METRICS = [
    *(f"{name}_{how}_s" for name in ("ttft", "tpot", "response") for how in ("mean", "sd", "median")),
    "gap_median_s",
    "response_p99_s",
    "user_tokens_per_s_mean",
    "user_tokens_per_s_sd",
    "session_tokens_per_s",
]
"""The measured columns of :func:`summarise`."""


_SUMMARISED = [*LATENCIES, "output_tokens", "t_send_ns", "t_last_ns", "token_ns"]


def _summary(done: Mapping[str, npt.NDArray[Any]]) -> dict[str, float]:
    """Of one point's answers to one turn, an array for each of :data:`_SUMMARISED`."""
    row: dict[str, float] = {}
    for name in ("ttft", "tpot", "response"):
        row |= _spread(name, done[f"{name}_s"])
    gaps_s, user_tokens_per_s = token_gaps(done), done["user_tokens_per_s"]
    return row | {
        "gap_median_s": float(np.median(gaps_s)) if len(gaps_s) else np.nan,
        "response_p99_s": p99(done["response_s"]),
        "user_tokens_per_s_mean": user_tokens_per_s.mean(),
        "user_tokens_per_s_sd": _sd(user_tokens_per_s),
        "session_tokens_per_s": session_throughput(done),
    }


def _spread(name: str, values_s: npt.NDArray[np.float64]) -> dict[str, float]:
    """Over the answers that have such a latency: one of a single token has no TPOT."""
    if np.isnan(values_s).all():
        return {}
    found = {"mean": float(np.nanmean(values_s)), "sd": _sd(values_s), "median": float(np.nanmedian(values_s))}
    return {f"{name}_{how}_s": value for how, value in found.items()}


def _sd(values: npt.NDArray[np.float64]) -> float:
    return float(np.nanstd(values, ddof=1)) if (~np.isnan(values)).sum() > 1 else np.nan


def _each_request_once(records: pd.DataFrame) -> None:
    """Records that are read twice would double every throughput."""
    twice = records.duplicated([*POINT, "point_hash", "user", "turn"])
    if twice.any():
        row = records[twice].iloc[0]
        raise ValueError(
            f"{twice.sum()} of {len(records)} requests stand in the records twice, the first of them {row['config']}, "
            f"{row['users']} users, repeat {row['repeat']}, user {row['user']}, {row['turn']}; read each point once"
        )


def _one_measurement_per_point(records: pd.DataFrame) -> None:
    hashes = records.groupby(POINT)["point_hash"].nunique()
    if (hashes > 1).any():
        point = dict(zip(POINT, hashes.idxmax(), strict=True))
        raise ValueError(
            f"{hashes.max()} different measurements of one point: {point}; keep one profile's records only"
        )


def aggregate(summary: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread over repeats.

    Parameters
    ----------
    summary : DataFrame
        What :func:`summarise` returned.

    Returns
    -------
    DataFrame
        One row per (source, paper, experiment, config, mix, users, turn, metric): ``mean``, ``sd``, ``ci95`` (half
        width of Student's 95 % interval of the mean; NaN like ``sd`` for a single repeat) and ``repeats``.
    """
    keys = [*(key for key in POINT if key != "repeat"), "turn"]
    long = summary.melt(id_vars=[*keys, "repeat"], value_vars=METRICS, var_name="metric")
    over = long.groupby([*keys, "metric"])["value"]
    result = over.agg(mean="mean", sd="std", repeats="count").reset_index()
    return result.assign(ci95=half_interval(result["sd"], result["repeats"]))


def half_interval(sd: Any, repeats: Any) -> Any:
    """Half width of Student's 95 % interval of a mean, of numbers or of columns of them; NaN for a single repeat."""
    return special.stdtrit(np.where(repeats > 1, repeats - 1, np.nan), 0.975) * sd / np.sqrt(repeats)


HIGHLIGHTS = [
    *("ttft_mean_s", "tpot_mean_s", "response_mean_s", "response_p99_s"),
    *("user_tokens_per_s_mean", "session_tokens_per_s"),
]
"""What both papers report, in seconds and tokens per second."""


def at_highest_load(table: pd.DataFrame) -> pd.DataFrame:
    """Each system at the most users of its own paper.

    Parameters
    ----------
    table : DataFrame
        What :func:`aggregate` returned.

    Returns
    -------
    DataFrame
        One row per (config, users, mix, turn), one column for each of :data:`HIGHLIGHTS`: means over repeats.
    """
    highest = table[table["users"] == table.groupby("paper")["users"].transform("max")]
    rows = ["config", "users", "mix", "turn"]
    return highest.pivot_table(index=rows, columns="metric", values="mean").reindex(columns=HIGHLIGHTS)


def accounting(records: pd.DataFrame) -> pd.DataFrame:
    """Do clients and servers agree, and how was the load spread?

    Returns
    -------
    DataFrame
        One row per config: ``received_tokens``, ``counted_tokens`` (by the servers), ``busiest_share`` (requests of the
        busiest expert over an even share) and ``moved`` (share of continuation prompts that the router sent to another
        expert than their base prompt; NaN where nothing is classified).
    """
    done = answers(records)
    by_config = done.groupby("config")
    counted = done.groupby(["config", "point_hash"])["server_tokens"].first().groupby("config").sum()
    classified = done[done["route_kmeans_ns"] > 0]
    turns = classified.pivot_table(index=["config", "point_hash", "user"], columns="turn", values="expert")
    turns = turns.reindex(columns=["base", "continuation"]).dropna()
    return pd.DataFrame(
        {
            "received_tokens": by_config["output_tokens"].sum(),
            "counted_tokens": counted,
            "busiest_share": by_config["expert"].agg(lambda expert: expert.value_counts().max() / len(expert))
            * pd.Series({name: config.load_configuration(name).laptop.instances for name in by_config.groups}),
            "moved": (turns["base"] != turns["continuation"]).groupby("config").mean(),
        }
    )


def routing_spans(records: pd.DataFrame) -> pd.DataFrame:
    """What the gateway did with each answered request that passed through one, in ms.

    Returns
    -------
    DataFrame
        ``config``, ``relay``, ``mix``, ``users``, ``repeat``, ``turn``, ``input_tokens``, one column per span of
        :data:`erlib.serving.spans.GATEWAY_SPANS` (0 where the gateway skipped it), ``gateway`` (their sum) and
        ``first_byte``.
    """
    _each_request_once(records)
    done = records[(records["status"] == "ok") & records["route_forward_ns"].notna()].reset_index(drop=True)
    spans = done[[column(span) for span in SPANS]].fillna(0) * 1e-6
    spans.columns = pd.Index(SPANS)
    spans.insert(len(GATEWAY_SPANS), "gateway", spans[list(GATEWAY_SPANS)].sum(axis=1))
    return pd.concat([done[["config", "relay", "mix", "users", "repeat", "turn", "input_tokens"]], spans], axis=1)


def routing_overhead(records: pd.DataFrame) -> pd.DataFrame:
    """Routing overhead by who relays and number of users, span by span.

    Returns
    -------
    DataFrame
        One row per (config, relay, users, span), ``gateway`` being the sum of the gateway's own spans: ``requests``,
        ``mean_ms``, ``sd_ms``, ``median_ms``, ``p99_ms``.
    """
    names = [*GATEWAY_SPANS, "gateway", "first_byte"]
    keys = ["config", "relay", "users"]
    long = routing_spans(records).melt(id_vars=keys, value_vars=names, var_name="span", value_name="ms")
    return long.groupby([*keys, "span"], as_index=False)["ms"].agg(
        requests="count", mean_ms="mean", sd_ms="std", median_ms="median", p99_ms=p99
    )
