"""Ways to put eight experts on eight H100s, simulated: what each costs in load, and what it costs in language.

The small model of paper 2 (``p2.E``), with prompts and answers of its lengths. Language is measured elsewhere, with
trained experts of a smaller model (:func:`erlib.experts.served`): how much is lost where a request goes to another
expert is taken from there, how often that happens from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from erlib import cache, paths, provenance
from erlib.config import ConfigError, Profile
from erlib.load import metrics
from erlib.machine import processes
from erlib.machine.progress import Bar
from erlib.paper_scale import adapter_steps, batching, clock, service_levels, setups
from erlib.paper_scale.batching import System
from erlib.workload import prompts
from erlib.workload.prompts import Floats, Prompt

STRICT, IN_TURN = "expert per GPU", "one dense model, in turn"
ADAPTERS = "all experts as adapters"
SLOWER = (1.0, 1.25, 1.5, 2.0)
"""Steps with adapters of several experts, times those without: assumed, for engines with kernels of their own."""
BY_PYTORCH = f"{ADAPTERS}, PyTorch's kernels"
"""With what :mod:`erlib.paper_scale.adapter_steps` says that adapters cost."""
SPREADS = ("uniform", "normal", "measured")
PRECISION = 1.05
"""Within which factor the most requests are found."""
_SPILL_OVER = 8
"""From how many more requests than the least busy expert has, the own one is too busy."""
_HOT = 2


class Design(NamedTuple):
    """One way to serve."""

    system: System
    answers: str = "routed"
    """Who answers: a design of :func:`erlib.experts.served`."""
    slower: float = 1.0
    """Its steps, times those of engines without adapters; not a number where that differs from step to step."""

    @property
    def gpus(self) -> int:
        return len(self.system.experts)

    @property
    def minds(self) -> bool:
        """Whether it matters to it which expert a request is for."""
        return self.system.routing == "expert_router" and not self.system.adapters


class Seen(NamedTuple):
    """What a load is like to its users."""

    ttft_s: Floats
    tpot_s: Floats
    """Of answers with more than one token."""
    tokens: int
    """That users got; two experts who make one count once."""
    tokens_per_s: float
    elsewhere: float
    """Share of the requests that another expert answered."""


def designs(profile: Profile, shares: Sequence[float]) -> dict[str, Design]:
    """What is compared, by name; replicas go to the experts that `shares` of the requests keep the busiest."""
    strict = batching.paper_system("p2.E", profile.workload.p2_max_output_tokens)
    hot = tuple(sorted(int(expert) for expert in np.argsort(shares)[-_HOT:]))
    found = {
        STRICT: Design(strict),
        f"{STRICT}, {_HOT} more for the busiest": Design(replace(strict, added=hot)),
        f"{STRICT}, or the least busy one": Design(replace(strict, spill_over=_SPILL_OVER)),
        "two experts for every token": Design(strict, "two experts"),
        IN_TURN: Design(replace(strict, routing="replicas"), "dense"),
    }
    shared = replace(strict, adapters=True)
    for factor in SLOWER:
        name = ADAPTERS + (f", steps × {factor:g}" if factor != 1 else "")
        found[name] = Design(setups.slower(shared, factor), slower=factor)
    found[BY_PYTORCH] = Design(adapter_steps.with_adapters(shared), slower=math.nan)
    return found


def see(design: Design, drawn: Sequence[Prompt], seconds: Sequence[Prompt], starts_s: Sequence[float]) -> Seen:
    """Let users who come at these moments ask for one answer each.

    Where two experts answer, each generates every token (`seconds` are the same prompts for the second one), and a
    token is there when both have it. That they would have to wait for one another at every token is left out.
    """
    asked = [*drawn, *seconds] if design.answers == "two experts" else drawn
    times = len(asked) // len(drawn)
    around = clock.HARDWARE
    happened = clock.trace(design.system, asked, continues=False, around=around, starts_s=list(starts_s) * times)
    requests = sorted(zip(happened.requests, happened.token_ns(), strict=True), key=lambda pair: pair[0].user)
    first_s, last_s = (
        np.array([stamps[place] for _, stamps in requests]).reshape(times, -1).max(axis=0) * 1e-9 for place in (0, -1)
    )
    tokens = np.array([prompt.max_tokens for prompt in drawn])
    experts = design.system.experts
    elsewhere = [experts[request.server] != request.expert for request, _ in requests] if design.minds else [False]
    return Seen(
        ttft_s=first_s - np.array(starts_s),
        tpot_s=metrics.tpot_s(last_s - first_s, tokens)[tokens > 1],
        tokens=int(tokens.sum()),
        tokens_per_s=tokens.sum() / (last_s.max() - min(starts_s)),
        elsewhere=float(np.mean(elsewhere)),
    )


def design_load(profile: Profile, shares: Sequence[float], workers: int = 2) -> pd.DataFrame:
    """Every design under every spread of the requests over the experts, from one draw of prompts.

    Parameters
    ----------
    profile : Profile
        Gives the seed and, in ``sensitivity``, users, the window of Poisson arrivals and the price of a GPU's hour.
    shares : sequence of float
        Of the requests that each expert would get by a measurement: the spread called ``measured``, beside paper 2's
        ``uniform`` and ``normal``.
    workers : int
        Processes.

    Returns
    -------
    DataFrame
        One row per ``spread``, ``design`` and ``users`` (all at once, one prompt each): ``gpus``, ``answers``,
        ``slower`` (how many times as long all steps are as without adapters), ``ttft_p99_s``, ``tpot_mean_s``,
        ``tokens_per_s``, ``elsewhere`` (share of the requests that another expert answered); and, the same for all user
        levels, ``requests_per_s`` (the most of a Poisson process whose p99 keeps to MLPerf's latencies, found within
        :data:`PRECISION`), with ``elsewhere_then`` and ``price_per_million_tokens`` (of ``sensitivity.gpu_hour``).

    Raises
    ------
    ConfigError
        If there are other than eight experts.
    """
    if len(shares) != service_levels.GPUS:
        raise ConfigError(f"{service_levels.GPUS} GPUs have an expert each, but there are {len(shares)} clusters")
    settings = profile.sensitivity
    used = settings.model_dump(include={"users", "window_s", "gpu_hour"})
    places = [f"paper_scale/{name}.py" for name in ("designs", "adapter_steps", "service_levels")]
    own = cache.digest(provenance.code_digest(*places, "load/metrics.py"), adapter_steps.MEASURED)
    spread = [round(float(share), 6) for share in shares]
    digest = cache.digest(setups.given(profile), own, used, spread)
    file = paths.run_dir(profile.name) / "simulated" / "designs" / f"{digest}.parquet"
    if (kept := cache.recalled(file, pd.read_parquet, "designs")) is not None:
        return kept
    with processes.pool(workers) as pool:
        jobs = {
            pool.submit(_of_design, profile, name, mix, shares): (mix, name)
            for mix in SPREADS
            for name, design in designs(profile, shares).items()
            if design.minds or mix == SPREADS[0]
        }
        found = {jobs[job]: job.result() for job in Bar(jobs, desc="designs", unit="design")}
    rows = [
        {"spread": mix, **row}
        for mix in SPREADS
        for name in designs(profile, shares)
        for row in found.get((mix, name), found[SPREADS[0], name])
    ]
    table = pd.DataFrame(rows)
    with cache.writing(file) as partial:
        table.to_parquet(partial)
    return table


def _of_design(profile: Profile, name: str, spread: str, shares: Sequence[float]) -> list[dict[str, object]]:
    pool = replace(setups.workload(profile, "p2"), sigma=profile.workload.sigma)
    normal = prompts.mix_shares("normal", pool.n_clusters, pool.sigma).tolist()
    design = designs(profile, shares if spread == "measured" else normal)[name]
    window_s = profile.sensitivity.window_s / 2  # as for all of paper 2's answers, see service_levels
    bounds = service_levels.TTFT_S, service_levels.TPOT_S

    def seen(n: int, within_s: float) -> Seen:
        rng = np.random.default_rng([profile.seed, n])
        drawn = prompts.draw(pool, n, "normal" if spread == "normal" else "uniform", profile.seed, 0)
        if spread == "measured":
            goes = rng.choice(pool.n_clusters, n, p=np.array(shares) / sum(shares))
            drawn = [prompt._replace(cluster=int(cluster)) for prompt, cluster in zip(drawn, goes, strict=True)]
        steps = rng.integers(1, pool.n_clusters, n)
        seconds = [
            prompt._replace(cluster=int((prompt.cluster + step) % pool.n_clusters))
            for prompt, step in zip(drawn, steps, strict=True)
        ]
        return see(design, drawn, seconds, rng.uniform(0, within_s, n).tolist())

    def keeps(n: int) -> bool:
        found = seen(n, window_s)
        pairs = zip((found.ttft_s, found.tpot_s), bounds, strict=True)
        return all(metrics.p99(its) <= bound for its, bound in pairs if len(its))

    most = service_levels.most(keeps, PRECISION)
    then = seen(most, window_s) if most else None
    about = {
        **{"design": name, "gpus": design.gpus, "answers": design.answers, "slower": design.slower},
        **{"requests_per_s": most / window_s, "elsewhere_then": then.elsewhere if then else 0.0},
        "price_per_million_tokens": _price(profile, design, then, window_s),
    }
    levels = {users: seen(users, 0.0) for users in profile.sensitivity.users}
    return [
        {
            **about,
            **{"users": users, "ttft_p99_s": metrics.p99(found.ttft_s), "tpot_mean_s": found.tpot_s.mean()},
            **{"tokens_per_s": found.tokens_per_s, "elsewhere": found.elsewhere},
        }
        for users, found in levels.items()
    ]


def _price(profile: Profile, design: Design, then: Seen | None, window_s: float) -> float:
    if then is None:
        return float("nan")
    gpu_hours = design.gpus * window_s / 3600
    return profile.sensitivity.gpu_hour * gpu_hours / then.tokens * 1e6


def quality_and_load(load: pd.DataFrame, language: pd.DataFrame) -> pd.DataFrame:
    """Both sides of every design: what :func:`design_load` gave, and how much more language it loses.

    Parameters
    ----------
    load : DataFrame
    language : DataFrame
        What :func:`erlib.experts.served` gave.

    Returns
    -------
    DataFrame
        `load` with ``worse_by``, ``ci95_low``, ``ci95_high``: the loss at ``requests_per_s``, beside experts who all
        answer their own prompts. Requests that go elsewhere lose what ``other expert`` loses.
    """
    lost = language[["worse_by", "ci95_low", "ci95_high"]]
    stays = lost.loc[load["answers"]].to_numpy()
    goes = lost.loc["other expert"].to_numpy()
    share = load["elsewhere_then"].to_numpy()[:, None]
    return load.assign(**dict(zip(lost.columns, ((1 - share) * stays + share * goes).T, strict=True)))


def break_even(load: pd.DataFrame) -> pd.DataFrame:
    """What all experts on every GPU gain over an expert per GPU, and how much slower steps may be until that is lost.

    Returns
    -------
    DataFrame
        One row per spread: ``gain`` in requests per second with adapters that cost nothing (0.5: half as much again),
        and ``slower_at_break_even`` (1.2: a fifth slower), interpolated; missing beyond what was simulated.
    """
    once = load.drop_duplicates(["spread", "design"])
    rows = []
    for spread, its in once.groupby("spread", sort=False):
        strict = its.loc[its["design"] == STRICT, "requests_per_s"].iloc[0]
        shared = its[its["design"].str.startswith(ADAPTERS) & its["slower"].notna()].sort_values("requests_per_s")
        at = np.interp(strict, shared["requests_per_s"], shared["slower"], left=np.nan, right=np.nan)
        rows.append({"spread": spread, "gain": shared["requests_per_s"].max() / strict - 1, "slower_at_break_even": at})
    return pd.DataFrame(rows).set_index("spread")
