"""The papers' systems in wall-clock time on any machine: engines that only keep time, everything around them real.

An emulated engine is a Triton model whose steps last as long as :mod:`erlib.paper_scale.steptimes` says
(``engines/triton/emulated``); clients, NGINX, gateways and servers are those of the measured sweeps, which
:mod:`erlib.load.sweep` runs and records. A machine with few cores cannot carry the tokens of eight H100s in real time;
in *slow motion* it can: every step takes so many times longer, and the records' times are divided by as much. What the
harness costs shrinks by the same factor, as if its cores were faster. Where even that is too much, steps end late, and
the point is marked.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pandas as pd

from erlib import cache, config
from erlib.config import ConfigError, Paper, Profile
from erlib.engines import checkpoint
from erlib.load import metrics, points, records
from erlib.load.experiments import Series, System
from erlib.paper_scale import batching, measured_steps, simulation, steptimes
from erlib.routing import building, clusterer
from erlib.serving import wire
from erlib.serving.share import Classifier
from erlib.serving.spans import GATEWAY_SPANS, column
from erlib.serving.triton import ServerPlan
from erlib.workload import prompts
from erlib.workload.prompts import Workload

KEPT_PACE = 0.05
"""Largest share of the engines' time that a point may lose to late steps and still count as their doing."""


def system(
    profile: Profile,
    name: str,
    slow_motion: float = 1.0,
    classifier: Classifier = "ours",
    steps: Path | None = None,
) -> System:
    """A configuration of a paper on 8 emulated H100s (see :func:`erlib.paper_scale.batching.paper_system`).

    One second of the engines takes `slow_motion` seconds on the wall. Other GPUs than H100s have `steps`, a table of
    ``scripts/measure_step_times.py``.

    Raises
    ------
    ConfigError
        If that table does not hold it.
    """
    answer_limit = _answer_limit(profile, name)
    target = _timed(profile, name, steps)
    parameters = {
        "engine": str(checkpoint.checkpoint(profile.engines)),
        "config": name,
        "answer_limit": json.dumps(answer_limit),
        "slow_motion": str(slow_motion),
        wire.CONTEXT: str(min(target.kv_tokens, target.max_step_tokens)),
        # for the points' hash: what the name stands for
        "stands_for": cache.digest(config.load_configuration(name).system.model_dump(), steps or steptimes.TABLE),
        **({"steps": str(steps.resolve())} if steps else {}),
    }
    # It stands for hardware of its own, which nothing here could delay: where cores are short, the engine goes first.
    server = ServerPlan("emulated", parameters, target.batch_size, niceness=-10)
    return System(
        config=name,
        routing=target.routing,
        servers=[server] * target.instances,
        tokenizer=checkpoint.checkpoint(profile.engines) / "tokenizer.json",
        router=building.build_clusterer(profile),
        classifier=classifier,
        relay=profile.serving.relay,
    )


def _answer_limit(profile: Profile, name: str) -> int | None:
    return profile.workload.p2_max_output_tokens if config.paper_of(name) == "p2" else None


def _timed(profile: Profile, name: str, steps: Path | None) -> batching.System:
    """What keeps time for a configuration."""
    try:
        if steps and steps.suffix == ".csv":
            measured_steps.read(steps)
        return batching.paper_system(name, _answer_limit(profile, name), steps)
    except (OSError, ValueError) as error:
        raise ConfigError(f"emulation.configs: {error}") from None


def check(profile: Profile) -> None:
    """Refuse at once step times that :func:`emulated_load` would refuse.

    Raises
    ------
    ConfigError
    """
    if profile.emulation.steps:
        for name in profile.emulation.configs:
            _timed(profile, name, Path(profile.emulation.steps))


def workload(profile: Profile, paper: Paper) -> Workload:
    """Prompts of the papers' own lengths, cut from the profile's corpus by the profile's router.

    Paper 2's answers get MLPerf's lengths: an engine that only keeps time never ends an answer itself.
    """
    forced = profile.workload.model_copy(update={"p2_answers": "mlperf"})
    full_length = profile.model_copy(update={"scale": config.Scale(users=1, tokens=1), "workload": forced})
    router = clusterer.Clusterer.load(building.build_clusterer(profile))
    return prompts.build(full_length, paper, checkpoint.tokenizer(profile), router, n=profile.emulation.prompts)


def emulated_load(profile: Profile) -> list[Series]:
    """The papers' main experiment on emulated engines: few systems, few loads."""
    settings = profile.emulation
    series = []
    for name in settings.configs:
        paper = config.paper_of(name)
        target = system(profile, name, settings.slow_motion, steps=Path(settings.steps) if settings.steps else None)
        series.append(
            Series(paper, "load", target, workload(profile, paper), settings.users, settings.repeats, ["uniform"])
        )
    return series


def simulated_beside(profile: Profile, sweep_: list[Series], emulated: pd.DataFrame | None = None) -> pd.DataFrame:
    """The same points (systems, prompts, users, repeats) in virtual time.

    Parameters
    ----------
    profile : Profile
    sweep_ : list of Series
    emulated : DataFrame, optional
        Their records.

    Returns
    -------
    DataFrame
        Records with ``source`` "simulated-hardware", where requests reach the engines at once, and, if there are
        emulated ones, "simulated-replay", where each is as late as it was there, by the gateway's own spans.
    """
    parts = []
    delays_s = {} if emulated is None else _routing_s(emulated)
    for series in sweep_:
        for point in points.points(profile, series):
            parameters = series.system.servers[0].parameters
            target = batching.paper_system(
                point.system.config,
                json.loads(parameters["answer_limit"]),
                Path(parameters["steps"]) if "steps" in parameters else None,
            )
            target = dataclasses.replace(target, added=series.system.added)
            drawn = prompts.draw(series.workload, point.users, point.mix, profile.seed, point.repeat)
            ways: dict[str, list[float] | None] = {"simulated-hardware": None}
            if emulated is not None:
                turns = itertools.product(range(point.users), ("base", "continuation"))
                ways["simulated-replay"] = [
                    delays_s[point.hash, user, turn] if turn == "base" or series.continues else 0.0
                    for user, turn in turns
                ]
            for source, routing_s in ways.items():
                answered = simulation.simulate(
                    target,
                    drawn,
                    paper=series.paper,
                    mix=point.mix,
                    repeat=point.repeat,
                    routing_s=routing_s,
                    columns={"source": source, "experiment": series.experiment, "profile": profile.name},
                    continues=series.continues,
                )
                parts.append(answered)
    return records.frame(parts)


def _routing_s(emulated: pd.DataFrame) -> dict[tuple[str, int, str], float]:
    """(point's hash, user, turn) -> seconds between the client's send and the prompt's leaving the gateway."""
    spans_ns = emulated[[column(span) for span in GATEWAY_SPANS]].sum(axis=1)
    keys = zip(emulated["point_hash"], emulated["user"], emulated["turn"], strict=True)
    return dict(zip(keys, spans_ns * 1e-9, strict=True))


def pace(emulated: pd.DataFrame) -> pd.DataFrame:
    """How well the machine kept the engines' pace.

    Returns
    -------
    DataFrame
        One row per point: its key, ``late`` (share of steps more than 5 % late), ``lost_time`` (share of the engines'
        time) and ``kept_pace``.
    """
    key = ["config", "client", "classifier", "slow_motion", "mix", "users", "repeat"]
    points = emulated.groupby(key, dropna=False, as_index=False)[["steps", "late_steps", "lost_time"]].first()
    points["late"] = points.pop("late_steps") / points.pop("steps")
    return points.assign(kept_pace=points["lost_time"] <= KEPT_PACE)


def beside_simulation(emulated: pd.DataFrame, virtual: pd.DataFrame) -> pd.DataFrame:
    """TTFT, TPOT and session throughput of the same points in both, and how far the emulation is off.

    Parameters
    ----------
    emulated, virtual : DataFrame
        Records of :func:`erlib.load.sweep.run` and of :func:`simulated_beside`.

    Returns
    -------
    DataFrame
        One row per configuration, users, turn and metric, means over repeats: ``emulated``, ``simulated`` and
        ``replayed`` (as late as the emulation's gateways were), the emulation's difference relative to each, and
        ``kept_pace``.
    """
    keys = ["config", "users", "turn", "metric"]

    def means(frame: pd.DataFrame) -> pd.Series:
        table = metrics.aggregate(metrics.summarise(frame))
        return table[table["metric"].isin(measured_steps.METRICS)].set_index(keys)["mean"]

    both = pd.DataFrame(
        {
            "emulated": means(emulated),
            "simulated": means(virtual[virtual["source"] == "simulated-hardware"]),
            "replayed": means(virtual[virtual["source"] == "simulated-replay"]),
        }
    ).dropna()
    for other in ("simulated", "replayed"):
        both[f"off_{other}"] = both["emulated"] / both[other] - 1
    kept = pace(emulated).groupby(["config", "users"])["kept_pace"].all().reset_index()
    return both.reset_index().merge(kept)
