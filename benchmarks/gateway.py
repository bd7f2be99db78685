"""What does the gateway cost? Latency and CPU that it adds to a direct connection, beside those of other proxies.

One engine that only keeps time answers everybody; users, engine and proxy share this machine, and the pace leaves it
time. For each way from users to engine and each number of streams, one after the other:

- *burst*: all streams begin at once. CPU of the proxy's processes per request, its first token included. The last
  first token has a floor: what the burst takes of CPU, in all processes, over the number of cores.
- *quiet*: the streams run, nobody comes or goes. CPU of the proxy's processes per token.
- *steady*: the streams run, and short requests come one by one. Their time to first token; the running streams' time
  from engine to user, and between tokens.

Added is the difference to the same users and engine without a proxy, in the same round of the same run; printed is the
median of all ``--repeats`` rounds, written is each. Beside it stand the machine's own limits: its idle share, what
other processes took, how late users and engine were.

Then: classification alone by length of prompt and vocabulary; memory and start of the gateways.

    python -m benchmarks.gateway [--parts relay classify memory] [--ways NAME ...] [--levels N ...] [--repeats N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import psutil
from tqdm import tqdm

from benchmarks.cpu import process_cpu_s
from benchmarks.paced import ENDLESS, Stream, Users
from benchmarks.ways import GATEWAYS, WAYS, Site, Way
from erlib import config, paths, provenance
from erlib.machine import processes
from erlib.machine.processes import StartError
from erlib.routing import building, sklearn_pipeline
from erlib.routing.clusterer import Clusterer
from erlib.workload import corpus

LEVELS = (1, 10, 100, 300, 1000)
BASE_PORT = 24000
TOKENS_PER_S = 2000
"""Of all streams together; what two cores relay with time left. (LiteLLM takes more than two for it.)"""
SHORTEST_PACE_S = 0.02
ARRIVALS_PER_S = 25
QUIET_S, STEADY_S, SETTLE_S = 6.0, 12.0, 1.0
TIMEOUT_S = 60
LAG_PROBE_S = 0.01
PROMPT_WORDS = 335  # of the papers' base prompts
WARM_UP_REQUESTS = 64

CLASSIFIED_WORDS = (35, 100, 335, 1_000, 2_000, 4_000, 8_000)
VOCABULARIES = (40_000, 100_000, 400_000, 1_000_000)
CLASSIFIED_PROMPTS = 100

PRINTED = {
    "way": "way", "streams": "streams", "tokens_per_s": "tokens/s",
    "added_ttft_p50_ms": "+TTFT p50", "added_ttft_p95_ms": "p95",
    "added_token_p50_ms": "+token p50", "added_token_p99_ms": "p99",
    "gap_p99_ms": "gap p99", "added_gap_p99_ms": "+gap p99",
    "cpu_us_per_token": "us/token", "cpu_us_per_request": "us/request",
    "burst_ttft_p50_ms": "burst p50", "burst_ttft_max_ms": "max", "burst_floor_ms": "floor",
    "idle": "idle", "others": "others", "users_lag_p99_ms": "users late",
    "engine_late_p99_ms": "engine late", "failed": "failed",
}  # fmt: skip


class PointFailed(RuntimeError):
    """Nothing can be said about a point; the message says why."""


class Engine:
    """The engine's process."""

    def __init__(self, ports: tuple[int, int], log: Path) -> None:
        command = processes.python("-m", "benchmarks.paced", *map(str, ports))
        self.process = processes.spawn(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for port in ports:
            processes.wait_until(partial(processes.listening, port), self.process, "engine", log, 30)

    def report(self, pace_s: float | None = None) -> dict[str, Any]:
        """What :mod:`benchmarks.paced` says about the time since the last report; sets the pace, if given."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"%a\n" % pace_s if pace_s else b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@dataclass
class Interval:
    """A stretch of time: who computed how much (s), and how late this process' event loop ran (ms)."""

    relays: Sequence[int]
    engine: int
    start_ns: int = 0
    end_ns: int = 0
    relays_s: float = 0.0
    all_s: float = 0.0
    idle: float = float("nan")
    others: float = float("nan")
    lags_ms: list[float] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._before = self._read()
        self.start_ns = time.monotonic_ns()
        self._watch = asyncio.create_task(self._watch_lag())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end_ns = time.monotonic_ns()
        self._watch.cancel()
        relays, ends, idle, total = (after - before for after, before in zip(self._read(), self._before, strict=True))
        self.relays_s, self.all_s = relays, relays + ends
        if total:  # counted in hundredths of a second, of which a short interval may have none
            self.idle = idle / total
            self.others = max(0.0, 1 - self.idle - self.all_s / total)

    def _read(self) -> tuple[float, float, float, float]:
        relays = sum(map(process_cpu_s, self.relays))
        machine = psutil.cpu_times()
        return (
            relays,
            process_cpu_s(self.engine) + time.process_time(),
            machine.idle + machine.iowait,
            _all_times(machine),
        )

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_PROBE_S
            await asyncio.sleep(LAG_PROBE_S)
            self.lags_ms.append((time.monotonic() - due) * 1e3)

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


def _all_times(times: Any) -> float:
    return sum(times) - times.guest - times.guest_nice  # which user and nice contain


async def point(
    way: Way, engine: Engine, n_streams: int, tokens_per_s: float, prompts: Iterator[str], seconds: Sequence[float]
) -> dict[str, Any]:
    """Burst, quiet, steady with `n_streams`; one row of the table, not yet compared with anything."""
    pace_s = max(SHORTEST_PACE_S, n_streams / tokens_per_s)
    engine.report(pace_s)
    quiet_s, steady_s = seconds
    async with Users(way.url, way.protocol) as users:
        for _ in range(WARM_UP_REQUESTS):
            await asyncio.wait_for((await users.request(next(prompts), 1)).ended, TIMEOUT_S)
        pids = way.processes(), engine.process.pid
        async with Interval(*pids) as burst:
            streams = await asyncio.gather(*(users.request(next(prompts), ENDLESS) for _ in range(n_streams)))
            await _first_tokens(streams)
        await asyncio.sleep(SETTLE_S + pace_s)
        engine.report()
        async with Interval(*pids) as quiet:
            await asyncio.sleep(quiet_s)
        async with Interval(*pids) as steady:
            arrivals = await _arrivals(users, prompts, steady_s)
        kept = engine.report()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(arrival.ended for arrival in arrivals)), TIMEOUT_S)
        for stream in streams:
            stream.abandon()
    alive = [stream for stream in streams if stream.arrived_ns and not stream.error]
    answered = [arrival for arrival in arrivals if arrival.arrived_ns and not arrival.error]
    errors = [stream.error or "no answer in time" for stream in (*streams, *arrivals) if stream not in alive + answered]
    if not alive or not answered:
        raise PointFailed(f"no request came through: {errors[0]}")
    return {
        "streams": n_streams,
        "pace_ms": pace_s * 1e3,
        "tokens_per_s": _n_tokens(alive, quiet) / quiet.duration_s,
        **_percentiles("ttft", _first_ms(answered), 50, 95, 99),
        **_percentiles("token", _took_ms(alive, steady), 50, 99),
        **_percentiles("gap", _gaps_ms(alive, steady), 1, 50, 99),
        **_percentiles("quiet_gap", _gaps_ms(alive, quiet), 1, 50, 99),
        "cpu_us_per_token": quiet.relays_s / max(1, _n_tokens(alive, quiet)) * 1e6,
        "cpu_us_per_request": burst.relays_s / n_streams * 1e6,
        **_percentiles("burst_ttft", _first_ms(alive), 50, 95, 100),
        "burst_floor_ms": burst.all_s / (os.cpu_count() or 1) * 1e3,
        "idle": steady.idle,
        "others": steady.others,
        "quiet_idle": quiet.idle,
        "users_lag_p99_ms": float(np.percentile(steady.lags_ms, 99)),
        "burst_users_lag_max_ms": max(burst.lags_ms, default=0.0),
        "engine_late_p99_ms": kept["late_p99_ms"],
        "arrivals": len(arrivals),
        "failed": len(errors),
        "note": errors[0][:200] if errors else "",
    }


async def _first_tokens(streams: Sequence[Stream]) -> None:
    """Wait until each stream has its first token or has failed, or nothing more comes."""
    deadline = time.monotonic() + TIMEOUT_S
    waiting = list(streams)
    while waiting and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
        waiting = [stream for stream in waiting if not stream.arrived_ns and not stream.ended.done()]


async def _arrivals(users: Users, prompts: Iterator[str], duration_s: float) -> list[Stream]:
    """Requests for one token, evenly spread; each begins on time, whether those before it are answered or not."""
    requests = []
    begin = time.monotonic()
    for number in range(round(duration_s * ARRIVALS_PER_S)):
        await asyncio.sleep(max(0.0, begin + number / ARRIVALS_PER_S - time.monotonic()))
        requests.append(asyncio.create_task(users.request(next(prompts), 1)))
    await asyncio.sleep(1 / ARRIVALS_PER_S)
    return list(await asyncio.gather(*requests))


def _n_tokens(streams: Sequence[Stream], interval: Interval) -> int:
    return sum(len(_within(stream, interval)) for stream in streams)


def _within(stream: Stream, interval: Interval) -> np.ndarray:
    """Positions of the tokens that arrived in `interval`, int array (n,)."""
    arrived_ns = np.array(stream.arrived_ns, np.int64)
    return np.flatnonzero((arrived_ns >= interval.start_ns) & (arrived_ns < interval.end_ns))


def _first_ms(streams: Sequence[Stream]) -> np.ndarray:
    return np.array([stream.arrived_ns[0] - stream.sent_ns for stream in streams]) / 1e6


def _took_ms(streams: Sequence[Stream], interval: Interval) -> np.ndarray:
    return np.concatenate([np.array(s.took_ns, np.int64)[_within(s, interval)] for s in streams]) / 1e6


def _gaps_ms(streams: Sequence[Stream], interval: Interval) -> np.ndarray:
    return np.concatenate([np.diff(np.array(s.arrived_ns, np.int64)[_within(s, interval)]) for s in streams]) / 1e6


def _percentiles(name: str, values: np.ndarray, *percents: int) -> dict[str, float]:
    names = [f"{name}_{'max' if percent == 100 else f'p{percent}'}_ms" for percent in percents]
    measured = np.percentile(values, percents) if len(values) else np.full(len(percents), np.nan)
    return dict(zip(names, map(float, measured), strict=True))


def relays(options: argparse.Namespace, site: Site, prompts: Sequence[str], work: Path) -> pd.DataFrame:
    """All ways at all levels, `repeats` times; a way that cannot be started here has rows that say why."""
    engine = Engine((site.engine_port, site.openai_port), work / "engine.log")
    ways = [name for name in WAYS if name in options.ways or name in {_baseline(way) for way in options.ways}]
    rows: list[dict[str, Any]] = []
    try:
        with tqdm(total=options.repeats * len(ways) * len(options.levels), unit="point") as progress:
            for repeat, name in itertools.product(range(options.repeats), ways):
                levels = _levels(site, name, engine, options, itertools.cycle(prompts), progress)
                rows += [{"repeat": repeat, **row} for row in levels]
    finally:
        processes.stop([engine.process], 3)
    return compared(pd.DataFrame(rows))


def _levels(
    site: Site, name: str, engine: Engine, options: argparse.Namespace, prompts: Iterator[str], progress: tqdm
) -> Iterator[dict[str, Any]]:
    """Rows of one way."""
    try:
        with site.way(name) as way:
            for n_streams in options.levels:
                progress.set_description(f"{name}, {n_streams}")
                try:
                    row = asyncio.run(point(way, engine, n_streams, options.tokens_per_s, prompts, options.seconds))
                except (TimeoutError, OSError, PointFailed) as error:
                    row = {"streams": n_streams, "note": str(error) or "a warm-up request was not answered in time"}
                yield {"way": name, **row}
                progress.update()
                time.sleep(SETTLE_S)  # what was abandoned is cleared away
    except StartError as error:
        yield {"way": name, "note": str(error)}


def _baseline(way: str) -> str:
    """What `way` is compared with: the connection without proxy in its protocol."""
    return "direct, OpenAI" if way in ("LiteLLM", "direct, OpenAI") else "direct"


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with columns ``added_*``: each way less its baseline at the same level of the same repeat."""
    if "ttft_p50_ms" not in table:
        return table
    key = [table["way"].map(_baseline), table["streams"], table["repeat"]]
    base = table.set_index(["way", "streams", "repeat"])
    for column in [name for name in table if re.fullmatch(r"(ttft|token|gap|quiet_gap|burst_ttft)_.*_ms", name)]:
        table[f"added_{column}"] = (
            table[column].to_numpy() - base[column].reindex(pd.MultiIndex.from_arrays(key)).to_numpy()
        )
    return table


def medians(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that are printed of `table`, with the median of all repeats."""
    numbers = table.reindex(columns=list(PRINTED)).groupby(["way", "streams"], sort=False, dropna=False)
    return numbers.median().reset_index().rename(columns=PRINTED)


# --- classification, memory, start --------------------------------------------------------------------------------


def classification(router: Path, texts: Sequence[str], seed: int) -> pd.DataFrame:
    """How long one prompt takes, by its words and the vocabulary's terms; the floor is to find its words at all."""
    words = [word for text in texts for word in text.split()]
    model = Clusterer.load(router)
    rows = []
    for n_terms in tqdm(VOCABULARIES, desc="vocabularies"):
        padded = sklearn_pipeline.padded(_trimmed(model, n_terms), n_terms, seed)
        for n_words in CLASSIFIED_WORDS:
            starts = np.linspace(0, len(words) - n_words, CLASSIFIED_PROMPTS).astype(int)
            prompts = [" ".join(words[start : start + n_words]) for start in starts]
            rows.append(
                {
                    "terms": len(padded.terms),
                    "words": n_words,
                    **_percentiles("classify", _durations_ms(padded.route, prompts), 50, 99),
                    **_percentiles("floor", _durations_ms(_words_of, prompts), 50),
                }
            )
    return pd.DataFrame(rows)


def _trimmed(model: Clusterer, n_terms: int) -> Clusterer:
    """`model` with its most frequent terms only, as if it had been fitted on less text."""
    kept = np.sort(np.argsort(model.idf, kind="stable")[:n_terms])
    return Clusterer(
        [model.terms[column] for column in kept],
        model.idf[kept],
        model.components[kept],
        model.centres,
        mean=model.mean,
        scale=model.scale,
    )


def _words_of(prompt: str) -> int:
    return len(set(re.findall(r"(?u)\b\w\w+\b", prompt.lower())))


def _durations_ms(function: Any, prompts: Sequence[str]) -> np.ndarray:
    durations_ms = []
    for prompt in prompts:
        began_ns = time.perf_counter_ns()
        function(prompt)
        durations_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return np.array(durations_ms)


def memory(site: Site) -> pd.DataFrame:
    """Start time, and resident and proportional memory, of one gateway and of all, with the process that forks them."""
    rows = []
    for n in (1, GATEWAYS):
        with contextlib.ExitStack() as running:
            began = time.monotonic()
            _, gateways = site.gateways(running, n)
            start_s = time.monotonic() - began
            family = [psutil.Process(gateway.pid) for gateway in gateways]
            family += {gateway.parent() for gateway in family}  # what has forked them
            used = [member.memory_full_info() for member in family]
            cpu_s = sum(process_cpu_s(member.pid) for member in family)
        rows.append(
            {
                "gateways": n,
                "start_s": start_s,
                "start_cpu_s_each": cpu_s / n,
                "rss_mb_each": float(np.mean([one.rss for one in used])) / 1e6,
                "pss_mb_each": float(np.mean([one.pss for one in used])) / 1e6,
                "pss_mb_all": sum(one.pss for one in used) / 1e6,
            }
        )
    return pd.DataFrame(rows)


# --- command line -------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print, write tables and provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("relay", "classify", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="their baseline comes along")
    parser.add_argument("--levels", nargs="+", type=int, default=LEVELS, help="numbers of concurrent streams")
    parser.add_argument("--repeats", type=int, default=1, help="rounds through all ways")
    parser.add_argument("--tokens-per-s", type=float, default=TOKENS_PER_S, help="of all streams together")
    parser.add_argument("--seconds", nargs=2, type=float, default=(QUIET_S, STEADY_S), metavar=("QUIET", "STEADY"))
    parser.add_argument("--base-port", type=int, default=BASE_PORT)
    parser.add_argument("--profile", default="laptop", help="whose clusterer and corpus")
    parser.add_argument("--out", type=Path, default=paths.RUNS / "benchmarks")
    options = parser.parse_args()

    profile = config.load_profile(options.profile)
    router = building.build_clusterer(profile)
    texts = corpus.load_corpus(profile.corpus, profile.seed, "holdout").texts
    long_enough = [words for text in texts if len(words := text.split()) >= PROMPT_WORDS]
    prompts = [" ".join(words[:PROMPT_WORDS]) for words in long_enough]
    about = {
        **provenance.columns(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arguments": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "load_average": os.getloadavg(),
        "clusterer": router.name,
    }
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        site = Site(options.base_port, router, work)
        tables = {}
        if "relay" in options.parts:
            tables["relay"] = relays(options, site, prompts, work)
        if "classify" in options.parts:
            tables["classify"] = classification(router, texts, profile.seed)
        if "memory" in options.parts:
            tables["memory"] = memory(site)

    options.out.mkdir(parents=True, exist_ok=True)
    pd.set_option("display.width", 250, "display.max_columns", None, "display.max_rows", None)
    for name, table in tables.items():
        table.to_csv(options.out / f"gateway-{name}.csv", index=False)
        shown = medians(table) if name == "relay" else table
        print(f"\n{name}\n{shown.to_string(index=False, float_format='{:.2f}'.format)}")
        for note in table.get("note", pd.Series(dtype=str)).dropna().unique():
            print(f"  {note}" * bool(note))
    (options.out / "gateway.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
