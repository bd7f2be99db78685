"""Fit the harness of ``simulated-harness`` to the claims that it was fitted to; write every try to ``data``.

Ten minutes on 2 cores.

.venv/bin/python scripts/fit_harness.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a Python without erlib finds it there, and is told more

from erlib import cache, config, paths
from erlib.claims import harness_fit
from erlib.machine import processes


def main() -> int:
    argparse.ArgumentParser(prog="scripts/fit_harness.py", description=__doc__).parse_args()
    processes.end_on_signals()
    profile = config.load_profile("dgx-h100")
    for paper in harness_fit.GRID:
        table = harness_fit.fit(profile, paper)
        file = paths.FACTS / f"harness_fit_{paper}.csv"
        with cache.writing(file) as partial:
            table.to_csv(partial, index=False)
        best = table[table["held"] == table["held"].max()]
        (used,) = table.loc[table["chosen"], "held"]
        claims = len(harness_fit.fitted_claims(paper))
        print(f"{file}: of {claims} claims at most {best['held'].iloc[0]} hold, {used} with the harness that is used")
        print(f"  {len(best)} of {len(table)} harnesses make as many hold:")
        for field in harness_fit.GRID[paper]:
            print(f"  {field}: {', '.join(f'{value:g}' for value in sorted(best[field].unique()))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
