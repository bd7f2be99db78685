"""What YAML may say, and what is refused before it takes all memory or the stack."""

from __future__ import annotations

import re

import pytest

from erlib import config, paths
from erlib.config import strict_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("No", "No"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("010", 10),
        ("0x1F", 31),
        ("-5", -5),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("1.5", 1.5),
        ("-.inf", float("-inf")),
        ("true", True),
        ("~", None),
        ("", None),
        ("~/x.jsonl", "~/x.jsonl"),
        ("'5'", "5"),
        ("\ufeffa: 1", {"a": 1}),
        ("a: &b {k: 1, j: 2}\nc: {<<: *b, k: 3}", {"a": {"k": 1, "j": 2}, "c": {"k": 3, "j": 2}}),
        ("a: &b [1, 2]\nc: *b", {"a": [1, 2], "c": [1, 2]}),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    assert strict_yaml.read(text) == value
    assert type(strict_yaml.read(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: key 'a' is given twice"),
        ("a: {b: 1, 'b': 2}", "line 1: key 'b' is given twice"),
        ("x:\n- {a: 1,\n   a: 1}", "line 3: key 'a' is given twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "line 2: key '<<' is given twice"),
        ("a: [1,", "line 2: did not find expected node content"),
        ("@text", "line 1: found character that cannot start any token"),
        ("a:\n\t- 1", "line 2"),
        ("*x", "line 1: found undefined alias"),
        ("---\na: 1\n---\nb: 1", "line 3: but found another document"),
        ("a: !!python/object:os.system x", "line 1: could not determine a constructor"),
        ("a: !!bool maybe", "line 1"),
        ("a: 1\nb: " + "9" * 5000, "line 2: Exceeds the limit"),
        ("a: 1\0", "unacceptable character"),
        (b"a: \xff", "invalid leading UTF-8"),
        ("\ud800", "surrogates not allowed"),
        ("a: " + "[" * 100_000, "line 1: more than 50 levels"),
        ("a: " + "{a: " * 100_000, "line 1: more than 50 levels"),
    ],
    ids=lambda part: repr(part[:30]),
)
def test_what_is_wrong_is_said_in_one_line(text, message):
    with pytest.raises(strict_yaml.YamlError, match=re.escape(message)) as refused:
        strict_yaml.read(text)
    assert "\n" not in str(refused.value)


def test_a_few_aliases_cannot_stand_for_more_than_memory():
    merges = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}]}}" for i in range(1, 12)]
    with pytest.raises(strict_yaml.YamlError, match="aliases"):
        strict_yaml.read("\n".join(["a0: &a0 {k: 1}", *merges]))


def test_files_of_the_repository_are_read_alike():
    files = [path for folder in (paths.PROFILES, paths.ENGINE_SPECS, paths.FACTS) for path in folder.glob("*.yaml")]
    assert len(files) > 10
    for path in files:
        assert config.read_yaml(path)


def test_a_key_that_stands_twice_in_a_profile_names_the_file_and_the_line(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text((paths.PROFILES / "smoke.yaml").read_text() + "seed: 1\n")
    with pytest.raises(config.ConfigError, match=r"mine\.yaml is not readable YAML: line \d+: key .seed. is given"):
        config.load_profile(str(mine))
