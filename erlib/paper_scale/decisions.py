"""What follows from an answer: what is shown of the two best designs, which decision is sure, and what is not known."""

from __future__ import annotations

import math

import pandas as pd

from erlib.paper_scale import known_error, questions
from erlib.paper_scale.exploring import RESPONSES, Answer
from erlib.paper_scale.gpus import GPUS
from erlib.paper_scale.questions import IN_TURN, Question

_LATER, _LESS, _SAME = ("", "> "), ("", "< "), ("", "")
"""Before what is shown; the latter near and beyond what is carried, where it gets worse with time."""
_SHOWN = {
    "ttft_mean_s": ("TTFT, mean [ms]", 1e3, _LATER),
    "ttft_p99_s": ("TTFT, p99 [ms]", 1e3, _LATER),
    "tpot_mean_s": ("TPOT, mean [ms]", 1e3, _SAME),
    "tpot_p99_s": ("TPOT, p99 [ms]", 1e3, _SAME),
    "response_p99_s": ("response time, p99 [s]", 1.0, _LATER),
    "tokens_per_s": ("throughput [output tokens/s]", 1.0, _SAME),
    "goodput_per_s": ("goodput [requests/s within the service level]", 1.0, _LESS),
    "within": ("within the service level [%]", 100.0, _LESS),
    "price_per_million_tokens": ("price of a million output tokens", 1.0, _SAME),
}
NEAR = 1.1
"""Headroom below which latencies go on growing for longer than is simulated."""
SURE, UNSURE, NO = "carries", "cannot be told", "does not carry"


def side_by_side(answer: Answer) -> pd.DataFrame:
    """The two best designs, a column each: means over draws with the 90 % interval of that mean; headroom, its end."""
    columns = {}
    for _, row in answer.best.iterrows():
        grows = not answer.question.users and row["headroom"] < NEAR  # a queue that grows for longer than was simulated
        cells = {
            said: (marks[grows] + cell(*(row[f"{name}{end}"] * times for end in ("", "_low", "_high")))).strip()
            for name, (said, times, marks) in _SHOWN.items()
        }
        cells["headroom [times what is asked]"] = cell(row["headroom"], row["headroom_low"], row["headroom_high"])
        cells["nearest to its bound"] = row["bottleneck"]
        cells["what ends the headroom"] = row["limited_by"]
        cells["slots, KV cache in use at most [%]"] = f"{100 * row['slots_used']:.0f}, {100 * row['kv_used']:.0f}"
        cells["draws"] = str(row["draws"])
        columns[row["design"]] = cells
    return pd.DataFrame(columns)


def cell(value: float, low: float, high: float) -> str:
    """A value with its interval behind it, if there is one."""
    if math.isnan(value):
        return ""
    return short(value) if math.isnan(low) else f"{short(value)} ({short(low)} to {short(high)})"


def short(value: float) -> str:
    """Three digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def carries(answer: Answer, design: str) -> str:
    """Whether a design carries what is asked: :data:`SURE`, :data:`UNSURE` or :data:`NO`.

    Sure is what both intervals say: that of the p99s over draws, and that of the headroom, if the simulation's
    throughput errs as it does beside published measurements.
    """
    row = answer.table.set_index("design").loc[design]
    asked = answer.question
    bounds = {"ttft_p99_s": asked.ttft_s, "tpot_p99_s": asked.tpot_s}
    ends = {name: (row[f"{name}_low"], row[f"{name}_high"]) for name in bounds}
    ends = {name: (row[name], row[name]) if math.isnan(its[0]) else its for name, its in ends.items()}
    if any(ends[name][0] > bound for name, bound in bounds.items()) or row["headroom_high"] < 1:
        return NO
    kept = not any(ends[name][1] > bound for name, bound in bounds.items())
    return SURE if kept and row["headroom_low"] > 1 else UNSURE


def decision(answer: Answer) -> list[str]:
    """Which decisions the answer is for, a sentence each: whether it is carried, by whom rather, and routed or not."""
    rather = _rather(answer) if len(answer.table) > 1 else ""
    return [said for said in (_carried(answer), rather, _of_kinds(answer)) if said]


def _carried(answer: Answer) -> str:
    best, asked = answer.table.iloc[0], answer.question
    level = f"p99 TTFT {asked.ttft_s:g} s and TPOT {asked.tpot_s:g} s"
    room = f"headroom {best['headroom']:.3g} ({best['headroom_low']:.3g} to {best['headroom_high']:.3g})"
    verdict = carries(answer, best["design"])
    if verdict == NO:
        late = best[f"{best['bottleneck'].lower()}_p99_s"]
        why = f"{room}, ended by {best['limited_by']}"
        if late > getattr(asked, f"{best['bottleneck'].lower()}_s"):
            why = f"p99 {best['bottleneck']} {short(late)} s, {room}"
        return (
            f"No design carries {asked.load} within {level}. Nearest to it is {best['design']}: {why}. Ask for less, "
            "or give more GPUs."
        )
    if verdict == UNSURE:
        return (
            f"Whether {asked.load} are carried within {level} cannot be told: by {best['design']} if at all, {room}, "
            f"ended by {best['limited_by']}."
        )
    return f"{best['design']} carries {asked.load} within {level}: {room}, ended by {best['limited_by']}."


def _rather(answer: Answer) -> str:
    first, second = (row for _, row in answer.best.iterrows())
    ratio, low, high = compared(answer, first, second)
    names = f"{first['design']} rather than {second['design']}"
    if math.isnan(ratio):
        return ""
    times = _times(answer.question, ratio, low, high)
    return f"{names}: {times}." if low > 1 else f"{names} is not sure: {times}."


def compared(answer: Answer, one: pd.Series, other: pd.Series) -> tuple[float, float, float]:
    """One design over the other, in requests per second that are carried (headroom, or answers to users), and its 90 %
    interval.

    Where both have the same step times, an error of these is the same for both, and what is left is by how much draws
    differ. Otherwise each may err on its own. NaN where one of them carries nothing.
    """
    name = "goodput_per_s" if answer.question.users else "headroom"
    if not (one[name] > 0 and other[name] > 0):
        return math.nan, math.nan, math.nan
    ratio = one[name] / other[name]
    low, high = 1.0, 1.0
    if one["form"] != other["form"]:
        least, most = known_error.between(answer.errors, questions.throughput_error(answer.question))
        low, high = least / most, most / least
    elif name == "goodput_per_s" and one[f"{name}_low"] > 0 and other[f"{name}_low"] > 0:
        low = one[f"{name}_low"] / one[name] * other[name] / other[f"{name}_high"]
        high = one[f"{name}_high"] / one[name] * other[name] / other[f"{name}_low"]
    return ratio, ratio * low, ratio * high


def _of_kinds(answer: Answer) -> str:
    """One model in turn, or experts?"""
    table = answer.table[answer.table["draws"] > 0]
    one, experts = table[table["kind"] == IN_TURN], table[table["kind"] != IN_TURN]
    if one.empty or experts.empty:
        return ""
    mine, its = experts.iloc[0], one.iloc[0]
    ratio, low, high = compared(answer, mine, its)
    if math.isnan(ratio):
        return ""
    told = {
        SURE: f"they carry {answer.question.load}, too",
        UNSURE: f"whether they carry {answer.question.load} cannot be told",
        NO: f"they do not carry {answer.question.load}",
    }[carries(answer, mine["design"])]
    return (
        f"Experts instead of one model ({mine['design']} against {its['design']}) have "
        f"{_times(answer.question, ratio, low, high)}; {told}. Which answers are better is not asked."
    )


def _times(question: Question, ratio: float, low: float, high: float) -> str:
    interval = f" ({low:.3g} to {high:.3g})" if low < high else ""
    return f"{ratio:.3g} times{interval} the {'answers' if question.users else 'headroom'}"


def limits(answer: Answer) -> list[str]:
    """What the intervals hold and what they do not; where the simulation is known to be too good."""
    errors, asked = answer.errors, answer.question
    metric = questions.throughput_error(asked)
    low, high = known_error.between(errors, metric)
    sheet = asked.its_gpu.sheet is not None
    how_sure = "in static batches, all of them, which are too few for an interval" if sheet else "with 90 % probability"
    said = [
        "Intervals of latencies and rates: of the mean over draws of prompts, arrivals and order, with 90 % "
        "probability; they hold no error of the simulation.",
        f"Interval of the headroom: published throughputs are {low:.3g} to {high:.3g} times the simulated ones, "
        f"{how_sure} ({errors.loc[metric, 'points']:.0f} points); the headroom itself is arithmetic, "
        "with engines that are always full and requests of mean lengths; a test holds three saturated simulations to "
        "it within 8 %.",
        f"Requests come for some {RESPONSES} answers' time. With a headroom below {NEAR:g} queues grow for longer: '>' "
        "and '<' say so.",
    ]
    said.append(too_good(errors, asked))
    said += unknown(asked)
    said.append("No host, no gateway and no network are in it.")
    return said


def unknown(asked: Question) -> list[str]:
    """That the errors are of other step times than the question's, if so."""
    of = asked.its_gpu
    if of.sheet is not None or of.tables == GPUS["h100"].tables:
        return []
    return ["These errors are of NVIDIA's step times for the H100; with other step times nothing is known of them."]


def too_good(errors: pd.DataFrame, asked: Question) -> str:
    """Where the simulation is known to be optimistic, in a sentence."""
    if asked.its_gpu.sheet is not None:
        first = errors.loc[known_error.TTFT + known_error.SHEET]
        return (
            "A data sheet knows no kernels: step times assume 60 % of the arithmetic and 75 % of the bandwidth in it, "
            f"and no time for launches. Published TTFTs of a lone prompt are {first['smallest']:.3g} to "
            f"{first['largest']:.3g} times the simulated ones ({first['points']:.0f} points, the shorter prompts "
            "farther off); where several wait, nothing is published for these GPUs."
        )
    if asked.users:
        low, high = known_error.between(errors, known_error.TPOT)
        first = errors.loc[known_error.TTFT]
        return (
            f"Of users who wait, published TPOTs are {low:.3g} to {high:.3g} times the simulated ones with 90 % "
            f"probability, TTFTs {first['smallest']:.3g} to {first['largest']:.3g} times ({first['points']:.0f} "
            "points: too few for an interval)."
        )
    tpot, ttft = (errors.loc[name + known_error.OPEN] for name in (known_error.TPOT, known_error.TTFT))
    return (
        f"Too good near saturation: where arrivals do not wait, published TPOTs are {tpot['smallest']:.2g} to "
        f"{tpot['largest']:.2g} times, TTFTs {ttft['smallest']:.2g} to {ttft['largest']:.2g} times the simulated ones "
        "(at 0.88 and more of capacity). At less nothing is published; leave headroom."
    )
