"""What can be asked, and the one line that says why not; designs, experts and requests that follow from a question."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from erlib import config, paths
from erlib.config import ConfigError
from erlib.engines import llama
from erlib.machine import hardware
from erlib.paper_scale import gpus, questions, steptimes
from erlib.paper_scale.questions import Question
from erlib.workload import traces
from erlib.workload.traces import Trace

MEASURED = paths.FACTS / "h100_pytorch_step_times.csv"


@pytest.fixture(scope="module")
def profile() -> config.Profile:
    return config.load_profile("smoke")


def asked(**changed: object) -> Question:
    return Question(**{"model": "llama-3-8b", "gpus": 2, "requests_per_s": 5.0, **changed})


def trace(n: int = 40, **changed: object) -> Trace:
    rng = np.random.default_rng(0)
    its = {"arrival_s": rng.exponential(0.5, n).cumsum(), "input_tokens": rng.integers(5, 500, n)}
    return Trace(
        **{
            "name": "mine.csv",
            "format": "own",
            **its,
            "output_tokens": rng.integers(1, 200, n),
            "cluster": None,
            **changed,
        }
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gpus": 0}, "1 to 8 GPUs, not 0"),
        ({"gpus": 9}, "1 to 8 GPUs, not 9"),
        ({"experts": 9}, "1 to 8 experts, not 9"),
        ({"requests_per_s": 0.0}, r"requests_per_s is 0.001 to 1e\+06, not 0"),
        ({"requests_per_s": np.inf}, "not inf"),
        ({"requests_per_s": np.nan}, "not nan"),
        ({"ttft_s": -1.0}, "ttft_s is .* not -1"),
        ({"window_s": 0.0}, "window_s is .* not 0"),
        ({"gpu_gb": 1e300}, r"gpu_gb is 1 to 10000, not 1e\+300"),
        ({"adapters_slower": np.inf}, "adapters_slower is .* not inf"),
        ({"requests_per_s": None}, "requests per second .* or users"),
        ({"users": 3}, "one of them"),
        ({"lengths": trace(), "users": 3}, "not both"),
        ({"lengths": trace(n=1)}, "two requests or more"),
        ({"lengths": trace(arrival_s=np.zeros(40)), "requests_per_s": None}, "come at once: give requests per second"),
        ({"lengths": trace(output_tokens=np.zeros(40))}, "at least one token"),
        ({"lengths": trace(arrival_s=np.full(40, np.nan))}, "has times"),
        ({"lengths": trace(input_tokens=np.ones(3))}, "each with arrival, input and output"),
        ({"lengths": trace(cluster=np.full(40, 8))}, "clusters are 0 to 7"),
    ],
)
def test_what_cannot_be_asked_is_said(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        asked(**changed)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "smollm2-135m"}, r"no step times for smollm2-135m on 2 GPUs.*has llama-2-13b, llama-2-70b"),
        ({"model": "llama-9"}, "no shape for 'llama-9'"),
        (
            {"model": "llama-3-70b", "gpus": 1, "formats": ["fp16"]},
            "llama-3-70b in fp16 .* has no form that fits into 1",
        ),
        ({"gpu": "v100"}, "no step times of GPU 'v100'.*measure it with scripts/measure_step_times.py"),
        (
            {"gpu": "a100", "formats": ["fp8"]},
            "no step times for llama-3-8b in fp8 .* some for fp16, int4, int8",
        ),
        ({"gpu": "a100", "model": "smollm2-135m"}, "no step times for smollm2-135m .* a data sheet prices llama-2-13b"),
        ({"gpu": "h1000"}, "no step times of GPU 'h1000'.*h100"),
        ({"gpu": "nowhere.csv", "gpu_gb": 80}, "there is no step table nowhere.csv"),
        ({"gpu": str(MEASURED)}, "does not say how much memory"),
        ({"gpu": str(MEASURED), "gpu_gb": 80, "model": "llama-2-70b"}, "no step times for llama-2-70b.*h100_pytorch"),
        ({"gpu": str(paths.FACTS / "host_binding.csv"), "gpu_gb": 80}, "host_binding.csv is no table of step times"),
    ],
)
def test_what_no_design_can_serve_is_said(profile: config.Profile, changed: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        questions.ways(asked(**changed), profile)
    assert len(str(error.value).splitlines()) == 1


def test_a_table_of_ones_own_is_used_like_a_known_one(profile: config.Profile, tmp_path: Path) -> None:
    rows = pd.read_csv(MEASURED)
    rows["ms"] *= 2
    rows.to_csv(tmp_path / "mine.csv", index=False)
    mine = questions.ways(asked(gpu=str(tmp_path / "mine.csv"), gpu_gb=40), profile)
    known = questions.ways(asked(gpu="h100-pytorch"), profile)
    assert list(mine) == list(known) and "2 × FP8 TP1, KV FP16, one model" in mine
    for name, way in mine.items():
        system, its = way.system, known[name].system
        assert system.steps.decode_s(8, 300) == pytest.approx(2 * its.steps.decode_s(8, 300))
        assert system.kv_tokens < its.kv_tokens


def test_memory_is_what_an_engine_sees_of_it() -> None:
    assert gpus.gpu("h100").memory_bytes == pytest.approx(81_559 * 2**20 - hardware.CONTEXT_BYTES, rel=1e-3)
    assert 1 < gpus.gpu("a100").memory_bytes / gpus.gpu("h100").memory_bytes < 1.01
    assert "with 24 GB each" in gpus.gpu("h100", 24).said and gpus.gpu("h100", 24).memory_bytes == 24e9


def test_an_h200_holds_more_than_an_h100(profile: config.Profile) -> None:
    one, other = (questions.ways(asked(gpu=name), profile) for name in ("h100-pytorch", "h200-pytorch"))
    for name in one:
        assert other[name].system.kv_tokens > 1.5 * one[name].system.kv_tokens


def test_experts_that_a_trace_names_have_servers_of_their_own(profile: config.Profile) -> None:
    """However few they are: no server waits for a cluster that does not come."""
    two = trace(cluster=np.arange(40) % 2, experts=("a", "b"))
    question = asked(lengths=two, requests_per_s=None)
    assert question.clusters == 2 and question.spread_said == "as the trace says"
    ways = questions.ways(question, profile)
    assert "2 × FP8 TP1, an expert each" in ways and "2 × FP16 TP1, 2 adapters each" in ways
    system = ways["2 × FP8 TP1, an expert each"].system
    assert questions.shares(question, profile, 2).tolist() == [0.5, 0.5]
    drawn = questions.for_experts(question, questions.drawn(question, profile, 20, 0), system)
    assert Counter(prompt.cluster for prompt in drawn) == {0: 10, 1: 10}
    wide = questions.ways(asked(lengths=two, requests_per_s=None, gpus=8), profile)["8 × FP8 TP1, 2 experts"]
    assert Counter(wide.system.experts) == {0: 4, 1: 4}


def test_a_data_sheet_prices_every_width_of_every_large_model(profile: config.Profile) -> None:
    def known(gpu: str, model: str) -> set[str]:
        return set(questions.ways(asked(gpu=gpu, model=model, gpus=4), profile))

    assert known("h100", "llama-3-8b") < known("h200", "llama-3-8b")
    widths = {
        f"{4 // width} × {dtype} TP{width}, one model" for width in (1, 2, 4) for dtype in ("FP16", "INT8", "INT4")
    }
    for model in ("llama-2-13b", "llama-3-8b", "llama-3.2-1b"):
        assert widths < known("a100", model) and not any("FP8" in name for name in known("a100", model))
    large = known("a100", "llama-3-70b")
    assert "2 × INT8 TP2, one model" in large and "4 × INT8 TP1, one model" in large
    assert "1 × FP16 TP4, one model" in large and "4 × FP16 TP1, one model" not in large


@pytest.mark.parametrize("gpu", ["a100", "h200"])
def test_steps_of_a_data_sheet_are_the_rooflines(profile: config.Profile, gpu: str) -> None:
    way = questions.ways(asked(gpu=gpu, gpus=8), profile)["4 × FP16 TP2, one model"]
    sheet = {"a100": steptimes.A100, "h200": steptimes.H200}[gpu]
    roofline = steptimes.Roofline(llama.shape("llama-3-8b"), sheet, tensor_parallel=2)
    assert way.system.steps.step_s(2, 600, 30, 12_000) == roofline.step_s(2, 600, 30, 12_000)
    slower = questions.ways(asked(gpu=gpu, gpus=8), profile)["4 × FP16 TP2, 8 adapters each"].system.steps
    times = asked().adapters_slower
    assert slower.step_s(2, 600, 30, 12_000) == pytest.approx(times * roofline.step_s(2, 600, 30, 12_000))
    assert slower.decode_steps_s(2, 30, 12_000)[0] == pytest.approx(times * roofline.step_s(0, 0, 30, 12_000))


def test_fewer_experts_have_replicas_where_the_load_is(profile: config.Profile) -> None:
    ways = questions.ways(asked(gpus=8, experts=3, spread="normal"), profile)
    system = ways["8 × FP8 TP1, 3 experts"].system
    assert len(system.experts) == 8
    share = questions.shares(asked(spread="normal"), profile, 3)
    servers = Counter(system.experts)
    assert sum(share) == pytest.approx(1)
    assert max(servers, key=servers.__getitem__) == int(np.argmax(share))
    assert "8 × FP16 TP1, 3 adapters each" in ways
    assert not any("expert" in name for name in questions.ways(asked(gpus=1, experts=3), profile))


def test_requests_of_a_trace_are_its_rows(profile: config.Profile) -> None:
    mine = trace(cluster=np.arange(40) % 8)
    question = asked(lengths=mine, requests_per_s=None)
    assert question.rate_per_s == mine.requests_per_s == pytest.approx(39 / mine.arrival_s[-1])
    first, second = (questions.drawn(question, profile, 10, draw) for draw in (0, 1))
    assert [prompt.prompt for prompt in first] == list(range(10))
    assert [prompt.prompt for prompt in second] == list(range(8, 18))
    assert [(p.input_tokens, p.max_tokens, p.cluster) for p in first] == list(
        zip(mine.input_tokens[:10], mine.output_tokens[:10], range(10), strict=True)
    )[:8] + [(int(mine.input_tokens[n]), int(mine.output_tokens[n]), n - 8) for n in (8, 9)]
    run_on = questions.drawn(question, profile, 10, 4)
    assert [prompt.prompt for prompt in run_on] == [*range(32, 40), 0, 1]


def test_a_profile_asks_a_question() -> None:
    profile = config.load_profile("smoke", {"what_if.gpus": 4, "sensitivity.gpu_hour": 3})
    question = questions.asked_in(profile)
    assert (question.gpus, question.gpu_hour, question.requests_per_s) == (4, 3, 150)
    with pytest.raises(ConfigError, match="one of requests_per_s and users"):
        config.load_profile("smoke", {"what_if.users": 4})


def test_a_profile_may_name_a_trace_which_comes_as_it_came(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    traces.write(Trace("mine", "own", np.arange(20) * 0.5, np.full(20, 90), np.full(20, 30)), file)
    question = questions.asked_in(config.load_profile("smoke", {"what_if.trace": str(file)}))
    assert question.trace is not None and question.rate_per_s == pytest.approx(19 / 9.5)
    faster = config.load_profile("smoke", {"what_if.trace": str(file), "what_if.requests_per_s": 8})
    assert questions.asked_in(faster).rate_per_s == 8
    with pytest.raises(ConfigError, match=r"nowhere\.csv"):
        questions.asked_in(config.load_profile("smoke", {"what_if.trace": str(tmp_path / "nowhere.csv")}))
