"""``x1.L``: experts as adapters of one engine, planned, checked, and served by the real Triton with a stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from erlib import config, paths
from erlib.config import ConfigError
from erlib.dgx import adapters, fit, option_tables, outcome, preflight, recipes, repository, tensorrt_llm
from erlib.dgx.__main__ import main
from erlib.dgx.containers import Places
from erlib.machine import hardware
from erlib.serving import wheel, wire
from tests.support.ports import BASE_PORT
from tests.support.served import PROMPT, Served, answered, difference, refusal, serving

N = 3
HIDDEN, LAYERS = 4096, 32
STANDINS = paths.ROOT / "tests" / "support"


def adapter(
    folder: Path, rank: int = 2, hidden: int = HIDDEN, matrices: tuple[str, ...] = ("q_proj", "v_proj")
) -> Path:
    """As PEFT writes one, of the last layer alone."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank}))
    place = f"base_model.model.model.layers.{LAYERS - 1}.self_attn"
    tensors = {}
    for name in matrices:
        tensors[f"{place}.{name}.lora_A.weight"] = np.zeros((rank, hidden), np.float16)
        tensors[f"{place}.{name}.lora_B.weight"] = np.zeros((hidden, rank), np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    home = tmp_path_factory.mktemp("places")
    for i in range(N):
        adapter(home / "checkpoints" / "experts" / f"expert-{i}", rank=2 + i)
    (home / "work").mkdir()
    return Places(home / "checkpoints", home / "work")


def planned(places: Places, flow: config.Flow = "engine", version: config.Version = "1.2.1") -> tensorrt_llm.Plan:
    configuration = config.load_configuration("x1.L")
    its = adapters.read("x1.L", places.checkpoints / "experts", N, "llama-3-8b", places)
    longest = tensorrt_llm.lengths(configuration, config.WorkloadSettings())
    return tensorrt_llm.Plan(configuration, longest, places, flow, version, its)


# --- planned ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.2.1", "0.21.0"])
def test_commands_fit_the_option_tables(places, version):
    plan, contract = planned(places, version=version), option_tables.load_contract(version)
    assert recipes.misfits(plan, contract) == []
    (build,) = [command for command in recipes.commands(plan) if command.purpose == "build"]
    said = option_tables.parse("trtllm-build", build.options, contract)
    assert (said["lora_plugin"], said["max_lora_rank"]) == ("float16", 4)
    assert said["lora_target_modules"] == ["attn_q", "attn_v"]
    converted = [command for command in recipes.commands(plan) if command.tool == "hf_lora_convert.py"]
    assert [command.makes.name for command in converted] == ["1", "2", "3"]
    froms = [option_tables.parse(one.tool, one.options, contract)["in_file"] for one in converted]
    assert froms == [str(places.checkpoints / "experts" / f"expert-{i}") for i in range(N)]


def test_other_adapters_of_that_kind_need_no_other_engine(places, tmp_path):
    for i in range(N):
        adapter(places.checkpoints / "others" / f"expert-{i}", rank=4)
    mine = planned(places)
    theirs = adapters.read("x1.L", places.checkpoints / "others", N, "llama-3-8b", places)
    other = tensorrt_llm.Plan(mine.configuration, mine.lengths, places, "engine", "1.2.1", theirs)
    assert mine.served == other.served
    assert mine.prefetched != other.prefetched


def test_the_llm_api_reads_adapters_as_they_are(places):
    plan = planned(places, "llmapi")
    assert not [command for command in recipes.commands(plan) if command.tool]
    assert repository.llm_args(plan)["lora_config"]["max_loras"] == N


def test_the_check_of_a_plan_knows_its_adapters(places, capsys):
    plan = planned(places)
    *_, check = recipes.commands(plan)
    assert main(check.argv[3:]) == 1  # nothing has been built
    said = capsys.readouterr().out
    assert "engines" in said and "model.lora_config.npy: not readable" in said


def test_adapters_that_were_converted_from_others_are_found_out(places, tmp_path):
    plan = planned(places)
    for number, folder in plan.adapters.numbered():
        made = plan.prefetched / str(number)
        made.mkdir(parents=True)
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        np.save(made / "model.lora_config.npy", np.array([[[1, 31, rank], [3, 31, rank]]], np.int32))
        np.save(made / "model.lora_weights.npy", np.zeros((1, 2, 2 * rank * HIDDEN), np.float16))
    of_adapters = [line for line in outcome.problems(plan) if "adapters" in line]
    assert of_adapters == []
    np.save(plan.prefetched / "2" / "model.lora_config.npy", np.array([[[1, 31, 64], [3, 31, 64]]], np.int32))
    (line,) = [line for line in outcome.problems(plan) if "adapters" in line]
    assert "rank 64, of another adapter" in line


def test_a_point_knows_the_adapters_by_content_and_not_by_place(places, tmp_path):
    """Or records of other experts would be found again."""

    def described(home: Path, ranks: list[int], flow: config.Flow) -> dict:
        here = Places(home / "checkpoints", home / "work")
        (home / "work").mkdir(parents=True)
        for i, rank in enumerate(ranks):
            adapter(here.checkpoints / "experts" / f"expert-{i}", rank)
        plan = planned(here, flow)
        plan.served.mkdir(parents=True)
        (plan.served / "config.json").write_text("{}")
        (server, *_) = repository.server_plans(plan, "bare", 8)
        repository.render(plan, plan.source, server.repository)
        return server.description

    for flow in ("engine", "llmapi"):
        mine, same, other = (
            described(tmp_path / flow / name, ranks, flow)
            for name, ranks in (("mine", [2, 2, 2]), ("same", [2, 2, 2]), ("other", [2, 2, 1]))
        )
        assert mine == same
        assert mine != other


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"hidden": 576}, "of another base model or rank"),
        ({"matrices": ("q_proj", "embed_tokens")}, "not to embed_tokens"),
    ],
)
def test_what_the_engine_would_not_take_is_said_at_once(places, made, said):
    folder = places.checkpoints / said.replace(" ", "-")
    adapter(folder / "expert-0", **made)
    with pytest.raises(ConfigError, match=said):
        adapters.read("x1.L", folder, 1, "llama-3-8b", places)


def test_adapters_are_asked_for_and_looked_for_where_a_container_sees_them(places, tmp_path):
    profile = config.load_profile("dgx-h100")
    with pytest.raises(ConfigError, match=r"x1\.L: experts\.adapters must name a folder"):
        tensorrt_llm.plan(profile, config.load_configuration("x1.L"))
    with pytest.raises(ConfigError, match=r"a container does not see experts\.adapters"):
        adapters.read("x1.L", tmp_path, N, "llama-3-8b", places)
    with pytest.raises(ConfigError, match="expert-3 holds no adapter"):
        adapters.read("x1.L", places.checkpoints / "experts", N + 1, "llama-3-8b", places)


def fitted(places: Places, n_gpus: int, clusters: int) -> fit.Fitted:
    given = {"experts.adapters": str(places.checkpoints / "experts"), "clusterer.n_clusters": clusters}
    where = {f"tensorrt_llm.{name}": str(getattr(places, name)) for name in ("checkpoints", "work")}
    return fit.fitted(config.load_profile("dgx-h100", {**given, **where}), [hardware.H100] * n_gpus)


@pytest.mark.parametrize("n_gpus", [1, N])
def test_all_experts_are_there_on_one_gpu_and_on_several(places, n_gpus):
    found = fitted(places, n_gpus, N)
    (one,) = found.named(["x1.L"])
    assert (one.system.instances, one.routing, one.adapters) == (n_gpus, "expert_router", True)
    assert len(tensorrt_llm.plan(found.profile, one).adapters.folders) == N
    assert found.named(["p2.E"])


def test_a_gpu_has_to_hold_all_adapters_at_a_time(places, monkeypatch):
    given = {"experts.adapters": str(places.checkpoints / "experts"), "clusterer.n_clusters": N}
    where = {f"tensorrt_llm.{name}": str(getattr(places, name)) for name in ("checkpoints", "work")}
    asked = config.load_profile("dgx-h100", {**given, **where, "tensorrt_llm.gpus": N})

    def said() -> list[str]:
        return [problem for problem in preflight.check(asked).problems if problem.startswith("x1.L: its adapters")]

    assert said() == []
    monkeypatch.setattr(preflight, "ADAPTERS_SHARE", 1e-6)
    (problem,) = said()
    assert "take some of a lower rank" in problem


def test_adapters_of_other_clusters_are_not_served(places):
    with pytest.raises(ConfigError, match=r"x1\.L: its adapters are of 3 clusters, of which this run makes 2"):
        fitted(places, 2, N).named(["x1.L"])
    with pytest.raises(ConfigError, match=r"has expert-2, too, but there are 2 clusters"):
        adapters.read("x1.L", places.checkpoints / "experts", 2, "llama-3-8b", places)


# --- served -----------------------------------------------------------------------------------------------------


def rendered(plan: tensorrt_llm.Plan, target: Path, tokenizer: Path) -> Path:
    """The repository, with the stand-in of its flow."""
    models = repository.render(plan, tokenizer, target, n_processes=1)
    if plan.flow == "llmapi":
        (models / "ensemble" / "1" / "tensorrt_llm.py").symlink_to(STANDINS / "standin_llm_api.py")
        return models
    for number, _ in plan.adapters.numbered():
        (plan.prefetched / str(number)).mkdir(parents=True, exist_ok=True)
    engine = models / "tensorrt_llm" / "config.pbtxt"
    step = 'parameters { key: "step_s" value { string_value: "0.002" } }\n'
    engine.write_text(engine.read_text().replace('backend: "tensorrtllm"', 'backend: "python"') + step)
    (models / "tensorrt_llm" / "1" / "model.py").symlink_to(STANDINS / "standin_tensorrt_llm.py")
    return models


@pytest.fixture(scope="module", params=["engine", "llmapi"])
def served(request, places, tokenizer, tmp_path_factory):
    """Two servers that have all experts."""
    wheel.preflight()
    home = tmp_path_factory.mktemp(request.param)
    models = rendered(planned(places, request.param), home / "x1.L", tokenizer.parent)
    with serving(
        [models] * 2, [tokenizer.parent] * 2, BASE_PORT + 300, home, request.param, adapters=N
    ) as running:  # fmt: skip
        yield running


def test_any_server_answers_with_the_expert_that_the_gateway_names(served: Served):
    before = [server.counters() for server in served.servers]
    replies = served.ask([wire.encode_request(PROMPT, 40, wire.NEVER_STOP)] * 4 * N)
    assert sorted(expert for expert, _ in replies) == sorted([*range(N)] * 4)
    plain = served.expected(0, PROMPT, 40)
    for expert, messages in replies:
        moved = [token if token == served.end_ids[0] else token + expert + 1 for token in plain]
        assert answered(messages) == moved
    after = [server.counters() for server in served.servers]
    done = difference(*([round(one["expert_engine_tokens"]) for one in each] for each in (after, before)))
    assert sum(done) == 40 * 4 * N
    assert min(done) > 0  # both had some
    mixed = difference(*([round(one.get("expert_mixed_steps", 0)) for one in each] for each in (after, before)))
    assert min(mixed) > 0  # requests with different adapters shared steps


@pytest.mark.parametrize("named", [(), (("er-expert", str(N)),), (("er-expert", "-1"),), (("er-expert", "x"),)])
def test_a_request_that_names_no_expert_of_the_servers_is_refused(served: Served, named):
    said = refusal(served.servers[0].url, wire.encode_request(PROMPT, 3, wire.NEVER_STOP), named)
    assert said.removeprefix("in ensemble 'ensemble', ").startswith(
        f"INVALID_ARGUMENT: this server has {N} experts, and metadata er-expert must name one"
    )
