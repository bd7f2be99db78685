"""What is routing to trained experts worth with more training, a riper seed, more experts, or another router?

Notebook 11 answers for one budget and one seed. Here every cell of a grid is trained and judged as there, with draws of
its own (held-out samples, clusters, order, first weights): intervals of notebook 11 are over texts, these rows are over
trainings. Meant for a GPU, on which some cells run at a time; two cores take ten minutes for a cell of 1,024 tokens
and twenty for one of 4,096 (docs/experts.md).

    python -m benchmarks.experts_by_budget --out FILE.csv [--workers 8] [--set experts.batch=2 ...]
        [--cells SEED_TOKENS:TOKENS[:CLUSTERS] ...] [--routers classify embeddings neighbours topics] [--seeds 0 1 2]

Each cell's rows are written when it is done; whoever interrupts it finds again what had been trained.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
import pandas as pd

from erlib import cache, config, experts
from erlib.config import ConfigError
from erlib.experts.tables import PROMPT
from erlib.experts.worth import best_on_own
from erlib.machine import processes

CELLS = ("8192:8192", "8192:32768", "131072:32768", "8192:65536", "131072:65536", "131072:8192")
BY_CLUSTERS = ("8192:65536:4", "8192:16384:16")
"""As many tokens in all as eight experts of 32,768 have."""


class Cell(NamedTuple):
    """One training of all arms."""

    seed: int
    seed_tokens: int
    tokens: int
    clusters: int
    router: str

    @classmethod
    def read(cls, text: str, router: str, seed: int) -> Cell:
        """``SEED_TOKENS:TOKENS`` or ``SEED_TOKENS:TOKENS:CLUSTERS``."""
        try:
            seed_tokens, tokens, *clusters = map(int, text.split(":"))
            (k,) = clusters or [8]
        except ValueError:
            raise ConfigError(f"a cell is SEED_TOKENS:TOKENS or SEED_TOKENS:TOKENS:CLUSTERS, not {text!r}") from None
        return cls(seed, seed_tokens, tokens, k, router)


def rows(cell: Cell, profile_name: str, overrides: dict[str, object]) -> pd.DataFrame:
    """Train and judge one cell.

    Returns
    -------
    DataFrame
        The columns of :func:`erlib.experts.compare`, for all tokens (``after`` 0) and those that answer a prompt of 32,
        and the cell's; ``best_on_own``, on how many clusters their own expert is the best; ``train_s``, of all arms.
    """
    of_cell = {
        "experts.seed_tokens": cell.seed_tokens,
        "experts.tokens": cell.tokens,
        "experts.router": cell.router,
        "clusterer.n_clusters": cell.clusters,
        "seed": cell.seed,
    }
    profile = config.load_profile(profile_name, {**overrides, **of_cell})
    judged = experts.judged(profile)
    found = []
    for after in (0, PROMPT):
        table = experts.compare(judged, profile.experts.temperature, cell.seed, after)
        found.append(table.assign(after=after))
    facts = {
        "best_on_own": best_on_own(experts.matrix(judged)),
        "train_s": judged.training["train_s"].sum(),
        "dtype": judged.training["dtype"].iloc[0],
        "machine": judged.training["machine"].iloc[0],
    }
    return pd.concat(found).assign(**cell._asdict(), **facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--cells", nargs="+", default=[*CELLS, *BY_CLUSTERS])
    parser.add_argument("--routers", nargs="+", default=["classify"], help="values of experts.router")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    options = parser.parse_args()
    begun_s = time.monotonic()
    try:
        overrides = config.read_overrides(options.set)
        for router in options.routers:
            config.load_profile(options.profile, {**overrides, "experts.router": router})
        cells = [Cell.read(*each) for each in itertools.product(options.cells, options.routers, options.seeds)]
    except ConfigError as error:
        parser.error(str(error))
    done: list[pd.DataFrame] = []
    with processes.pool(options.workers) as pool:
        jobs = {pool.submit(rows, cell, options.profile, overrides): cell for cell in cells}
        for job in concurrent.futures.as_completed(jobs):
            done.append(job.result())
            with cache.writing(options.out) as partial:
                pd.concat(done).round(5).to_csv(partial, index=False)
            print(f"{time.monotonic() - begun_s:5.0f} s: {jobs[job]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
