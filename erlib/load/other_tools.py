"""What other tools measured, in the workbench's terms: AIPerf, GuideLLM and ``vllm bench serve``.

The tools share words and not meanings. Everything here is computed anew from moments and counts that a tool wrote, and
:data:`LEFT_OUT` says which of its own metrics are not taken, and why. TPOT is (last - first) / (n - 1) here; GuideLLM
calls that inter-token latency, and something else TPOT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from erlib.config import ConfigError
from erlib.load import metrics
from erlib.workload.traces import Trace

LEFT_OUT = {
    "AIPerf": {
        "inter_token_latency": "divided by tokens as AIPerf's own tokenizer counts them, unless it was told otherwise; "
        "tpot_s has the server's count where the server gave one",
        "inter_chunk_latency": "gaps between messages, each of which may bring several tokens",
        "goodput": "its service levels are its own; records have what another level needs",
    },
    "GuideLLM": {
        "time_per_output_token_ms": "(last - start) / n: the wait for the first token is in it",
        "request_latency": "until the stream is closed, which is after the last token",
        "request_goodput": "as in AIPerf",
    },
    "vllm bench": {
        "itl": "gaps between messages, each of which may bring several tokens, and the last of which may bring none",
        "request_goodput": "as in AIPerf",
    },
}
"""Metrics of each tool that are not taken, with the reason."""

METRICS = ("ttft_s", "tpot_s", "response_s")
_COLUMNS = ["tool", "run", "status", "t_send_s", "input_tokens", "output_tokens", "ttft_s", "response_s"]


@dataclass(frozen=True)
class Measured:
    """What a file holds."""

    tool: str
    requests: pd.DataFrame
    """One row per request: ``source`` ("measured"), ``tool``, ``run`` (a file may hold several), ``status`` ("ok", or
    what went wrong), ``t_send_s`` (since the run's first), ``input_tokens``, ``output_tokens``, and, of answered ones,
    ``ttft_s``, ``tpot_s``, ``response_s``, ``user_tokens_per_s`` as :func:`erlib.load.metrics.latencies` defines them.
    No rows, if the file holds a summary only."""
    summary: pd.DataFrame
    """One row per ``run`` and ``metric``: ``answers``, ``failures``, ``mean``, ``median``, ``p99``, in seconds."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """The tool's metrics that are not here, with the reason."""
        return LEFT_OUT[self.tool]


def read_results(path: Path) -> Measured:
    """A tool's results: AIPerf's ``profile_export.jsonl``, GuideLLM's ``benchmarks.json``, or what vLLM's bench saved.

    Raises
    ------
    ConfigError
        If it is none of these, of a version that is not known, or holds no answer; or if a number is not what it can
        be: an answer without a count of its tokens, a last token before the first.
    """
    documents = _documents(path)
    first = documents[0]
    if {"metadata", "metrics"} <= first.keys():
        rows = _of_aiperf(documents, path.name)
    elif "benchmarks" in first:
        rows = _of_guidellm(first, path.name)
    elif "mean_ttft_ms" in first:
        if not {"ttfts", "itls"} <= first.keys():
            return _vllm_summary(documents, path.name)
        rows = _of_vllm(documents, path.name)
    elif "input_config" in first:
        raise ConfigError(f"{path.name} has AIPerf's averages only: give the file profile_export.jsonl beside it")
    else:
        raise ConfigError(
            f"{path.name} is none of AIPerf's profile_export.jsonl, GuideLLM's benchmarks.json and what vllm bench "
            "serve --save-result writes"
        )
    return _measured(pd.DataFrame([_checked(*row) for row in rows], columns=_COLUMNS), path.name)


def _documents(path: Path) -> list[dict[str, Any]]:
    """One of the whole file, or one of each line."""
    if not path.is_file():
        raise ConfigError(f"there are no results {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not a text in UTF-8, as JSON is") from None
    try:
        found = [json.loads(text)]
    except (ValueError, RecursionError):
        found = []
        for number, line in enumerate(text.split("\n"), 1):  # texts in JSON may hold what else would end a line
            try:
                found += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError):
                raise ConfigError(f"{path.name}, line {number}: not JSON") from None
    if not found or not all(isinstance(document, dict) for document in found):
        raise ConfigError(f"{path.name} holds no results")
    return found


def _checked(
    place: str,
    tool: str,
    run: str,
    status: str,
    start: Any,
    inputs: Any,
    outputs: Any,
    ttft: Any,
    response: Any,
) -> tuple[Any, ...]:
    """A row of :data:`_COLUMNS`. None is what a file does not say, as it may of requests that failed."""
    for what, seconds in {"the moment of sending": start, "TTFT": ttft, "the response time": response}.items():
        if seconds is not None and not _is_number(seconds):
            raise ConfigError(f"{place}: {what} must be a number, not {seconds!r:.60}")
    for what, tokens in {"prompt": inputs, "answer": outputs}.items():
        if tokens is not None and not (_is_number(tokens) and 0 <= tokens < 2**31 and tokens == int(tokens)):
            raise ConfigError(f"{place}: tokens of the {what} must be a whole number from 0, not {tokens!r:.60}")
    if status == "ok" and outputs == 0 and ttft is None:
        status = "no answer"
    if status == "ok":
        if start is None:
            raise ConfigError(f"{place}: no moment of sending, without which requests have no order: measure again")
        if not (inputs and outputs):
            raise ConfigError(
                f"{place}: no token counts: measure again with a server that reports usage, or let {tool} count with "
                "the model's tokenizer"
            )
        tpot = None if ttft is None or response is None else response - ttft
        for what, seconds in {"TTFT": ttft, "the response time": response, "TPOT": tpot}.items():
            if seconds is not None and seconds < 0:
                raise ConfigError(f"{place}: {what} is negative ({seconds:g} s): leave it out, or measure again")
    start, ttft, response = (np.nan if its is None else its for its in (start, ttft, response))
    return tool, run, status, start, int(inputs or 0), int(outputs or 0), ttft, response


def _is_number(value: Any) -> bool:
    """Whether it is one, finite, and no longer than what a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _measured(requests: pd.DataFrame, name: str) -> Measured:
    ok = requests["status"] == "ok"
    if not ok.any():
        raise ConfigError(f"{name} holds no answered request ({len(requests)} failed)")
    answered = requests["output_tokens"].where(ok).astype(float)
    first, last = requests["ttft_s"].astype(float), requests["response_s"].astype(float)
    requests = requests.assign(
        source="measured",
        ttft_s=first,
        response_s=last,
        tpot_s=metrics.tpot_s(last - first, answered),
        user_tokens_per_s=answered / last,
        t_send_s=requests["t_send_s"] - requests.groupby("run")["t_send_s"].transform("min"),
    )
    rows = []
    for run, its in requests.groupby("run", sort=False):
        done = its[its["status"] == "ok"]
        for metric in METRICS:
            values = done[metric].dropna()
            if len(values):
                about = {"run": run, "metric": metric, "answers": len(done), "failures": len(its) - len(done)}
                found = {"mean": values.mean(), "median": values.median(), "p99": metrics.p99(values)}
                rows.append(about | found)
    return Measured(requests["tool"].iloc[0], requests, pd.DataFrame(rows))


# --- AIPerf -----------------------------------------------------------------------------------------------------------

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0}


def _of_aiperf(documents: Sequence[dict[str, Any]], name: str) -> Iterator[tuple[Any, ...]]:
    """Warm-up is left out; ``request_latency`` ends with the last message that has content."""
    for line, document in enumerate(documents, 1):
        try:
            about, its = document["metadata"], document["metrics"]
            if about.get("benchmark_phase", "profiling") != "profiling":
                continue
            error = document.get("error")
            status = "cancelled" if about.get("was_cancelled") else f"error {error.get('code')}" if error else "ok"
            seconds = [
                its[metric]["value"] * _SECONDS[its[metric]["unit"]] if metric in its else None
                for metric in ("time_to_first_token", "request_latency")
            ]
            counts = [
                its.get(server, its.get(client, {})).get("value")
                for server, client in (
                    ("usage_prompt_tokens", "input_sequence_length"),
                    ("usage_completion_tokens", "output_sequence_length"),
                )
            ]
            place = f"{name}, line {line}"
            yield place, "AIPerf", "profiling", status, about["request_start_ns"] * 1e-9, *counts, *seconds
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{name}, line {line}: not a record of AIPerf's ({error!r})") from None


# --- GuideLLM ---------------------------------------------------------------------------------------------------------

_GUIDELLM_VERSION = 2


def _of_guidellm(document: dict[str, Any], name: str) -> Iterator[tuple[Any, ...]]:
    """Moments are those of the client's clock: of sending, of the first and of the last token."""
    about = document.get("metadata")
    version = about.get("version") if isinstance(about, dict) else None
    if version != _GUIDELLM_VERSION:
        raise ConfigError(
            f"{name} has GuideLLM's schema {'without a version' if version is None else f'version {version}'}; version "
            f"{_GUIDELLM_VERSION} is read, which newer releases write (metadata.version)"
        )
    try:
        for place, benchmark in enumerate(document["benchmarks"]):
            strategy = benchmark["config"]["strategy"]
            level = next((strategy[key] for key in ("rate", "streams") if strategy.get(key)), None)
            run = f"{place}: {strategy['type_']}" + (f" {level:g}" if level else "")
            for status in ("successful", "errored", "incomplete"):
                for number, request in enumerate(benchmark["requests"][status] or (), 1):
                    timings = request["info"]["timings"]
                    start = timings["request_start"]
                    seconds = (
                        None if start is None or timings[moment] is None else timings[moment] - start
                        for moment in ("first_token_iteration", "last_token_iteration")
                    )
                    yield (
                        *(f"{name}, run {run!r}, {status} request {number}", "GuideLLM", run),
                        *("ok" if status == "successful" else status, start),
                        *(request["prompt_tokens"], request["output_tokens"], *seconds),
                    )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name}: not a report of GuideLLM's ({error!r})") from None


# --- vllm bench serve -------------------------------------------------------------------------------------------------


def _vllm_run(place: int, document: dict[str, Any]) -> str:
    return f"{place}: rate {document.get('request_rate', '?')}"


def _of_vllm(documents: Sequence[dict[str, Any]], name: str) -> Iterator[tuple[Any, ...]]:
    """A latency is the first token's, and all gaps after it: so vLLM computes it, too."""
    wanted = ("start_times", "input_lens", "output_lens", "ttfts", "itls", "errors")
    for place, document in enumerate(documents):
        run = _vllm_run(place, document)
        try:
            requests = zip(*(document[its] for its in wanted), strict=True)
            for number, (start, inputs, outputs, ttft, gaps, error) in enumerate(requests, 1):
                failed = bool(error) or not outputs
                seconds = (None, None) if failed else (ttft, ttft + sum(gaps))
                about = f"{name}, run {run!r}, request {number}", "vllm bench", run, "failed" if failed else "ok"
                yield *about, start, inputs, outputs, *seconds
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{name}: not what vllm bench serve --save-detailed writes ({error!r})") from None


def _vllm_summary(documents: Sequence[dict[str, Any]], name: str) -> Measured:
    """Of a file without ``--save-detailed``: vLLM's percentiles interpolate, ours do not."""
    names = {"ttft_s": "ttft", "tpot_s": "tpot", "response_s": "e2el"}
    figures = [f"{how}_{its}_ms" for how in ("mean", "median", "p99") for its in names.values()]
    for place, document in enumerate(documents):
        where = f"{name}, run {_vllm_run(place, document)!r}"
        for key in ("completed", *(key for key in ("failed", *figures) if key in document)):
            value: Any = document.get(key)
            if not _is_number(value) or value < 0:
                what = "is missing" if value is None else f"must be a number from 0, not {value!r:.60}"
                raise ConfigError(f"{where}: not what vllm bench serve --save-result writes: {key} {what}")
        if not document["completed"]:
            raise ConfigError(f"{where}: holds no answered request")
    rows = [
        {
            **{"run": _vllm_run(place, document), "metric": metric},
            **{"answers": document["completed"], "failures": document.get("failed", 0)},
            **{how: document.get(f"{how}_{its}_ms", np.nan) * 1e-3 for how in ("mean", "median", "p99")},
        }
        for place, document in enumerate(documents)
        for metric, its in names.items()
        if f"mean_{its}_ms" in document
    ]
    return Measured("vllm bench", pd.DataFrame(columns=[*_COLUMNS, "tpot_s", "user_tokens_per_s"]), pd.DataFrame(rows))


# --- beside a prediction ----------------------------------------------------------------------------------------------


def trace(measured: Measured, run: str) -> Trace:
    """What a tool asked in one run, so that it can be asked of a simulation; without requests that were not answered.

    Raises
    ------
    ConfigError
        If the file holds no such run, or a summary only.
    """
    requests = measured.requests
    if requests.empty:
        raise ConfigError(f"this file of {measured.tool} has no requests: vllm bench serve needs --save-detailed")
    done = requests[(requests["run"] == run) & (requests["status"] == "ok")].sort_values("t_send_s", kind="stable")
    if done.empty:
        raise ConfigError(f"no answers of a run {run!r}; runs are {', '.join(requests['run'].unique())}")
    sent_s = done["t_send_s"].to_numpy(float)
    inputs, outputs = (done[f"{what}_tokens"].to_numpy(np.int64) for what in ("input", "output"))
    return Trace(f"{measured.tool}, {run}", measured.tool, sent_s - sent_s[0], inputs, outputs)


def beside(measured: Measured, run: str, simulated: pd.DataFrame) -> pd.DataFrame:
    """Measured and simulated, metric by metric.

    Parameters
    ----------
    measured : Measured
    run : str
        One of the file's.
    simulated : DataFrame
        Simulated requests with latencies, as :func:`erlib.paper_scale.replay.replay` returns them.

    Returns
    -------
    DataFrame
        One row per ``metric`` and ``statistic`` (mean, median, p99): ``measured``, ``simulated`` in seconds, and
        ``error`` of the simulation (0.1: a tenth too long). ``answers``, ``failures``: measured.
    """
    done = simulated[simulated["status"] == "ok"]
    rows = []
    for its in measured.summary[measured.summary["run"] == run].itertuples():
        values = done[its.metric].dropna()
        of = {"mean": values.mean(), "median": values.median(), "p99": metrics.p99(values) if len(values) else np.nan}
        for statistic, seconds in of.items():
            theirs = getattr(its, statistic)
            about = {"metric": its.metric, "statistic": statistic, "measured": theirs, "simulated": seconds}
            rows.append(about | {"error": seconds / theirs - 1, "answers": its.answers, "failures": its.failures})
    if not rows:
        raise ConfigError(f"no run {run!r}; runs are {', '.join(measured.summary['run'].unique())}")
    return pd.DataFrame(rows)
