"""import os"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.engines import llama
from erlib.paper_scale import batching, simulation, steptimes
from erlib.paper_scale.fitting import Fitted
from erlib.paper_scale.steptimes import OutOfRange, Roofline, Table
from erlib.workload.lengths import FORCED
from erlib.workload.prompts import Prompt
from tests.support.linear import Linear

PAPERS = [name for name in config.config_ids() if config.load_configuration(name).paper and name != "x1.S"]
"""And x1.F: the table knows no 1B."""


def test_the_table_says_what_the_kernel_model_says():
    """Milliseconds that aiconfigurator-core 0.12.0 itself answered; none of them is a point of the table's grid."""
    a = steptimes.for_configuration(config.load_configuration("p1.A"))
    assert a.prefill_s(335) * 1e3 == pytest.approx(26.016, rel=0.01)
    assert a.prefill_s(335, prompts=5) * 1e3 == pytest.approx(76.059, rel=0.01)
    assert a.decode_s(600, 1000) * 1e3 == pytest.approx(43.204, rel=0.01)
    assert a.decode_s(100, 1000) * 1e3 == pytest.approx(16.932, rel=0.01)
    assert a.step_s(5, 1675, 100, 100_000) * 1e3 == pytest.approx(81.906, rel=0.01)
    d = steptimes.for_configuration(config.load_configuration("p1.D"))
    assert [d.decode_s(batch, 1000) * 1e3 for batch in (60, 125)] == pytest.approx([18.453, 29.482], rel=0.02)


def test_the_parts_of_a_step_add_up():
    rows = pd.read_parquet(steptimes.TABLE)
    mine = rows[(rows["model"] == "llama-3-8b") & (rows["dtype"] == "fp16") & (rows["tensor_parallel"] == 1)]
    ms = mine.set_index(["part", "x", "y"])["ms"]
    # 64 sequences of 1,024 tokens, and 2 prompts of 64: 192 tokens
    parts = [ms["decode", 64, 1024], ms["prefill", 2, 64], ms["dense", 192, 0]]
    output = np.interp(66, *np.transpose([(x, value) for (part, x, _), value in ms.items() if part == "output"]))
    step_s = Table("llama-3-8b", "fp16", "fp16", 1).step_s(2, 128, 64, 64 * 1024)
    assert step_s * 1e3 == pytest.approx(sum(parts) + output, rel=1e-5)


def test_the_table_says_the_same_in_whatever_folder_the_repository_lies(tmp_path, monkeypatch):
    expected = Table("llama-3-8b", "fp16", "fp16", 1).decode_s(8, 100)
    elsewhere = tmp_path / "model=llama" / "seconds=1" / steptimes.TABLE.name
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(steptimes.TABLE, elsewhere)
    monkeypatch.setattr(steptimes, "TABLE", elsewhere)
    steptimes._table.cache_clear()
    assert Table("llama-3-8b", "fp16", "fp16", 1).decode_s(8, 100) == expected
    monkeypatch.undo()
    steptimes._table.cache_clear()


def test_the_table_is_read_by_a_python_that_does_not_know_how_its_folder_is_called(tmp_path):
    """As Triton embeds it."""
    home = tmp_path / "a b;ü"
    shutil.copytree(paths.ROOT / "erlib", home / "erlib", ignore=shutil.ignore_patterns("__pycache__"))
    (home / "data").mkdir()
    shutil.copy(steptimes.TABLE, home / "data")
    # It also ends, which must not abort it.
    code = "from erlib.paper_scale import steptimes; print(steptimes._table(steptimes.TABLE).num_rows)"
    no_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(home)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | no_locale,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) == steptimes._table(steptimes.TABLE).num_rows


@pytest.mark.parametrize(("sequences", "context_tokens"), [(1, 1), (60, 60 * 333 + 7), (1000, 1000 * 1500)])
def test_many_steps_are_as_long_as_each_of_them(sequences, context_tokens):
    for steps in (Linear(), Table("llama-2-13b", "fp8", "fp8", 1)):
        for n in (0, 1, 15, 1200):
            one_by_one = [steps.step_s(0, 0, sequences, context_tokens + i * sequences) for i in range(n)]
            assert steps.decode_steps_s(n, sequences, context_tokens).tolist() == one_by_one
        with pytest.raises(OutOfRange, match="context"):
            steps.decode_steps_s(8192, sequences, sequences * 8000)


@pytest.mark.parametrize("name", PAPERS)
def test_more_work_takes_longer(name):
    steps = steptimes.for_configuration(config.load_configuration(name))
    by_batch = [steps.decode_s(batch, 1000) for batch in (1, 16, 64, 256, 1000)]
    by_context = [steps.decode_s(64, context) for context in (500, 1000, 2000, 4000, 8000)]
    by_length = [steps.prefill_s(tokens) for tokens in (64, 335, 1535, 4000, 8000)]
    for times in (by_batch, by_context, by_length):
        assert all(np.diff(times) > 0)
    assert 0.001 < by_batch[0] < 0.05
    assert steps.step_s(1, 335, 64, 64_000) > max(steps.decode_s(64, 1000), steps.prefill_s(335))


def test_what_the_table_does_not_know_is_an_error():
    steps = steptimes.for_configuration(config.load_configuration("p1.A"))
    for step, message in [
        ((1, 8193, 0, 0), "tokens 8,193"),
        ((0, 0, 4097, 4097), "batch 4,097"),
        ((0, 0, 1, 8193), "context 8,193"),
        ((300, 300, 0, 0), "at most 256 prompts"),
        ((0, 0, 0, 0), "reads a prompt or decodes"),
        ((0, 0, 2, 1), "at least one token"),
        ((0, 5, 1, 1), "no prompt or sequence"),
        ((-1, 0, 1, 1), "at least one token"),
    ]:
        with pytest.raises(OutOfRange, match=message):
            steps.step_s(*step)
    assert steps.step_s(1, 8191, 1, 8192) > 0  # the corner itself is known
    with pytest.raises(OutOfRange, match="no llama-2-13b in int4"):
        Table("llama-2-13b", "int4", "fp16", 1)


def test_roofline_is_bound_by_memory_then_by_arithmetic():
    shape = llama.shape("llama-3-8b")
    steps = Roofline(shape, steptimes.H100)
    read_s = (shape.linear + shape.embedding) * 2 / (3.35e12 * 0.75)
    assert steps.decode_s(1, 1) == pytest.approx(read_s, rel=0.01)
    assert steps.decode_s(2, 1) == pytest.approx(steps.decode_s(1, 1), rel=0.01)
    assert steps.prefill_s(8000) == pytest.approx(2 * steps.prefill_s(4000), rel=0.15)
    quarter = Roofline(shape, steptimes.H100, "int4").decode_s(1, 1) / steps.decode_s(1, 1)
    assert 0.25 < quarter < 0.4  # the output layer stays FP16
    parallel = Roofline(shape, steptimes.H100, tensor_parallel=8)
    assert steps.prefill_s(4000) / 8 < parallel.prefill_s(4000) < steps.prefill_s(4000)
    assert Roofline(shape, steptimes.H200).decode_s(1, 1) < steps.decode_s(1, 1)


@pytest.mark.parametrize("name", ["p1.A", "p1.C", "p1.D", "p2.B", "p2.C", "p2.E"])
def test_roofline_and_table_tell_of_the_same_hardware(name):
    system = config.load_configuration(name).system
    crude = Roofline(llama.shape(system.model), steptimes.H100, system.dtype, system.kv_dtype, system.tensor_parallel)
    table = steptimes.for_configuration(config.load_configuration(name))
    for step in ((0, 0, 64, 64_000), (4, 1340, 0, 0), (0, 0, 256, 256_000)):
        assert 0.4 < crude.step_s(*step) / table.step_s(*step) < 1.6


def _measure(steps, users, batch_size=16):
    system = batching.System("p2.E", "direct", steps, 1, batch_size, 100_000)
    drawn = [Prompt(n, 0, "", 40 + 7 * (n % 5), 60 + 11 * (n % 7), FORCED) for n in range(users)]
    return simulation.simulate(system, drawn, paper="p1").to_pandas()


def test_fitted_finds_the_engine_behind_the_records_and_predicts_other_loads():
    fitted = Fitted(pd.concat([_measure(Linear(), users) for users in (1, 4, 32)]))
    assert fitted.limits.batch == 16
    for batch in (1, 4, 16):
        assert fitted.decode_s(batch, 50) == pytest.approx(Linear().decode_s(batch, 50), rel=0.02)
    assert fitted.prefill_s(64) == pytest.approx(Linear().prefill_s(64), rel=0.05)
    for users in (2, 8, 24):
        truth, predicted = (_measure(steps, users) for steps in (Linear(), fitted))
        for column in ("t_first_ns", "t_last_ns"):
            real, guessed = ((rows[column] - rows["t_send_ns"]).mean() for rows in (truth, predicted))
            assert guessed == pytest.approx(real, rel=0.05)


def test_fitted_tells_reading_alone_from_reading_beside_decoding():
    class Overlapping(Linear):
        def step_s(self, prompts, prompt_tokens, sequences, context_tokens):
            alone = super().step_s(prompts, prompt_tokens, sequences, context_tokens)
            return alone + 0.05 if prompts and not sequences else alone

    fitted = Fitted(pd.concat([_measure(Overlapping(), users) for users in (1, 4, 32)]))
    for step in ((1, 64, 0, 0), (2, 150, 8, 400), (1, 64, 15, 1000)):
        assert fitted.step_s(*step) == pytest.approx(Overlapping().step_s(*step), rel=0.05)


def test_fitted_refuses_what_it_cannot_know():
    seen = pd.concat([_measure(Linear(), 1), _measure(Linear(), 4)])
    fitted = Fitted(seen)
    with pytest.raises(OutOfRange, match="batch 5"):
        fitted.decode_s(5, 50)
    with pytest.raises(OutOfRange, match="context"):
        fitted.decode_s(1, 5000)
    with pytest.raises(OutOfRange, match="does not extrapolate"):
        _measure(fitted, 8)
    with pytest.raises(ValueError, match="single user"):
        Fitted(_measure(Linear(), 4))
    with pytest.raises(ValueError, match="one configuration"):
        Fitted(pd.concat([seen, seen.assign(config="p2.D")]))
    with pytest.raises(ValueError, match="min_gaps"):
        Fitted(seen, min_gaps=10**6)
