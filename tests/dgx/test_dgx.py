"""The DGX's way, whole: plans carried out, repositories rendered and served, users, records. Only kernels stand in."""

from __future__ import annotations

import json
import os
import sys

import pytest

from erlib import config, paths
from erlib.dgx import builds, checkpoints, recipes, tensorrt_llm
from erlib.load import experiments, published, records, sweep
from erlib.machine import hardware, processes
from tests.support.ports import BASE_PORT

STANDIN = paths.ROOT / "tests" / "support" / "standin_dgx_tools.py"
SCALED_DOWN = {
    "scale.users": 250,
    "scale.tokens": 60,
    "corpus.name": "newsgroups",
    "corpus.documents": 1500,
    "serving.gateways": 2,
    "serving.user_processes": 2,
    "serving.base_port": BASE_PORT + 500,
    "serving.start_timeout_s": 150,  # a stand-in is loaded in seconds; real engines take minutes
    "paper1.users": [2],
    "paper1.repeats": 1,
    "paper2.users": [2],
    "paper2.repeats": 1,
    "paper2.mixes": ["uniform"],
}


@pytest.fixture
def dgx(tmp_path, tokenizer, monkeypatch):
    """A machine with the tools' stand-ins, and a profile whose engines have the papers' sizes; lists what is called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("nvidia-smi", "hf", "docker"):
        (tools / name).write_text(f"#!{sys.executable}\n" + STANDIN.read_text().replace("__file__", repr(str(STANDIN))))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT))
    monkeypatch.setenv("STANDIN_HOME", str(tmp_path))
    monkeypatch.setenv("STANDIN_TOKENIZER", str(tokenizer.parent))
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    places = {"tensorrt_llm.checkpoints": str(tmp_path / "hf"), "tensorrt_llm.work": str(tmp_path / "work")}
    # The one file that is fetched before any engine is built; the hub is not there to be asked.
    for model in checkpoints.CHECKPOINTS:
        directory = checkpoints.source(model, tensorrt_llm.Places(tmp_path / "hf", tmp_path / "work"))
        directory.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((tokenizer.parent / name).read_bytes())

    def profile(**overrides):
        return config.load_profile("dgx-h100", SCALED_DOWN | places | overrides)

    def calls() -> list[list[str]]:
        file = tmp_path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return profile, calls


def built(calls: list[list[str]]) -> list[str]:
    return [call[call.index("--output_dir") + 1].rpartition("/")[2] for call in calls if "--max_batch_size" in call]


def test_engines_are_built_once_and_an_interrupted_build_goes_on(dgx, monkeypatch):
    profile, calls = dgx
    plans = [tensorrt_llm.plan(profile(), config.load_configuration(name)) for name in ("p2.B", "p2.C", "p2.D")]
    monkeypatch.setenv("STANDIN_FAILS", plans[1].served.name)
    with pytest.raises(builds.StepFailed, match=r"docker failed with code 1; .*\n.*out of memory") as failure:
        builds.build(plans, "docker")
    assert "build-llama-3-70b-fp8-kv_fp8-tp4-bs100" in str(failure.value)  # the log
    assert built(calls()) == [plans[0].served.name, plans[1].served.name]
    before = len(calls())
    monkeypatch.delenv("STANDIN_FAILS")
    builds.build(plans, "docker")
    assert built(calls()[before:]) == [plans[1].served.name, plans[2].served.name]
    assert not [call for call in calls()[before:] if "--qformat" in call and "tp4" in str(call)]
    before = len(calls())
    builds.build(plans, "docker")
    assert calls()[before:] == []
    step = next(command for command in recipes.commands(plans[0]) if command.purpose == "build")
    assert builds.seconds(step) > 0
    (plans[0].served / "config.json").write_text("{}")
    builds.stamp(step).unlink()
    builds.build(plans, "docker")
    assert built(calls()[before:]) == [plans[0].served.name]


def test_an_engine_that_is_not_what_was_asked_for_is_refused(dgx, tmp_path):
    profile, _ = dgx
    plan = tensorrt_llm.plan(profile(), config.load_configuration("p2.E"))
    builds.build([plan], "docker")
    described = json.loads((plan.served / "config.json").read_text())
    described["build_config"]["max_batch_size"] = 8
    (plan.served / "config.json").write_text(json.dumps(described))
    with pytest.raises(builds.StepFailed, match=r"max_batch_size is 8, not 125"):
        builds.build([plan], "docker")


def fetched(tmp_path) -> dict[str, list[str]]:
    """Files that were fetched, by repository."""
    lines = map(json.loads, (tmp_path / "fetched").read_text().splitlines())
    return {repository: files for repository, *files in lines}


def test_downloads_hold_the_weights_once_and_scripts_are_found_where_an_image_has_them(dgx, tmp_path, monkeypatch):
    """By the real ``hf``, which says what its patterns choose; in an image whose layout is not the expected one."""
    profile, calls = dgx
    monkeypatch.setenv("STANDIN_EXAMPLES", "/app/tensorrt_llm/examples")
    builds.build([tensorrt_llm.plan(profile(), config.load_configuration("p2.D"))], "docker")
    assert fetched(tmp_path) == {
        "meta-llama/Meta-Llama-3-70B": [
            "config.json",
            "generation_config.json",
            "model-1-of-2.safetensors",
            "model-2-of-2.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ],
        "abisee/cnn_dailymail": ["3.0.0/train-00000-of-00003.parquet", "README.md"],
    }
    (quantised,) = [call for call in calls() if "--qformat" in call]
    assert "/app/tensorrt_llm/examples/quantization/quantize.py" in quantised


def test_a_download_without_all_weights_is_none(dgx, tmp_path, monkeypatch):
    profile, _ = dgx
    plan = tensorrt_llm.plan(profile(), config.load_configuration("p2.E"))
    monkeypatch.setenv("STANDIN_LOSES", "model-2-of-2.safetensors")
    with pytest.raises(builds.StepFailed, match=r"without an error, but there is no \S*/model-2-of-2\.safetensors; "):
        builds.build([plan], "docker")
    fetch = recipes.commands(plan)[0]
    builds.stamp(fetch).write_text(json.dumps({"argv": list(fetch.argv), "seconds": 1}))  # whatever a stamp says
    assert not builds.is_done(fetch)
    monkeypatch.delenv("STANDIN_LOSES")
    builds.build([plan], "docker")
    assert builds.is_done(fetch)
    with (plan.source / "model-1-of-2.safetensors").open("r+b") as weights:
        weights.truncate(10**9)
    (cut,) = builds.lacking(fetch)
    assert cut.startswith("7.03 GB of ")
    (plan.source / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json that could be read" in builds.lacking(fetch)[0]


def test_texts_that_are_still_being_fetched_are_not_taken_for_somebodys(dgx, monkeypatch):
    profile, _ = dgx
    fetch = recipes.commands(tensorrt_llm.plan(profile(), config.load_configuration("p2.D")))[1]
    texts = fetch.makes / "3.0.0" / "train-00000-of-00003.parquet"
    texts.parent.mkdir(parents=True)
    texts.touch()
    assert builds.is_done(fetch)  # somebody has put them there
    (fetch.makes / ".cache" / "huggingface").mkdir(parents=True)
    assert not builds.is_done(fetch)
    builds.stamp(fetch).write_text(json.dumps({"argv": list(fetch.argv), "seconds": 1}))
    assert builds.is_done(fetch)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "STANDIN_EXAMPLES",
            "/opt",
            r"quantize\.py --help fails .*/app/examples/.*can't open.*/app/tensorrt_llm/.*can",
        ),
        ("STANDIN_LACKS", "--max_seq_len", r"unrecognized arguments: --max_seq_len .*this image is not as TensorRT"),
    ],
)
def test_an_image_that_lacks_something_is_found_out_when_it_has_come(dgx, monkeypatch, variable, value, message):
    """Before hours of conversion, although nothing of it could be asked before."""
    profile, calls = dgx
    monkeypatch.setenv(variable, value)
    with pytest.raises(builds.StepFailed, match=message):
        builds.build([tensorrt_llm.plan(profile(), config.load_configuration("p2.D"))], "docker")
    assert ["docker", "pull", "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3", None] in calls()
    assert not [call for call in calls() if "--qformat" in call]


def test_a_clone_that_was_cut_off_is_made_anew(dgx, tmp_path):
    """git does not go on where it was; it refuses a directory that is there."""
    profile, _ = dgx
    plan = tensorrt_llm.plan(profile(**{"tensorrt_llm.flow": "llmapi"}), config.load_configuration("p1.D"))
    clone = next(command for command in recipes.commands(plan) if command.program[0] == "git")
    git = tmp_path / "bin" / "git"
    git.write_text('#!/bin/sh\nfor last; do :; done\nmkdir "$last" && touch "$last/whole"\n')
    git.chmod(0o755)
    clone.makes.mkdir(parents=True)
    (clone.makes / "half").touch()
    with pytest.raises(builds.StepFailed, match="docker failed"):  # the stand-in does not quantise for the LLM API
        builds.build([plan], "docker")
    assert [path.name for path in clone.makes.iterdir()] == ["whole"]


def test_a_missing_tool_is_named(dgx, monkeypatch):
    profile, _ = dgx
    monkeypatch.setenv("PATH", "/nonexistent")
    plan = tensorrt_llm.plan(profile(), config.load_configuration("p2.E"))
    with pytest.raises(builds.StepFailed, match=r"hf is not installed"):
        builds.build([plan], "docker")


def test_what_does_not_fit_is_told_before_anything_is_built(dgx, monkeypatch):
    profile, calls = dgx
    monkeypatch.setenv("STANDIN_GPUS", "1")
    with pytest.raises(config.ConfigError, match=r"p1\.A: 138 GB of weights.* do not fit a GPU of 85 GB"):
        experiments.load_sweep(profile(**{"paper1.configs": ["p1.A"]}), "p1")
    monkeypatch.setenv("STANDIN_GPUS", "0")
    with pytest.raises(config.ConfigError, match=r"nvidia-smi finds none"):
        experiments.load_sweep(profile(**{"paper1.configs": ["p1.A"]}), "p1")
    assert built(calls()) == []


def test_four_gpus_carry_four_experts(dgx, monkeypatch):
    profile, _ = dgx
    monkeypatch.setenv("STANDIN_GPUS", "4")
    wanted = profile(**{"paper1.configs": ["p1.C"], "clusterer.n_clusters": 4})
    (series,) = experiments.load_sweep(wanted, "p1")
    assert [plan.gpus for plan in series.system.servers] == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize(("flow", "name"), [("engine", "x1.F"), ("llmapi", "x1.S")])
def test_one_gpu_serves_several_experts_and_the_router_decides_among_them(dgx, monkeypatch, flow, name):
    profile, calls = dgx
    monkeypatch.setenv("STANDIN_GPUS", "1")
    shared = {"tensorrt_llm.experts_per_gpu": 3, "tensorrt_llm.flow": flow, "clusterer.n_clusters": 3}
    wanted = profile(**shared, **{"paper2.configs": [name], "paper2.users": [6]})
    seen = sweep.run(wanted, experiments.load_sweep(wanted, "p2"))
    assert set(seen["status"]) == {"ok"}
    assert (seen["expert"] == seen["cluster"]).all()
    assert seen["expert"].nunique() > 1
    started = [word for call in calls() for word in call if str(word).startswith("CUDA_VISIBLE_DEVICES=")]
    assert set(started) == {"CUDA_VISIBLE_DEVICES=0"}
    assert len(started) >= 3
    if flow == "engine":
        (engine,) = built(calls())
        assert engine.endswith("-step2730")


def test_both_papers_are_measured_as_on_a_laptop(dgx, tmp_path, capsys):
    """Routed experts, one per GPU, and two tensor-parallel servers in turn, asked from another host; found when rerun.

    ``ssh`` is a stand-in too: it runs here what it is given.
    """
    profile, calls = dgx
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text('#!/bin/sh\necho "$@" > "$STANDIN_HOME/ssh-$$"\nfor last; do :; done\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    with pytest.raises(config.ConfigError, match=r"users on load-node cannot reach 127\.0\.0\.1"):
        profile(**{"serving.users_on": "load-node"})
    apart = {"serving.users_on": "load-node", "serving.host": "127.0.0.2"}
    wanted = profile(**apart, **{"paper1.configs": ["p1.C"], "paper2.configs": ["p2.C"]})
    seen = sweep.run(wanted, [*experiments.load_sweep(wanted, "p1"), *experiments.load_sweep(wanted, "p2")])

    assert list(seen.columns) == records.SCHEMA.names
    assert set(seen["source"]) == {"measured"}
    assert set(seen["status"]) == {"ok"}
    assert seen.groupby("config")["user"].nunique().to_dict() == {"p1.C": 2, "p2.C": 2}
    forced = seen[seen["config"] == "p1.C"]
    assert set(forced["turn"]) == {"base", "continuation"}
    assert set(forced["output_tokens"]) == {20}  # 1,200 / 60
    assert (forced["route_vectorise_ns"] > 0).all()
    assert seen["route_queue_ns"].isna().all()  # users and gateways have no clock in common
    assert (seen["network_us_mean"] > 0).all()
    all_of_them = hardware.ranges(os.sched_getaffinity(0))
    assert (seen["server_cores"] == hardware.cores()).all()
    servers = {"p1.C": 8, "p2.C": 2}
    assert (seen["server_cpus"] == seen["config"].map(lambda config: f"{all_of_them} x {servers[config]}")).all()
    assert (seen["network_us_sd"] >= 0).all()
    started = [file.read_text() for file in tmp_path.glob("ssh-*")]
    assert len(started) == 2 * 2  # processes, once per system
    assert all(line.startswith("-o BatchMode=yes -- load-node cd ") for line in started)

    served = [call for call in calls() if "mpirun" in call]
    assert sum(call[1] == "pull" for call in calls()) == 1
    visible = [word for call in served for word in call if str(word).startswith("CUDA_VISIBLE_DEVICES=")]
    assert list(dict.fromkeys(visible)) == [
        f"CUDA_VISIBLE_DEVICES={gpus}" for gpus in (*range(8), "0,1,2,3", "4,5,6,7")
    ]
    assert len(visible) == 10 + _started_again(capsys)
    names = {call[call.index("--name") + 1] for call in served}
    assert names == {call[-2] for call in calls() if call[1] == "rm"}  # nothing is left behind
    assert len(names) == 8  # the second system's servers take the ports of the first

    before = len(calls())
    capsys.readouterr()
    again = sweep.run(wanted, [*experiments.load_sweep(wanted, "p1"), *experiments.load_sweep(wanted, "p2")])
    assert "sweep: 2 of 2 points found by content hash" in capsys.readouterr().out
    assert len(again) == len(seen)
    assert {call[0] for call in calls()[before:]} == {"nvidia-smi"}
    processes.require_free_ports(range(wanted.serving.base_port, wanted.serving.base_port + 30), "127.0.0.2")


def _started_again(capsys) -> int:
    """Servers that were lost while they loaded, as they may be, and each said so."""
    return capsys.readouterr().out.count(": starting it again")


def test_the_llm_api_needs_a_download_and_one_process(dgx, capsys):
    profile, calls = dgx
    wanted = profile(**{"tensorrt_llm.flow": "llmapi", "paper2.configs": ["p2.A"]})
    seen = sweep.run(wanted, experiments.load_sweep(wanted, "p2"))
    assert set(seen["source"]) == {"measured"}
    assert set(seen["status"]) == {"ok"}
    assert seen["user"].nunique() == 2
    assert built(calls()) == []
    served, *again = [call for call in calls() if call[:2] == ["docker", "run"]]
    assert len(again) == _started_again(capsys)
    image = next(i for i, word in enumerate(served) if word.startswith("nvcr.io/"))
    assert served[image + 1] == "tritonserver"
    assert served[served.index("--env") + 1] == "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("paper", "configs", "model"),
    [
        ("p1", ["p1.A", "p1.D"], "Llama-2-70b-hf"),
        ("p1", ["x1.S"], "Llama-3.2-1B"),
        ("p2", ["x1.S", "x1.F"], "Meta-Llama-3-8B"),
        ("preliminary", ["p2.E"], "Meta-Llama-3-70B"),
    ],
)
def test_prompts_are_cut_with_the_tokenizer_of_those_who_read_them(dgx, monkeypatch, paper, configs, model):
    profile, _ = dgx
    asked = []
    monkeypatch.setattr(experiments.Tokenizer, "from_file", asked.append)
    experiments.tokenizer(profile(**{f"paper{1 if paper == 'p1' else 2}.configs": configs}), paper)
    assert [file.split("/")[-2] for file in asked] == [model]


def test_one_gpu_has_no_preliminary_records_and_nothing_is_missing(dgx, monkeypatch, tmp_path):
    profile, calls = dgx
    monkeypatch.setenv("STANDIN_GPUS", "1")
    for file in tmp_path.glob("hf/*70B/tokenizer.json"):  # for which somebody would need access
        file.unlink()
    assert published.preliminary_records(profile()).empty
    assert built(calls()) == []
