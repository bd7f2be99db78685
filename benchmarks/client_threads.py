"""What does a client with a thread per user pay for a streamed token? Both papers' users, in front of a free engine.

Both papers have a thread for each of up to a thousand users (section IV), which in Python share one interpreter.
Whatever servers and gateways could do, such a client takes tokens no faster than its callbacks run. How fast is that?

If it was what the papers' numbers come from, then, whatever the engines:

1. it takes about as many tokens per second for 100 users as for 1,000, and not more with more users;
2. these are of the size of paper 1's 200 to 2,000 tokens per second;
3. a second core helps little, because callbacks wait for one another.

It is refuted as an explanation if it takes more than twice 2,000 tokens per second (taking it that no core of the
papers' machine is half as fast as this one), or ever more with more users. It cannot explain a difference between two
systems at the same number of running requests.

The client is the workbench's own (:mod:`erlib.load.threaded_users`, with a stream of ``tritonclient`` for each user).
In servers' and gateways' place stands :mod:`benchmarks.paced`, which sends every answer at such a pace that all users
together are offered :data:`OFFERED_TOKENS_PER_S`, more than the client can take. What it has not taken waits in the
streams' buffers, as it would there. The engine has the first core; the client has the last one, or the last two. Rows
that are in the file already are not measured again.

    python -m benchmarks.client_threads [--rounds N] [--users N ...] [--cores N ...] [--file FILE]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.cpu import bound
from benchmarks.gateway import Engine
from erlib import cache, config, paths, provenance
from erlib.engines import checkpoint
from erlib.load.users import Observation, Script, UserSimulator
from erlib.machine import processes
from erlib.serving import wire

USERS = (1, 50, 100, 200, 400, 600, 800, 1000)
OFFERED_TOKENS_PER_S = 20_000
TOKENS = 30_000
"""Of all answers of a point together, unless that is less than :data:`LEAST_TOKENS` of each."""
LEAST_TOKENS = 60
PROMPT = "word " * 335  # as long as the papers' base prompts
ANSWER_TIMEOUT_S = 300
BASE_PORT = 26500


def point(client: UserSimulator, engine: Engine, target: str, users: int) -> dict[str, float]:
    """Let all users ask at once; what their client took until each had its answer."""
    tokens = max(LEAST_TOKENS, TOKENS // users)
    scripts = [Script(user, 0, 0, PROMPT, tokens, wire.NEVER_STOP, 0, None) for user in range(users)]
    engine.report(users / OFFERED_TOKENS_PER_S)
    seen = client.run(scripts, [target], ANSWER_TIMEOUT_S)
    late_ms = engine.report()["late_p50_ms"]
    return {"answer_tokens": tokens, "engine_late_p50_ms": late_ms, **_taken(seen)}


def _taken(seen: Observation) -> dict[str, float]:
    """What a token cost a client, its part of the requests included; and how long it took until all were sent."""
    if failed := [answer.status for answer in seen.answers if answer.status != "ok"]:
        raise processes.StartError(f"{len(failed)} of {len(seen.answers)} requests failed: {failed[0]}")
    sent_s = np.array([answer.t_send_ns for answer in seen.answers]) * 1e-9
    taken = sum(len(answer.token_ns) for answer in seen.answers)
    spent_s = seen.cpu_cores * (max(answer.t_last_ns for answer in seen.answers) * 1e-9 - sent_s.min())
    return {
        "us_per_token": 1e6 * spent_s / taken,
        "busy_cores": seen.cpu_cores,
        "sending_us_per_request": 1e6 * (sent_s.max() - sent_s.min()) / len(sent_s),
    }


def measure(users: Sequence[int], cores: Sequence[int], work: Path, tokenizer: Path) -> list[dict[str, float]]:
    """A client bound to `cores`, and an engine on the first one; a row for each of `users`."""
    port = BASE_PORT
    with bound({0}):
        engine = Engine((port, port + 1), work / "engine.log")
    try:
        with bound(set(cores)), UserSimulator(tokenizer, 1, work / "client.log", client="threads") as client:
            return [{"users": n, "cores": len(cores), **point(client, engine, f"127.0.0.1:{port}", n)} for n in users]
    finally:
        processes.stop([engine.process], 2)


def main() -> None:
    """Measure what is missing in the file, print each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--cores", type=int, nargs="+", choices=(1, 2), default=(1, 2), help="of the client")
    parser.add_argument("--file", type=Path, default=paths.RUNS / "benchmarks" / "client_threads.csv")
    options = parser.parse_args()
    processes.end_on_signals()

    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2 or available[0] != 0:
        parser.error(f"the engine takes the first core, the client another; this process may use {available} only")
    tokenizer = checkpoint.checkpoint(config.load_profile("laptop").engines) / "tokenizer.json"
    about = provenance.columns()
    rows = pd.read_csv(options.file).to_dict("records") if options.file.exists() else []
    known = {(row["users"], row["cores"], row["round"]) for row in rows}
    series = [(n, available[-cores:]) for n in range(options.rounds) for cores in options.cores]
    with tqdm(total=len(series) * len(options.users), unit="point") as progress:
        for n, cores in series:
            for users in options.users:
                if (users, len(cores), n) not in known:
                    with tempfile.TemporaryDirectory(prefix="client-threads-") as work:
                        (row,) = measure([users], cores, Path(work), tokenizer)
                    tqdm.write("  ".join(f"{what} {value:.4g}" for what, value in row.items()))
                    rows.append({"round": n, **row, **about})
                    with cache.writing(options.file) as partial:
                        pd.DataFrame(rows).to_csv(partial, index=False)
                progress.update()


if __name__ == "__main__":
    main()
