"""Published records give the same figures and verdicts, and are refused in one line where they could not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest

from erlib import config, paths
from erlib.claims import evidence, publication, verdicts
from erlib.load import metrics, published, records
from erlib.report import figures, input_tokens, paper1
from tests.support import synthetic

matplotlib.use("agg")


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    small = {"paper1.users": [1, 8, 16], "paper1.repeats": 2, "paper2.configs": ["p2.C", "p2.E"], "paper2.users": [8]}
    return config.load_profile("laptop", small)


@pytest.fixture(scope="module")
def runs(profile: config.Profile) -> pd.DataFrame:
    load = [row for paper in ("p1", "p2") for row in synthetic.load_rows(profile, paper)]
    return synthetic.frame([*load, *synthetic.preliminary_rows(profile)])


@pytest.fixture(scope="module")
def sources(runs: pd.DataFrame) -> dict[str, Any]:
    return {"measured": runs, "simulated-hardware": runs.assign(source="simulated-hardware")}


@pytest.fixture(scope="module")
def reference(
    profile: config.Profile, sources: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The records as they are published, of one measured and one simulated source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "REFERENCE", tmp_path_factory.mktemp("reference"))
        published.write(profile, publication.tables(sources, profile))
        yield paths.REFERENCE


@pytest.fixture(autouse=True)
def home(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of them, to be damaged."""
    monkeypatch.setattr(paths, "REFERENCE", shutil.copytree(reference, tmp_path / "reference"))
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")


def reader(profile: config.Profile) -> config.Profile:
    return profile.model_copy(update={"records": "published"})


def test_measured_records_come_back_whole(profile: config.Profile, runs: pd.DataFrame) -> None:
    back = published.load_records(reader(profile), "p1")
    mine = runs[(runs["paper"] == "p1") & (runs["experiment"] == "load")].reset_index(drop=True)
    pd.testing.assert_frame_equal(back, mine)
    assert set(published.preliminary_records(reader(profile))["experiment"]) == {"preliminary"}


def test_a_figure_is_the_same_byte_for_byte(profile: config.Profile, runs: pd.DataFrame, tmp_path: Path) -> None:
    drawn = []
    for who, source in ((profile, runs), (reader(profile), published.load_records(reader(profile), "p1"))):
        paper1.paper1_p99_response_time(source[source["paper"] == "p1"], who)
        file = tmp_path / "figures" / "laptop" / "measured" / "paper1" / "fig07_p99_response_time"
        drawn.append(file.with_suffix(".csv").read_bytes())
    assert drawn[0] == drawn[1]
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["command"] == "./run_all.sh --profile laptop --records published --only 08_figures_paper1"


def test_verdicts_are_the_same(profile: config.Profile, sources: dict[str, Any]) -> None:
    own = verdicts.evaluate(sources, profile)
    again = verdicts.evaluate(verdicts.read_sources(reader(profile)), reader(profile))
    pd.testing.assert_frame_equal(again, own)


@pytest.mark.skipif(
    not (paths.ROOT / "figures" / "laptop" / "records").exists(), reason="the reference run has published no records"
)
def test_the_committed_records_give_the_committed_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "REFERENCE", paths.ROOT / "figures")
    laptop = reader(config.load_profile("laptop"))
    published.check(laptop)
    load = [published.load_records(laptop, paper) for paper in ("p1", "p2")]
    measured = pd.concat([*load, published.preliminary_records(laptop)], ignore_index=True)
    figures.load_figures(measured, laptop, metrics.summarise(measured))
    input_tokens.paper2_input_tokens(published.input_lengths(laptop), laptop)
    drawn = sorted((tmp_path / "figures").rglob("*.csv"))
    assert len(drawn) == 14
    for file in drawn:
        committed = paths.ROOT / "figures" / file.relative_to(tmp_path / "figures")
        assert file.read_bytes() == committed.read_bytes(), f"{committed} is not what its records say"


def test_a_changed_file_is_refused_in_one_line(profile: config.Profile) -> None:
    file = published.folder(profile) / "measured.parquet"
    records.write(synthetic.point("p1", "load", "p1.A", 1, 0), file)
    refused(profile, r"measured\.parquet is not what was published \(wrong sha256\): git checkout \S+")


def test_a_missing_file_is_refused(profile: config.Profile) -> None:
    (published.folder(profile) / "simulated-hardware-points.parquet").unlink()
    refused(profile, r"simulated-hardware-points\.parquet is not published")


def test_another_schema_is_refused(profile: config.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SCHEMA", records.SCHEMA.remove(records.SCHEMA.get_field_index("client")))
    refused(profile, r"measured\.parquet has another schema than this version of erlib reads")


def test_verdicts_on_other_metrics_are_refused(profile: config.Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "POINTS", "another meaning")
    with pytest.raises(config.ConfigError, match=r"simulated-hardware-points\.parquet has another schema"):
        verdicts.read_sources(reader(profile))


@pytest.mark.parametrize("content", [None, "", "{"])
def test_no_manifest_is_no_publication(profile: config.Profile, content: str | None) -> None:
    manifest = published.folder(profile) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    refused(profile, r"no published records|manifest\.json is damaged")


def refused(profile: config.Profile, why: str) -> None:
    with pytest.raises(config.ConfigError, match=why) as found:
        published.check(reader(profile))
    assert "\n" not in str(found.value)


def test_a_summary_holds_no_timestamps_of_tokens(profile: config.Profile, runs: pd.DataFrame) -> None:
    assert "token_ns" not in evidence.summarise("measured", runs, profile).requests
    for file in published.folder(profile).glob("simulated-*"):
        assert not re.search("token_ns", str(published.read(profile, file.stem).schema))
