"""All figures of the load experiments, of both papers."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from erlib import config
from erlib.report.over_users import Turn
from erlib.report.paper1 import (
    paper1_bucket_throughput,
    paper1_p99_response_time,
    paper1_session_throughput,
    paper1_tpot,
    paper1_ttft,
    paper1_user_throughput,
)
from erlib.report.paper2 import (
    paper2_preliminary,
    paper2_system_throughput,
    paper2_tpot,
    paper2_ttft,
    paper2_user_throughput_p99,
)


def load_figures(records: pd.DataFrame, profile: config.Profile, summary: pd.DataFrame) -> list[Figure]:
    """All figures of both papers' load experiments and of the preliminary one, whatever source the records have.

    Parameters
    ----------
    records : DataFrame
    profile : Profile
    summary : DataFrame
        Of the same records (:func:`erlib.load.metrics.summarise`), so that figures need not compute it one by one.
    """
    p1, p2 = (records[records["paper"] == paper] for paper in ("p1", "p2"))
    turns: list[Turn] = ["base", "continuation"]
    drawn = [draw(p1, profile, turn, summary) for draw in (paper1_ttft, paper1_tpot) for turn in turns]
    rest1 = (paper1_user_throughput, paper1_p99_response_time, paper1_session_throughput)
    rest2 = [paper2_ttft, paper2_tpot, paper2_user_throughput_p99]
    if not records["source"].eq("simulated-harness").all():  # baselines alone, which no harness touches
        rest2.insert(0, paper2_preliminary)
    drawn += [draw(p1, profile, summary) for draw in rest1] + [paper1_bucket_throughput(p1, profile)]
    return [*drawn, *(draw(p2, profile, summary) for draw in rest2), paper2_system_throughput(p2, profile)]
