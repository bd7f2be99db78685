"""Profiles and configurations: what is wrong is said at once, and the three dependency lists agree."""

import re
import sys

import pytest
import yaml

from erlib import config, paths
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


def test_paths_are_relative_to_the_repository():
    read = config.load_profile("smoke", {"corpus.path": "my/text.jsonl", "clusterer.pickles": "https://host/c4/8"})
    assert read.corpus.path == str(paths.ROOT / "my/text.jsonl")
    assert read.clusterer.pickles == "https://host/c4/8"


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(config.ConfigError, match="did you mean 'laptop'"):
        config.load_profile("latop")
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


def test_scaling_keeps_at_least_one():
    profile = config.load_profile("laptop")
    assert profile.scaled_users(1000) == 32
    assert profile.scaled_users(1) == profile.scaled_tokens(1) == 1


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
    assert config.digest(one, two) != config.digest(two, one)
    assert config.digest({"a": 1, "b": 2}) == config.digest({"b": 2, "a": 1})


def _pins(text: str) -> dict[str, str]:
    found = re.findall(r"^\s*-?\s*([A-Za-z0-9_.\[\]-]+)==([^\s#]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name.split("[")[0].lower()): version for name, version in found}


def test_conda_environment_and_constraints_agree_with_the_pins():
    wanted = _pins((paths.ROOT / "requirements.txt").read_text())
    wanted_alone = _pins((paths.ROOT / "requirements-no-deps.txt").read_text())
    conda = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in conda["dependencies"] if isinstance(item, dict))
    assert _pins("\n".join(pip)) == wanted
    assert any(item.startswith("nginx") for item in conda["dependencies"] if isinstance(item, str))
    locked = _pins((paths.ROOT / "constraints.txt").read_text())
    assert {name: locked.get(name) for name in wanted | wanted_alone} == wanted | wanted_alone


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
    assert named == ["08_figures_paper1", "09_figures_paper2", "10_scorecard"]
