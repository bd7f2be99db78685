"""Step times measured on a GPU: the script that measures them (here on a CPU), and what they are held against."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from erlib import config, paths
from erlib.config import ConfigError
from erlib.paper_scale import measured_steps
from erlib.paper_scale.steptimes import PARTS, OutOfRange, Table
from scripts import compare_step_times
from scripts import measure_step_times as script

H100, H200 = (paths.FACTS / f"{card}_pytorch_step_times.csv" for card in ("h100", "h200"))
TINY = ["--device", "cpu", "--models", "tiny:fp16", "--few"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_step_times.py", *map(str, arguments)])
    script.main()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steps") / "tiny.csv"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, path, *TINY)
    return path


def test_every_part_of_a_tiny_model_is_measured_on_a_cpu(tiny):
    rows = measured_steps.read(tiny)
    assert list(rows.columns) == script.COLUMNS
    assert set(rows["part"]) == {*PARTS, "matrices", "whole decode", "whole prefill"}
    assert (rows["p10_ms"] > 0).all()
    assert (rows["p10_ms"] <= rows["ms"]).all() and (rows["ms"] <= rows["p90_ms"]).all()
    described = json.loads(tiny.with_suffix(".json").read_text())
    assert described["device"] == "cpu" and described["copy_gb_per_s"] > 0 and described["fp16_tflops"] > 0


def test_what_is_measured_is_not_measured_again_and_what_is_missing_is(tiny, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy.csv"
    lines = tiny.read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[:-2]))
    copy.with_suffix(".json").write_text(tiny.with_suffix(".json").read_text())
    run(monkeypatch, copy, *TINY)
    assert "2 points in" in capsys.readouterr().out
    again = copy.read_text().splitlines(keepends=True)
    assert (again[: len(lines) - 2], len(again)) == (lines[:-2], len(lines))


def test_a_line_that_was_not_finished_is_measured_again(tiny, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy.csv"
    whole = tiny.read_text()
    copy.write_text(whole[:-9])
    copy.with_suffix(".json").write_text(tiny.with_suffix(".json").read_text())
    run(monkeypatch, copy, *TINY)
    assert "1 points in" in capsys.readouterr().out
    assert len(measured_steps.read(copy)) == len(measured_steps.read(tiny))


def test_a_table_knows_what_it_is_of(tiny, tmp_path, monkeypatch):
    copy = tmp_path / "copy.csv"
    copy.write_text(tiny.read_text())
    with pytest.raises(SystemExit, match=r"copy\.json, which says what .* is missing"):
        run(monkeypatch, copy, *TINY)
    copy.with_suffix(".json").write_text(tiny.with_suffix(".json").read_text())
    with pytest.raises(SystemExit, match="another shape called tiny"):
        run(monkeypatch, copy, *TINY, "--shape", "tiny=2,64,128,4,2,512")


@pytest.mark.parametrize(
    ("text", "beside", "message"),
    [
        (None, "[]", r"copy\.json does not say what .*copy\.csv was measured on; name another file"),
        (None, "nothing", "does not say what"),
        (None, "[" * 100_000, "does not say what"),
        (None, "{}", "does not say what"),
        (None, {"shapes": []}, "does not say what"),
        (None, {"complete": 3}, "does not say what"),
        ("hello", None, r"copy\.csv is no table of this script: it has other columns"),
        ("hello\n", None, "is no table of this script"),
        ("\xff\n", None, r"copy\.csv is no table of this script \('utf-8' codec"),
        (",".join(script.COLUMNS) + "\ntiny,fp16\n", None, r"copy\.csv, line 2: 2 cells, not 11; remove the line"),
    ],
)
def test_files_that_are_no_table_of_the_script_are_refused_and_left_alone(
    text, beside, message, tiny, tmp_path, monkeypatch
):
    copy = tmp_path / "copy.csv"
    copy.write_text(tiny.read_text() if text is None else text, encoding="latin-1")
    described = tiny.with_suffix(".json").read_text()
    changed = json.dumps(json.loads(described) | beside) if isinstance(beside, dict) else beside
    copy.with_suffix(".json").write_text(changed or described)
    before = copy.read_bytes()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(monkeypatch, copy, *TINY)
    assert copy.read_bytes() == before


@pytest.mark.parametrize("characters", [0, 5])
def test_a_table_whose_columns_were_being_written_is_begun_again(characters, tiny, tmp_path, monkeypatch):
    copy = tmp_path / "copy.csv"
    copy.write_text(tiny.read_text()[:characters])
    copy.with_suffix(".json").write_text(tiny.with_suffix(".json").read_text())
    run(monkeypatch, copy, *TINY)
    assert len(measured_steps.read(copy)) == len(measured_steps.read(tiny))


POINT = {
    **dict(zip(measured_steps.FORM, ("llama-3-8b", "fp16", "fp16", "1"), strict=True)),
    **{"part": "dense", "x": "1", "y": "0", "ms": "5.78", "p10_ms": "5.76", "p90_ms": "6.64", "how": "graph"},
}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        *(
            ("ms", value, "ms must be a time of more than 0, not")
            for value in ("nan", "", "inf", "0", "-1", "x", "1_0")
        ),
        *(("p90_ms", value, "p90_ms must be a time of more than 0, not") for value in ("nan", "", "x")),
        *(("x", value, "x must be a whole number from 1, not") for value in ("0", "-1", "1.5", "x", "")),
        *(("y", value, "y must be a whole number from 0, not") for value in ("-1", "0.5", "x", "inf")),
        *(("tensor_parallel", value, "tensor_parallel must be a whole number from 1") for value in ("0", "1.5", "x")),
        *(("dtype", value, "dtype must be one of fp16, fp8, int8, int4, not") for value in ("FP16", "bf16", "")),
        ("kv_dtype", "auto", "kv_dtype must be one of fp16, fp8, int8, int4, not 'auto'"),
        ("model", "", "no model"),
        ("part", "", "no part"),
        ("how", "graph,more", "12 cells, but 11 columns"),
        ("how", '"graph', "not CSV"),
    ],
)
def test_what_no_measurement_says_is_refused_by_line(column, value, message, tmp_path, monkeypatch):
    table = tmp_path / "steps.csv"
    table.write_text("\n".join(map(",".join, (POINT, POINT.values(), (POINT | {column: value}).values()))) + "\n")
    with pytest.raises(ConfigError, match=rf"steps\.csv, line 3: {message}") as refused:
        measured_steps.read(table)
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(sys, "argv", ["compare_step_times.py", str(table)])
    with pytest.raises(SystemExit, match=r"^error: .*line 3"):
        compare_step_times.main()


def test_a_table_that_is_cut_says_how_to_go_on(tiny, tmp_path):
    cut = tmp_path / "cut.csv"
    whole = tiny.read_text()
    cut.write_text(whole[: whole.rindex(",")])
    with pytest.raises(ConfigError, match=rf"line {len(whole.splitlines())}: cut off, .* measure again with the same"):
        measured_steps.read(cut)
    cut.write_text(whole[: whole.index("\n") + 1])
    with pytest.raises(ConfigError, match="holds no step times: measure again"):
        measured_steps.read(cut)


def test_points_may_stand_in_any_order(tmp_path):
    mixed = tmp_path / "mixed.csv"
    pd.read_csv(H100).sample(frac=1, random_state=0).to_csv(mixed, index=False)
    one, other = (Table("llama-3-8b", "fp16", "fp16", 1, file) for file in (mixed, H100))
    assert [one.step_s(3, 900, n, 500 * n) for n in (1, 50, 300)] == [
        other.step_s(3, 900, n, 500 * n) for n in (1, 50, 300)
    ]
    with pytest.raises(OutOfRange, match="gives at most 1024 tokens"):
        one.step_s(1000, 1000, 100, 5000)


def test_one_table_is_of_one_machine(tiny, monkeypatch):
    beside = tiny.with_suffix(".json")
    before = beside.read_text()
    beside.write_text(json.dumps(json.loads(before) | {"device": "another"}))
    with pytest.raises(SystemExit, match="another device"):
        run(monkeypatch, tiny, *TINY)
    beside.write_text(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "llama"], "no shape is called 'llama'; known: llama-2-13b"),
        (["--models", "tiny:int4"], "not 'int4'"),
        (["--models", "tiny:fp16:3"], "4 heads cannot be shared by '3' GPUs"),
        (["--models", "tiny:fp16:2:junk"], r"tiny:fp16:2:junk: wanted MODEL:DTYPE\[:TP\], and nothing behind it"),
        (["--shape", "mine=1,2,3"], "six whole numbers"),
        (["--shape", "mine=4,128,junk,256,4,2,512,foo"], "six whole numbers"),
        (["--shape", "mine=4,128,junk,4,2,512"], "six whole numbers"),
        (["--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path / "steps.csv", *TINY[:2], *arguments)
    assert not list(tmp_path.iterdir())


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"ends in \.csv"):
        run(monkeypatch, tmp_path / "steps.parquet", *TINY)
    with pytest.raises(SystemExit, match="No such file"):
        run(monkeypatch, tmp_path / "nowhere" / "steps.csv", *TINY)


def test_the_script_has_the_shapes_of_the_repository():
    known = yaml.safe_load((paths.FACTS / "llama_shapes.yaml").read_text())
    for name, shape in script.SHAPES.items():
        if name != "tiny":
            assert shape._asdict() == {key: value for key, value in known[name].items() if key != "tied"}


def test_the_notice_says_what_the_measured_table_says():
    entries = measured_steps.entry_by_entry(H100)
    few, small = entries["x"] <= 256, entries["model"] != "llama-3-70b"
    output = entries[entries["part"] == "output"]
    for chosen, (least, most) in ((output["x"] <= 256, (0.97, 1.11)), (output["x"] > 256, (0.97, 1.13))):
        assert (output["ratio"][chosen].min().round(2), output["ratio"][chosen].max().round(2)) == (least, most)
    attention = entries[entries["model"].isin(["llama-3-8b", "llama-2-13b"])]
    large = attention[(attention["part"] == "decode") & (attention["x"] >= 32) & (attention["y"] >= 512)]
    assert large.groupby("model")["ratio"].mean().round(2).to_dict() == {"llama-3-8b": 0.91, "llama-2-13b": 0.98}
    prompts = attention[attention["part"] == "prefill"].groupby("model")["ratio"].median().round(2).to_dict()
    assert prompts == {"llama-3-8b": 0.41, "llama-2-13b": 0.35}
    ranges = {
        (1.00, 1.11): (entries["dtype"] == "fp16") & few & small,
        (1.11, 1.34): (entries["dtype"] == "fp16") & ~few & small,
        (0.82, 0.91): (entries["dtype"] == "fp8") & few & small,
        (0.88, 1.15): (entries["dtype"] == "fp8") & ~few & small,
        (0.92, 0.97): (entries["dtype"] == "fp8") & few & ~small,
        (0.98, 1.11): (entries["dtype"] == "fp8") & ~few & ~small,
    }
    for (least, most), chosen in ranges.items():
        ratio = entries[chosen & (entries["part"] == "dense")]["ratio"]
        assert (round(ratio.min(), 2), round(ratio.max(), 2)) == (least, most)
    apart = measured_steps.measured_twice(H100) - 1
    assert (len(apart), apart.median().round(3), (apart > 0.06).mean().round(2)) == (290, 0.007, 0.16)
    sums = measured_steps.sums_beside_whole_steps(H100)
    away = (sums["ratio"] - 1).abs()
    assert (len(sums), (away > 0.054).sum()) == (75, 3)
    assert away[sums["turn"] == "decode"].median() == pytest.approx(0.008, abs=5e-4)
    assert away[sums["turn"] == "prefill"].median() == pytest.approx(0.016, abs=5e-4)


def test_users_are_simulated_with_measured_step_times():
    profile = config.load_profile("dgx-h100")
    table = measured_steps.simulated_from("p2.E", H100, profile, [1, 300], repeats=1).set_index("users")
    assert table["tpot_mean_s_ratio"].between(0.9, 1.1).all()
    alone = table.loc[1]
    assert alone["ttft_mean_s_measured"] != alone["ttft_mean_s"]
    with pytest.raises(OutOfRange, match="holds no llama-2-70b"):
        measured_steps.simulated_from("p1.B", H100, profile, [1], repeats=1)


def test_a_share_of_a_model_is_no_step(tmp_path):
    """Its all-reduce is missing."""
    with pytest.raises(OutOfRange, match="dense is missing"):
        Table("llama-3-70b", "fp16", "fp16", 8, H100)


def test_batches_for_which_a_gpu_had_no_memory_are_not_known(tmp_path):
    rows = pd.read_csv(H100)
    less = tmp_path / "less.csv"
    rows[~((rows["part"] == "decode") & (rows["x"] == 512) & (rows["y"] == 4096))].to_csv(less, index=False)
    table, whole = (Table("llama-3-8b", "fp16", "fp16", 1, file) for file in (less, H100))
    assert (table.limits.batch, whole.limits.batch) == (256, 512)
    assert table.decode_s(100, 900) == whole.decode_s(100, 900)
    with pytest.raises(OutOfRange, match="batch up to 256"):
        table.decode_s(300, 900)


def test_another_csv_is_refused(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no column 'model'"):
        measured_steps.entry_by_entry(other)
    other.write_text(",".join([*script.COLUMNS, "ms"]) + "\n")
    with pytest.raises(ConfigError, match="two columns 'ms'"):
        measured_steps.read(other)


def test_an_h200_reads_memory_faster_than_an_h100_and_computes_alike():
    one, other = (measured_steps.read(table) for table in (H100, H200))
    both = other.merge(one, on=[*measured_steps.FORM, "part", "x", "y"], suffixes=("", "_h100"))
    ratio = both["ms"] / both["ms_h100"]
    reads = (both["part"] == "decode") & (both["x"] * both["y"] >= 32 * 512)
    assert 0.65 < ratio[reads].median() < 0.75  # 3.35 over 4.8 TB/s
    assert 0.95 < ratio[both["part"] == "prefill"].median() < 1.05
    sums = measured_steps.sums_beside_whole_steps(H200)
    assert len(sums) == 84 and sums["ratio"].between(0.88, 1.13).all()


def test_what_is_complete_is_written_down(tmp_path, monkeypatch, capsys):
    for grid in ("DECODE", "PREFILL", "WHOLE_DECODE", "WHOLE_PREFILL"):
        monkeypatch.setattr(script, grid, [(1, 16), (2, 16)])
    for grid in ("TOKENS", "SEQUENCES"):
        monkeypatch.setattr(script, grid, [1, 2])
    monkeypatch.setattr(script, "SAY_EVERY_S", 0)
    path, command = tmp_path / "steps.csv", ["--device", "cpu", "--models", "tiny"]
    run(monkeypatch, path, *command, "--budget-s", "0")
    assert "complete" not in json.loads(path.with_suffix(".json").read_text())
    run(monkeypatch, path, *command)
    assert "tiny fp16 TP1: 13/14 points" in capsys.readouterr().out
    assert json.loads(path.with_suffix(".json").read_text())["complete"] == ["tiny:fp16:1"]
