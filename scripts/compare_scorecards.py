"""What differs between the scorecards of two runs (``figures/<profile>/scorecard.csv``), of two seeds or machines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a Python without erlib finds it there, and is told more

import pandas as pd

from erlib.claims import scorecards


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/compare_scorecards.py", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE.csv")
    parser.add_argument("after", type=Path, metavar="AFTER.csv")
    args = parser.parse_args()
    try:
        before, after = (_read(path) for path in (args.before, args.after))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    differ = scorecards.changed(before, after)
    for source, rows in after.groupby("source", sort=False):
        known = rows["id"].isin(before.loc[before["source"] == source, "id"]).sum()
        mine = differ[differ["source"] == source]
        print(f"{source}: {len(mine)} of {known} verdicts differ, {mine['turned'].sum()} from holds to fails or back")
        for row in mine.itertuples():
            print(f"  {row.id}: {row.before} -> {row.after}. {row.claim}")
    return 0


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except ValueError:  # no csv, or none in UTF-8
        table = pd.DataFrame()
    if not {"id", "source", "verdict", "claim"} <= set(table.columns):
        raise ValueError(f"{path} is no scorecard: take a scorecard.csv from below figures/")
    return table


if __name__ == "__main__":
    sys.exit(main())
