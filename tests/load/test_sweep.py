"""What a sweep measures, and what it believes to have been measured."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from erlib import config, provenance
from erlib.dgx import repository
from erlib.load import experiments, on_cores, records, sweep
from tests.support import synthetic


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A sweep of two points whose measurement is writing down rows; the names of what was measured."""
    names = []
    points = [
        SimpleNamespace(users=users, path=tmp_path / "p1.A" / f"uniform-u{users:04d}-r0-{users}.parquet")
        for users in (1, 4)
    ]

    def measure(profile, part, progress):
        for _, group in part:
            for point in group:
                names.append(point.path.name)
                rows = synthetic.point("p1", "load", "p1.A", point.users, 0)
                records.write([row | {"point_hash": str(point.users)} for row in rows], point.path)

    monkeypatch.setattr(sweep, "points", lambda profile, series: points)
    monkeypatch.setattr(sweep, "_measure", measure)
    return points, names


SERIES = [SimpleNamespace(system=SimpleNamespace(source="measured"), experiment="load")]


def test_a_damaged_point_is_measured_again_and_the_others_are_not(measured, capsys):
    points, names = measured
    profile = config.load_profile("smoke")
    assert len(sweep.run(profile, SERIES)) == 1 + 4
    assert len(names) == 2
    assert len(sweep.run(profile, SERIES)) == 1 + 4
    assert len(names) == 2
    points[0].path.write_bytes(points[1].path.read_bytes())  # another point's rows under this one's name
    with pytest.raises(provenance.MissingRecords, match=r"1 of 2 points .* are damaged; run .*05_load_sweep"):
        sweep.read(profile, SERIES)
    capsys.readouterr()
    assert sorted(sweep.run(profile, SERIES)["users"]) == [1, 4, 4, 4, 4]
    assert names[2:] == [points[0].path.name]
    printed = capsys.readouterr().out
    assert f"sweep: {points[0].path.name} of p1.A is made again" in printed
    assert "sweep: 1 of 2 points found by content hash, 1 to measure" in printed


def test_an_overview_says_each_thing_once_and_without_hashes(tmp_path):
    engine = tmp_path / "smollm2-135m-2of30-fp16-0123456789abcdef"
    engine.mkdir()
    (engine / "config.json").write_text('{"max_position_embeddings": 8192}')
    plan = on_cores.server_plan(engine, 4, 7, "u8", 1)
    systems = [("p1.A", "direct", [plan]), ("p1.B", "expert_router", [plan] * 8)]
    table = experiments.overview(
        SimpleNamespace(system=experiments.System(*system, tokenizer=Path(), router=Path())) for system in systems
    )
    assert list(table.columns) == ["routing", "servers", "engine", "slots", "KV blocks", "KV cache", "threads"]
    assert list(table.loc["p1.B"]) == ["expert router", 8, "smollm2-135m-2of30-fp16", 4, "7", "u8", "1"]


def test_an_overview_of_servers_on_gpus(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    plan = repository.RepositoryPlan("tensorrt_llm", {"engine": str(tmp_path)}, 8, repository=tmp_path, gpus=(0, 1))
    system = experiments.System("p1.A", "direct", [plan], tokenizer=Path(), router=Path())
    assert list(experiments.overview([SimpleNamespace(system=system)]).loc["p1.A"])[-2:] == [2, None]
