"""Claims about the experiment itself: lengths, turns, clusters, what adds up."""

from __future__ import annotations

import numpy as np

from erlib.claims.evidence import Evidence, NotTestable
from erlib.claims.finding import Finding, number, predicate
from erlib.load import metrics


@predicate("users {levels}; {repeats} repeats {systems}")
def protocol(
    e: Evidence, *, paper: str, levels: list[int], repeats: int, experiment: str = "load", systems: int = 0
) -> Finding:
    """The levels and repeats that were run are the paper's."""
    mine = e.requests(paper, experiment)
    found = [round(e.scale.paper_users(level)) for level in sorted(mine["users"].unique())]
    runs, several = int(mine["repeat"].nunique()), int(mine["config"].nunique())
    text = f"users {', '.join(map(number, found))} on the papers' scale; {runs} repeat{'s' * (runs > 1)}"
    text += f"; {several} systems" * bool(systems)
    if found != levels or runs < repeats or several < systems:
        raise NotTestable(f"this profile runs less: {text}")
    return Finding(True, text)


@predicate("mean {mean} {median} input tokens ± {tolerance} {turn}")
def input_tokens(e: Evidence, *, paper: str, turn: str, mean: float, tolerance: float, median: float = 0) -> Finding:
    """Prompt lengths on the papers' scale, where a continuation is a base prompt and its answer."""
    mine = e.requests(paper).set_index(["config", "mix", "users", "repeat", "user"])
    tokens, base = (mine.loc[mine["turn"] == one, "input_tokens"] for one in (turn, "base"))
    if tokens.empty:
        raise NotTestable(f"no {turn} prompt in paper {paper[-1]}'s records")
    base = base.reindex(tokens.index)
    tokens = base * e.scale.inputs + (tokens - base) * e.scale.tokens
    wanted = {"mean": mean} | ({"median": median} if median else {})
    found = {name: float(tokens.agg(name)) for name in wanted}
    return Finding(
        all(abs(found[name] / wanted[name] - 1) <= tolerance for name in wanted),
        ", ".join(f"{name} {value:.0f}" for name, value in found.items()) + " input tokens on the papers' scale",
    )


@predicate("answers of {low} to {high} tokens")
def output_tokens(e: Evidence, *, paper: str, low: int, high: int) -> Finding:
    """Answer lengths, between the scaled limits."""
    tokens = e.requests(paper)["output_tokens"]
    least, most = (max(1, round(limit / e.scale.tokens)) for limit in (low, high))
    return Finding(
        bool(tokens.between(least, most).all()),
        f"{tokens.min()} to {tokens.max()} tokens in {len(tokens)} answers; {least} to {most} stand for the papers'",
    )


@predicate("each user sends a base prompt and, once answered, a continuation")
def two_turns(e: Evidence, *, paper: str) -> Finding:
    """Both prompts of every user, one after the other."""
    mine = e.requests(paper).set_index(["point_hash", "user"])
    base, then = (mine[mine["turn"] == turn] for turn in ("base", "continuation"))
    paired = base.join(then, how="inner", rsuffix="_then")
    ordered = int((paired["t_send_ns_then"] >= paired["t_last_ns"]).sum())
    return Finding(
        len(base) == len(then) == ordered, f"{ordered} of {len(base)} users sent both prompts one after the other"
    )


@predicate("clusters of a run differ by at most one prompt, {mix} mix")
def even_clusters(e: Evidence, *, paper: str, mix: str) -> Finding:
    """Prompts per cluster within each run."""
    mine = e.requests(paper)
    base = mine[(mine["turn"] == "base") & (mine["mix"] == mix) & (mine["users"] >= 8)]
    if base.empty:
        raise NotTestable("no run with at least eight users")
    counts = base.groupby(["point_hash", "cluster"]).size().unstack(fill_value=0)
    widest = int((counts.max(axis=1) - counts.min(axis=1)).max())
    return Finding(
        widest <= 1 and counts.shape[1] == 8, f"{counts.shape[1]} clusters, largest difference {widest} prompts"
    )


@predicate("no request of {configs} passes a gateway")
def unrouted(e: Evidence, *, configs: list[str]) -> Finding:
    """No gateway span in the records."""
    mine = e.done[e.done["config"].isin(configs)]
    if mine.empty:
        raise NotTestable(f"no records of {', '.join(configs)}")
    routed = int(mine["route_forward_ns"].notna().sum())
    return Finding(routed == 0, f"{routed} of {len(mine)} requests passed a gateway")


@predicate("mean TTFT + TPOT x tokens equals the mean response time within {tolerance} times scale.tokens")
def adds_up(e: Evidence, *, paper: str, tolerance: float) -> Finding:
    """Response time against TTFT + TPOT x N; exact would be N - 1, so that the tolerance grows for short answers."""
    mine = e.requests(paper).dropna(subset="tpot_s")
    total = mine["ttft_s"] + mine["tpot_s"] * mine["output_tokens"]
    error = float((total / mine["response_s"] - 1).abs().max())
    return Finding(error <= tolerance * e.scale.tokens, f"largest relative difference {error:.2%}")


@predicate("mixes {mixes} were run")
def mixes_present(e: Evidence, *, paper: str, mixes: list[str]) -> Finding:
    """Which mixes the records hold."""
    found = sorted(e.requests(paper)["mix"].unique())
    return Finding(set(mixes) <= set(found), f"mixes: {', '.join(found)}")


@predicate("classifying the longest fifth of the prompts takes at most {most} times as long as the shortest fifth")
def length_matters_not(e: Evidence, *, paper: str, most: float) -> Finding:
    """Time of classification (vectorise, SVD, k-means) over prompt length, within each level of users."""
    mine = e.requests(paper)
    spans = metrics.routing_spans(mine[mine["route_kmeans_ns"] > 0])  # where nothing is classified, it takes no time
    if spans.empty:
        raise NotTestable("no routing latency of a real gateway in real time")
    ratios, shortest, longest = [], np.inf, 0.0
    for _, group in spans.groupby(["config", "relay", "mix", "users"]):
        low, high = group["input_tokens"].quantile([0.2, 0.8])
        ms = group[["vectorise", "svd", "kmeans"]].sum(axis=1)
        if low < high:
            ratios.append(ms[group["input_tokens"] >= high].median() / ms[group["input_tokens"] <= low].median())
            shortest, longest = min(shortest, low), max(longest, high)
    if not ratios:
        raise NotTestable("all prompts of a run have the same length")
    middle = float(np.median(ratios))
    return Finding(middle <= most, f"{middle:.2f} times as long (prompts of {shortest:.0f} and {longest:.0f} tokens)")
