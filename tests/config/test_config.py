"""Profiles and configurations: what is wrong is said at once."""

import os
import re
import sys

import pytest

from erlib import cache, config, paths
from erlib.load import readiness
from erlib.serving import triton
from scripts import run_all


@pytest.mark.parametrize("name", sorted(path.stem for path in paths.PROFILES.glob("*.yaml")))
def test_shipped_profiles_are_valid(name):
    profile = config.load_profile(name)
    assert profile.name == name


@pytest.mark.parametrize("name", config.config_ids())
def test_shipped_configurations_are_valid(name):
    assert config.load_configuration(name).system.batch_size > 0


def test_overrides_change_the_profile_and_its_digest():
    before = config.load_profile("smoke")
    after = config.load_profile("smoke", {"paper1.repeats": 3, "clusterer.normalizer": "standard"})
    assert (after.paper1.repeats, after.clusterer.normalizer) == (3, "standard")
    assert after.digest != before.digest == config.load_profile("smoke").digest


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"paper1.repeat": 3}, "did you mean 'paper1.repeats'"),
        ({"paper1": 3}, "unknown key 'paper1'"),
        ({"paper1.repeats": 0}, "paper1.repeats: Input should be greater than 0"),
        ({"paper1.users": "many"}, "paper1.users: Input should be a valid list"),
        ({"clusterer.normalizer": "l1"}, "clusterer.normalizer: Input should be 'l2' or 'standard'"),
        ({"paper1.configs": ["p1.Z"]}, "unknown configuration 'p1.Z'"),
        ({"serving.base_port": 80}, "serving.base_port"),
    ],
)
def test_wrong_overrides_are_named(overrides, message):
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        config.load_profile("smoke", overrides)


FILE = {"corpus.name": "jsonl", "corpus.path": "my/text.jsonl"}


def test_relative_paths_start_at_the_repository_wherever_a_command_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    read = config.load_profile("smoke", FILE | {"clusterer.pickles": "https://host/c4/8"})
    assert read.corpus.path == str(paths.ROOT / "my/text.jsonl")
    assert read.clusterer.pickles == "https://host/c4/8"
    read = config.load_profile("smoke", FILE | {"corpus.path": "~/x.jsonl", "clusterer.pickles": "~/c4"})
    assert (read.corpus.path, read.clusterer.pickles) == (f"{tmp_path}/x.jsonl", f"{tmp_path}/c4")


AN_ADDRESS = {"serving.host": "10.0.0.1"}


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": -1},
        {"seed": 2**32},
        {"seed": True},
        {"scale.users": float("inf")},
        {"scale.tokens": float("nan")},
        {"scale.seconds": 1e-300},
        {"workload.sigma": 1e-9},
        {"serving.start_timeout_s": float("inf")},
        {"serving.gateways": 10**9},
        {"serving.host": "::1"},
        {"serving.host": "127.0.0.1:80; deny all"},
        {"serving.host": "1.2.3"},
        {"serving.host": "255.255.255.255"},
        {"serving.host": ""},
        AN_ADDRESS | {"serving.users_on": "-oProxyCommand=id"},
        AN_ADDRESS | {"serving.users_on": "host\n"},
        {"serving.cluster": "-x:1"},
        {"paper1.configs": []},
        {"paper1.configs": ["p2.A"]},
        {"paper2.configs": ["p1.A"]},
        {"paper1.configs": ["p1.A", "p1.A"]},
        {"paper1.users": []},
        {"paper1.users": [4, 4]},
        {"paper1.users": [10**9]},
        {"paper1.repeats": 10**9},
        {"paper2.mixes": ["normal", "normal"]},
        {"preliminary.dtypes": []},
        {"preliminary.batch_sizes": [20, 20]},
        {"emulation.configs": ["p2.D", "p2.D"]},
        {"replicas.added": [1, 1]},
        {"overhead.config": "p2.A"},
        {"engines.speed_batches": [1, 1]},
        {"corpus.name": "jsonl"},
        {"corpus.name": "c4", "corpus.documents": None},
        {"corpus.path": "x.jsonl"},  # of 20 Newsgroups: it would not be read
        FILE | {"corpus.path": "a\0b"},
        FILE | {"corpus.path": ""},
        FILE | {"corpus.path": "x" * 300},
        FILE | {"corpus.path": "x/" * 3000},
        FILE | {"corpus.path": "~nobody-of-this-name/x.jsonl"},
        FILE | {"corpus.text_field": ""},
        {"clusterer.pickles": "file:///c4"},
        {"clusterer.pickles_sha256": ["0" * 64, "no"]},
        *({"name": name} for name in ("x/../../y", "..", "/tmp/x", "", "a\n", "a" * 300, "-x", ".x")),
    ],
    ids=str,
)
def test_values_that_would_fail_late_or_count_twice_are_refused_with_the_profile(overrides):
    with pytest.raises(config.ConfigError) as refused:
        config.load_profile("smoke", overrides)
    message = str(refused.value)
    assert f"--set {list(overrides)[-1]}" in message or f", {list(overrides)[-1]}" in message
    assert "\n" not in message


def test_the_most_that_a_profile_may_ask_for_has_ports():
    most = {"serving.base_port": 60000, "serving.gateways": 1000, "replicas.added": [1000]}
    profile = config.load_profile("smoke", most)
    assert readiness.ports(profile).stop + max(profile.replicas.added) * triton.TritonServer.PORTS <= 65536
    for key, value in most.items():
        with pytest.raises(config.ConfigError, match=key):
            config.load_profile("smoke", {key: [value[0] + 1] if isinstance(value, list) else value + 1})


def test_what_is_wrong_is_named_where_it_stands(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text((paths.PROFILES / "smoke.yaml").read_text().replace("users: [1, 4]", "users: [1, 1]", 1))
    for overrides in ({}, {"paper2.users": [2]}):
        with pytest.raises(config.ConfigError, match=r"^\S*mine\.yaml: paper1\.users: 1 is given twice"):
            config.load_profile(str(mine), overrides)
    with pytest.raises(config.ConfigError, match=r"^--set paper1\.users: 2 is given twice"):
        config.load_profile(str(mine), {"paper1.users": [2, 2]})
    with pytest.raises(config.ConfigError, match=r"mine\.yaml with --set serving\.users_on: serving: users on"):
        config.load_profile(str(mine), {"paper1.users": [2], "serving.users_on": "other"})


def test_a_thousand_mistakes_are_a_few_lines():
    with pytest.raises(config.ConfigError) as refused:
        config.load_profile("smoke", {"paper1.users": ["x"] * 1000})
    assert 1 <= len(str(refused.value).splitlines()) <= 10


def test_a_section_left_empty_has_its_defaults(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text((paths.PROFILES / "smoke.yaml").read_text().replace("corpus: {documents: 1500}", "corpus:"))
    assert config.load_profile(str(mine)).corpus == config.CorpusSettings()
    assert config.load_profile(str(mine), {"corpus.documents": 5}).corpus.documents == 5
    mine.write_text(mine.read_text().replace("\ncorpus:", "\ncorpus: 5"))
    with pytest.raises(config.ConfigError, match="'corpus' must hold keys"):
        config.load_profile(str(mine), {"corpus.documents": 5})


def test_none_is_none_wherever_a_key_may_be_left_out():
    keys = ("what_if.trace", "emulation.steps", "your_gpu.python", "corpus.label_field", "what_if.gpu_gb")
    given = config.read_overrides([f"{key}=none" for key in keys])
    profile = config.load_profile("laptop", given)
    for section, name in (key.split(".") for key in keys):
        assert getattr(getattr(profile, section), name) is None
    assert profile.digest == config.load_profile("laptop", dict.fromkeys(keys)).digest
    users = config.load_profile("laptop", config.read_overrides(["what_if.requests_per_s=none", "what_if.users=9"]))
    assert users.what_if.requests_per_s is None
    with pytest.raises(config.ConfigError, match=r"what_if.gpus"):
        config.load_profile("laptop", config.read_overrides(["what_if.gpus=none"]))


def test_overrides_on_a_command_line():
    items = ["paper1.users=[1, 2]", "corpus.path=~/x", "seed=010", "description=on"]
    assert config.read_overrides(items) == {
        "paper1.users": [1, 2],
        "corpus.path": "~/x",
        "seed": 10,
        "description": "on",
    }
    wrong = {"paper1.users=[1,": "line", "corpus.text_field=@text": "@text", "paper1.users": "KEY=VALUE"}
    for item, message in wrong.items():
        with pytest.raises(config.ConfigError, match=message) as refused:
            config.read_overrides([item])
        assert "\n" not in str(refused.value)
    with pytest.raises(config.ConfigError, match="seed is given twice"):
        config.read_overrides(["seed=1", "seed=2"])


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(config.ConfigError, match="did you mean 'laptop'"):
        config.load_profile("latop")
    with pytest.raises(config.ConfigError, match=r"did you mean 'p2\.E'"):
        config.load_configuration("p2.e")
    with pytest.raises(config.ConfigError, match=r"no configuration 'p3\.A'"):
        config.load_configuration("p3.A")


def test_profile_files_are_checked(tmp_path):
    wrong = tmp_path / "mine.yaml"
    wrong.write_text((paths.PROFILES / "smoke.yaml").read_text().replace("repeats:", "repeat:"))
    with pytest.raises(config.ConfigError, match=re.escape("mine.yaml: paper1.repeat: unknown key (did you mean")):
        config.load_profile(str(wrong))
    wrong.write_text("- a list")
    with pytest.raises(config.ConfigError, match="must hold a mapping"):
        config.load_profile(str(wrong))
    wrong.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(config.ConfigError, match="not readable YAML"):
        config.load_profile(str(wrong))


@pytest.mark.parametrize("name", ["", "a\nb", "../profiles/smoke", "x" * 300, "x" * 300 + ".yaml", "a\0b.yaml", "-p"])
def test_profiles_that_cannot_be_are_refused_in_one_line(name):
    with pytest.raises(config.ConfigError) as refused:
        config.load_profile(name)
    assert "\n" not in str(refused.value)


def test_a_profile_is_a_file(tmp_path):
    (tmp_path / "a.yaml").mkdir()
    os.mkfifo(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").symlink_to("c.yaml")
    for name in "abc":
        with pytest.raises(config.ConfigError, match=rf"{name}\.yaml"):
            config.load_profile(str(tmp_path / f"{name}.yaml"))
    spaced = tmp_path / "my profile.yaml"
    spaced.write_text((paths.PROFILES / "smoke.yaml").read_text())
    with pytest.raises(config.ConfigError, match=r"name: 'my profile' is not a name"):
        config.load_profile(str(spaced))


def test_a_baseline_stands_beside_a_row_of_table_one(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ENGINE_SPECS", tmp_path)
    spec = (paths.ROOT / "engines/p1.R.yaml").read_text()
    (tmp_path / "p1.R.yaml").write_text(spec.replace("p1.C", "p1.R"))  # itself
    with pytest.raises(config.ConfigError, match=r"stands_beside: 'p1\.R' is no configuration with a row"):
        config.load_configuration("p1.R")


def test_scaling_keeps_at_least_one():
    profile = config.load_profile("laptop")
    assert profile.scaled_users(1000) == 50
    assert profile.scaled_users(1) == profile.scaled_tokens(1) == profile.scaled_input_tokens(1) == 1


def test_the_papers_scale_has_the_profiles_levels_and_never_more_preliminary_ones_than_the_paper():
    full = config.at_paper_scale(config.load_profile("laptop", {"paper_scale.repeats": 10, "seed": 5}))
    assert (full.name, full.seed, full.scale.users, full.scale.tokens) == ("laptop", 5, 1, 1)
    assert full.paper1.users == full.paper2.users == [1, *range(100, 1001, 100)]
    assert (full.paper1.repeats, full.preliminary.repeats) == (10, 5)
    assert full.preliminary.users == [1, 100, 200, 300, 400, 500]
    assert full.preliminary.batch_sizes == [20, 100, 200, 400, 600]
    few = config.at_paper_scale(config.load_profile("smoke", {"paper_scale.users": [1, 800]}))
    assert (few.paper2.users, few.preliminary.users, few.preliminary.repeats) == ([1, 800], [1, 500], 1)


def test_digest_tells_content_apart(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("ab")
    two.write_text("c")
    assert cache.digest(one, two) != cache.digest(two, one)
    assert cache.digest({"a": 1, "b": 2}) == cache.digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "paper1.repeat=3"], "did you mean 'paper1.repeats'"),
        (["--set", "paper1.repeats"], "KEY=VALUE"),
        (["--only", "05_load_swep"], "did you mean '05_load_sweep'"),
        (["--profile", "laptob"], "did you mean 'laptop'"),
    ],
)
def test_run_all_refuses_what_it_does_not_know(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py", *arguments])
    assert run_all.main() == 2
    assert message in capsys.readouterr().err


def test_dry_run_says_what_would_run_and_why(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--profile", "smoke", "--dry-run", "--from", "08"])
    assert run_all.main() == 0
    named = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert named == [
        "08_figures_paper1", "09_figures_paper2", "11_experts", "12_your_gpu", "13_what_if", "10_scorecard",
    ]  # fmt: skip
