"""The fitted harness: how its numbers come about, and how far they are determined."""

import pandas as pd
import pytest

from erlib import config, paths
from erlib.claims import harness_fit, verdicts
from erlib.paper_scale import presets


def test_the_search_tells_a_harness_that_fits_from_one_that_does_not():
    profile = config.load_profile("dgx-h100")
    table = harness_fit.fit(profile, "p2", {"gateway_streams": [48, 1000]}).set_index("gateway_streams")
    assert table.loc[48, "held"] == 3 > table.loc[1000, "held"]
    assert table["chosen"].to_dict() == {48: True, 1000: False}
    claims = [claim.id for claim in harness_fit.fitted_claims("p2")]
    assert set(table.loc[48, claims]) == {verdicts.FITTED}
    assert verdicts.FAILS in set(table.loc[1000, claims])


@pytest.mark.parametrize("paper", ["p1", "p2"])
def test_the_committed_fit_is_of_the_harness_that_is_used(paper):
    table = pd.read_csv(paths.FACTS / f"harness_fit_{paper}.csv")
    (chosen,) = table[table["chosen"]].to_dict("records")
    claims = [claim.id for claim in harness_fit.fitted_claims(paper)]
    assert (table["held"] == (table[claims] == verdicts.FITTED).sum(axis=1)).all()
    used = presets.HARNESS[paper]
    assert all(chosen[field] == getattr(used, field) for field in harness_fit.GRID[paper])
