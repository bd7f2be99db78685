"""What two runs say of intervals: of runs whose spread lies between repeats, not between users."""

import numpy as np
import pandas as pd

from benchmarks import intervals


def run(seed, slower=1.0):
    """Latencies of eight systems, each repeat of which is as a whole faster or slower by some 20 %."""
    rng = np.random.default_rng(seed)
    rows = []
    for name in "ABCDEFGH":
        for repeat in range(3):
            seconds = slower * np.exp(rng.normal(0, 0.2)) * np.exp(rng.normal(0, 0.05, 20))
            point = {"paper": "p1", "config": f"p1.{name}", "mix": "uniform", "users": 20, "repeat": repeat}
            rows.append(
                pd.DataFrame({"ttft_s": seconds, "tpot_s": seconds / 10, "response_s": 2 * seconds}).assign(**point)
            )
    return pd.concat(rows, ignore_index=True)


def test_students_intervals_cover_what_differs_between_repeats_and_those_of_users_do_not(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 50)
    tables = [intervals.covered(run(2 * n), run(2 * n + 1)) for n in range(3)]
    share = sum(table[["student", "repeats and users", "users"]] for table in tables) / len(tables)
    points = tables[0].xs("TTFT, mean", level="metric")["points"]
    assert points.to_dict() == {"as it is": 8, "to the baseline": 7}
    assert (share["student"] > 0.85).all()
    assert (share["users"] < 0.5).all()
    assert (share["repeats and users"] < share["student"]).all()


def test_ratios_do_not_see_that_a_machine_is_slower(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 2)
    share = intervals.covered(run(0), run(1, slower=3))["student"]
    assert (share["as it is"] == 0).all()
    assert (share["to the baseline"] > 0.7).all()
