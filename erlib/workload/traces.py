"""Traces of other people's traffic: when requests came, how long they and their answers were, who was to answer.

Formats are told apart by their columns, never by a file's name; each may be CSV or JSON lines. Columns that are not
named in :data:`FORMATS` are passed over.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import pandas as pd

from erlib import cache
from erlib.config import ConfigError
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order in which they came."""

    name: str
    """Of the file."""
    format: str
    arrival_s: npt.NDArray[np.float64]
    """From 0, never falling; several requests may come at a time."""
    input_tokens: Ints
    output_tokens: Ints
    cluster: Ints | None = None
    """Whose expert is to answer, an index from 0; None: the trace does not say."""
    experts: tuple[str, ...] = ()
    """What the trace calls them, by cluster. If all names are as our own (``expert-0``, ``expert-12``; ``expert-01`` is
    not), clusters have their numbers; others are clusters in the order of their names."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def requests_per_s(self) -> float:
        """On average, from the first request to the last; infinite if all come at once."""
        span_s = float(self.arrival_s[-1])
        return (len(self) - 1) / span_s if span_s else math.inf

    def first(self, requests: int) -> Trace:
        """Its beginning: so many requests, or all, if there are fewer."""
        if requests < 1:
            raise ConfigError(f"{self.name}: a trace has at least one request, not {requests}")
        shorter = slice(requests)
        return replace(
            self,
            **{name: getattr(self, name)[shorter] for name in ("arrival_s", "input_tokens", "output_tokens")},
            cluster=None if self.cluster is None else self.cluster[shorter],
        )

    def at_rate(self, requests_per_s: float) -> Trace:
        """The same requests in the same rhythm, so many a second on average.

        Raises
        ------
        ConfigError
            If all come at once, so that there is no rhythm, or the rate is not more than 0.
        """
        if not requests_per_s > 0:
            raise ConfigError(f"{self.name}: requests come at a rate of more than 0 per second, not {requests_per_s:g}")
        if not self.arrival_s[-1]:
            raise ConfigError(f"{self.name}: all requests come at once, which no rate describes")
        return replace(self, arrival_s=self.arrival_s * (self.requests_per_s / requests_per_s))


class Format(NamedTuple):
    """Which columns of a file hold what."""

    times: tuple[str, ...]
    """Whichever there is."""
    input_tokens: str
    output_tokens: str
    decisions: tuple[str, ...] = ()
    """Who answers: likewise, if there is any."""
    per_second: int = 1
    """Units of the times."""
    dates: bool = False
    """Whether times are dates, as in ISO 8601; then the units are those to which they are read."""
    without_answer: str = "leave such requests out"
    """What to do about a request that has no answer."""

    def of(self, fields: Mapping[str, Any] | list[str]) -> bool:
        """Whether a file with these columns is of this format."""
        return any(name in fields for name in self.times) and {self.input_tokens, self.output_tokens} <= set(fields)


FORMATS = {
    "own": Format(("arrival_s",), "input_tokens", "output_tokens", ("cluster",)),
    "azure": Format(("TIMESTAMP",), "ContextTokens", "GeneratedTokens", per_second=10**6, dates=True),
    "mooncake": Format(("timestamp",), "input_length", "output_length", per_second=1000),
    "burstgpt": Format(
        *(("Timestamp",), "Request tokens", "Response tokens"),
        without_answer="BurstGPT keeps failed requests so; its files without_fails leave them out",
    ),
    "splitwise": Format(("arrived_at", "timestamp"), "num_prefill_tokens", "num_decode_tokens"),
    "semantic-router": Format(
        *(("timestamp",), "prompt_tokens", "generated_tokens"),
        decisions=("selected_model", "x_vsr_selected_model", "model", "routed_to", "model_id"),
    ),
}
"""By name; what traces of Azure (2023, 2024), Mooncake, BurstGPT, Splitwise and Vidur, and vLLM's semantic router have.
"""


def asked(trace: Trace, clusters: Sequence[int], rows: Sequence[int]) -> list[Prompt]:
    """What users ask in these rows of a trace, without texts; each row's cluster stands beside it."""
    tokens = (its[rows].tolist() for its in (trace.input_tokens, trace.output_tokens))
    return [
        Prompt(row, cluster, "", prompt, answer, FORCED)
        for row, cluster, prompt, answer in zip(rows, clusters, *tokens, strict=True)
    ]


def read(path: Path) -> Trace:
    """A trace of any of :data:`FORMATS`.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ConfigError
        If there is no such file, it is of no known format, or a line is not what it should be: a time that is missing,
        negative or before that of the line above, a number of tokens that is not a whole number from 1, more cells than
        columns, a decision where others have none. The message has the line's number.
    """
    if not path.is_file():
        raise ConfigError(f"there is no trace {path}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(path.name, _rows(path.name, file))
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not a text in UTF-8, as traces in CSV or JSON lines are") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _read(name: str, rows: Iterator[tuple[int, dict[str, Any]]]) -> Trace:
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{name} holds no request")
    first_line, fields = first
    kind = next((kind for kind, known in FORMATS.items() if known.of(fields)), None)
    if kind is None:
        known = "; ".join(
            f"{kind}: {its.times[0]}, {its.input_tokens}, {its.output_tokens}" for kind, its in FORMATS.items()
        )
        raise ConfigError(f"{name}, line 1: columns {', '.join(fields)} are of no known trace; known are {known}")
    its = FORMATS[kind]
    when = next(column for column in its.times if column in fields)
    who = next((column for column in its.decisions if column in fields), None)
    arrivals, inputs, outputs, decisions = [], [], [], []
    for line, row in itertools.chain([first], rows):
        place = f"{name}, line {line}"
        arrivals.append(_time(row.get(when), when, its, place))
        if len(arrivals) > 1 and arrivals[-1] < arrivals[-2]:
            raise ConfigError(f"{place}: {when} is before that of the line above: sort the lines by it")
        inputs.append(_tokens(row, its.input_tokens, "a request has at least one token", place))
        outputs.append(_tokens(row, its.output_tokens, its.without_answer, place))
        found = next((column for column in its.decisions if column == who or column in row), None)
        if found != who:
            raise ConfigError(f"{name}, line {first_line}: no {found}, which other lines have (line {line})")
        if who:
            decisions.append(_decision(row.get(who), who, its, place))
    start = np.array(arrivals)
    cluster, experts = _clusters(decisions)
    return Trace(name, kind, (start - start[0]) / its.per_second, np.array(inputs), np.array(outputs), cluster, experts)


def _rows(name: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that is not blank, with its number, as a mapping from columns to what they hold."""
    first = file.readline()
    file.seek(0)
    if first.lstrip().startswith(("{", "[")):
        yield from _json_rows(name, file)
        return
    reader = csv.reader(file, strict=True)  # or a quotation mark that is never closed would swallow all lines below
    try:
        header = [column.strip() for column in next(reader, [])]
        if twice := _twice(list(filter(None, header))):
            raise ConfigError(f"{name}, line 1: two columns are called {_short(twice)}: leave one of them")
        for cells in reader:
            if any(cells[len(header) :]):
                raise ConfigError(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, but {len(header)} columns: put what has a "
                    "comma in quotation marks, and write numbers without any"
                )
            if cells:
                yield reader.line_num, dict(itertools.zip_longest(header, cells[: len(header)]))
    except csv.Error as error:
        raise ConfigError(f"{name}, line {reader.line_num}: not CSV ({error})") from None


def _json_rows(name: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object)
        except ConfigError as error:
            raise ConfigError(f"{name}, line {line}: {error}") from None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{name}, line {line}: not a JSON object: a trace has one request a line")
        yield line, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As JSON's own, which would take the last of several values silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ConfigError(
            f"{_short(_twice([name for name, _ in pairs]))} stands twice in one object: leave one of them"
        )
    return found


def _twice(names: list[str]) -> str | None:
    """The first that has been there before."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _time(value: Any, column: str, its: Format, place: str) -> float:
    """In the format's units, since whenever."""
    if value is None or value == "":
        raise ConfigError(f"{place}: no {column}")
    try:
        time = _microseconds(value) if its.dates else _number(value)
    except (TypeError, ValueError, OverflowError):
        wanted = "date such as 2023-11-16 18:15:46.6805900" if its.dates else "number"
        raise ConfigError(f"{place}: {column} must be a {wanted}, not {_short(value)}") from None
    if time < 0:
        raise ConfigError(f"{place}: {column} is negative ({_short(value)})")
    return time


def _microseconds(text: str) -> float:
    """Of a date, since 1970; UTC where it does not say."""
    date = datetime.fromisoformat(text)
    return ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.fromtimestamp(0, UTC)) / timedelta(
        microseconds=1
    )


def _whole(value: Any, column: str, place: str) -> int:
    if value is None or value == "":
        raise ConfigError(f"{place}: no {column}")
    try:
        number = _number(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (number.is_integer() and abs(number) < 2**31):
        raise ConfigError(f"{place}: {column} must be a whole number, not {_short(value)}")
    return int(number)


def _tokens(row: Mapping[str, Any], column: str, advice: str, place: str) -> int:
    tokens = _whole(row.get(column), column, place)
    if tokens < 1:
        raise ConfigError(f"{place}: {column} is {tokens}: {advice}")
    return tokens


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _decision(value: Any, column: str, its: Format, place: str) -> str:
    if its is FORMATS["own"]:
        cluster = _whole(value, column, place)
        if not 0 <= cluster < _MOST_CLUSTERS:
            raise ConfigError(f"{place}: {column} is {cluster}: clusters are numbered from 0")
        return _expert(cluster)
    if value is None or value == "":
        raise ConfigError(f"{place}: no {column}, which other lines have")
    return str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."


_MOST_CLUSTERS = 10_000
_OUR_EXPERT = re.compile("expert-(0|[1-9][0-9]{0,3})")


def _expert(cluster: int) -> str:
    return f"expert-{cluster}"


def _clusters(decisions: list[str]) -> tuple[Ints | None, tuple[str, ...]]:
    """An index for each decision: of our own experts their number, of others their place by name."""
    if not decisions:
        return None, ()
    known = tuple(sorted(set(decisions)))
    ours = [_OUR_EXPERT.fullmatch(expert) for expert in known]
    numbers = [int(number[1]) for number in ours if number]
    if len(numbers) == len(known):
        known = tuple(map(_expert, range(max(numbers) + 1)))
    place = {expert: i for i, expert in enumerate(known)}
    return np.array([place[expert] for expert in decisions]), known


def of_records(records: pd.DataFrame, name: str = "records") -> Trace:
    """What was asked in one point, with who answered; requests that were not answered are left out.

    Parameters
    ----------
    records : DataFrame
        One row per request, as :func:`erlib.load.records.read` returns it, whatever its source.
    name : str

    Raises
    ------
    ConfigError
        If there are no answers, or those of several points, whose clocks are not comparable.
    """
    done = records[records["status"] == "ok"].sort_values("t_send_ns", kind="stable")
    if done.empty:
        raise ConfigError("a trace needs at least one answered request")
    if (points := done["point_hash"].nunique(dropna=False)) > 1:
        raise ConfigError(
            f"a trace is of one point, but these records are of {points}: their clocks are not comparable"
        )
    sent_ns, inputs, outputs, expert = (
        done[column].to_numpy(np.int64) for column in ("t_send_ns", "input_tokens", "output_tokens", "expert")
    )
    names = tuple(map(_expert, range(expert.max() + 1)))
    return Trace(name, "records", (sent_ns - sent_ns[0]) / 1e9, inputs, outputs, expert, names)


def write(trace: Trace, path: Path) -> None:
    """Write a trace as vLLM's semantic router takes it, with the routing decision where there is one.

    ``category`` is the cluster. ``complexity``, which is optional there, is left out: nothing here judges it.
    """
    lines = []
    for i in range(len(trace)):
        row: dict[str, Any] = {
            "timestamp": float(trace.arrival_s[i]),
            "prompt_tokens": int(trace.input_tokens[i]),
            "generated_tokens": int(trace.output_tokens[i]),
        }
        if trace.cluster is not None:
            cluster = int(trace.cluster[i])
            row |= {"selected_model": trace.experts[cluster], "category": f"cluster-{cluster}"}
        lines.append(json.dumps(row))
    with cache.writing(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
