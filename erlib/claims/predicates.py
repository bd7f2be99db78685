"""What decides a claim: small predicates over a source's evidence, or over the papers' own numbers.

Each is a function whose parameters come from ``data/claims.yaml``, with a template that says in words what it tests.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from erlib import config
from erlib.claims.evidence import LABELS, Evidence, Levels, NotTestable, Value, name_users
from erlib.engines import llama, table1
from erlib.load import metrics
from erlib.workload import prompts

UNITS = {"_tokens_per_s": " tokens/s", "_tokens_per_s_mean": " tokens/s", "_s": " s", "_ms": " ms"}


def _unit(metric: str) -> str:
    return next((unit for ending, unit in UNITS.items() if metric.endswith(ending)), "")


class Finding(NamedTuple):
    """Whether a predicate holds, and the numbers that say so."""

    holds: bool
    numbers: str


@dataclass(frozen=True)
class Predicate:
    function: Callable[..., Finding]
    template: str
    arithmetic: bool

    def bind(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, defaults included; TypeError where they do not fit."""
        signature = inspect.signature(self.function)
        bound = signature.bind(*(() if self.arithmetic else (None,)), **parameters)
        bound.apply_defaults()
        return bound.arguments

    def words(self, parameters: Mapping[str, Any]) -> str:
        bound = self.bind(parameters)
        given = {name: _word(name, value) for name, value in bound.items()}
        given["bounds"] = _bounds(bound.get("low", 0), bound.get("high", math.inf))
        return " ".join(self.template.format(**given).split())


PREDICATES: dict[str, Predicate] = {}


def _predicate(template: str, arithmetic: bool = False) -> Callable[[Callable[..., Finding]], Callable[..., Finding]]:
    def register(function: Callable[..., Finding]) -> Callable[..., Finding]:
        PREDICATES[function.__name__] = Predicate(function, template, arithmetic)
        return function

    return register


def _word(name: str, value: Any) -> str:
    if name in _WORDS:
        return _WORDS[name](value)
    if isinstance(value, Mapping):
        return ", ".join(f"{number:,g}" + f" ({key})" * (key != "all") for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(item for item in map(str, value) if item != "all")
    return f"{value:g}" if isinstance(value, float) else str(value)


_WORDS: dict[str, Callable[[Any], str]] = {
    "metric": lambda name: LABELS[name],
    "quantity": lambda name: QUANTITIES[name][0],
    "users": lambda users: f"at {name_users(users)} user{'s' * (users != 1)}",
    "factor": lambda value: "" if value == 1 else f"times {value:g}",
    "turn": lambda turn: f"({turn} prompt)" if turn else "",
    "share": lambda value: "" if value == 1 else f"in {value:.0%} of the cases",
    "tolerance": lambda value: f"{value:.1%}".replace(".0%", "%"),
    "over": lambda name: f"relative to {name}" if name else "",
    "median": lambda value: f"and median {value}" if value else "",
    "systems": lambda value: f"of {value} systems" if value else "",
}
"""How parameters are said; an empty one is not."""


def _bounds(low: float, high: float) -> str:
    if math.isinf(high):
        return f"≥ {low:,g}"
    return f"≤ {high:,g}" if not low else f"= {low:,g}" if low == high else f"from {low:,g} to {high:,g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _turns(turn: str, *configs: str) -> list[str]:
    """Paper 1 makes its claims for both prompts unless it names one; paper 2 has one."""
    return [turn] if turn else ["base", "continuation"] if config.paper_of(configs[0]) == "p1" else ["base"]


@_predicate("{metric} of {left} {factor} ≤ that of {right} {users} {turn}")
def below(
    e: Evidence,
    *,
    metric: str,
    left: list[str],
    right: list[str],
    users: Levels,
    factor: float = 1,
    turn: str = "",
    experiment: str = "load",
) -> Finding:
    """Every `left` times `factor` is at most every `right`, at every level that both have."""
    ratios = _ratios(e, metric, left, right, users, turn, experiment)
    worst = min(ratios, key=lambda pair: pair.ratio)
    held = sum(pair.ratio >= factor for pair in ratios)
    spread = math.hypot(worst.left.sd * factor, worst.right.sd)
    close = bool(abs(worst.right.mean - worst.left.mean * factor) < spread)
    return Finding(
        held == len(ratios),
        f"{held} of {len(ratios)} comparisons; tightest: {worst.text}"
        + "; this difference is within the spread between repeats" * close,
    )


@_predicate("{metric} of {left} and {right} within a factor of {within} {users} {turn}")
def alike(
    e: Evidence,
    *,
    metric: str,
    left: list[str],
    right: list[str],
    users: Levels,
    within: float,
    turn: str = "",
    experiment: str = "load",
) -> Finding:
    """Every `left` differs from every `right` by less than a factor of `within` either way."""
    ratios = _ratios(e, metric, left, right, users, turn, experiment)
    worst = max(ratios, key=lambda pair: abs(math.log(pair.ratio)))
    held = sum(1 / within <= pair.ratio <= within for pair in ratios)
    return Finding(held == len(ratios), f"{held} of {len(ratios)} comparisons; widest: {worst.text}")


class _Pair(NamedTuple):
    ratio: float
    left: Value
    right: Value
    text: str


def _ratios(
    e: Evidence, metric: str, left: list[str], right: list[str], users: Levels, turn: str, experiment: str
) -> list[_Pair]:
    pairs = []
    for which, a, b in itertools.product(_turns(turn, *left), left, right):
        ours = e.series(metric, a, users, which, experiment=experiment)
        theirs = e.series(metric, b, users, which, experiment=experiment)
        for level in sorted(ours.keys() & theirs.keys()):
            x, y = ours[level], theirs[level]
            ratio = y.mean / x.mean if x.mean else math.inf
            names = f"{e.resolve(a)} {_number(x.mean)}, {e.resolve(b)} {_number(y.mean)}{_unit(metric)}"
            pairs.append(_Pair(ratio, x, y, f"{names} at {e.at(level, which)}"))
    if not pairs:
        raise NotTestable(f"no level at which both {', '.join(left)} and {', '.join(right)} were run")
    return pairs


@_predicate("{metric} of {of} {bounds} {users} {turn}")
def between(
    e: Evidence,
    *,
    metric: str,
    of: list[str],
    users: Levels,
    low: float = 0,
    high: float = math.inf,
    turn: str = "",
    absolute: bool = False,
) -> Finding:
    """All values lie between `low` and `high`; `absolute` ones mean H100s and are not tested on anything else."""
    if absolute and not e.has_gpus:
        raise NotTestable("an absolute number of H100s, which this machine does not have")
    cells = _cells(e, metric, of, users, turn)
    worst = max(cells, key=lambda cell: max(low - cell.mean, cell.mean - high))
    held = sum(low <= cell.mean <= high for cell in cells)
    least, most = (pick(cell.mean for cell in cells) for pick in (min, max))
    return Finding(
        held == len(cells),
        f"{held} of {len(cells)}; from {_number(least)} to {_number(most)}{_unit(metric)}"
        + ("" if held == len(cells) else f"; farthest off: {worst.text}"),
    )


class _Cell(NamedTuple):
    mean: float
    text: str


def _cells(e: Evidence, metric: str, of: list[str], users: Levels, turn: str) -> list[_Cell]:
    return [
        _Cell(value.mean, f"{name} {_number(value.mean)}{_unit(metric)} at {e.at(level, which)}")
        for which, name in itertools.product(_turns(turn, *of), of)
        for level, value in sorted(e.series(metric, name, users, which).items())
    ]


@_predicate("reported: {metric} of {of} {users}")
def report(e: Evidence, *, metric: str, of: list[str], users: Levels, turn: str = "") -> Finding:
    """Only the numbers, for claims without a direction."""
    return Finding(True, "; ".join(cell.text for cell in _cells(e, metric, of, users, turn)))


@_predicate("highest over lowest {metric} of {of} {over} ≤ {high} {users}")
def stable(
    e: Evidence, *, metric: str, of: list[str], users: Levels, high: float, over: str = "", turn: str = ""
) -> Finding:
    """Over users, no configuration's largest value (relative to `over`'s) exceeds `high` times its smallest."""
    spans = {}
    for which, name in itertools.product(_turns(turn, *of), of):
        values = _trend(e, metric, name, users, which)
        if over:
            base = e.series(metric, over, users, which)
            values = {level: value / base[level].mean for level, value in values.items() if level in base}
        spans[name, which] = max(values.values()) / min(values.values())
    return Finding(max(spans.values()) <= high, _by_config("factor", spans))


def _trend(e: Evidence, metric: str, name: str, users: Levels, turn: str) -> dict[int, float]:
    values = {level: value.mean for level, value in sorted(e.series(metric, name, users, turn).items())}
    if len(values) < 2:
        raise NotTestable(f"one level of users says nothing about {LABELS[metric]} over users")
    return values


def _by_config(what: str, values: Mapping[tuple[str, str], float]) -> str:
    parts = [
        f"{name} {value:.2f}" + " (continuation)" * (turn == "continuation") for (name, turn), value in values.items()
    ]
    return f"{what}: {', '.join(parts)}"


@_predicate("{metric} of {of} rises with users (Spearman > 0.9) {users}")
def rises(e: Evidence, *, metric: str, of: list[str], users: Levels, turn: str = "") -> Finding:
    """Rank correlation with users above 0.9."""
    found = _spearman(e, metric, of, users, turn)
    return Finding(min(found.values()) > 0.9, _by_config("Spearman", found))


@_predicate("{metric} of {of} falls with users (Spearman < -0.9) {users}")
def falls(e: Evidence, *, metric: str, of: list[str], users: Levels, turn: str = "") -> Finding:
    """Rank correlation with users below -0.9."""
    found = _spearman(e, metric, of, users, turn)
    return Finding(max(found.values()) < -0.9, _by_config("Spearman", found))


def _spearman(e: Evidence, metric: str, of: list[str], users: Levels, turn: str) -> dict[tuple[str, str], float]:
    found = {}
    for which, name in itertools.product(_turns(turn, *of), of):
        values = _trend(e, metric, name, users, which)
        steady = min(values.values()) == max(values.values())
        found[name, which] = 0.0 if steady else float(stats.spearmanr(list(values), list(values.values())).statistic)
    return found


@_predicate("{metric} of {of} at the second over the first level {bounds} {users}")
def growth(
    e: Evidence, *, metric: str, of: list[str], users: Sequence[int], low: float, high: float, turn: str = ""
) -> Finding:
    """The value at the second level over the value at the first, the nearest measured ones."""
    grown = {}
    for which, name in itertools.product(_turns(turn, *of), of):
        (first,), (last,) = (e.series(metric, name, level, which).values() for level in users)
        grown[name, which] = last.mean / first.mean
    return Finding(all(low <= value <= high for value in grown.values()), _by_config("factor", grown))


@_predicate("{metric} of {of}: continuation over base prompt ≤ {high} {users} {share}")
def turns(e: Evidence, *, metric: str, of: list[str], users: Levels, high: float, share: float = 1) -> Finding:
    """In at least `share` of the cases, the continuation's value is at most `high` times the base prompt's."""
    cells = []
    for name in of:
        base, then = (e.series(metric, name, users, turn) for turn in ("base", "continuation"))
        for level in sorted(base.keys() & then.keys()):
            ratio = then[level].mean / base[level].mean
            cells.append(_Cell(ratio, f"{name} {ratio:.2f} at {e.at(level, '')}"))
    held = sum(cell.mean <= high for cell in cells)
    return Finding(held >= share * len(cells), f"{held} of {len(cells)}; largest: {max(cells).text}")


@_predicate("{metric} of {of}: normal over uniform mix {bounds} {users}")
def mixes(e: Evidence, *, metric: str, of: list[str], users: Levels, low: float = 0, high: float = math.inf) -> Finding:
    """Normal mix relative to the uniform one."""
    cells = []
    for name in of:
        uneven, even = (e.series(metric, name, users, "base", mix) for mix in ("normal", "uniform"))
        for level in sorted(uneven.keys() & even.keys()):
            ratio = uneven[level].mean / even[level].mean
            cells.append(_Cell(ratio, f"{name} {ratio:.2f} at {e.at(level, '')}"))
    held = sum(low <= cell.mean <= high for cell in cells)
    return Finding(held == len(cells), f"{held} of {len(cells)}; from {min(cells).text} to {max(cells).text}")


@_predicate(
    "mean throughput of {left} and {right} within a factor of {within}, correlation over time ≥ {correlation} {users}"
)
def trajectory(e: Evidence, *, left: str, right: str, users: int, within: float, correlation: float) -> Finding:
    """Two systems' bucket throughput: mean and course, a system that has ended counting as 0."""
    ours, theirs = (e.series("bucket_mean_tokens_per_s", name, users, "base") for name in (left, right))
    if ours.keys() != theirs.keys():
        raise NotTestable(f"{left} and {right} were run at different levels")
    (level,) = ours
    curves = e.curves[(e.curves["turn"] == "base") & (e.curves["users"] == level)]
    curves = metrics.average_buckets(curves[curves["config"].isin([left, right])])
    mix = "normal" if (curves["mix"] == "normal").any() else "uniform"
    course = curves[curves["mix"] == mix].pivot_table(index="bucket", columns="config", values="tokens_per_s").fillna(0)
    similar = float(course[left].corr(course[right]))
    ratio = ours[level].mean / theirs[level].mean
    return Finding(
        1 / within <= ratio <= within and similar >= correlation,
        f"means {_number(ours[level].mean)} and {_number(theirs[level].mean)} tokens/s (ratio {ratio:.2f}), "
        f"correlation {similar:.2f} at {e.at(level, '')}",
    )


@_predicate("best batch size: {expected}")
def best_batch(e: Evidence, *, expected: dict[str, int]) -> Finding:
    """The batch size with the lowest mean response time at the most users."""
    found = {name: int(e.resolve(name).rpartition("-bs")[2]) for name in expected}
    text = ", ".join(f"{name.removeprefix('p2.').removesuffix('-best')} {batch}" for name, batch in found.items())
    return Finding(found == expected, f"best batch size: {text}")


@_predicate("users {levels}; {repeats} repeats {systems}")
def protocol(
    e: Evidence, *, paper: str, levels: list[int], repeats: int, experiment: str = "load", systems: int = 0
) -> Finding:
    """The levels and repeats that were run are the paper's."""
    mine = e.requests(paper, experiment)
    found = [round(e.paper_users(level)) for level in sorted(mine["users"].unique())]
    runs, several = int(mine["repeat"].nunique()), int(mine["config"].nunique())
    text = f"users {', '.join(map(_number, found))} on the papers' scale; {runs} repeat{'s' * (runs > 1)}"
    return Finding(
        found == levels and runs >= repeats and several >= systems, text + f"; {several} systems" * bool(systems)
    )


@_predicate("mean {mean} {median} input tokens ± {tolerance} {turn}")
def input_tokens(e: Evidence, *, paper: str, turn: str, mean: float, tolerance: float, median: float = 0) -> Finding:
    """Prompt lengths on the papers' scale."""
    mine = e.requests(paper)
    tokens = mine.loc[mine["turn"] == turn, "input_tokens"] * e.scale.tokens
    if tokens.empty:
        raise NotTestable(f"no {turn} prompt in paper {paper[-1]}'s records")
    wanted = {"mean": mean} | ({"median": median} if median else {})
    found = {name: float(tokens.agg(name)) for name in wanted}
    return Finding(
        all(abs(found[name] / wanted[name] - 1) <= tolerance for name in wanted),
        ", ".join(f"{name} {value:.0f}" for name, value in found.items()) + " input tokens on the papers' scale",
    )


@_predicate("answers of {low} to {high} tokens")
def output_tokens(e: Evidence, *, paper: str, low: int, high: int) -> Finding:
    """Answer lengths, between the scaled limits."""
    tokens = e.requests(paper)["output_tokens"]
    least, most = (max(1, round(limit / e.scale.tokens)) for limit in (low, high))
    return Finding(
        bool(tokens.between(least, most).all()),
        f"{tokens.min()} to {tokens.max()} tokens in {len(tokens)} answers; {least} to {most} stand for the papers'",
    )


@_predicate("each user sends a base prompt and, once answered, a continuation")
def two_turns(e: Evidence, *, paper: str) -> Finding:
    """Both prompts of every user, one after the other."""
    mine = e.requests(paper).set_index(["point_hash", "user"])
    base, then = (mine[mine["turn"] == turn] for turn in ("base", "continuation"))
    paired = base.join(then, how="inner", rsuffix="_then")
    ordered = int((paired["t_send_ns_then"] >= paired["t_last_ns"]).sum())
    return Finding(
        len(base) == len(then) == ordered, f"{ordered} of {len(base)} users sent both prompts one after the other"
    )


@_predicate("clusters of a run differ by at most one prompt, {mix} mix")
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


@_predicate("no request of {configs} passes a gateway")
def unrouted(e: Evidence, *, configs: list[str]) -> Finding:
    """No gateway span in the records."""
    mine = e.done[e.done["config"].isin(configs)]
    if mine.empty:
        raise NotTestable(f"no records of {', '.join(configs)}")
    routed = int(mine["route_forward_ns"].notna().sum())
    return Finding(routed == 0, f"{routed} of {len(mine)} requests passed a gateway")


@_predicate("mean TTFT + TPOT x tokens equals the mean response time within {tolerance} times scale.tokens")
def adds_up(e: Evidence, *, paper: str, tolerance: float) -> Finding:
    """Response time against TTFT + TPOT x N; exact would be N - 1, so that the tolerance grows for short answers."""
    mine = e.requests(paper).dropna(subset="tpot_s")
    total = mine["ttft_s"] + mine["tpot_s"] * mine["output_tokens"]
    error = float((total / mine["response_s"] - 1).abs().max())
    return Finding(error <= tolerance * e.scale.tokens, f"largest relative difference {error:.2%}")


@_predicate("mixes {mixes} were run")
def mixes_present(e: Evidence, *, paper: str, mixes: list[str]) -> Finding:
    """Which mixes the records hold."""
    found = sorted(e.requests(paper)["mix"].unique())
    return Finding(set(mixes) <= set(found), f"mixes: {', '.join(found)}")


@_predicate("routing latency grows by at most {high_ms_per_token} ms per input token on the papers' scale")
def routing_slope(e: Evidence, *, paper: str, high_ms_per_token: float) -> Finding:
    """Slope of the gateway's latency over prompt length, within each level of users."""
    mine = e.requests(paper)
    spans = metrics.routing_spans(mine[mine["route_kmeans_ns"].notna()])
    if spans.empty:
        raise NotTestable("no routing latency of a real gateway in real time")
    keys = ["config", "mix", "users", "repeat"]
    own = spans[["input_tokens", "gateway"]] - spans.groupby(keys)[["input_tokens", "gateway"]].transform("mean")
    if not own["input_tokens"].any():
        raise NotTestable("all prompts of a run have the same length")
    slope = stats.linregress(own["input_tokens"] * e.scale.tokens, own["gateway"])
    return Finding(
        slope.slope <= high_ms_per_token,
        f"{slope.slope:.2g} ± {slope.stderr:.1g} ms per token, correlation {slope.rvalue:.2f}",
    )


# --- arithmetic -------------------------------------------------------------------------------------------------


def _system(name: str) -> config.PaperSystem:
    return config.load_configuration(name).system


def _weights_gb(name: str, dtype: config.Dtype | None = None) -> float:
    system = _system(name)
    return llama.shape(system.model).parameters * llama.BYTES_PER_VALUE[dtype or system.dtype] / 1e9


def _gpu_gb(name: str) -> float:
    table = table1.table1(config.paper_of(name)).set_index("config")
    return float(table["gpu_gb"][name])


_P1_USERS = [1, *np.arange(100, 1001, 100)]
QUANTITIES: dict[str, tuple[str, Callable[[str], float]]] = {
    "weights_gb": ("parameters x bytes [GB]", _weights_gb),
    "weights_as_int8_gb": ("parameters x 1 byte [GB]", lambda name: _weights_gb(name, "int8")),
    "kv_tokens": ("tokens that the KV cache holds", lambda name: llama.kv_tokens(_system(name))),
    "gpu_gb": ("weights, KV cache and gateways on one GPU [GB]", _gpu_gb),
    "gateway_mb_per_gpu": ("MB of 16 gateways on each of 8 GPUs", lambda _: 16 * 1138 / 8),
    "parameters_billion": (
        "parameters of all instances [10^9]",
        lambda name: _system(name).instances * llama.shape(_system(name).model).parameters / 1e9,
    ),
    "response_tokens_million": (
        "users x repeats x prompts x tokens x systems [10^6]",
        lambda _: sum(_P1_USERS) * 10 * 2 * 1200 * 4 / 1e6,
    ),
    "query_heads_per_kv_head": (
        "query heads per KV head",
        lambda name: llama.shape(_system(name).model).heads / llama.shape(_system(name).model).kv_heads,
    ),
    "slots": ("batch size x instances", lambda name: _system(name).batch_size * _system(name).instances),
    "batch_size": ("batch size", lambda name: _system(name).batch_size),
    "hottest_expert_users": (
        "users of the busiest expert, normal mix with an sd of two clusters, 1,000 users",
        lambda _: 1000 * prompts.mix_shares("normal", 8, 2.0).max(),
    ),
    "p1_slowest_user_tokens_per_s": ("1,200 tokens over 1,200 x 1 s", lambda _: 1200 / (1200 * 1.0)),
    "p1_admitted_streams": (
        "streams admitted at 1,000 users, against 2,000 tokens/s x 0.1 s",
        lambda name: min(1000, _system(name).batch_size * _system(name).instances),
    ),
    "p2_kv_gain_gb": ("KV cache of B less that of A [GB]", lambda _: _kv_gb("p2.B") - _kv_gb("p2.A")),
    "network_over_routing": ("17 µs over the routing latency of 442 ms", lambda _: 17e-6 / 0.442),
}
"""Name -> meaning, and its value for a configuration (``all``: not of one configuration)."""


def _kv_gb(name: str) -> float:
    return _system(name).kv_cache_gb * _system(name).instances


def _of(name: str) -> str:
    return "" if name == "all" else f"{name} "


def _amount(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@_predicate("{quantity} = {printed} ± {tolerance}", arithmetic=True)
def computes_to(*, quantity: str, printed: dict[str, float], tolerance: float) -> Finding:
    """What the architecture gives is what is printed, within a relative `tolerance`."""
    found = {name: QUANTITIES[quantity][1](name) for name in printed}
    off = {name: printed[name] / value - 1 for name, value in found.items()}
    text = ", ".join(
        f"{_of(name)}computed {_amount(value)}, printed {_amount(printed[name])} ({off[name]:+.1%})"
        for name, value in found.items()
    )
    return Finding(all(abs(value) <= tolerance + 1e-9 for value in off.values()), text)


@_predicate("{quantity} {of} {bounds}", arithmetic=True)
def computes_within(*, quantity: str, of: list[str], low: float = 0, high: float = math.inf) -> Finding:
    """What follows from the papers' numbers lies between `low` and `high`."""
    found = {name: QUANTITIES[quantity][1](name) for name in of}
    text = ", ".join(f"{_of(name)}{_amount(value)}" for name, value in found.items())
    return Finding(all(low <= value <= high for value in found.values()), text)
