"""Step times of a measured engine, fitted to its records, to predict loads that were not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import isotonic_regression, least_squares, minimize_scalar

from erlib.paper_scale.steptimes import Limits, StepTimes
from erlib.serving import spans

_ROUTE_COLUMNS = [spans.column(span) for span in spans.GATEWAY_SPANS]


class TooFewRecords(ValueError):
    """There is too little to fit to."""


class Fitted(StepTimes):
    """Step times of a measured engine, fitted to its records; to predict loads that were not measured.

    A step that gives tokens to b sequences takes as long as a table says: the mean time between two tokens of an answer
    while b were under way and no prompt was read, made non-decreasing, linear between the batch sizes that were seen.
    Reading prompts adds a fixed time and one per prompt token; the fixed time is another one if nothing is decoded
    beside (the way to the engine is in it then). How many instances run at full speed beside each other is what makes
    steps of equal batch sizes scatter least.

    Parameters
    ----------
    records : DataFrame
        Records of one configuration, one user and at least one further load among them.
    min_gaps : int
        Batch sizes with fewer inter-token times than this are not used.

    Attributes
    ----------
    batches, decode_table_s : array
        Batch sizes, and the seconds of a step that reads no prompt, on a machine of its own.
    alone_s, beside_s, per_token_s : float
        What reading prompts adds: without and with others decoding, and per prompt token.

    Raises
    ------
    ValueError
        If there are records of several configurations, or none of a single user.
    TooFewRecords
        If no batch size was seen often enough.
    """

    def __init__(self, records: pd.DataFrame, min_gaps: int = 20):
        if records["config"].nunique() != 1:
            raise ValueError(f"fit one configuration at a time, not {sorted(records['config'].unique())}")
        done = records[records["status"] == "ok"]
        if not (done["users"] == 1).any():
            raise ValueError("calibrating needs records of a single user: without them, time in queues looks like work")
        steps = pd.concat([_steps(point) for _, point in done.groupby(["source", "mix", "users", "repeat"])])
        decoding = steps[steps["prompts"] == 0]
        decoding = decoding[decoding.groupby("batch")["batch"].transform("size") >= min_gaps]
        if decoding.empty:
            raise TooFewRecords(f"no batch size has {min_gaps} inter-token times; give more records or lower min_gaps")
        self.at_full_speed = _at_full_speed(decoding)
        table_s = _by_batch(decoding, self.at_full_speed)
        self.batches: npt.NDArray[np.int64] = table_s.index.to_numpy()
        self.decode_table_s: npt.NDArray[np.float64] = table_s.to_numpy()
        reading = steps[(steps["prompts"] > 0) & (steps["batch"] <= self.batches[-1])]
        self.alone_s, self.beside_s, self.per_token_s = self._added_by_prompts(reading)
        longest = int((done["input_tokens"] + done["output_tokens"]).max())
        self.limits = Limits(np.inf, int(self.batches[-1]), longest, math.ceil(steps["busy"].max()))

    def step_s(self, prompts: int, prompt_tokens: int, sequences: int, context_tokens: int) -> float:
        self._check(prompts, prompt_tokens, sequences, context_tokens)
        if prompts + sequences > self.limits.batch:
            raise self._beyond("batch", prompts + sequences)
        seconds = np.interp(prompts + sequences, self.batches, self.decode_table_s)
        if prompts:
            seconds += (self.beside_s if sequences else self.alone_s) + self.per_token_s * prompt_tokens
        return float(seconds)

    def _added_by_prompts(self, reading: pd.DataFrame) -> tuple[float, float, float]:
        """The three times that explain the steps best, in ratios; the few steps that stalled have little say."""
        table_s = np.interp(reading["batch"], self.batches, self.decode_table_s)
        slowdown = _slowdown(reading, self.at_full_speed)
        alone = reading["alone"].to_numpy()
        # without a prompt that met an answer, reading one is taken to cost the same beside decoding as alone
        fixed = [alone, ~alone] if not alone.all() else [alone]
        parts = np.column_stack([*fixed, reading["prompt_tokens"]]).astype(float)
        once = 1 / np.sqrt(reading["seen_by"].to_numpy())

        def misfit(added_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return once * np.log(slowdown * (table_s + parts @ added_s) / reading["seconds"].to_numpy())

        start = np.full(parts.shape[1], 1e-3)
        added_s = least_squares(misfit, start, bounds=(0, np.inf), loss="soft_l1", f_scale=0.1).x
        return float(added_s[0]), float(added_s[-2]), float(added_s[-1])


def arrived_ns(records: pd.DataFrame) -> pd.Series:
    """When each request reached its server: sent, and what the gateway took, where there is one."""
    return records["t_send_ns"] + records[_ROUTE_COLUMNS].fillna(0).sum(axis=1)


def _slowdown(steps: pd.DataFrame, at_full_speed: float) -> npt.NDArray[np.float64]:
    return np.maximum(1, steps["busy"].to_numpy() / at_full_speed)


def _at_full_speed(decoding: pd.DataFrame) -> float:
    """How many instances run at full speed, if steps of equal batch sizes are to scatter least."""

    def scatter(at_full_speed: float) -> float:
        table_s = _by_batch(decoding, at_full_speed).loc[decoding["batch"]].to_numpy()
        return float(np.abs(np.log(decoding["seconds"] / table_s / _slowdown(decoding, at_full_speed))).mean())

    most = decoding["busy"].max()
    return float(minimize_scalar(scatter, bounds=(1, most), method="bounded").x) if most > 1 else np.inf


def _by_batch(decoding: pd.DataFrame, at_full_speed: float) -> pd.Series:
    """Mean seconds of a step at full speed, by batch size, non-decreasing."""
    alone_s = decoding["seconds"] / _slowdown(decoding, at_full_speed)
    table = alone_s.groupby(decoding["batch"]).agg(["mean", "size"])
    return pd.Series(isotonic_regression(table["mean"], weights=table["size"].astype(float)).x, table.index)


def _steps(point: pd.DataFrame) -> pd.DataFrame:
    """Engine steps of one point.

    Returns
    -------
    DataFrame
        A row per inter-token time and one per step that decoded nothing: ``batch`` (sequences that got a token),
        ``prompts`` and ``prompt_tokens`` that were read, ``alone`` (nothing was decoded beside them), ``seen_by``
        (answers with a row of this step), ``busy`` (instances that had work, mean over the step), ``seconds``.
    """
    servers = [server for _, server in point.assign(arrived_ns=arrived_ns(point)).groupby("expert")]
    steps = pd.concat([part for server in servers for part in (_gaps(server), _alone(server))], ignore_index=True)
    began, ended = steps.pop("began_ns"), steps.pop("ended_ns")
    worked_ns = sum(_worked_ns(server, ended) - _worked_ns(server, began) for server in servers)
    steps["busy"] = np.clip(worked_ns / (ended - began), 1, len(servers))
    steps["seconds"] = (ended - began) * 1e-9
    return steps


def _gaps(server: pd.DataFrame) -> pd.DataFrame:
    """Steps of one server that decoded, as every answer saw them."""
    server = server.sort_values("t_first_ns")
    starts, ends = server["t_first_ns"].to_numpy(), np.sort(server["t_last_ns"].to_numpy())
    read = np.concatenate([[0], server["input_tokens"].cumsum()])
    stamps: Sequence[npt.NDArray[np.int64]] = [np.asarray(tokens) for tokens in server["token_ns"]]
    sooner = np.concatenate([tokens[:-1] for tokens in stamps])
    later = np.concatenate([tokens[1:] for tokens in stamps])
    quarter = (later - sooner) // 4
    # a step's messages arrive within a fraction of it, so a prompt's first token may come a little after the others'
    before, after = (np.searchsorted(starts, stamp + quarter, "right") for stamp in (sooner, later))
    sequences = before - np.searchsorted(ends, sooner + quarter, "left")
    prompts, prompt_tokens = after - before, read[after] - read[before]
    columns = {"batch": sequences + prompts, "prompts": prompts, "prompt_tokens": prompt_tokens, "alone": False}
    return pd.DataFrame({**columns, "seen_by": sequences, "began_ns": sooner, "ended_ns": later})


def _alone(server: pd.DataFrame) -> pd.DataFrame:
    """Steps of one server that only read prompts: from their arrival, or from the last token before, to the first."""
    server = server.sort_values("t_first_ns")
    first, last, arrived = (server[name].to_numpy() for name in ("t_first_ns", "t_last_ns", "arrived_ns"))
    read = np.concatenate([[0], server["input_tokens"].cumsum()])
    quarter = (last - first) // (4 * np.maximum(1, server["output_tokens"].to_numpy() - 1))
    idle_from, decoded_until = (
        np.concatenate([[-np.inf], np.maximum.accumulate(end)[:-1]]) for end in (last, last + quarter)
    )
    leaders = np.flatnonzero(first > decoded_until)
    stops = np.searchsorted(first, (first + quarter)[leaders], "right")
    came = [arrived[leader:stop].min() for leader, stop in zip(leaders, stops, strict=True)]
    prompts, prompt_tokens = stops - leaders, read[stops] - read[leaders]
    columns = {"batch": prompts, "prompts": prompts, "prompt_tokens": prompt_tokens, "alone": True, "seen_by": 1}
    return pd.DataFrame({**columns, "began_ns": np.maximum(idle_from[leaders], came), "ended_ns": first[leaders]})


def _worked_ns(server: pd.DataFrame, at_ns: pd.Series) -> npt.NDArray[np.float64]:
    """For how long one server had had work by each of the times `at_ns`."""
    server = server.sort_values("arrived_ns")
    arrived, until = server["arrived_ns"].to_numpy(), np.maximum.accumulate(server["t_last_ns"].to_numpy())
    idle = np.flatnonzero(arrived[1:] > until[:-1])
    edges = np.column_stack([arrived[np.append(0, idle + 1)], until[np.append(idle, len(server) - 1)]]).ravel()
    lengths = np.diff(edges)
    lengths[1::2] = 0
    return np.interp(at_ns, edges, np.append(0, lengths.cumsum()))
