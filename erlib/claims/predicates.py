"""What decides a claim: small predicates over a source's evidence, or over the papers' own numbers.

Each is a function whose parameters come from ``data/claims.yaml``, with a template that says in words what it tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from scipy import stats

from erlib import config
from erlib.claims.evidence import LABELS, Evidence, Levels, NotTestable
from erlib.claims.finding import Finding, number, predicate, unit_of
from erlib.claims.uncertainty import Decision, Estimate, Value, decide, estimate, ratio
from erlib.load import metrics


def _turns(turn: str, *configs: str) -> list[str]:
    """Paper 1 makes its claims for both prompts unless it names one; paper 2 has one."""
    return [turn] if turn else ["base", "continuation"] if config.paper_of(configs[0]) == "p1" else ["base"]


@predicate("{metric} of {left} {factor} ≤ that of {right} {users} {turn} {experiment}")
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
    found = decide(_ratios(e, metric, left, right, users, turn, experiment), low=factor)
    return _finding(found, " comparisons; tightest: {text}")


@predicate("{metric} of {left} and {right} within a factor of {within} {users} {turn} {experiment}")
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
    found = decide(_ratios(e, metric, left, right, users, turn, experiment), 1 / within, within)
    return _finding(found, " comparisons; widest: {text}")


def _finding(found: Decision, words: str) -> Finding:
    at = found.closest
    about = f" (ratio {number(at.value)}, {at.interval})"
    return Finding(found.holds, f"{found.counted}{words.format(text=at.text)}{about}", found)


def _ratios(
    e: Evidence, metric: str, left: list[str], right: list[str], users: Levels, turn: str, experiment: str
) -> list[Estimate]:
    """Right over left, of every pair at every level that both have."""
    pairs = []
    for which, a, b in itertools.product(_turns(turn, *left), left, right):
        ours = e.series(metric, a, users, which, experiment=experiment)
        theirs = e.series(metric, b, users, which, experiment=experiment)
        for level in sorted(ours.keys() & theirs.keys()):
            x, y = ours[level], theirs[level]
            names = f"{e.resolve(a)} {number(x.mean)}, {e.resolve(b)} {number(y.mean)}{unit_of(metric)}"
            pairs.append(ratio([y], [x], f"{names} at {e.at(level, which)}"))
    if not pairs:
        raise NotTestable(f"no level at which both {', '.join(left)} and {', '.join(right)} were run")
    return pairs


@predicate("{metric} of {right} over {left}, relative to that with {than}, {bounds} {users} {turn}")
def gains(
    e: Evidence,
    *,
    metric: str,
    left: list[str],
    right: list[str],
    users: Levels,
    than: str,
    low: float,
    turn: str = "",
) -> Finding:
    """What every `right` has over every `left` in the load experiment, relative to the same in another experiment."""
    cells = []
    for which, a, b in itertools.product(_turns(turn, *left), left, right):
        ours, theirs, ours_then, theirs_then = (
            e.series(metric, name, users, which, experiment=where) for where in ("load", than) for name in (b, a)
        )
        for level in sorted(ours.keys() & theirs.keys() & ours_then.keys() & theirs_then.keys()):
            above, below = [ours[level], theirs_then[level]], [theirs[level], ours_then[level]]
            cells.append(ratio(above, below, f"{b} over {a} at {e.at(level, which)}"))
    if not cells:
        raise NotTestable(f"no level at which both load and {than} were run")
    return _finding(decide(cells, low), "; tightest: {text}")


@predicate("{metric} of {of} {bounds} {users} {turn}")
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
    found = decide(cells, low or -math.inf, high)  # none is negative, whatever its interval says
    least, most = (pick(cell.value for cell in cells) for pick in (min, max))
    text = f"{found.counted}; from {number(least)} to {number(most)}{unit_of(metric)}"
    off = f"; closest: {found.closest.text} ({found.closest.interval})"
    return Finding(found.holds, text + off * (found.holds is not True), found)


def _cells(e: Evidence, metric: str, of: list[str], users: Levels, turn: str) -> list[Estimate]:
    return [
        estimate(value, f"{name} {number(value.mean)}{unit_of(metric)} at {e.at(level, which)}")
        for which, name in itertools.product(_turns(turn, *of), of)
        for level, value in sorted(e.series(metric, name, users, which).items())
    ]


@predicate("reported: {metric} of {of} {users}")
def report(e: Evidence, *, metric: str, of: list[str], users: Levels, turn: str = "") -> Finding:
    """Only the numbers, for claims without a direction."""
    return Finding(True, "; ".join(cell.text for cell in _cells(e, metric, of, users, turn)))


@predicate("highest over lowest {metric} of {of} {over} ≤ {high} {users}")
def stable(
    e: Evidence, *, metric: str, of: list[str], users: Levels, high: float, over: str = "", turn: str = ""
) -> Finding:
    """Over users, no configuration's largest value (relative to `over`'s) exceeds `high` times its smallest."""
    spans = []
    for which, name in itertools.product(_turns(turn, *of), of):
        values = _trend(e, metric, name, users, which)
        base = e.series(metric, over, users, which) if over else {}
        at = [level for level in values if level in base or not over]
        if len(at) < 2:
            raise NotTestable(f"no two levels at which both {name} and {over} were run")
        relative = {level: values[level].mean / (base[level].mean if base else 1) for level in at}
        least, most = min(relative, key=relative.__getitem__), max(relative, key=relative.__getitem__)
        above, under = [values[most], *_one(base, least)], [values[least], *_one(base, most)]
        spans.append(ratio(above, under, _named(name, which)))
    return _factors(spans, high=high)


def _one(values: Mapping[int, Value], level: int) -> list[Value]:
    return [values[level]] if values else []


def _named(name: str, turn: str) -> str:
    return name + " (continuation)" * (turn == "continuation")


def _factors(spans: Sequence[Estimate], low: float = 0.0, high: float = math.inf) -> Finding:
    found = decide(spans, low, high)
    parts = [f"{span.text} {span.value:.2f}" + f" ({span.interval})" * (span.n > 1) for span in spans]
    return Finding(found.holds, f"factor: {', '.join(parts)}", found)


def _trend(e: Evidence, metric: str, name: str, users: Levels, turn: str) -> dict[int, Value]:
    values = dict(sorted(e.series(metric, name, users, turn).items()))
    if len(values) < 2:
        raise NotTestable(f"one level of users says nothing about {LABELS[metric]} over users")
    return values


@predicate("{metric} of {of} rises with users (Spearman > 0.9) {users}")
def rises(e: Evidence, *, metric: str, of: list[str], users: Levels, turn: str = "") -> Finding:
    """Rank correlation with users above 0.9."""
    found = _spearman(e, metric, of, users, turn)
    return Finding(min(found.values()) > 0.9, _said(found))


@predicate("{metric} of {of} falls with users (Spearman < -0.9) {users}")
def falls(e: Evidence, *, metric: str, of: list[str], users: Levels, turn: str = "") -> Finding:
    """Rank correlation with users below -0.9."""
    found = _spearman(e, metric, of, users, turn)
    return Finding(max(found.values()) < -0.9, _said(found))


def _said(found: Mapping[str, float]) -> str:
    return f"Spearman: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}"


def _spearman(e: Evidence, metric: str, of: list[str], users: Levels, turn: str) -> dict[str, float]:
    found = {}
    for which, name in itertools.product(_turns(turn, *of), of):
        means = {level: value.mean for level, value in _trend(e, metric, name, users, which).items()}
        steady = min(means.values()) == max(means.values())
        rank = 0.0 if steady else float(stats.spearmanr(list(means), list(means.values())).statistic)
        found[_named(name, which)] = rank
    return found


@predicate("{metric} of {of} at the second over the first level {bounds} {users}")
def growth(
    e: Evidence, *, metric: str, of: list[str], users: Sequence[int], low: float, high: float, turn: str = ""
) -> Finding:
    """The value at the second level over the value at the first, the nearest measured ones."""
    grown = []
    for which, name in itertools.product(_turns(turn, *of), of):
        (first,), (last,) = (e.series(metric, name, level, which).values() for level in users)
        grown.append(ratio([last], [first], _named(name, which)))
    return _factors(grown, low, high)


@predicate("{metric} of {of}: continuation over base prompt ≤ {high} {users} {share}")
def turns(e: Evidence, *, metric: str, of: list[str], users: Levels, high: float, share: float = 1) -> Finding:
    """In at least `share` of the cases, the continuation's value is at most `high` times the base prompt's."""
    cells = []
    for name in of:
        base, then = (e.series(metric, name, users, turn) for turn in ("base", "continuation"))
        for level in sorted(base.keys() & then.keys()):
            cells.append(ratio([then[level]], [base[level]], f"{name} at {e.at(level, '')}"))
    return _finding(decide(cells, high=high, share=share), "; largest: {text}")


@predicate("{metric} of {of}: normal over uniform mix {bounds} {users}")
def mixes(e: Evidence, *, metric: str, of: list[str], users: Levels, low: float = 0, high: float = math.inf) -> Finding:
    """Normal mix relative to the uniform one."""
    cells = []
    for name in of:
        uneven, even = (e.series(metric, name, users, "base", mix) for mix in ("normal", "uniform"))
        for level in sorted(uneven.keys() & even.keys()):
            cells.append(ratio([uneven[level]], [even[level]], f"{name} at {e.at(level, '')}"))
    found = decide(cells, low, high)
    least, most = (pick(cell.value for cell in cells) for pick in (min, max))
    return _finding(found, f"; from {least:.2f} to {most:.2f}; closest: {{text}}")


@predicate(
    "mean throughput of {left} and {right} within a factor of {within}, correlation over time ≥ {correlation} {users}"
)
def trajectory(e: Evidence, *, left: str, right: str, users: int, within: float, correlation: float) -> Finding:
    """Two systems' bucket throughput: mean and course, a system that has ended counting as 0."""
    ours, theirs = (e.series("run_tokens_per_s", name, users, "base") for name in (left, right))
    if ours.keys() != theirs.keys():
        raise NotTestable(f"{left} and {right} were run at different levels")
    (level,) = ours
    curves = e.curves[(e.curves["turn"] == "base") & (e.curves["users"] == level)]
    curves = metrics.average_buckets(curves[curves["config"].isin([left, right])])
    mix = "normal" if (curves["mix"] == "normal").any() else "uniform"
    course = curves[curves["mix"] == mix].pivot_table(index="bucket", columns="config", values="tokens_per_s").fillna(0)
    similar = float(course[left].corr(course[right]))
    means = decide([ratio([ours[level]], [theirs[level]], "")], 1 / within, within)
    return Finding(
        means.holds if similar >= correlation else False,
        f"means {number(ours[level].mean)} and {number(theirs[level].mean)} tokens/s (ratio {means.closest.value:.2f}, "
        f"{means.closest.interval}), correlation {similar:.2f} at {e.at(level, '')}",
        means,
    )


@predicate("best batch size: {expected}")
def best_batch(e: Evidence, *, expected: dict[str, int]) -> Finding:
    """The batch size with the lowest mean response time at the most users, which no other may undercut.

    Of several that are nearly as good, chance chooses one: where each was measured once, nobody can tell.
    """
    numbers, best = [], []
    for name, batch in expected.items():
        stem, _, fastest = e.resolve(name).rpartition("-bs")
        best.append(f"{stem.removeprefix('p2.')} {fastest}")
        tried = {
            (key[3], int(key[1].rpartition("-bs")[2])): value
            for key, value in e.values.items()
            if key[0] == "preliminary" and key[1].startswith(f"{stem}-bs") and key[5] == "response_mean_s"
        }
        most, _ = max(tried)
        if (most, batch) not in tried:
            raise NotTestable(f"{stem} was not run with a batch of {batch}")
        numbers += [
            ratio([value], [tried[most, batch]], f"{stem}: a batch of {other} against {batch}")
            for (users, other), value in sorted(tried.items())
            if users == most and other != batch
        ]
    decision = decide(numbers, low=1)
    once = e.source in ("measured", "emulated") and min(number.n for number in numbers) < 2
    text = f"best batch size: {', '.join(best)}{', each measured once' * once}"
    return Finding(None if once else decision.holds, text, None if once else decision)
