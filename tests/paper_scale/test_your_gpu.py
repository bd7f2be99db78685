"""This machine's GPU: how it is found and measured (with stand-ins for both), and what is made of its step times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from erlib import config, paths
from erlib.config import ConfigError
from erlib.machine import hardware
from erlib.machine.hardware import Gpu
from erlib.paper_scale import your_gpu
from erlib.paper_scale.your_gpu import H100, H200, StepTable
from erlib.report.own import your_gpu as figure

ADA = Gpu("NVIDIA RTX 4090", 24_564 * 2**20, "590.44.01", 8.9)
A100 = Gpu("NVIDIA A100-SXM4-80GB", 81_920 * 2**20, "590.44.01", 8.0)

STANDIN = """
import json, sys
from pathlib import Path
arguments = sys.argv[1:]
if arguments[0] == "-c":
    sys.exit({sees})
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
print("llama-3-8b fp16 TP1: 100/348 points", flush=True)
print("llama-3-8b fp16 TP1: decode 512 4096 left out: CUDA out of memory")
if {fails!r}:
    sys.exit("error: " + {fails!r})
table = Path(arguments[1])
table.write_text(Path({source!r}).read_text())
about = {{"device": "NVIDIA RTX 4090", "torch": "2.9", "date": "2026-01-02", "copy_gb_per_s": 900, "fp16_tflops": 160}}
about |= {{"complete": ["llama-3-8b:fp16:1"], "memory_bytes": 25.3e9}}
table.with_suffix(".json").write_text(json.dumps(about))
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with GPUs, and a Python whose PyTorch sees them; lists how the script was called."""
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")

    def has(gpu: Gpu, sees: bool = True, fails: str = "", source: Path = H100) -> dict[str, str]:
        calls, program = str(tmp_path / "calls"), tmp_path / "standin.py"
        program.write_text(STANDIN.format(sees=int(not sees), calls=calls, fails=fails, source=str(source)))
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(hardware, "gpus", lambda: [gpu])
        return {"your_gpu.python": str(python)}

    def calls() -> list[list[str]]:
        file = tmp_path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return has, calls


def profile(**overrides):
    return config.load_profile("smoke", {key.replace("__", "."): value for key, value in overrides.items()})


def test_without_a_gpu_it_is_said_whose_step_times_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "gpus", list)
    table = your_gpu.step_table(profile())
    assert (table.file, table.here) == (H200, False)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("no CUDA GPU here")
    assert said[1] == "step times: NVIDIA H200, measured elsewhere (PyTorch 2.11.0+cu130, 2026-11-27)"


def test_a_gpu_is_measured_once_and_found_again(machine, capsys):
    has, calls = machine
    cfg = config.load_profile("smoke", has(ADA))
    table = your_gpu.step_table(cfg)
    (call,) = calls()
    assert call[0] == str(your_gpu.SCRIPT)
    assert call[2:5] == ["--models", "llama-3-8b:fp16", "--budget-s"]
    assert table.here
    assert table.file.is_relative_to(paths.CACHE) and table.file.name == "nvidia-rtx-4090.csv"
    said = capsys.readouterr().out
    assert "1 points left out, the first: llama-3-8b fp16 TP1: decode 512 4096" in said
    assert "step times: NVIDIA RTX 4090, measured here (PyTorch 2.9, 2026-01-02)" in said
    assert your_gpu.step_table(cfg) == table
    assert len(calls()) == 1
    assert f"step times found in {table.file}" in capsys.readouterr().out
    more = config.load_profile("smoke", has(ADA) | {"your_gpu.models": ["llama-3-8b:fp16", "llama-3-8b:fp8"]})
    your_gpu.step_table(more)
    assert len(calls()) == 2


def test_a_gpu_that_no_python_sees_is_not_the_one_that_is_shown(machine, capsys):
    has, calls = machine
    table = your_gpu.step_table(config.load_profile("smoke", has(ADA, sees=False)))
    assert (table.file, calls()) == (H200, [])
    assert "NVIDIA RTX 4090 is here, but no Python whose PyTorch sees it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpu", "fails", "overrides", "message"),
    [
        (
            A100,
            "",
            {"your_gpu.models": ["llama-3-8b:fp16", "llama-3-8b:fp8"]},
            r"computes no FP8: leave llama-3-8b:fp8",
        ),
        (ADA, "no shape is called 'x'", {}, r"NVIDIA RTX 4090 was not measured: no shape is called 'x'$"),
        (ADA, "a.csv was measured with another torch; name another file", {}, r"another torch; remove it, and every"),
    ],
)
def test_what_a_gpu_or_the_script_cannot_is_one_line(machine, gpu, fails, overrides, message):
    has, _ = machine
    with pytest.raises(ConfigError, match=message) as raised:
        your_gpu.step_table(config.load_profile("smoke", has(gpu, fails=fails) | overrides))
    assert "\n" not in str(raised.value)


def test_a_gpu_whose_memory_did_not_suffice_is_named(machine, tmp_path):
    has, _ = machine
    little = tmp_path / "little.csv"
    rows = pd.read_csv(H100)
    rows[rows["part"] == "dense"].to_csv(little, index=False)
    with pytest.raises(
        ConfigError, match=r"4090: too little was measured for p2\.E \(.*CUDA out of memory\); run again"
    ):
        your_gpu.step_table(config.load_profile("smoke", has(ADA, source=little)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"your_gpu__config": "p1.D"},
            r"p1\.D has FP8 weights and FP8 KV cache; PyTorch .* choose p2\.E or p1\.C",
        ),
        ({"your_gpu__steps": "absent.csv"}, r"absent\.json, which says .* cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        your_gpu.step_table(profile(**overrides))


def test_a_table_of_another_model_or_another_make_is_refused(tmp_path):
    other = tmp_path / "other.csv"
    rows = pd.read_csv(H100)
    rows[rows["model"] == "llama-2-13b"].to_csv(other, index=False)
    other.with_suffix(".json").write_text(H100.with_suffix(".json").read_text())
    with pytest.raises(ConfigError, match=r"other\.csv holds no llama-3-8b in fp16 .*\(for your_gpu\.config=p2\.E\)"):
        your_gpu.step_table(profile(your_gpu__steps=str(other)))
    assert not your_gpu.step_table(profile(your_gpu__steps=str(other), your_gpu__config="p1.C")).here
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="has no column 'model'"):
        your_gpu.step_table(profile(your_gpu__steps=str(other)))


@pytest.fixture
def h200():
    return StepTable(H200, json.loads(H200.with_suffix(".json").read_text()), here=False)


def test_an_h200_stands_beside_two_h100s(h200):
    ceilings = your_gpu.ceilings(h200)
    assert ceilings.index.str.contains("H200|H100").tolist() == [True, True]
    assert ceilings["copy_gb_per_s"].tolist() == [2719.6, 2440.2]
    beside = your_gpu.beside_h100(h200)
    assert set(beside["beside"]) == set(your_gpu.H100_NAMES.values())
    parts = your_gpu.by_part(beside).xs(("H100, PyTorch", "llama-3-8b", "fp16", 1), level=[0, 1, 2, 3])
    assert parts["points"].to_dict() == {"dense": 25, "output": 11, "decode": 90, "prefill": 48}
    # What reads memory is as much faster as the memory, what computes is not.
    assert parts.loc["output", "median"] == pytest.approx(0.68, abs=0.02)
    assert parts.loc["prefill", "median"] == pytest.approx(0.99, abs=0.02)
    ratios = beside[
        (beside["beside"] == "H100, PyTorch") & (beside["model"] == "llama-3-8b") & (beside["dtype"] == "fp16")
    ]
    decode = ratios[ratios["part"] == "decode"]["ratio"]
    assert parts.loc["decode", "worst"] == decode.min() < 1 / decode.max()


def test_eight_of_a_smaller_card_hold_fewer_tokens_and_run_fewer_sequences(h200):
    cfg = profile(your_gpu__users=[1, 500], your_gpu__repeats=1)
    whole = your_gpu.eight_of_them(h200, cfg).set_index("users")
    assert (whole["tpot_mean_s_ratio"] < 0.9).all()
    small = StepTable(H200, h200.about | {"memory_bytes": 25.7e9}, here=False)
    less = your_gpu.eight_of_them(small, cfg).set_index("users")
    assert less.loc[1].equals(whole.loc[1])
    assert less.loc[500, "session_tokens_per_s_measured"] < 0.8 * whole.loc[500, "session_tokens_per_s_measured"]
    assert less.loc[500, "session_tokens_per_s"] == whole.loc[500, "session_tokens_per_s"]
    tiny = StepTable(H200, h200.about | {"memory_bytes": 12.7e9}, here=False)
    with pytest.raises(ConfigError, match=r"llama-3-8b in fp16 has 16 GB of weights"):
        your_gpu.eight_of_them(tiny, cfg)


def test_any_served_engine_is_simulated_with_a_machine_for_each_expert(monkeypatch, tmp_path, capsys):
    """The published records of a laptop, whose eight experts share two cores."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    cfg = profile()
    served = your_gpu.served_records(cfg)
    assert "those published" in capsys.readouterr().out
    table = your_gpu.from_records(served, cfg)
    assert list(table.index) == sorted(served["users"].unique())
    alone, crowd = table.loc[1], table.iloc[-1]
    assert alone["tpot_mean_s_apart"] == pytest.approx(alone["tpot_mean_s"], rel=0.1)
    assert crowd["session_tokens_per_s_apart"] > 2 * crowd["session_tokens_per_s"]
    with pytest.raises(ConfigError, match="cannot be fitted to these records: calibrating needs records of a single"):
        your_gpu.from_records(served[served["users"] > 1], cfg)


def test_too_few_records_of_ones_own_give_way_to_published_ones(monkeypatch, tmp_path, capsys):
    """As after a smoke run, whose answers are a few tokens long."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    cfg = profile()
    published = your_gpu.served_records(cfg)
    few = published[published["users"] == 1].head(1)
    few = few.assign(token_ns=[few["token_ns"].iloc[0][:5]])
    (tmp_path / cfg.name / "records").mkdir(parents=True)
    monkeypatch.setattr(your_gpu.records, "read", lambda folder: few)
    capsys.readouterr()
    assert your_gpu.served_records(cfg).equals(published)
    said = capsys.readouterr().out
    assert "this machine's 1 points of p2.E are too few (no batch size has" in said and "those published" in said
    with pytest.raises(ConfigError, match=r"no records of x1.S here .*, and none are published: measure more, or set"):
        your_gpu.served_records(profile(your_gpu__config="x1.S"))


def test_the_picture_says_whose_step_times_they_are(h200, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "FIGURES", tmp_path)
    cfg = profile(your_gpu__users=[1, 100], your_gpu__repeats=1)
    figure.your_gpu(your_gpu.beside_h100(h200), your_gpu.eight_of_them(h200, cfg), h200, cfg)
    folder = tmp_path / "smoke" / "simulated-hardware" / "workbench"
    about = json.loads((folder / "your_gpu.json").read_text())
    assert "NVIDIA H200, measured elsewhere" in about["footer"]
    assert "It is not this machine's GPU." in about["caption"]
    assert len(pd.read_csv(folder / "your_gpu.csv")) == 2
