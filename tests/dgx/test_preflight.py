"""Preflight, smaller machines, estimates and the printed plan: with stand-ins for the programs that would be asked."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError
from hypothesis import given
from hypothesis import strategies as st

from erlib import config, paths
from erlib.config import ConfigError
from erlib.dgx import builds, checkpoints, estimates, fit, hub, option_tables, preflight, recipes, runbook, tensorrt_llm
from erlib.engines import llama
from erlib.machine import hardware
from erlib.machine.hardware import Gpu
from erlib.paper_scale import batching, clock, simulation
from erlib.workload import prompts
from tests.support import ports

BASE_PORT = ports.BASE_PORT + 800
H100 = "NVIDIA H100 80GB HBM3, 81559, 590.44.01, 9.0"
GEFORCE = "NVIDIA GeForce RTX 4090, 81559, 590.44.01, 8.9"
INSISTS = {"tensorrt_llm__version": "1.2.1"}
A100 = Gpu("NVIDIA A100-SXM4-80GB", 81_920 * 2**20, "590.44.01", 8.0)
H200 = Gpu("NVIDIA H200", 143_771 * 2**20, "590.44.01", 9.0)

NVIDIA_SMI = """#!/bin/sh
case "$1" in *memory.used*) cat used ;; *) cat gpus ;; esac
"""
DOCKER = """#!/bin/sh
case "$1" in
info) [ -e refuses ] && { echo "permission denied while trying to connect" >&2; exit 1; }; echo "$PWD" ;;
image) cat image ;;
run) for word; do name=${word##*/}
    [ -e absent ] && expr "$word" : "$(cat absent)" >&2 && { echo "no $word" >&2; exit 2; }
    [ -e "help/$name" ] && exec cat "help/$name"
    done; exit 1 ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A DGX H100 with room for everything and an image that is here; tests take things away from it."""
    tools = tmp_path / "bin"
    (tools / "help").mkdir(parents=True)
    for name, script in {"nvidia-smi": NVIDIA_SMI, "docker": DOCKER, "hf": "#!/bin/sh\n"}.items():
        (tools / name).write_text(script.replace("#!/bin/sh\n", f"#!/bin/sh\ncd {tools}\n"))
        (tools / name).chmod(0o755)
    (tools / "gpus").write_text(f"{H100}\n" * 8)
    (tools / "used").write_text("3\n" * 8)
    (tools / "image").write_text("[]\n")
    contract = option_tables.load_contract("1.2.1")
    for tool in contract.tools:
        (tools / "help" / tool).write_text(option_tables.parser(tool, contract).format_help())
    monkeypatch.setenv("PATH", f"{tools}:/usr/sbin:/usr/bin:/bin")
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda: int(2e12))
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda directory: int(28e12))
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    return tools


@pytest.fixture
def profile(tmp_path):
    """The DGX's, with directories and ports of its own."""

    def load(**overrides):
        own = {
            "serving.base_port": BASE_PORT,
            "tensorrt_llm.checkpoints": str(tmp_path / "hf"),
            "tensorrt_llm.work": str(tmp_path / "work"),
        }
        return config.load_profile(
            "dgx-h100", own | {key.replace("__", "."): value for key, value in overrides.items()}
        )

    return load


def problem(profile):
    """The only problem of a machine."""
    (only,) = preflight.check(profile).problems
    return only


# --- what is found ------------------------------------------------------------------------------------------------


def test_a_dgx_with_everything_has_no_problem(machine, profile, tmp_path):
    report = preflight.check(profile())
    assert report.problems == []
    assert report.fitted.losses == report.fitted.refused == []
    assert [warning for warning in report.warnings if "is not pinned" not in warning] == []
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "hf").exists()


def test_everything_that_is_missing_is_said_at_once(machine, profile, monkeypatch):
    for tool in ("nvidia-smi", "docker", "hf"):
        (machine / tool).unlink()
    monkeypatch.setenv("PATH", f"{machine}:/usr/bin:/bin" if not os.path.exists("/usr/bin/docker") else str(machine))
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda: int(24e9))
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda directory: int(1e9))
    monkeypatch.setattr(hub, "get_hf_file_metadata", raising(httpx.ConnectError("Name or service not known")))
    monkeypatch.setattr(hub.HfApi, "dataset_info", raising(httpx.ConnectError("Name or service not known")))
    found = preflight.check(profile()).problems
    for words in (
        "no GPU",
        "docker is not installed",
        "hf is not installed",
        "of host memory are free",
        "of disk are free",
        "a run needs 4 GB",
        "the Hugging Face hub is out of reach",
    ):
        assert sum(words in one for one in found) == 1, words
    assert len(found) == 7


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("gpus", "overrides", "words"),
    [
        ([H100.replace("590.44.01", "560.35.05")] * 8, {}, "driver 560.35.05 is older than 575.51.03"),
        ([GEFORCE.replace("590.44.01", "550.90.07")] * 8, {}, "these are NVIDIA GeForce RTX 4090: update the driver"),
        ([GEFORCE.replace("590.44.01", "580.95.05")] * 8, INSISTS, "580.95.05 is older than 590.44.01"),
        ([H100] * 8, {"tensorrt_llm__gpus": 9}, "asks for 9 GPUs, there are 8"),
        ([H100] * 7 + ["NVIDIA H200, 143771, 590.44.01, 9.0"], {}, "the GPUs differ"),
    ],
)
def test_wrong_gpus_are_named(machine, profile, gpus, overrides, words):
    (machine / "gpus").write_text("\n".join(gpus))
    assert words in problem(profile(**overrides))


def test_a_newer_driver_is_right_whatever_its_digits_look_like(machine, profile):
    (machine / "gpus").write_text(f"{H100.replace('590.44.01', '1000.5')}\n" * 8)
    assert preflight.check(profile()).problems == []


@pytest.mark.parametrize(
    ("driver", "overrides", "version", "warning"),
    [
        ("590.44.01", {}, "1.2.1", ""),
        ("580.95.05", {}, "0.21.0", "so this takes 25.08-trtllm-python-py3 with TensorRT-LLM 0.21.0; --set"),
        ("580.95.05", INSISTS, "1.2.1", "26.07-trtllm-python-py3 is made for; the image's compatibility package"),
        ("580.95.05", {"tensorrt_llm__flow": "llmapi", "paper1__configs": ["p1.A"]}, "1.2.1", "covers its branch"),
        ("550.90.07", {}, "0.21.0", "driver 550.90.07 is older than 575.51.03, which 25.08-trtllm-python-py3 is"),
        ("590.44.01", {"tensorrt_llm__version": "0.21.0"}, "0.21.0", ""),
    ],
)
def test_the_driver_chooses_the_image(machine, profile, driver, overrides, version, warning):
    """Older branches of a data-centre GPU's driver are a warning where the image brings what they lack."""
    (machine / "gpus").write_text(f"{H100.replace('590.44.01', driver)}\n" * 8)
    contract = option_tables.load_contract(version)
    for tool in contract.tools:
        (machine / "help" / tool).write_text(option_tables.parser(tool, contract).format_help())
    report = preflight.check(profile(**overrides))
    assert report.problems == []
    assert {plan.version for plan in report.fitted.plans} == {version}
    # as the notebooks load it
    assert (report.fitted.profile.tensorrt_llm.version or tensorrt_llm.NEWEST) == version
    said = [line for line in report.warnings if "driver" in line]
    assert (warning in "\n".join(said)) if warning else said == []
    again = fit.fitted(report.fitted.profile, report.gpus)
    assert (again.profile, again.overrides) == (report.fitted.profile, {})


def test_a_gpu_that_somebody_uses_is_named(machine, profile):
    (machine / "used").write_text("3\n3\n40960\n" + "3\n" * 5)
    assert problem(profile()).startswith("somebody uses 42.9 GB of GPU 2")
    assert preflight.check(profile(tensorrt_llm__gpus=2)).problems == []


def test_gpus_that_serve_but_cannot_calibrate_are_told(machine, profile):
    (machine / "gpus").write_text(f"{H100}\n" * 2)
    assert "about 212 GB of GPU memory, there are 170 GB (for p1.D, p2.B, p2.C" in problem(profile())
    left = profile(paper2__configs=["p2.A", "p2.D"], preliminary__dtypes=["int4"])
    assert preflight.check(left).problems == []  # 13B still fits


def test_a_user_who_may_not_use_docker_is_told_how(machine, profile):
    (machine / "refuses").touch()
    assert re.search(r"permission denied .*usermod -aG docker", problem(profile()))


def test_another_runner_is_looked_for_by_its_own_name(machine, profile):
    assert "apptainer is not installed" in problem(profile(tensorrt_llm__runner="apptainer"))


def test_the_tools_in_the_image_have_the_last_word(machine, profile):
    build = machine / "help" / "trtllm-build"
    build.write_text(build.read_text().replace("--max_seq_len", "--max_sequence_length"))
    found = preflight.check(profile(paper1__configs=["p1.C"], paper2__configs=["p2.E"])).problems
    assert found
    assert all("unrecognized arguments: --max_seq_len" in one for one in found)
    (machine / "image").write_text("")  # then only the tables can be asked
    assert preflight.check(profile()).problems == []


def test_scripts_elsewhere_in_the_image_are_found(machine, profile):
    (machine / "absent").write_text("/app/examples")
    assert preflight.check(profile()).problems == []
    (machine / "absent").write_text(".*/examples")
    found = preflight.check(profile()).problems
    assert len(found) == 2
    for tool in ("convert_checkpoint.py", "quantize.py"):
        assert sum(one.startswith(f"{tool} --help fails in 26.07-trtllm-python-py3") for one in found) == 1
    assert all("/app/examples/" in one and "/app/tensorrt_llm/examples/" in one for one in found)


def test_a_tool_that_is_still_to_be_fetched_is_not_asked(machine, profile):
    (machine / "help" / "hf_ptq.py").unlink()
    without = profile(tensorrt_llm__flow="llmapi", paper1__configs=["p1.D"])
    assert preflight.check(without).problems == []


def test_a_tool_that_does_not_start_in_the_image_is_named(machine, profile):
    (machine / "help" / "quantize.py").unlink()
    assert "quantize.py --help fails in 26.07-trtllm-python-py3" in problem(profile())


def test_gated_checkpoints_name_their_licence_and_only_those_that_are_missing(machine, profile, monkeypatch, tmp_path):
    request = httpx.Request("HEAD", "https://huggingface.co")
    denied = GatedRepoError("gated", response=httpx.Response(403, request=request))
    monkeypatch.setattr(hub, "get_hf_file_metadata", raising(denied))
    found = preflight.check(profile()).problems
    assert len(found) == 4
    assert sum("accept the Llama 2 Community License" in one for one in found) == 2
    assert sum("accept the Meta Llama 3 Community License" in one for one in found) == 2
    for name in ("Llama-2-13b-hf", "Meta-Llama-3-8B", "Meta-Llama-3-70B"):
        (tmp_path / "hf" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / "hf" / name / file).write_text("somebody's")
    assert "no access to meta-llama/Llama-2-70b-hf" in problem(profile())


def test_disk_is_counted_per_file_system(machine, profile, monkeypatch):
    sizes = preflight.disk_needs(profile(), preflight.check(profile()).fitted.plans)
    assert 300e9 < sizes[checkpoints.places(profile()).checkpoints] < 340e9  # four models, 16-bit
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda directory: int(sum(sizes.values()) * 0.95))
    assert "of disk are free" in problem(profile())
    numbers = iter(range(1000))
    monkeypatch.setattr(hardware, "file_system", lambda directory: next(numbers))  # each on a disk of its own
    assert preflight.check(profile()).problems == []


def test_a_port_in_use_is_named(machine, profile):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", BASE_PORT + 3))
        taken.listen()
        assert str(BASE_PORT + 3) in problem(profile())


@pytest.mark.parametrize(("key", "name"), [("work", "a b"), ("checkpoints", "a:b"), ("work", "ü"), ("work", "$(b)")])
def test_folders_that_a_shell_in_the_image_would_take_apart_are_named(machine, profile, tmp_path, key, name):
    found = problem(profile(**{f"tensorrt_llm__{key}": str(tmp_path / name)}))
    assert str(tmp_path / name) in found
    assert f"set tensorrt_llm.{key}" in found


def test_a_folder_that_no_search_path_can_name_is_named(machine, profile, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", Path("/a:b"))
    assert problem(profile()).startswith("'/a:b' holds ':'")


def test_a_flow_that_cannot_express_a_system_says_so(machine, profile):
    report = preflight.check(profile(tensorrt_llm__flow="llmapi"))
    assert sum("p1.B: flow llmapi cannot express it" in one for one in report.problems) == 1
    without = profile(tensorrt_llm__flow="llmapi", paper1__configs=["p1.A", "p1.C", "p1.D"])
    assert preflight.check(without).problems == []


def test_a_ready_made_clusterer_needs_as_many_clusters_as_there_are_experts(machine, profile):
    (machine / "gpus").write_text(f"{H100}\n" * 4)
    assert "there are 4 experts" in problem(profile(clusterer__pickles="https://host/c4/8"))
    (machine / "gpus").write_text(f"{H100}\n" * 8)
    assert preflight.check(profile(clusterer__pickles="https://host/c4/8")).problems == []


def test_gpus_that_carry_nothing_are_told(machine, profile):
    (machine / "gpus").write_text("NVIDIA A10, 23028, 590.44.01, 8.6\n" * 2)
    found = "\n".join(preflight.check(profile()).problems)
    assert "none of paper1.configs fits" in found


def test_whoever_knows_better_goes_past_what_is_named_and_nothing_else(machine, profile, monkeypatch):
    (machine / "gpus").write_text(f"{GEFORCE.replace('590.44.01', '560.35.05')}\n" * 8)
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda directory: int(5e9))
    few = {"paper1__configs": ["p1.C"], "paper2__configs": ["p2.E"], "preliminary__dtypes": ["int4"]}
    few |= {"overhead__config": "p2.E"}
    driver, disk = preflight.check(profile(**few)).problems
    assert driver.endswith("(to go on all the same: --set tensorrt_llm.go_past='[driver]')")
    assert disk.endswith("tensorrt_llm.go_past='[disk]')")
    report = preflight.check(profile(tensorrt_llm__go_past=["driver"], **few))
    assert report.problems == [disk]
    assert "driver 560.35.05 is older" in report.warnings[0]
    assert "go_past" not in report.warnings[0]
    (machine / "refuses").touch()
    (only,) = preflight.check(profile(tensorrt_llm__go_past=["driver", "disk"], **few)).problems
    assert only.startswith("docker does not answer")
    assert "go_past" not in only


@pytest.mark.parametrize("what", ["gpus", "runner", "options", "everything"])
def test_what_no_run_survives_cannot_be_gone_past(profile, what):
    with pytest.raises(ConfigError, match=r"tensorrt_llm\.go_past\.0: Input should be 'driver', 'gpus_in_use'"):
        profile(tensorrt_llm__go_past=[what])


@pytest.mark.parametrize("name", ["prompts", "vila", "MyVILA"])
def test_a_path_that_tensorrt_llm_takes_for_another_models_is_refused(machine, profile, tmp_path, name):
    checkpoints = str(tmp_path / name / "hf")
    assert f"tensorrt_llm.checkpoints is {checkpoints}: " in problem(profile(tensorrt_llm__checkpoints=checkpoints))
    # the LLM API takes what was downloaded as it is
    served = {"tensorrt_llm__flow": "llmapi", "paper1__configs": ["p1.A"], "paper2__configs": ["p2.A"]}
    served |= {"preliminary__dtypes": ["fp16"], "overhead__config": "p2.E"}
    assert preflight.check(profile(tensorrt_llm__checkpoints=checkpoints, **served)).problems == []


def test_texts_that_the_container_fetches_itself_need_the_hub(machine, profile, monkeypatch):
    asked = []
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, name, timeout: asked.append(name))
    quantised = {"tensorrt_llm__flow": "llmapi", "paper1__configs": ["p1.D"]}
    assert preflight.check(profile(**quantised)).problems == []
    assert asked.count("abisee/cnn_dailymail") == 1
    monkeypatch.setattr(hub.HfApi, "dataset_info", raising(httpx.ConnectError("Name or service not known")))
    assert "abisee/cnn_dailymail (which hf_ptq.py fetches itself: quantise elsewhere" in problem(profile(**quantised))


# --- smaller machines ---------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(config.config_ids()),
    n_gpus=st.integers(1, 16),
    gpu_bytes=st.floats(16e9, 200e9),
    has_fp8=st.booleans(),
    experts_per_gpu=st.integers(1, 8),
)
def test_what_is_fitted_never_exceeds_the_gpus_nor_the_paper(name, n_gpus, gpu_bytes, has_fp8, experts_per_gpu):
    configuration = config.load_configuration(name)
    printed = configuration.system
    try:
        result, losses = fit.on_gpus(configuration, n_gpus, gpu_bytes, has_fp8, experts_per_gpu)
    except ConfigError as error:
        assert name in str(error)
        return
    system = result.system
    assert system.instances * system.tensor_parallel <= n_gpus * result.per_gpu
    assert result.per_gpu <= experts_per_gpu
    assert llama.gpu_memory(system, result.per_gpu).total <= gpu_bytes
    assert has_fp8 or "fp8" not in (system.dtype, system.kv_dtype)
    for field in ("instances", "tensor_parallel", "batch_size"):
        assert getattr(system, field) <= getattr(printed, field)
    longest = 2021 if "p1" not in configuration.papers else 335 + 2 * 1200
    assert longest <= llama.kv_tokens(system) <= llama.kv_tokens(printed)
    assert (result is configuration) == (not losses)
    if system.kv_cache_gb == printed.kv_cache_gb:
        assert system.batch_size == printed.batch_size


@pytest.mark.parametrize("name", config.config_ids())
@pytest.mark.parametrize("gpu", [hardware.H100, H200], ids=["H100", "H200"])
def test_eight_gpus_of_the_papers_size_or_more_carry_what_the_papers_print(name, gpu):
    configuration = config.load_configuration(name)
    result, losses = fit.on_gpus(configuration, 8, gpu.usable_bytes, gpu.has_fp8)
    assert result is configuration
    assert losses == []


def test_a_dgx_runs_the_profile_as_it_is(profile):
    fitted = fit.fitted(profile(), [hardware.H100] * 8)
    assert fitted.profile == profile()
    assert fitted.losses == fitted.refused == []
    assert fitted.overrides == fitted.left_out == {}
    assert {plan.served for plan in fitted.plans} == {plan.served for plan in tensorrt_llm.needed(profile())}


@pytest.mark.parametrize("n_gpus", [2, 4, 7])
def test_with_fewer_gpus_there_are_as_many_experts_and_clusters(profile, n_gpus):
    fitted = fit.fitted(profile(), [hardware.H100] * n_gpus)
    experts = [one for one in fitted.load if one.routing == "expert_router"]
    assert {one.system.instances for one in experts} == {n_gpus} == {fitted.profile.clusterer.n_clusters}
    again = {"serving.base_port": BASE_PORT, "tensorrt_llm.checkpoints": fitted.profile.tensorrt_llm.checkpoints}
    again |= {"tensorrt_llm.work": fitted.profile.tensorrt_llm.work}
    assert config.load_profile("dgx-h100", again | fitted.overrides) == fitted.profile
    said = "\n".join(fitted.losses)
    assert f"p1.B: {n_gpus} instead of 8 experts" in said
    assert f"clusterer: {n_gpus} clusters instead of 8" in said
    assert f"carries up to {8 / n_gpus:.3g} times the papers' load" in said
    assert list(fitted.left_out) == ["07_paper_scale"]


def test_a_baseline_becomes_narrower_before_it_becomes_fewer(profile):
    systems = {one.id: one for one in fit.fitted(profile(), [hardware.H100] * 4).load}
    assert (systems["p2.A"].system.tensor_parallel, systems["p2.A"].title) == (4, "70B FP16 TP4")
    assert (systems["p2.C"].system.instances, systems["p2.C"].system.tensor_parallel) == (2, 2)
    assert systems["p2.C"].title == "2 x 70B FP8 TP2"
    tokens = llama.kv_tokens(systems["p2.A"].system)
    assert tokens < llama.kv_tokens(config.load_configuration("p2.A").system)
    assert systems["p2.A"].system.batch_size == 200  # still held as longest sequences
    assert systems["p1.A"].system.batch_size < 600


def test_one_gpu_has_nothing_to_route_to(profile):
    fitted = fit.fitted(profile(), [hardware.H100])
    systems = {one.id: one for one in fitted.load}
    assert set(systems) == {"p1.B", "p1.C", "p1.D", "p2.B", "p2.C", "p2.D", "p2.E"}
    assert {one.routing for one in systems.values()} == {"replicas", "direct", "round_robin"}
    assert fitted.profile.clusterer.n_clusters == 8
    assert fitted.profile.paper1.configs == ["p1.B", "p1.C", "p1.D"]
    assert any(reason.startswith("p1.A: 138 GB of weights") for reason in fitted.refused)
    assert "p1.R: on one GPU the same as p1.C, left out" in fitted.losses


@pytest.mark.parametrize(
    ("name", "gpu_gb", "has_fp8", "fits"),
    [
        ("x1.F", 85.5, True, 8),
        ("p2.E", 85.5, True, 4),
        ("p2.E", 150.7, True, 8),  # an H200
        ("x1.S", 85.5, True, 8),
        ("x1.S", 25.7, True, 6),  # a card of 24 GiB
        ("x1.F", 25.7, True, 2),
    ],
)
def test_experts_share_a_gpu_as_far_as_they_fit(profile, name, gpu_gb, has_fp8, fits):
    configuration = config.load_configuration(name)
    gpu_bytes = gpu_gb * 1e9 - hardware.CONTEXT_BYTES
    result, losses = fit.on_gpus(configuration, 1, gpu_bytes, has_fp8, experts_per_gpu=fits)
    assert (result.system.instances, result.per_gpu, result.routing) == (fits, fits, "expert_router")
    assert losses[-2] == f"{name}: {fits} engines share a GPU, and take turns at it"
    memory = llama.gpu_memory(result.system, fits)
    assert memory.total <= gpu_bytes
    # What the last of them finds free, of which it may take its share, is enough for as many tokens as the first has.
    free = gpu_bytes - memory.total + memory.kv_cache / fits
    assert llama.KV_SHARE * free >= 0.999 * memory.kv_cache / fits
    if fits < 8:
        with pytest.raises(ConfigError, match=rf"{name}: {fits + 1} engines .* {fits} would do .*_per_gpu={fits}\)"):
            fit.on_gpus(configuration, 1, gpu_bytes, has_fp8, experts_per_gpu=fits + 1)


@pytest.mark.parametrize(
    ("n_gpus", "most", "experts"), [(1, 4, 4), (2, 8, 8), (3, 8, 8), (3, 2, 6), (4, 8, 8), (8, 8, 8)]
)
def test_the_router_decides_among_eight_on_fewer_gpus(profile, n_gpus, most, experts):
    """Of every system with one GPU per expert alike, since they share the router; others are as they would be."""
    shared = fit.fitted(profile(tensorrt_llm__experts_per_gpu=most), [H200] * n_gpus)
    apart = fit.fitted(profile(), [H200] * n_gpus)
    routed = [one for one in shared.load if one.routing == "expert_router"]
    assert "p2.E" in {one.id for one in routed}
    assert {one.system.instances for one in routed} == {experts} == {shared.profile.clusterer.n_clusters}
    assert ("07_paper_scale" in shared.left_out) == (experts < 8)
    others = {one.id: one for one in apart.load if one.id in ("p1.A", "p2.B", "p2.C")}
    assert {one.id: one for one in shared.load if one.id in others} == others
    if n_gpus == 8:
        assert shared.load == apart.load
    again = fit.fitted(shared.profile, [H200] * n_gpus)
    assert (again.profile, again.load, again.overrides) == (shared.profile, shared.load, {})


def test_one_gpu_is_not_halved_and_all_that_needs_no_half_is_run(profile):
    fitted = fit.fitted(profile(), [hardware.H100])
    assert list(fitted.left_out) == ["04_preliminary_sweep"]
    assert fitted.preliminary == []


def test_experts_share_gpus_of_one_machine_alone(profile):
    with pytest.raises(ConfigError, match=r"experts share GPUs of one machine: set tensorrt_llm\.experts_per_gpu=1"):
        profile(tensorrt_llm__experts_per_gpu=2, serving__cluster="auto")


def test_systems_are_found_by_name_or_their_absence_is_explained(profile):
    fitted = fit.fitted(profile(), [A100] * 8)
    assert [one.id for one in fitted.named(["p2.E", "p1.A"])] == ["p2.E", "p1.A"]
    with pytest.raises(ConfigError, match=r"p1\.D: these GPUs have no FP8"):
        fitted.named(["p1.A", "p1.D"])


def test_what_is_fitted_once_stays_so(profile):
    """Notebooks load the profile with the overrides, and fit it again."""
    once = fit.fitted(profile(), [hardware.H100] * 4)
    again = fit.fitted(once.profile, [hardware.H100] * 4)
    assert (again.profile, again.load, again.overrides) == (once.profile, once.load, {})
    assert again.left_out == once.left_out


def test_an_a100_has_no_fp8(profile):
    fitted = fit.fitted(profile(), [A100] * 8)
    assert {reason[:4] for reason in fitted.refused if "have no FP8" in reason} >= {"p1.D", "p2.B", "p2.C"}
    assert "p1.D" not in fitted.profile.paper1.configs
    assert all(one.system.dtype != "fp8" for one in fitted.configurations)


def test_the_preliminary_experiment_compares_all_gpus_with_half_of_them(profile):
    fitted = fit.fitted(profile(), [hardware.H100] * 4)
    widths = {one.id.split("-")[1]: one.system.tensor_parallel for one in fitted.preliminary}
    assert widths == {"tp8": 4, "tp4": 2}
    assert {one.system.batch_size for one in fitted.preliminary} == set(profile().preliminary.batch_sizes)
    assert sum("preliminary experiment" in loss for loss in fitted.losses) == 1


# --- estimates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "users"), [("p1.A", 200), ("p1.B", 1000), ("p1.D", 500), ("p2.C", 500), ("p2.D", 1000)]
)
def test_a_point_takes_about_as_long_as_in_the_simulation(profile, name, users):
    configuration, whole = config.load_configuration(name), profile()
    paper, steps = name[:2], estimates.step_times(configuration, hardware.H100)
    share = estimates.busiest_share(configuration, whole, "uniform")
    estimate = estimates.point_s(configuration, steps, estimates.turns(whole, paper), users, share)
    drawn = prompts.draw(simulation.textless_workload(whole, paper), users, "uniform", 0, 0)
    system = batching.paper_system(name, answer_limit=1000 if paper == "p2" else None)
    simulated = max(times[-1] for times in clock.trace(system, drawn, paper == "p1").token_ns()) / 1e9
    assert estimate == pytest.approx(simulated, rel=0.4)


def test_other_gpus_are_estimated_from_their_data_sheet_or_not_at_all():
    configuration = config.load_configuration("p1.C")
    seconds = [estimates.step_times(configuration, gpu).decode_s(32, 1000) for gpu in (H200, hardware.H100, A100)]
    assert seconds == sorted(seconds)
    assert estimates.step_times(configuration, Gpu("NVIDIA L40S", 46_068 * 2**20, "590.44.01", 8.9)) is None


def test_a_step_that_was_run_here_is_measured(profile):
    plan = tensorrt_llm.plan(profile(), config.load_configuration("p2.E"))
    step = next(command for command in recipes.commands(plan) if command.purpose == "build")
    before = estimates.of_step(plan, step)
    assert not before.measured
    step.makes.mkdir(parents=True)
    builds.stamp(step).write_text(json.dumps({"argv": list(step.argv), "seconds": 77.5}))
    after = estimates.of_step(plan, step)
    assert (after.seconds, after.measured, after.disk_bytes) == (77.5, True, before.disk_bytes)


# --- the printed plan ---------------------------------------------------------------------------------------------


@pytest.fixture
def plan_text(machine, profile):
    def text(**overrides):
        return runbook.text(preflight.check(profile(**overrides)), [("05_load_sweep", "run: not run before")])

    return text


def section(text, name):
    """One section without its heading."""
    return re.search(rf"\d+\. {name}\n=+\n\n(.*?)(?=\n\n\d+\. |\Z)", text, re.DOTALL)[1]


@pytest.mark.parametrize("overrides", [{}, {"tensorrt_llm__flow": "llmapi"}, {"tensorrt_llm__version": "0.21.0"}])
def test_the_printed_commands_are_those_that_a_run_executes(plan_text, profile, tmp_path, overrides):
    """The shell reads them, and what it starts is what is still to be made."""
    shell = section(plan_text(**overrides), "Commands")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("docker", "hf", "python", "git"):
        (stubs / name).write_text(
            f'#!{sys.executable}\nimport json, sys\nprint(json.dumps(["{name}", *sys.argv[1:]]))\n'
        )
        (stubs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{stubs}:/usr/bin:/bin"}
    reply = subprocess.run(
        ["bash", "-e", "-u", "-c", shell], env=environment, capture_output=True, text=True, check=True
    )
    started = [tuple(json.loads(line)) for line in reply.stdout.splitlines()]
    asked = profile(**overrides)
    fitted = fit.fitted(asked, [hardware.H100] * 8)
    runners = preflight.runners(fitted.plans, asked)
    due = {runners[plan.version].argv(command) for plan, command in builds.missing(fitted.plans)}
    setup = {words for runner in runners.values() for words in runner.setup}
    assert {words for words in started if words[0] != "python"} == due | setup
    checks = [words[4] for words in started if words[0] == "python"]
    assert set(checks) <= set(config.config_ids())


def test_the_plan_has_ports_launches_memory_and_both_tables(plan_text):
    text = plan_text()
    servers = section(text, "Servers")
    assert re.search(
        rf"p1.B +8 +0 \.\.\. 7 +{BASE_PORT} +{BASE_PORT + 1}-{BASE_PORT + 32} +{BASE_PORT + 33}, \+3", servers
    )
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3 " in servers
    memory = section(text, "Memory of each GPU")
    assert re.search(r"p1.B +69\.5 +1\.3 +0\.0 +12\.0 +82\.9 +2\.0", memory)
    assert re.search(r"p1.A +17\.7 +0\.5 +3\.[89] +45\.8 +67\.8 +17\.1", memory)  # seven other ranks' contexts
    tables = section(text, "Table I of the papers")
    assert tables.count(" yes ") == 9
    assert "160,000 KV tokens, which need 131 GB" in tables
    assert "Nothing stops it" in section(text, "Problems")
    assert "nobody has measured" in section(text, "Time and disk")
    assert max(map(len, section(text, "Commands").splitlines())) <= 120


@pytest.mark.parametrize(
    ("gpu", "rows", "refused"),
    [
        (H100, {"x1.S": 8, "x1.F": 8}, ""),
        (GEFORCE.replace("81559", "24564"), {"x1.S": 6, "x1.F": 2}, "x1.S: 8 engines on a GPU of 25 GB need 31 GB"),
        ("NVIDIA A10G, 23028, 590.44.01, 8.6", {"x1.S": 5, "x1.F": 0}, "x1.F: these GPUs have no FP8"),
    ],
)
def test_the_plan_says_how_many_experts_a_gpu_carries(machine, tmp_path, gpu, rows, refused):
    """Acceptance: eight of 8B in FP8 on an H100, of 1B in FP16 on a card of 24 GB."""
    (machine / "gpus").write_text(f"{gpu}\n")
    places = {"tensorrt_llm.checkpoints": str(tmp_path / "hf"), "tensorrt_llm.work": str(tmp_path / "work")}
    asked = config.load_profile("one-gpu", {"serving.base_port": BASE_PORT, **places})
    text = runbook.text(preflight.check(asked), [])
    memory = section(text, "Memory of each GPU")
    for name, fits in rows.items():
        shown = re.search(rf"^{name} +\d+B FP\d+ \(Expert Router\) +(.+)", memory.split("Experts that share")[1], re.M)[
            1
        ]
        numbers = re.findall(r"[\d,]+|-|no FP8", shown)
        assert [number[0].isdigit() for number in numbers] == [True] * fits + [False] * (8 - fits)
    assert refused in section(text, "Systems")
    if not refused:
        assert re.search(r"^x1.F +72\.6 +4\.3 +3\.9 +3\.9 +84\.7 +0\.2", memory, re.M)
        assert re.search(r"^x1.F +8 +0, 8 each ", section(text, "Servers"), re.M)


def test_a_table_that_disagrees_is_shown_as_such(plan_text, monkeypatch):
    whole = config.load_configuration
    wrong = whole("p2.D").system.model_copy(update={"weights_gb": 39.5})
    monkeypatch.setattr(
        config, "load_configuration", lambda n: whole(n).model_copy(update={"paper": wrong} if n == "p2.D" else {})
    )
    assert " NO " in section(plan_text(), "Table I of the papers")


def test_losses_are_told_before_a_smaller_run(machine, profile):
    (machine / "gpus").write_text(f"{H100}\n" * 4)
    report = preflight.check(profile())
    assert report.problems == []
    assert "p2.A: TP4 instead of TP8" in runbook.opening(report)
    assert "p2.A: TP4 instead of TP8" in section(runbook.text(report, []), "Systems")


# --- the command --------------------------------------------------------------------------------------------------


def run_all(home, *arguments):
    """``run_all.py`` as users start it, and how long it took; everything it makes goes to `home`."""
    environment = os.environ | {"ERLIB_HOME": str(home), "HF_HUB_OFFLINE": "", "PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, str(paths.ROOT / "scripts" / "run_all.py"), *arguments]
    before = time.monotonic()
    reply = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(f"{shlex.join(arguments)}: {time.monotonic() - before:.1f} s")
    return reply


@pytest.mark.skipif(bool(hardware.gpus()), reason="this machine has GPUs")
def test_without_a_gpu_the_plan_is_printed_and_a_run_stops_with_nothing_made(tmp_path):
    home = tmp_path / "home"
    shown = run_all(home, "--profile", "dgx-h100", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    for words in ("trtllm-build", "CUDA_VISIBLE_DEVICES", "A run would stop here because", "05_load_sweep"):
        assert words in shown.stdout
    stopped = run_all(home, "--profile", "dgx-h100")
    assert stopped.returncode == 2
    assert "no GPU" in stopped.stderr
    assert "Nothing was started" in stopped.stderr
    assert stopped.stdout == ""
    assert not home.exists()


def test_the_laptop_is_checked_too(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", BASE_PORT + 61))
        taken.listen()
        reply = run_all(tmp_path, "--profile", "smoke", "--set", f"serving.base_port={BASE_PORT + 60}")
    assert reply.returncode == 2
    assert f"port in use: {BASE_PORT + 61}" in reply.stderr
    assert reply.stdout == ""
