"""One source's records, summarised so that a claim can ask by the papers' configurations and numbers of users."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from scipy import signal, stats

from erlib import config
from erlib.claims.uncertainty import Value
from erlib.config import Profile
from erlib.load import metrics
from erlib.load.records import read_files
from erlib.machine import processes
from erlib.machine.progress import Bar

Levels = int | Sequence[int]
"""Users on the papers' scale: from and to, or one level."""


Key = tuple[str, str, str, int, str, str]
"""Experiment, configuration, mix, users, turn, metric."""


class NotTestable(Exception):
    """A source has no record of what a predicate asks for; the message says of what."""


FULL_SCALE = config.Scale(users=1, tokens=1)


class Summary(NamedTuple):
    """What verdicts need of one source's records; at the papers' scale these hold gigabytes of timestamps."""

    requests: pd.DataFrame
    """The answered requests with their latencies, without the timestamps of their tokens."""
    curves: pd.DataFrame
    """Tokens over time of the load experiment, by turn: 60 s buckets in paper 1, 2 s in paper 2, scaled."""
    points: pd.DataFrame
    """One row per point, turn and metric: ``value``."""


Records: TypeAlias = pd.DataFrame | Iterable[pd.DataFrame] | Summary
"""One source's: whole, in parts with whole points, or summarised."""


class Evidence:
    """One source's records, summarised so that predicates can ask by the papers' numbers of users.

    Parameters
    ----------
    source : str
        ``measured``, ``emulated``, ``simulated-...``. All but ``measured`` are on the papers' own scale.
    records : Records
        As :func:`erlib.load.records.read` returns them; or what :func:`summarise` or :func:`of_files` made of them.
    profile : Profile
        Its scale says what the measured users, tokens and seconds stand for.

    Raises
    ------
    ValueError
        If there are no records, or they are damaged.
    """

    def __init__(self, source: str, records: Records, profile: Profile) -> None:
        self.source = source
        self.profile = profile
        self.scale = scale_of(source, profile)
        self.done, self.curves, points = summarise(source, records, profile)
        keys = ["experiment", "config", "mix", "users", "turn", "metric"]
        over = points.groupby(keys)["value"].agg(["mean", "std", "count"])
        self.values: dict[Key, Value] = {
            key: Value(mean, sd, int(n)) for key, (mean, sd, n) in zip(over.index, over.to_numpy(), strict=True)
        }
        """(experiment, config, mix, users, turn, metric) -> mean and spread over repeats."""

    @classmethod
    def of_values(cls, source: str, values: dict[Key, Value], profile: Profile) -> Evidence:
        """Evidence of which only the numbers are left; what looks at requests or curves finds none."""
        evidence = cls.__new__(cls)
        evidence.source, evidence.profile, evidence.scale, evidence.values = source, profile, FULL_SCALE, values
        evidence.done = evidence.curves = pd.DataFrame(columns=[*metrics.POINT, "turn"])
        return evidence

    @property
    def has_gpus(self) -> bool:
        """Whether absolute seconds are an H100's."""
        return self.source != "measured" or self.profile.serving.backend == "tensorrt_llm"

    def resolve(self, name: str) -> str:
        """``p2.fp8-tp4-best`` -> the batch size with the lowest response time at the most users."""
        stem = name.removesuffix("best")
        if stem == name:
            return name
        tried = {
            (key[3], value.mean, key[1])
            for key, value in self.values.items()
            if key[0] == "preliminary" and key[1].startswith(stem) and key[5] == "response_mean_s"
        }
        if not tried:
            raise NotTestable(f"no preliminary records of {stem.removesuffix('-')}")
        most = max(users for users, _, _ in tried)
        return min((seconds, config_id) for users, seconds, config_id in tried if users == most)[1]

    def series(
        self, metric: str, name: str, users: Levels, turn: str, mix: str = "", experiment: str = "load"
    ) -> dict[int, Value]:
        """Values of one configuration at the levels that stand for the papers' `users`, on this source's scale.

        Raises
        ------
        NotTestable
            If there are none.
        """
        name = self.resolve(name)
        found = {
            (key[2], key[3]): value
            for key, value in self.values.items()
            if (key[0], key[1], key[4], key[5]) == (experiment, name, turn, metric)
        }
        mixes = sorted({key[0] for key in found})
        if not mix:  # paper 2 shows the normal mix; systems that ignore clusters are measured under one mix only
            mix = "normal" if name.startswith("p2") and "normal" in mixes else "uniform"
        if mix not in mixes and len(mixes) == 1:
            mix = mixes[0]
        at = {level: value for (which, level), value in found.items() if which == mix}
        if not at:
            short = f": its runs have fewer than {metrics.LEAST_BUCKETS} time buckets" * metric.startswith("bucket_")
            raise NotTestable(f"no {LABELS[metric]} of {name}{f' ({mix} mix)' * (mix == 'normal')}{short}")
        chosen = self._levels(at, users)
        if not chosen:
            raise NotTestable(f"no level of {name} stands for {name_users(users)} users")
        return {level: at[level] for level in chosen}

    def _levels(self, available: Iterable[int], users: Levels) -> list[int]:
        paper = {level: self.scale.paper_users(level) for level in sorted(available)}
        if not isinstance(users, int):
            return [level for level, at in paper.items() if users[0] <= round(at) <= users[1]]
        nearest = min(paper, key=lambda level: abs(paper[level] - users))
        return [nearest] if abs(paper[nearest] / users - 1) <= 0.3 else []

    def requests(self, paper: str, experiment: str = "load") -> pd.DataFrame:
        """The answered requests of one paper's experiment, or :class:`NotTestable`."""
        mine = self.done[(self.done["paper"] == paper) & (self.done["experiment"] == experiment)]
        if mine.empty:
            raise NotTestable(f"no {experiment} records of paper {paper[-1]}")
        return mine

    def at(self, level: int, turn: str) -> str:
        paper = self.scale.paper_users(level)
        where = f"{level} user{'s' * (level > 1)}" + ("" if paper == level else f" (papers: {paper:.0f})")
        return where + (", continuation" if turn == "continuation" else "")


def scale_of(source: str, profile: Profile) -> config.Scale:
    """What a source's users, tokens and seconds stand for."""
    return profile.scale if source == "measured" else FULL_SCALE


def summarise(source: str, records: Records, profile: Profile) -> Summary:
    """What verdicts need of a source's records; see :class:`Evidence` for parameters and errors."""
    if isinstance(records, Summary):
        return records
    parts = [records] if isinstance(records, pd.DataFrame) else records
    seen = [_summary(part, scale_of(source, profile)) for part in parts if not part.empty]
    if not seen:
        raise ValueError(f"no records for source {source!r}: leave it out, or run its notebooks first")
    return Summary(*(pd.concat(kind, ignore_index=True) for kind in zip(*seen, strict=True)))


def of_files(source: str, files: Sequence[Path], profile: Profile, workers: int = 2) -> Summary:
    """:func:`summarise` of complete points, a few at a time in each of so many processes: memory never holds them all.

    Raises
    ------
    DamagedRecords
        If a file is not what was written.
    """
    few = 16
    parts = [files[start : start + few] for start in range(0, len(files), few)]
    scale = scale_of(source, profile)
    with processes.pool(workers) as pool, Bar(total=len(files), unit="point", desc=f"claims {source}") as progress:
        seen = []
        for part, summary in zip(parts, pool.map(_summary_of_files, parts, [scale] * len(parts)), strict=True):
            seen.append(summary)
            progress.update(len(part))
    return Summary(*(pd.concat(kind, ignore_index=True) for kind in zip(*seen, strict=True)))


def _summary_of_files(files: Sequence[Path], scale: config.Scale) -> Summary:
    return _summary(read_files(files), scale)


def _summary(part: pd.DataFrame, scale: config.Scale) -> Summary:
    keys = [*metrics.POINT, "turn"]
    general = metrics.summarise(part).melt(keys, metrics.METRICS, "metric")
    done = metrics.answers(part)
    # Slow motion divides the gateways' own time too, which is real: it says nothing of theirs or the papers'.
    done["route_kmeans_ns"] = done["route_kmeans_ns"].where(done["slow_motion"].fillna(1) == 1)
    own = [
        dict(zip(keys, key, strict=True)) | {"metric": name, "value": value}
        for key, group in done.groupby(keys)
        for name, value in {**_of_answers(group), **_of_routing(group)}.items()
    ]
    load = part[part["experiment"] == "load"]
    width_s = {"p1": 60 / scale.seconds, "p2": 2 / scale.seconds}
    curves = pd.concat(
        metrics.bucket_throughput(group, width_s[paper]).assign(turn=turn)
        for (paper, turn), group in [*load.groupby(["paper", "turn"]), (("p1", ""), load[:0])]
    )
    over = [
        dict(zip(keys, key, strict=True)) | {"metric": name, "value": value}
        for key, group in curves.groupby(keys)
        for name, value in _of_buckets(group["tokens_per_s"].to_numpy()).items()
    ]
    table = pd.concat([general, pd.DataFrame(own), pd.DataFrame(over)]).dropna(subset="value")
    return Summary(done.drop(columns="token_ns"), curves, table)


def _of_answers(done: pd.DataFrame) -> dict[str, float]:
    tpot = done["tpot_s"].dropna()
    lasted_s = (done["t_last_ns"].max() - done["t_send_ns"].min()) / 1e9
    return {
        "ttft_min_s": done["ttft_s"].min(),
        "tpot_iqr_s": stats.iqr(tpot) if len(tpot) else np.nan,
        # Not the mean over buckets: the last one is seldom full, and a short run has few.
        "run_tokens_per_s": done["output_tokens"].sum() / lasted_s if lasted_s else np.nan,
    }


def _of_routing(done: pd.DataFrame) -> dict[str, float]:
    if done["route_kmeans_ns"].isna().all():
        return {}
    ms = metrics.routing_spans(done)["gateway"]
    return {
        "gateway_mean_ms": ms.mean(),
        "gateway_cv": ms.std() / ms.mean(),
        "gateway_p99_over_median": metrics.p99(ms) / ms.median(),
        "gateway_share": ms.mean() / 1e3 / done["response_s"].median(),
    }


def _of_buckets(tokens_per_s: np.ndarray) -> dict[str, float]:
    if len(tokens_per_s) < metrics.LEAST_BUCKETS:
        return {}
    mean, peak = tokens_per_s.mean(), tokens_per_s.max()
    third = len(tokens_per_s) // 3
    low, high = np.quantile(tokens_per_s, [0.05, 0.95])
    # a peak stands out by a fifth of the highest; zeros around let the first and the last bucket be one
    peaks, _ = signal.find_peaks(np.pad(tokens_per_s, 1), prominence=peak / 5)
    return {
        "bucket_peak_tokens_per_s": peak,
        "bucket_p5_tokens_per_s": low,
        "bucket_p95_tokens_per_s": high,
        "bucket_cv": tokens_per_s.std() / mean,
        "bucket_start_over_peak": tokens_per_s[0] / peak,
        "bucket_end_over_peak": tokens_per_s[-third:].mean() / peak,
        "bucket_peaks": float(len(peaks)),
    }


LABELS = {
    "ttft_mean_s": "mean TTFT",
    "ttft_sd_s": "sd of TTFT",
    "ttft_median_s": "median TTFT",
    "ttft_min_s": "lowest TTFT",
    "tpot_mean_s": "mean TPOT",
    "tpot_median_s": "median TPOT",
    "tpot_iqr_s": "interquartile range of TPOT",
    "response_mean_s": "mean response time",
    "response_median_s": "median response time",
    "response_p99_s": "p99 response time",
    "user_tokens_per_s_mean": "user throughput",
    "session_tokens_per_s": "session throughput",
    "gateway_mean_ms": "mean routing latency",
    "gateway_cv": "sd over mean of routing latency",
    "gateway_p99_over_median": "p99 over median of routing latency",
    "gateway_share": "routing latency over median response time",
    "run_tokens_per_s": "mean throughput over the run",
    "bucket_peak_tokens_per_s": "peak bucket throughput",
    "bucket_p5_tokens_per_s": "5th percentile of bucket throughput",
    "bucket_p95_tokens_per_s": "95th percentile of bucket throughput",
    "bucket_cv": "sd over mean of bucket throughput",
    "bucket_start_over_peak": "first bucket over the peak",
    "bucket_end_over_peak": "mean of the last third of the buckets over the peak",
    "bucket_peaks": "peaks over time",
}


def name_users(users: Levels) -> str:
    return f"{users:,}" if isinstance(users, int) else f"{users[0]:,} to {users[1]:,}"
