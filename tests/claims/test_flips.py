"""Which unknown flips which conclusion: judged as the scorecard judges, kept, and drawn."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from erlib import config, paths
from erlib.claims import flips, verdicts
from erlib.paper_scale import setups
from erlib.report import canvas
from erlib.report.own import sensitivity


def test_headlines_are_claims_that_records_decide() -> None:
    known = {claim.id: claim for claim in verdicts.load()}
    assert set(flips.HEADLINES) <= set(known)
    assert not any(known[name].untestable or known[name].ambiguous for name in flips.HEADLINES)


def test_a_verdict_flips_where_the_numbers_do_and_is_kept_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With INT4 kernels that take hardly any time, E no longer streams fastest; sigma does not concern paper 1."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    faster = setups.UNKNOWNS["weight_only"]._replace(values=(0.05, 1))
    monkeypatch.setitem(setups.UNKNOWNS, "weight_only", faster)
    narrower = setups.UNKNOWNS["sigma"]._replace(values=(0.5, 2))
    monkeypatch.setitem(setups.UNKNOWNS, "sigma", narrower)
    profile = config.load_profile("smoke", {"sensitivity.unknowns": ["weight_only", "sigma"]})
    table = flips.sensitivity(profile)
    tpot = table[(table["id"] == "P2-R13") & (table["unknown"] == "weight_only")].set_index("value")
    assert tpot["verdict"].to_dict() == {0.05: "fails", 1: "holds"}
    assert tpot["flips"].to_dict() == {0.05: True, 1: False}
    assert tpot["default"].to_dict() == {0.05: False, 1: True}
    assert "p2.D" in tpot.loc[0.05, "numbers"]
    assert set(table.loc[table["unknown"] == "sigma", "id"].str[:2]) == {"P2"}
    stands = flips.robust(table)
    assert stands.loc["P2-R13", ["weight_only", "sigma", "slots"]].tolist() == ["0.05 fails", "all", ""]
    assert stands.loc["P1-R18", ["weight_only", "sigma"]].tolist() == ["all", ""]

    monkeypatch.setattr(setups, "simulated", None)
    pd.testing.assert_frame_equal(flips.sensitivity(profile), table)

    canvas.style()
    sensitivity.flipped_verdicts(table, profile)
    written = tmp_path / "figures" / "smoke" / "simulated-hardware" / "workbench"
    assert len(pd.read_csv(written / "sensitivity.csv")) == len(table)
    assert (written / "sensitivity.png").stat().st_size > 10_000
