"""Hold step times that scripts/measure_step_times.py measured against the table of H100 step times, entry by entry.

    python scripts/compare_step_times.py data/h100_pytorch_step_times.csv
    python scripts/compare_step_times.py steps.csv --simulate p2.E --entries entries.csv

Prints, for each model and part, measured over table; whether the parts of a step add up to a step measured as a whole;
and what a configuration's users would see with either. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import erlib  # noqa: F401  (says what to do where this Python lacks the packages)

# isort: split
from erlib import config
from erlib.paper_scale import measured_steps
from erlib.paper_scale.steptimes import OutOfRange

USERS = [1, 10, 50, 100, 200, 500, 1000]


def main() -> None:
    """Print three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV of scripts/measure_step_times.py")
    parser.add_argument("--simulate", nargs="*", default=["p2.E", "p1.C"], metavar="CONFIG", help="p2.E p1.C")
    parser.add_argument("--users", nargs="+", type=int, default=USERS)
    parser.add_argument("--entries", type=Path, help="write every entry beside the table's to this CSV file")
    options = parser.parse_args()
    try:
        entries = measured_steps.entry_by_entry(options.table)
        form = ["model", "dtype", "tensor_parallel"]
        print("measured over table:")
        print(measured_steps.spread(entries, [*form, "part"]).round(3).to_string(index=False))
        sums = measured_steps.sums_beside_whole_steps(options.table)
        print("\nsum of a step's parts over the same step measured as a whole:")
        print(measured_steps.spread(sums, [*form, "turn"]).round(3).to_string(index=False))
        twice = measured_steps.measured_twice(options.table) - 1
        if len(twice):
            share = (twice > 0.06).mean()
            print(f"\n{len(twice)} points measured twice: {twice.median():.1%} apart (median), {share:.0%} over 6 %")
        if options.entries:
            entries.round(5).to_csv(options.entries, index=False)
        profile = config.load_profile("dgx-h100")
        for name in options.simulate:
            table = measured_steps.simulated_from(name, options.table, profile, options.users)
            print(f"\n{name}, simulated from both:\n{table.round(4).to_string(index=False)}")
    except (OSError, ValueError, OutOfRange) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
