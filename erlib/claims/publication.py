"""What verdicts need of each source, published: measured records whole, those of the papers' own scale summarised."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from erlib import cache
from erlib.claims import evidence
from erlib.claims.evidence import Records, Summary
from erlib.config import Profile
from erlib.load import metrics, published
from erlib.load.published import Published

_WITHOUT = ("token_ns",)
"""What summarised requests lack of a record; latencies are computed again."""
POINTS = cache.digest([*metrics.POINT, "turn", "metric", "value"], sorted(evidence.LABELS))
"""A summary that was made before a metric was added says nothing of it: it is of another schema."""


def tables(sources: Mapping[str, Records], profile: Profile) -> dict[str, Published]:
    """Tables to publish of what :func:`erlib.claims.verdicts.read_sources` returned."""
    found = {}
    for source, records in sources.items():
        if source == published.MEASURED:
            assert isinstance(records, pd.DataFrame), "measured records are published whole"
            found[source] = published.of_records(records)
            continue
        summary = evidence.summarise(source, records, profile)
        requests = published.of_records(summary.requests.drop(columns=metrics.LATENCIES), without=_WITHOUT)
        found[f"{source}-requests"] = requests
        found[f"{source}-curves"] = published.of_frame(summary.curves)
        found[f"{source}-points"] = published.of_frame(summary.points)._replace(schema=POINTS)
    return found


def read(profile: Profile) -> dict[str, pd.DataFrame | Summary]:
    """Published evidence by source, for :func:`erlib.claims.verdicts.evaluate`; ConfigError where it is refused."""
    found: dict[str, pd.DataFrame | Summary] = {published.MEASURED: published.measured(profile)}
    meaning = dict(zip(Summary._fields, (published.schema_of_records(_WITHOUT), None, POINTS), strict=True))
    for source in (name.removesuffix("-points") for name in published.names(profile) if name.endswith("-points")):
        requests, curves, points = (
            published.read(profile, f"{source}-{part}", schema).to_pandas() for part, schema in meaning.items()
        )
        found[source] = Summary(metrics.latencies(requests), curves, points)
    return found
