"""What did the papers measure? Their harness, part by part, around emulated engines whose speed is known.

Two parts of the papers' harness are replaced, each by what they describe or by what this workbench uses: the client
(one process with a thread and a ``tritonclient`` stream per user, or a few asyncio processes) and the way in which the
gateway evaluates the router's model (scikit-learn's, unpickled, at a realistic vocabulary; or
:mod:`erlib.routing.clusterer`). Engines, prompts, decisions of the router and everything else stay the same, in real
time. What differs between the arms is the replaced part's doing, as far as the engines kept pace; that the papers' own
numbers come from the same parts remains an inference.
"""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import get_args

import pandas as pd
import psutil

from erlib import config
from erlib.config import ConfigError, Profile
from erlib.load import metrics, points, records, sweep, users
from erlib.load.experiments import Series
from erlib.paper_scale import emulation, measured_steps
from erlib.routing import sklearn_pipeline
from erlib.serving import wire
from erlib.serving.share import Classifier

PAPERS: tuple[users.Client, Classifier] = ("threads", "stock")
OURS: tuple[users.Client, Classifier] = ("asyncio", "ours")
ARMS: list[tuple[users.Client, Classifier]] = list(product(get_args(users.Client), get_args(Classifier)))
"""(client, classifier), all four."""

_BYTES_PER_WEIGHT = 22
"""Of a stock router: float64, the copy that each classification makes, and the vocabulary beside them."""

METRICS = [*measured_steps.METRICS, "gateway_mean_s", "client_cpu_us_per_token"]
"""Columns of :func:`by_point`."""


def ablation_plan(profile: Profile) -> list[Series]:
    """Four arms around the same engines: base prompts at their own length, short answers of forced length."""
    settings = profile.ablation
    paper = config.paper_of(settings.config)
    pool = emulation.workload(profile, paper)
    frame = pool.frame.assign(max_tokens=settings.output_tokens, end_id=wire.NEVER_STOP)
    pool = dataclasses.replace(pool, frame=frame)
    router = sklearn_pipeline.build(profile, settings.terms)
    series = []
    for client, classifier in ARMS:
        system = emulation.system(profile, settings.config, classifier=classifier)
        system = dataclasses.replace(system, router=router, relay="gateway")  # the papers' gateways relay
        most = max(settings.users) if classifier == "ours" else settings.stock_users
        levels = [level for level in settings.users if level <= most]
        series.append(Series(paper, "ablation", system, pool, levels, settings.repeats, ["uniform"], client))
    return series


def ablation_profile(profile: Profile) -> Profile:
    """The profile with no more gateways than can hold the unpickled model."""
    changes = {"gateways": profile.ablation.gateways}
    return profile.model_copy(update={"serving": profile.serving.model_copy(update=changes)})


def run_ablation(profile: Profile) -> pd.DataFrame:
    """Records of all arms; what is missing is run (see :func:`erlib.load.sweep.run`).

    Raises
    ------
    ConfigError
        If memory does not hold the unpickled models that are still needed.
    """
    _require_memory(profile, 1)  # the model is made before anything is known of points
    arms = ablation_plan(profile)
    wanted = [point for arm in arms for point in points.points(ablation_profile(profile), arm)]
    if not all(records.found(point.path, "ablation") for point in wanted):
        _require_memory(profile, profile.ablation.gateways)
    return sweep.run(ablation_profile(profile), arms)


def _require_memory(profile: Profile, models: int) -> None:
    settings = profile.ablation
    needed = models * settings.terms * profile.clusterer.n_components * _BYTES_PER_WEIGHT
    free = psutil.virtual_memory().available
    if free < needed:
        raise ConfigError(
            f"{models} gateways with the stock router need {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free: lower ablation.gateways or ablation.terms"
        )


def by_point(records: pd.DataFrame) -> pd.DataFrame:
    """One row per arm, users and repeat: :data:`METRICS` and ``kept_pace``."""
    keys = ["client", "classifier", "users", "repeat"]
    rows = []
    for key, point in records.groupby(keys):
        (row,) = metrics.summarise(point).to_dict("records")
        gateway_s = metrics.routing_spans(point)["gateway"] * 1e-3  # the threaded client cannot see the spans
        elapsed_s = (point["t_last_ns"].max() - point["t_send_ns"].min()) * 1e-9
        client_cpu_s = point["client_cpu_cores"].iloc[0] * elapsed_s
        rows.append(
            {
                **dict(zip(keys, key, strict=True)),
                **{name: row[name] for name in measured_steps.METRICS},
                "gateway_mean_s": gateway_s.mean(),
                "client_cpu_us_per_token": client_cpu_s / point["output_tokens"].sum() * 1e6,
            }
        )
    return pd.DataFrame(rows).merge(emulation.pace(records)[[*keys, "kept_pace"]])


def _interval(values: pd.Series) -> dict[str, float]:
    """Mean and half width of Student's 95 % interval over repeats."""
    return {"mean": values.mean(), "ci95": float(metrics.half_interval(values.std(), values.count()))}


def ablation_table(points: pd.DataFrame) -> pd.DataFrame:
    """One row per arm, users and metric: ``mean`` and ``ci95`` over repeats, ``kept_pace`` (all repeats did)."""
    rows = []
    for (client, classifier, level), group in points.groupby(["client", "classifier", "users"]):
        shared = {"client": client, "classifier": classifier, "users": level, "kept_pace": group["kept_pace"].all()}
        for metric in METRICS:
            rows.append({**shared, "metric": metric, **_interval(group[metric])})
    return pd.DataFrame(rows).dropna(subset="mean").reset_index(drop=True)


def ablation_effects(points: pd.DataFrame) -> pd.DataFrame:
    """What each replaced part does to each metric, by users.

    Differences between the papers' part and ours, the other part held fixed, paired by repeat (the same prompts), and
    averaged over those states of the other part in which the engines kept pace. Where there is none, over all.

    Returns
    -------
    DataFrame
        One row per ``part`` (client, classifier), ``users`` and ``metric``: ``beside`` (states of the other part),
        ``difference`` (papers' minus ours), its ``ci95``, ``ours`` (mean with our part) and ``finding``: *engines were
        late* where none kept pace, so that the part and the lack of cores cannot be told apart; otherwise *established*
        where the interval excludes zero and *no difference seen* where it does not. Points that kept pace may still
        have lost a share of their engines' time (:data:`erlib.paper_scale.emulation.KEPT_PACE`): a relative difference
        below that may be the engines'.
    """
    rows = []
    parts = ("client", "classifier")
    for part, other, theirs, ours in zip(parts, reversed(parts), PAPERS, OURS, strict=True):
        in_pace = points.groupby(["users", other])["kept_pace"].all()
        for metric in METRICS:
            wide = points.pivot_table(index=["users", "repeat", other], columns=part, values=metric)
            if not {theirs, ours} <= set(wide.columns):
                continue
            for level, pairs in wide.dropna().groupby("users"):
                states = pairs.index.unique(other)
                beside = [state for state in states if in_pace[level, state]]
                used = pairs[pairs.index.isin(beside or states, level=other)]
                interval = _interval((used[theirs] - used[ours]).groupby("repeat").mean())
                rows.append(
                    {
                        "part": part,
                        "users": level,
                        "metric": metric,
                        "beside": ", ".join(beside or states),
                        "ours": used[ours].mean(),
                        "difference": interval["mean"],
                        "ci95": interval["ci95"],
                        "finding": _finding(bool(beside), interval),
                    }
                )
    return pd.DataFrame(rows)


def _finding(kept_pace: bool, interval: dict[str, float]) -> str:
    if not kept_pace:
        return "engines were late"
    return "established" if abs(interval["mean"]) > interval["ci95"] else "no difference seen"
