"""Replicas of hot experts: how many bring paper 2's normal mix to what the uniform one gets from eight GPUs.

Both papers name more copies of a popular model as the remedy for uneven demand and do not try it. Here it is tried at
their scale, in virtual time (:mod:`erlib.simulation`): each replica is one more GPU with one more engine like the
expert's, and a prompt goes to whichever replica of its expert has the fewest requests outstanding.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from erlib import batching, config, metrics, prompts, simulation
from erlib.config import Mix, Profile
from erlib.prompts import Prompt

BETTER = {"response_p99_s": -1, "session_tokens_per_s": 1, "ttft_mean_s": -1}
"""What is looked at, and whether more (1) or less (-1) of it is better."""


def hottest(shares: npt.NDArray[np.float64], replicas: int) -> tuple[int, ...]:
    """Experts that get `replicas` more instances, each the one that has the most demand per instance by then.

    Parameters
    ----------
    shares : float array (k,)
        Share of the requests of each expert.
    replicas : int

    Returns
    -------
    tuple of int
        Experts in the order in which they are added to; of equally hot ones the first.
    """
    instances = np.ones(len(shares))
    added = []
    for _ in range(replicas):
        expert = int((shares / instances).round(12).argmax())  # rounded: shares that mirror each other are equal
        instances[expert] += 1
        added.append(expert)
    return tuple(added)


def run(
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
        One row per (config, mix, added, users, repeat): ``gpus``, the columns of :func:`erlib.metrics.summarise` and
        ``session_tokens_per_s_per_gpu``. Engines only, no harness around them: ``source`` is "simulated-hardware".
    """
    full = config.at_paper_scale(profile)
    workload = replace(simulation.textless_workload(full, "p2"), sigma=profile.workload.sigma)
    shares = {mix: prompts.mix_shares(mix, workload.n_clusters, workload.sigma) for mix in typing.get_args(Mix)}
    arms: list[tuple[Mix, int]] = [("uniform", 0), *(("normal", added) for added in range(most_added + 1))]
    rows = []
    for users_now in tqdm(users, desc="replicas", unit="level", delay=2, leave=False):
        for repeat in range(profile.paper_scale.repeats):
            asked = prompts.draw(workload, users_now, "uniform", profile.seed, repeat)
            drawn = {mix: _whose(asked, shares[mix], np.random.default_rng([profile.seed, repeat])) for mix in shares}
            for name in configs:
                system = batching.paper_system(name, answer_limit=full.workload.p2_max_output_tokens)
                for mix, added in arms:
                    about = {"source": "simulated-hardware", "point_hash": f"{added} added"}
                    wider = replace(system, added=hottest(shares["normal"], added))
                    answered = simulation.simulate(
                        wider, drawn[mix], paper="p2", mix=mix, repeat=repeat, seed=profile.seed, columns=about
                    )
                    summary = metrics.summarise(pd.DataFrame(answered))
                    rows.append(summary.assign(added=added, gpus=len(wider.experts)))
    table = pd.concat(rows, ignore_index=True)
    return table.assign(session_tokens_per_s_per_gpu=table["session_tokens_per_s"] / table["gpus"])


def _whose(asked: Sequence[Prompt], shares: npt.NDArray[np.float64], rng: np.random.Generator) -> list[Prompt]:
    """The same prompts, dealt out to the clusters by `shares`."""
    clusters = np.repeat(np.arange(len(shares)), prompts.partition(len(asked), shares, rng))
    return [
        prompt._replace(cluster=int(cluster)) for prompt, cluster in zip(asked, rng.permutation(clusters), strict=True)
    ]


def needed(table: pd.DataFrame) -> pd.DataFrame:
    """Replicas after which the normal mix does at least as well as the uniform one, means over repeats.

    Parameters
    ----------
    table : DataFrame
        What :func:`run` returned.

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
