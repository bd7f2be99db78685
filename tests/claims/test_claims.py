"""Every claim gets a verdict, and a claim of each kind fails when the records say otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from erlib import config, paths
from erlib.claims import evidence, explained, scorecards, verdicts
from erlib.claims.verdicts import AMBIGUOUS, CONSTRUCTION, FAILS, FITTED, HOLDS, NOT_RUN, UNTOLD
from erlib.load import experiments, metrics, records, sweep
from tests.support import synthetic

IDS = [f"P1-S{i:02d}" for i in range(1, 23)] + [f"P1-R{i:02d}" for i in range(1, 33)]
IDS += [f"P2-S{i:02d}" for i in range(1, 17)] + [f"P2-R{i:02d}" for i in range(1, 32)] + ["X1", "X2", "X3"]


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    levels = {"paper1.users": [1, 8, 16, 32], "paper2.users": [1, 8, 16, 32]}
    scale = {"scale.users": 31.25, "scale.input_tokens": 24}
    return config.load_profile("laptop", {**levels, **scale, "paper2.repeats": 2})


@pytest.fixture(scope="module")
def runs(profile: config.Profile) -> pd.DataFrame:
    load = [row for paper in ("p1", "p2") for row in synthetic.load_rows(profile, paper)]
    return synthetic.frame([*load, *synthetic.preliminary_rows(profile)])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    return tmp_path / "figures"


def stretched(runs: pd.DataFrame, factor: float, *, first: bool = True, **where: object) -> pd.DataFrame:
    """The same records with some answers slower or faster: all of each answer, or only what follows its first token."""
    rows = np.logical_and.reduce([runs[name] == value for name, value in where.items()])
    assert rows.any()
    result = runs.copy()
    start = runs["t_send_ns"] if first else runs["t_first_ns"]
    for name in ("t_first_ns", "t_last_ns") if first else ("t_last_ns",):
        result.loc[rows, name] = (start + (runs[name] - start) * factor)[rows].astype("int64")
    result.loc[rows, "token_ns"] = pd.Series(
        {i: (start[i] + (runs.at[i, "token_ns"] - start[i]) * factor).astype("int64") for i in runs.index[rows]}
    )
    return result


def at_full_scale(runs: pd.DataFrame) -> pd.DataFrame:
    """The same records under the papers' own numbers of users."""
    return runs.assign(users=runs["users"].replace({8: 200, 16: 500, 32: 1000}))


def row(name: str, runs: pd.DataFrame, profile: config.Profile, source: str = "measured") -> verdicts.Row:
    claim = next(claim for claim in verdicts.load() if claim.id == name)
    return verdicts.judge(claim, None if claim.by_arithmetic else _evidence(source, runs, profile))


_SEEN: dict[tuple[str, int], tuple[pd.DataFrame, evidence.Evidence]] = {}


def _evidence(source: str, runs: pd.DataFrame, profile: config.Profile) -> evidence.Evidence:
    """Summarised once, which takes seconds; the frame is kept, so that no other one gets its id."""
    key = (source, id(runs))
    if key not in _SEEN:
        _SEEN[key] = runs, evidence.Evidence(source, runs, profile)
    return _SEEN[key][1]


# --- completeness -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorecard(runs: pd.DataFrame, profile: config.Profile, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "FIGURES", tmp_path_factory.mktemp("none"))
        return verdicts.evaluate({"measured": runs, "emulated": runs}, profile)


def test_every_claim_has_one_verdict_per_source_with_numbers_or_a_reason(scorecard):
    assert list(scorecard["id"].unique()) == IDS
    assert set(scorecard["verdict"]) <= set(verdicts.VERDICTS)
    assert (scorecard["numbers"] != "").all()
    for name, rows in scorecard.groupby("id"):
        assert sorted(rows["source"]) in (["arithmetic"], ["emulated", "measured"]), name
    assert set(scorecard.loc[scorecard["verdict"] == HOLDS, "type"]) >= {"arith", "ord", "shape"}
    assert set(scorecard.loc[scorecard["verdict"] == FAILS, "type"]) >= {"arith", "ord", "shape"}
    tested = scorecard[scorecard["verdict"].isin([HOLDS, FAILS])]
    assert (tested["criterion"] != "").all()


def test_known_contradictions_have_their_own_list(scorecard):
    found = verdicts.inconsistencies(scorecard)
    assert {"P1-S06", "P1-S09", "P1-S17", "P1-R32", "P2-S06", "P2-S16", "X1", "X2", "X3"} <= set(found["id"])
    assert found["id"].is_unique


def test_arithmetic_agrees_with_the_papers_where_it_should_and_not_where_it_should_not(scorecard):
    rows = scorecard[scorecard["source"] != "emulated"].set_index("id")
    verdicts = rows["verdict"]
    assert [
        name for name in ("P1-S02", "P1-S03", "P1-S04", "P1-S05", "P1-S07", "P1-S08") if verdicts[name] != HOLDS
    ] == []
    assert [name for name in ("P2-S02", "P2-S04", "P2-S05", "P2-S07", "P2-S08") if verdicts[name] != HOLDS] == []
    assert [name for name in ("P1-S06", "P1-S09", "P1-S18", "P2-S06") if verdicts[name] != FAILS] == []
    assert verdicts["P2-S03"] == AMBIGUOUS and "as read here: holds" in rows.at["P2-S03", "numbers"]
    assert "528.1" in rows.at["P1-S09", "numbers"]
    assert "65,917" in rows.at["P1-S06", "numbers"]


# --- each kind can fail ---------------------------------------------------------------------------------------------


def test_an_ordering_turns_with_the_records(runs, profile):
    slow_baseline = stretched(runs, 50, config="p1.A")
    assert row("P1-R18", slow_baseline, profile).verdict == HOLDS
    one_slow_expert = stretched(slow_baseline, 5000, config="p1.C", users=16)
    failed = row("P1-R18", one_slow_expert, profile)
    assert failed.verdict == FAILS
    assert "p1.C" in failed.numbers and "16 users (papers: 500)" in failed.numbers
    assert row("P1-R18", stretched(slow_baseline, 5000, config="p1.C", users=32), profile).verdict == HOLDS  # 1,000


def test_a_shape_turns_with_the_records(runs, profile):
    assert row("P1-R17", runs, profile).verdict == HOLDS  # user throughput falls with users
    assert row("P1-R17", stretched(runs, 1000, config="p1.B", users=1), profile).verdict == FAILS
    flat = runs
    for level in (1, 8, 16, 32):
        for name in ("p1.B", "p1.C", "p1.D"):
            gaps = runs[(runs["config"] == name) & (runs["users"] == level)]
            tpot_s = ((gaps["t_last_ns"] - gaps["t_first_ns"]) / (gaps["output_tokens"] - 1)).mean() * 1e-9
            flat = stretched(flat, 0.1 / tpot_s, first=False, config=name, users=level)
    assert row("P1-R12", flat, profile, "emulated").verdict == HOLDS  # 0.1 s at any number of users
    assert row("P1-R12", stretched(flat, 3, first=False, config="p1.D", users=32), profile).verdict == FAILS


def test_arithmetic_on_records_and_on_print_turns(runs, profile):
    assert row("P1-S13", runs, profile).verdict == row("P1-S22", runs, profile).verdict == CONSTRUCTION
    cut = runs.copy()
    cut.at[0, "token_ns"] = cut.at[0, "token_ns"][:2]
    cut.loc[0, ["output_tokens", "t_last_ns"]] = [2, cut.at[0, "token_ns"][-1]]
    assert row("P1-S13", cut, profile).verdict == row("P1-S22", cut, profile).verdict == FAILS
    claim = next(claim for claim in verdicts.load() if claim.id == "P1-S05")
    wrong = {"computes_to": {"quantity": "kv_tokens", "printed": {"p1.B": 80000}, "tolerance": 0.03}}
    assert verdicts.judge(claim, None).verdict == HOLDS
    assert verdicts.judge(claim.model_copy(update={"checks": [wrong]}), None).verdict == FAILS


def test_routing_claims_turn_with_the_gateways_spans(runs, profile):
    tenth = {name: runs[name] // 10 for name in runs if name.startswith("route_")}
    assert row("P1-R03", runs.assign(**tenth), profile).verdict == HOLDS
    slow = runs.assign(route_svd_ns=runs["route_svd_ns"] + 442_000_000)
    assert row("P1-R03", slow, profile).verdict == FAILS
    assert row("P1-R01", runs, profile).verdict == FAILS
    assert row("P1-R01", slow, profile).verdict == HOLDS
    assert row("P1-S16", runs, profile).verdict == CONSTRUCTION
    assert row("P1-S16", runs.assign(route_forward_ns=1), profile).verdict == FAILS


# --- honesty --------------------------------------------------------------------------------------------------------


def test_what_was_not_run_is_said_to_be_so(runs, profile):
    missing = row("P1-R18", runs[runs["config"] != "p1.C"], profile)
    assert missing.verdict == NOT_RUN
    assert "p1.C" in missing.numbers
    assert row("P1-R18", runs[runs["users"] != 8][lambda r: r["users"] != 16], profile).verdict == NOT_RUN
    assert row("P2-R05", runs[runs["experiment"] == "load"], profile).verdict == NOT_RUN
    assert row("P1-R30", runs, profile).verdict == NOT_RUN


def test_absolute_numbers_of_h100s_are_not_tested_on_a_laptop(runs, profile):
    assert row("P1-R10", runs, profile).verdict == NOT_RUN
    verdict, numbers, _ = row("P1-R10", at_full_scale(runs), profile, "emulated")
    assert verdict == FAILS
    assert "at 200 users" in numbers and "papers" not in numbers


def test_the_preliminary_experiment_is_judged_at_the_papers_scale(runs, profile):
    found = {claim.id: claim for claim in verdicts.load()}
    simulated = at_full_scale(runs[runs["experiment"] == "preliminary"])

    def judged(records):
        evidence_of = evidence.Evidence("simulated-hardware", records, profile)
        return {
            name: verdicts.judge(found[name], evidence_of)
            for name in ("P2-R04", "P2-R05", "P2-R06", "P2-R07", "P2-S12")
        }

    ahead = judged(stretched(simulated, 0.5, config="p2.fp8-tp8-bs200"))
    behind = judged(stretched(simulated, 3, config="p2.fp8-tp8-bs200"))
    assert ahead.pop("P2-S12").verdict == NOT_RUN
    assert all(row.verdict in (HOLDS, FAILS) for row in ahead.values())
    assert (ahead["P2-R05"].verdict, behind["P2-R05"].verdict) == (HOLDS, FAILS)
    assert "fp8-tp8 200" in ahead["P2-R07"].numbers
    assert "at 500 users" in behind["P2-R04"].numbers
    assert "users 1, 200, 500 on the papers' scale" in behind["P2-S12"].numbers


def test_inputs_of_a_simulation_do_not_confirm_it(runs, profile):
    assert row("P1-R01", at_full_scale(runs), profile, "simulated-harness").verdict == CONSTRUCTION
    assert row("P1-R01", at_full_scale(runs), profile, "emulated").verdict == FAILS


def test_a_router_that_classifies_nothing_says_nothing_of_classification(runs, profile):
    idle = runs[runs["route_kmeans_ns"] == 0]
    assert not idle.empty
    with_it, without = (row("P2-R03", frame, profile) for frame in (runs, runs.drop(idle.index)))
    assert with_it == without and "nan" not in with_it.numbers
    only = pd.concat([idle, runs[runs["route_kmeans_ns"].isna()]])
    assert row("P2-R03", only, profile).verdict == NOT_RUN


def test_slow_motion_makes_no_gateway_fast(runs, profile):
    for slow_motion, tested in ((1.0, True), (5.0, False)):
        emulated = at_full_scale(runs).assign(slow_motion=slow_motion)
        for name in ("P1-R01", "P1-R03"):
            assert (row(name, emulated, profile, "emulated").verdict != NOT_RUN) == tested
        assert row("P1-R04", emulated, profile, "emulated").verdict != NOT_RUN


def test_ambiguous_claims_stay_ambiguous_and_name_the_reading(runs, profile):
    verdict, numbers, _ = row("P1-S11", runs, profile)
    assert verdict == AMBIGUOUS
    assert "as read here: " in numbers and "336" in numbers


def test_a_conclusion_follows_the_claims_it_rests_on(runs, profile):
    assert row("P1-R27", runs, profile).numbers.startswith("P1-R15 ")
    unequal = stretched(runs, 100, config="p1.A")
    assert row("P1-R15", unequal, profile).verdict == row("P1-R27", unequal, profile).verdict == FAILS


def test_a_difference_within_the_spread_cannot_be_told(runs, profile):
    """Two systems whose repeats differ by more than they do; and what is far beyond that."""
    few = runs[runs["paper"] == "p1"].reset_index(drop=True)
    noisy = stretched(stretched(few, 3, config="p1.A", repeat=0), 5, config="p1.A", repeat=1)
    twin = noisy[noisy["config"] == "p1.A"].assign(config="p1.B")
    same = pd.concat([noisy[noisy["config"] != "p1.B"], twin], ignore_index=True)
    undecided = row("P1-R18", same, profile)
    assert undecided.verdict == UNTOLD and undecided.decision.open > 0 and "cannot be told" in undecided.numbers
    assert undecided.decision.closest.low < 1 < undecided.decision.closest.high
    assert row("P1-R18", stretched(same, 250, config="p1.B"), profile).verdict == FAILS


def test_a_class_has_borders_that_the_records_cross(runs, profile):
    """From fails over cannot be told to holds, as the baseline gets slower."""
    expert = runs[(runs["config"] == "p1.B") & (runs["paper"] == "p1")]
    alike = pd.concat([expert.assign(config=f"p1.{name}") for name in "ABCD"], ignore_index=True)
    factors = (0.001, 0.5, 0.9, 1.0, 1.1, 2, 1000)
    seen = [row("P1-R18", stretched(alike, factor, config="p1.A"), profile).verdict for factor in factors]
    order = [FAILS, UNTOLD, HOLDS]
    assert [order.index(verdict) for verdict in seen] == sorted(order.index(verdict) for verdict in seen)
    assert (seen[0], seen[3], seen[-1]) == (FAILS, UNTOLD, HOLDS)


def test_what_a_source_was_fitted_to_is_not_held_by_it(runs, profile):
    claim = next(claim for claim in verdicts.load() if claim.id == "P1-R12")
    lenient = claim.model_copy(update={"checks": [{"report": {"metric": "tpot_mean_s", "of": ["p1.B"], "users": 1}}]})
    simulated = at_full_scale(runs)
    for source, verdict in (("simulated-harness", FITTED), ("simulated-hardware", HOLDS)):
        assert verdicts.judge(lenient, _evidence(source, simulated, profile)).verdict == verdict
    never = claim.model_copy(
        update={"checks": [{"between": {"metric": "tpot_mean_s", "of": ["p1.B"], "users": 1, "low": 1e6}}]}
    )
    assert verdicts.judge(never, _evidence("simulated-harness", simulated, profile)).verdict == FAILS


def test_sources_without_records_and_damaged_claims_are_refused(runs, profile, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no records for source 'emulated'"):
        verdicts.evaluate({"emulated": runs[:0]}, profile)
    good = {"id": "P1-S01", "where": "I", "type": "ord", "claim": "x"}
    for entry, message in [
        ({**good, "checks": [{"belo": {}}]}, "did you mean 'below'"),
        ({**good, "checks": [{"below": {"metric": "ttft_mean_s"}}]}, "missing a required"),
        ({**good}, "give checks, or why"),
        ({**good, "untestable": "y", "also": ["X1"]}, "one of checks"),
        ({**good, "also": ["X9"]}, "exactly one claim 'X9'"),
    ]:
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump([entry]))
        monkeypatch.setattr(paths, "FACTS", tmp_path)
        verdicts.load.cache_clear()
        with pytest.raises(config.ConfigError, match=message):
            verdicts.load()
    verdicts.load.cache_clear()


def test_reading_takes_every_source_that_was_run_and_the_newest_of_a_point(
    runs, profile, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    for name in ("load_sweep", "preliminary_sweep"):
        monkeypatch.setattr(experiments, name, lambda *_: [])
    monkeypatch.setattr(sweep, "read", lambda *_: runs[:3])
    assert list(verdicts.read_sources(profile)) == ["measured"]
    for i, name in enumerate(
        ["simulated/harness/p1.A/u1-r0-old", "simulated/harness/p1.A/u1-r0-new", "emulated/load/p1.A/u1-r0-x"]
    ):
        path = tmp_path / profile.name / f"{name}.parquet"
        rows = synthetic.point("p1", "load", "p1.A", i + 1, 0)
        records.write([row | {"point_hash": name.rpartition("-")[2]} for row in rows], path)
        if "simulated" in name:  # as an earlier version wrote it
            pq.write_table(pq.read_table(path).drop_columns("lost_time"), path)
        os.utime(path, (i, i))
    late = [row | {"lost_time": 0.06, "point_hash": "x"} for row in synthetic.point("p1", "load", "p1.A", 4, 0)]
    records.write(late, tmp_path / profile.name / "emulated/load/p1.A/u4-r0-x.parquet")
    (tmp_path / profile.name / "emulated/load/p1.A/u8-r0-x.parquet").touch()
    found = verdicts.read_sources(profile)
    printed = capsys.readouterr().out
    assert "left out p1.A/u4-r0-x.parquet: the emulated engines did not keep pace" in printed
    assert "left out p1.A/u8-r0-x.parquet: it cannot be read" in printed
    assert len(found.pop("measured")) == 9
    assert {name: len(summary.requests) for name, summary in found.items()} == {"emulated": 3, "simulated-harness": 2}


def test_hypotheses_are_compared_on_the_claims_that_all_of_them_decide():
    said = {
        "P1-R01": (HOLDS, FITTED, FAILS),
        "P1-R02": (FAILS, FITTED, HOLDS),
        "P1-R03": (FAILS, FAILS, UNTOLD),
        "P1-R04": (HOLDS, NOT_RUN, HOLDS),  # which one of them does not decide
    }
    sources = ("simulated-hardware", "simulated-harness", "simulated-pinned-host")
    rows = [
        {"id": claim, "source": source, "verdict": verdict}
        for claim, words in said.items()
        for source, verdict in zip(("measured", *sources), ("holds", *words), strict=True)
    ]
    table = explained.by_source(pd.DataFrame(rows))
    assert list(table.index) == list(sources)
    assert set(table["claims"]) == {3}
    assert table[[HOLDS, FITTED, UNTOLD, FAILS]].to_numpy().tolist() == [[1, 0, 0, 2], [0, 2, 0, 1], [1, 0, 1, 1]]
    assert table["only"].to_list() == ["", "P1-R02", "P1-R02"]
    assert table["lost"].to_list() == ["", "", "P1-R01"]
    assert explained.by_source(pd.DataFrame(rows[:1])).empty


def test_scorecards_are_compared_claim_by_claim(scorecard, tmp_path):
    assert scorecards.changed(scorecard, scorecard).empty
    sure = scorecard["verdict"].isin([HOLDS, FAILS]) & (scorecard["source"] == "measured")
    tested = scorecard[sure].head(2).reset_index(drop=True)
    opposite = tested["verdict"].map({HOLDS: FAILS, FAILS: HOLDS})
    other = tested.assign(verdict=[opposite[0], UNTOLD])
    differ = scorecards.changed(scorecard, other)
    assert differ["before"].to_list() == tested["verdict"].to_list()
    assert differ["after"].to_list() == [opposite[0], UNTOLD]
    assert differ["turned"].to_list() == [True, False]
    files = [tmp_path / "one.csv", tmp_path / "other.csv"]
    for file, table in zip(files, (scorecard, other), strict=True):
        table.to_csv(file, index=False)
    command = [sys.executable, paths.ROOT / "scripts" / "compare_scorecards.py"]
    said = subprocess.run([*command, *files], capture_output=True, text=True, check=True).stdout
    assert f"measured: 2 of 2 verdicts differ, 1 from holds to fails or back\n  {tested['id'][0]}: " in said
    wrong = subprocess.run(
        [*command, files[0], "README.md"], cwd=paths.ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert "README.md is no scorecard: take a scorecard.csv from below figures" in wrong.stderr


def test_records_in_parts_judge_as_whole_ones(runs, profile, scorecard):
    parts = (part for _, part in runs.groupby(["paper", "config", "users"]))
    whole = scorecard[scorecard["source"] != "emulated"].reset_index(drop=True)
    pd.testing.assert_frame_equal(verdicts.evaluate({"measured": parts}, profile), whole)


def test_points_summarised_in_processes_judge_as_whole_records(runs, profile, scorecard, tmp_path):
    files = [tmp_path / f"point-{point}.parquet" for point in runs["point_hash"].unique()]
    for file, (_, point) in zip(files, runs.groupby("point_hash", sort=False), strict=True):
        records.write(point.astype(object).where(point.notna(), None).to_dict("records"), file)
    whole = scorecard[scorecard["source"] != "emulated"].reset_index(drop=True)
    summary = evidence.of_files("measured", files, profile)
    pd.testing.assert_frame_equal(verdicts.evaluate({"measured": summary}, profile), whole)


# --- measures -------------------------------------------------------------------------------------------------------


def test_shape_of_throughput_over_time():
    one_peak = evidence._of_buckets(np.array([10.0, 60, 100, 80, 20, 10, 5, 5, 5]))
    assert one_peak["bucket_peaks"] == 1
    assert one_peak["bucket_start_over_peak"] == pytest.approx(0.1)
    assert one_peak["bucket_end_over_peak"] == pytest.approx(0.05)
    several = evidence._of_buckets(np.array([100.0, 20, 100, 20, 100, 20, 100]))
    assert several["bucket_peaks"] == 4
    assert evidence._of_buckets(np.ones(metrics.LEAST_BUCKETS - 1)) == {}


def test_users_map_to_the_papers_scale(runs, profile):
    found = _evidence("measured", runs, profile)
    assert list(found.series("ttft_mean_s", "p1.A", [200, 900], "base")) == [8, 16]
    assert list(found.series("ttft_mean_s", "p1.A", 1, "base")) == [1]
    assert list(found.series("ttft_mean_s", "p1.A", 200, "base")) == [8]
    with pytest.raises(evidence.NotTestable, match=r"no level of p1\.A stands for 100 users"):
        found.series("ttft_mean_s", "p1.A", 100, "base")
    assert found.resolve("p2.fp8-tp8-best").startswith("p2.fp8-tp8-bs")


def test_scorecard_files_hold_every_row(runs, profile, home):
    picture = home / "laptop/measured/paper1/fig07_p99_response_time.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    scorecard = verdicts.evaluate({"measured": runs}, profile)
    scorecards.write_scorecard(scorecard, profile)
    counted = scorecard.select_dtypes("number").columns
    again = pd.read_csv(home / "laptop/scorecard.csv", keep_default_na=False, na_values={key: "" for key in counted})
    pd.testing.assert_frame_equal(again, scorecard)
    text = (home / "laptop/scorecard.md").read_text()
    assert all(f"| {name} |" in text for name in IDS)
    assert "([figure](measured/paper1/fig07_p99_response_time.png))" in text
    assert verdicts.counts(scorecard).to_numpy().sum() == len(scorecard)


def test_what_looks_like_html_stays_text_in_markdown(runs, profile, home):
    scorecard = verdicts.evaluate({"measured": runs}, profile).head(2)
    evil = "<script>alert(1)</script> & <img src=x onerror=y> a | b\n# heading"
    scorecard = scorecard.assign(claim=evil, numbers=evil, where=evil, conflict=evil)
    scorecards.write_scorecard(scorecard, profile)
    text = (home / "laptop/scorecard.md").read_text()
    assert "<" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;img") == 2 * 4 + 2
    assert "\n# heading" not in text
    assert all(line.count("|") == 6 for line in text.splitlines() if line.startswith("| P"))
