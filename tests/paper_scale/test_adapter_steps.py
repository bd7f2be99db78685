"""What adapters cost a step, as an H100 measured it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from erlib.paper_scale import adapter_steps, batching
from erlib.paper_scale.steptimes import OutOfRange, StepTimes, Table

E = batching.paper_system("p2.E")


def steps(rank: int = adapter_steps.RANK) -> StepTimes:
    return adapter_steps.with_adapters(replace(E, adapters=True), rank).steps


def test_a_decoding_step_takes_as_much_longer_as_was_measured() -> None:
    rows = pd.read_csv(adapter_steps.MEASURED).query("dtype == 'fp16' and rank == 16")
    ms = rows.set_index(["x", "way"])["ms"]
    for sequences in rows["x"].unique():
        more_ms = min(ms[sequences, "gathered"], ms[sequences, "masked"]) - ms[sequences, "none"]
        for context in (100, 700):
            longer_s = steps().decode_s(sequences, context) - E.steps.decode_s(sequences, context)
            assert 1e3 * longer_s == pytest.approx(more_ms)
            (first_s,) = steps().decode_steps_s(1, sequences, sequences * context)
            assert first_s == pytest.approx(steps().decode_s(sequences, context))


def test_whole_decoding_steps_take_as_many_times_as_long_as_the_documents_say() -> None:
    times = {n: steps().decode_s(n, 512) / E.steps.decode_s(n, 512) for n in (1, 8, 32, 64, 128, 256)}
    assert min(times.values()) == times[256] == pytest.approx(1.28, abs=0.005)
    assert max(times.values()) == times[8] == pytest.approx(1.39, abs=0.005)


def test_beyond_what_was_measured_the_matrices_take_so_many_times_as_long() -> None:
    table = E.steps
    assert isinstance(table, Table)

    def share(tokens: int) -> float:
        longer_s = steps().prefill_s(tokens) - table.prefill_s(tokens)
        return 1e3 * longer_s / table.part_ms("dense", tokens)

    assert share(512) == pytest.approx(share(256)) == pytest.approx(share(1024))
    assert share(255) != pytest.approx(share(256), rel=1e-6)


def test_higher_ranks_cost_more() -> None:
    for sequences in (1, 32, 256):
        at = [steps(rank).decode_s(sequences, 300) for rank in (8, 16, 64)]
        assert E.steps.decode_s(sequences, 300) < at[0] < at[1] < at[2]


@pytest.mark.parametrize(
    ("config", "rank", "message"),
    [
        ("p2.E", 32, "no adapters of rank 32 at llama-3-8b in fp16: measure it with scripts/measure_adapters.py"),
        ("p1.C", 16, "no adapters of rank 16 at llama-2-13b"),
        ("p2.A", 16, "adapters were measured at engines of one GPU, of which p2.A is none"),
    ],
)
def test_what_was_not_measured_is_refused(config: str, rank: int, message: str) -> None:
    with pytest.raises(OutOfRange, match=message):
        adapter_steps.with_adapters(batching.paper_system(config), rank)
