"""Replicas of hot experts: how many bring paper 2's normal mix to what the uniform one gets from eight GPUs.

Both papers name more copies of a popular model as the remedy for uneven demand and do not try it. Here it is tried at
their scale, in virtual time (:mod:`erlib.paper_scale.simulation`): each replica is one more GPU with one more engine
like the expert's, and a prompt goes to whichever replica of its expert has the fewest requests outstanding.

And it is tried on the real serving stack around emulated engines (:mod:`erlib.paper_scale.emulation`), with fewer users
and short answers that this machine can carry, beside the simulation of the very same points. There each gateway counts
only the requests that it has itself sent.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from erlib import config
from erlib.config import Mix, Profile
from erlib.load import metrics, points
from erlib.load.experiments import Series
from erlib.machine.progress import Bar
from erlib.paper_scale import batching, emulation, setups, simulation
from erlib.serving import wire
from erlib.workload import prompts

BETTER = {"response_p99_s": -1, "session_tokens_per_s": 1, "ttft_mean_s": -1}
"""What is looked at, and whether more (1) or less (-1) of it is better."""
NAMES = {
    "response_p99_s": "p99 response time",
    "session_tokens_per_s": "session throughput",
    "ttft_mean_s": "mean TTFT",
}
AGREEMENT = 0.05
"""Emulation and simulation that differ by no more than this share are said to agree."""


def run_replicas(
    profile: Profile,
    configs: Sequence[str] = ("p2.D", "p2.E"),
    users: Sequence[int] = (400, 700, 1000),
    most_added: int = 8,
) -> pd.DataFrame:
    """Simulate the normal mix with 0 to `most_added` replicas, and the uniform mix without any.

    Both mixes ask for the same prompts and answers in the same order, so that they differ in nothing but whose experts
    have to answer.

    Parameters
    ----------
    profile : Profile
        Gives the seed, the width of the normal mix and ``paper_scale.repeats``; everything else is the papers' own.
    configs : sequence of str
        Expert-router configurations of paper 2.
    users : sequence of int
        Concurrent users, one prompt each.
    most_added : int

    Returns
    -------
    DataFrame
        One row per (config, mix, added, users, repeat): ``gpus``, the columns of :func:`erlib.load.metrics.summarise`
        and ``session_tokens_per_s_per_gpu``. Engines only, no harness around them: ``source`` is "simulated-hardware".
    """
    full = config.at_paper_scale(profile)
    workload = replace(simulation.textless_workload(full, "p2"), sigma=profile.workload.sigma)
    shares = prompts.mix_shares("normal", workload.n_clusters, workload.sigma)
    arms: list[tuple[Mix, int]] = [("uniform", 0), *(("normal", added) for added in range(most_added + 1))]
    rows = []
    for users_now in Bar(users, desc="replicas", unit="level", delay=2, leave=False):
        for repeat in range(profile.paper_scale.repeats):
            drawn = {mix: prompts.draw(workload, users_now, mix, profile.seed, repeat) for mix in typing.get_args(Mix)}
            for name in configs:
                system = batching.paper_system(name, answer_limit=full.workload.p2_max_output_tokens)
                for mix, added in arms:
                    about = {"source": "simulated-hardware", "point_hash": f"{added} added"}
                    wider = replace(system, added=setups.hottest(shares, added))
                    answered = simulation.simulate(
                        wider, drawn[mix], paper="p2", mix=mix, repeat=repeat, seed=profile.seed, columns=about
                    )
                    summary = metrics.summarise(answered.to_pandas())
                    rows.append(summary.assign(added=added, gpus=len(wider.experts)))
    table = pd.concat(rows, ignore_index=True)
    return table.assign(session_tokens_per_s_per_gpu=table["session_tokens_per_s"] / table["gpus"])


def gpus_needed(table: pd.DataFrame) -> pd.DataFrame:
    """Replicas after which the normal mix does at least as well as the uniform one, means over repeats.

    Parameters
    ----------
    table : DataFrame
        What :func:`run_replicas` returned, or one source of :func:`replicas_beside_simulation`.

    Returns
    -------
    DataFrame
        One row per (config, users), a column per metric of :data:`BETTER`: the fewest replicas that suffice; missing
        where none of those tried does.
    """
    means = table.groupby(["config", "users", "mix", "added"])[list(BETTER)].mean() * pd.Series(BETTER)
    goal = means.xs("uniform", level="mix").droplevel("added")
    reached = means.xs("normal", level="mix").reset_index("added")
    rows = {
        key: {name: part.loc[part[name] >= goal.loc[key, name], "added"].min() for name in BETTER}
        for key, part in reached.groupby(["config", "users"])
    }
    index = pd.MultiIndex.from_tuples(rows, names=["config", "users"])
    return pd.DataFrame(list(rows.values()), index).astype("Int64")


# --- on the real serving stack ------------------------------------------------------------------------------------


def replicas_plan(profile: Profile) -> list[Series]:
    """The normal mix with each number of replicas, and the uniform mix without any, around emulated engines.

    All answers are equally long, so that both mixes ask for the same. Empty, with a line that says why, where the
    router has another number of clusters than the system has experts.
    """
    settings = profile.replicas
    experts = config.load_configuration(settings.config).system.instances
    if profile.clusterer.n_clusters != experts:
        clusters = profile.clusterer.n_clusters
        print(f"replicas: not emulated, {settings.config} has {experts} experts for {clusters} clusters")
        return []
    paper = config.paper_of(settings.config)
    pool = emulation.workload(profile, paper)
    pool = replace(pool, frame=pool.frame.assign(max_tokens=settings.output_tokens, end_id=wire.NEVER_STOP))
    shares = prompts.mix_shares("normal", pool.n_clusters, pool.sigma)
    system = emulation.system(profile, settings.config, settings.slow_motion)
    series = []
    for added in settings.added:
        wider = replace(system, servers=system.servers[:1] * (experts + added), added=setups.hottest(shares, added))
        mixes: list[Mix] = ["normal"] if added else ["uniform", "normal"]
        series.append(Series(paper, "replicas", wider, pool, settings.users, settings.repeats, mixes))
    return series


def replicas_beside_simulation(profile: Profile, plan: Sequence[Series], emulated: pd.DataFrame) -> pd.DataFrame:
    """Every emulated point, and the same one in virtual time.

    Parameters
    ----------
    profile : Profile
    plan : sequence of Series
        What :func:`replicas_plan` returned.
    emulated : DataFrame
        Records of :func:`erlib.load.sweep.run` with it.

    Returns
    -------
    DataFrame
        One row per source (``emulated``; ``simulated-hardware``, engines that requests reach at once;
        ``simulated-replay``, each as late as it was there) and point: the columns of
        :func:`erlib.load.metrics.summarise`, ``added``, ``gpus``, ``kept_pace`` (whether the emulated engines did) and
        ``client_lag_p99_ms`` (how late their users' event loops were, in wall time).
    """
    rows = []
    for series in plan:
        mine = emulated[emulated["point_hash"].isin([point.hash for point in points.points(profile, series)])]
        point = ["mix", "users", "repeat"]
        kept = emulation.pace(mine)[[*point, "kept_pace"]]
        kept = kept.merge(mine.groupby(point, as_index=False)["client_lag_p99_ms"].first())
        for frame in (mine, emulation.simulated_beside(profile, [series], mine)):
            gpus = {"added": len(series.system.added), "gpus": len(series.system.servers)}
            rows.append(metrics.summarise(frame).merge(kept).assign(**gpus))
    return pd.concat(rows, ignore_index=True)


def replicas_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How far the emulation is from the simulation of the same points.

    Parameters
    ----------
    table : DataFrame
        What :func:`replicas_beside_simulation` returned.

    Returns
    -------
    DataFrame
        One row per configuration, users, mix, GPUs added and metric of :data:`BETTER`: a column per source, means over
        repeats; ``ratio`` (emulated over simulated), ``ratio_replayed`` (likewise over the replay); ``kept_pace`` and
        ``agrees``: the ratio is within :data:`AGREEMENT` of 1.
    """
    keys = ["config", "users", "mix", "added"]
    means = table.groupby(["source", *keys])[list(BETTER)].mean().rename_axis(columns="metric")
    sources = means.stack().unstack("source")
    ratio = sources["emulated"] / sources["simulated-hardware"]
    replayed = sources["emulated"] / sources["simulated-replay"]
    compared = sources.assign(ratio=ratio, ratio_replayed=replayed, agrees=(ratio - 1).abs() <= AGREEMENT)
    return compared.join(table.groupby(keys)["kept_pace"].all())


def replicas_finding(table: pd.DataFrame) -> str:
    """What came out, and whether emulation and simulation agree, in words.

    Parameters
    ----------
    table : DataFrame
        What :func:`replicas_beside_simulation` returned.
    """
    sources = {source: gpus_needed(part) for source, part in table.groupby("source")}
    compared = replicas_agreement(table)
    sentences = []
    for (name, users), emulated in sources["emulated"].iterrows():
        simulated = sources["simulated-hardware"].loc[(name, users)]
        enough = [f"{NAMES[m]} {_count(emulated[m])} (simulated: {_count(simulated[m])})" for m in BETTER]
        sentences.append(
            f"{name} at {users:,} users, GPUs added until the normal mix is as good as the uniform one: "
            f"{', '.join(enough)}."
        )
    agrees, agrees_replayed = (((compared[name] - 1).abs() <= AGREEMENT).sum() for name in ("ratio", "ratio_replayed"))
    ratios = [
        f"{NAMES[m]} {part['ratio'].min():.2f} to {part['ratio'].max():.2f} "
        f"({part['ratio_replayed'].min():.2f} to {part['ratio_replayed'].max():.2f})"
        for m, part in ((m, compared.xs(m, level="metric")) for m in BETTER)
    ]
    sentences.append(
        f"Emulation and simulation agree within {100 * AGREEMENT:.0f} % in {agrees} of {len(compared)} values "
        f"({agrees_replayed} where simulated requests arrive as late as emulated ones did); emulated over simulated: "
        f"{', '.join(ratios)}."
    )
    lag_ms = table["client_lag_p99_ms"].max()
    sentences.append(f"The users' event loops were up to {lag_ms:.0f} ms late (p99), in wall time.")
    if not compared["kept_pace"].all():
        sentences.append("Some points did not keep the engines' pace.")
    return " ".join(sentences)


def _count(replicas: int) -> str:
    return "none of those tried" if pd.isna(replicas) else str(replicas)
