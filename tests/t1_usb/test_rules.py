"""The rules file: each mistake is one sentence, and only trusted files count."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from udf.errors import UserError
from udf.manifest import Match
from udf.usb.matching import DeviceFacts, InterfaceFacts, volume_rule
from udf.usb.rules import MAX_RULES, NO_RULES, SYSTEM_RULES, Rule, Rules, check_rules, read_rules, rules_files


def sentence(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"ban": []}, "the rule 'ban' is of no known kind: there are [[allow]], [[deny]], [[prefer]], [[volume]]"),
    ({"deny": {"vendor": 1}}, "the rule 'deny' must be written as [[deny]]"),
    ({"deny": [1]}, "the rule 'deny[0]' must be a table, not 1"),
    ({"deny": [{}] * (MAX_RULES + 1)}, f"more than {MAX_RULES}"),
    ({"deny": [{"vendor": "x"}]}, "the rule 'deny[0].vendor' must be a number"),
    ({"deny": [{"product": 1}]}, "the rule 'deny[0].product' means nothing without vendor"),
    ({"allow": [{"colour": 1}]}, "the rule 'allow[0].colour' is not known there"),
    ({"allow": [{"port": 1}]}, "the rule 'allow[0].port' must be a printable text"),
    ({"allow": [{"bus": ""}]}, "the rule 'allow[0].bus' must be a printable text"),
    ({"allow": [{"driver": "../x"}]}, "the rule 'allow[0].driver' is '../x', which is not the name of a driver"),
    ({"prefer": [{"vendor": 1}]}, "the rule 'prefer[0]' names no driver"),
    ({"deny": [{"options": {"a": 1}}]}, "the rule 'deny[0].options' mean nothing here"),
    ({"deny": [{"label": "X"}]}, "the rule 'deny[0].label' is not known there"),
    ({"prefer": [{"driver": "x", "automount": True}]}, "the rule 'prefer[0].automount' is not known there"),
    ({"volume": [{"automount": "no"}]}, "the rule 'volume[0].automount' must be true or false, not 'no'"),
    ({"volume": [{"label": 7}]}, "the rule 'volume[0].label' must be a printable text"),
    ({"volume": [{"options": {"A": 1}}]}, "the rule 'volume[0].options.A' is not the name of an option"),
    ({"prefer": [{"driver": "x", "options": []}]}, "the rule 'prefer[0].options' must be a table"),
    ({"prefer": [{"driver": "x", "options": {"A": 1}}]}, "the rule 'prefer[0].options.A' is not the name of an option"),
    ({"prefer": [{"driver": "x", "options": {"a": []}}]}, "the rule 'prefer[0].options.a' must be a text, a number"),
]


@pytest.mark.parametrize(("table", "expected"), MISTAKES, ids=[text[:50] for _, text in MISTAKES])
def test_each_mistake_is_one_sentence(table: dict[str, Any], expected: str) -> None:
    text = sentence(check_rules, table, "/etc/udf/rules.toml")
    assert text.startswith("/etc/udf/rules.toml: ")
    assert expected in text


def test_a_rules_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(
        '[[deny]]\nclass = 3\n[[allow]]\nvendor = 0x046d\nport = "1-*"\n'
        '[[prefer]]\nserial = "A*"\ndriver = "acm"\noptions = { baud = 9600, loud = true, rate = 0.5, name = "x" }\n'
    )
    rules = read_rules(path, must_exist=True)
    assert rules.deny[0].match == Match(class_code=3)
    assert (rules.allow[0].match, rules.allow[0].port) == (Match(vendor=0x046D), "1-*")
    assert rules.prefer[0].options == {"baud": "9600", "loud": "1", "rate": "0.5", "name": "x"}
    assert rules.prefer[0].where == f"rule prefer[0] of {path}"
    both = rules.followed_by(rules)
    assert (len(both.allow), len(both.deny), len(both.prefer)) == (2, 2, 2)


def test_the_rules_of_the_readme_are_rules() -> None:
    (text,) = re.findall(r"```toml\n(# /etc/udf/rules.toml.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    rules = check_rules(tomllib.loads(text), "README.md")
    assert (len(rules.allow), len(rules.deny), len(rules.prefer)) == (1, 2, 1)


def test_no_file_means_no_rules_unless_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    assert read_rules(path) is NO_RULES
    assert "cannot be examined" in sentence(read_rules, path, must_exist=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[[deny", "the rules file is not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"#" * (64 * 1024 + 1), "larger than 64 KiB"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_bytes(content)
    assert expected in sentence(read_rules, path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in sentence(read_rules, tmp_path / "fifo")
    assert "not a regular file" in sentence(read_rules, tmp_path)


def test_a_file_that_others_can_change_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("")
    path.chmod(0o666)
    assert "can be written by everybody: chmod o-w" in sentence(read_rules, path)
    path.chmod(0o644)
    assert read_rules(path) == Rules()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_ignores_a_file_that_is_not_roots(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("")
    os.chown(path, 65534, 65534)
    assert "belongs to uid 65534, who could change it" in sentence(read_rules, path)


def test_a_users_own_file_counts_before_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert rules_files() == [Path("/home/ann/.config/udf/rules.toml"), SYSTEM_RULES]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert rules_files() == [SYSTEM_RULES]
    assert rules_files("/x/rules") == [Path("/x/rules")]


def test_the_first_rule_about_a_volume_counts() -> None:
    rules = check_rules(
        {
            "volume": [
                {"serial": "A*", "label": "BACKUP*", "automount": False},
                {"serial": "A*", "options": {"ro": True, "uid": 1000}, "driver": "fat"},
                {"port": "1-2"},
            ]
        },
        "f",
    )

    def found(label: str, **facts: Any) -> Rule | None:
        interfaces = (InterfaceFacts(0, ((8, 6, 0x50),)),)
        return volume_rule(DeviceFacts("k", 1, 2, interfaces=interfaces, **facts), label, rules)

    assert found("BACKUP-1", serial="A1") is rules.volume[0]
    assert not rules.volume[0].automount
    second = found("OTHER", serial="A1")
    assert second is rules.volume[1]
    assert (dict(second.options), second.driver, second.automount) == ({"ro": "1", "uid": "1000"}, "fat", True)
    assert found("BACKUP-1", port="1-2") is rules.volume[2]
    assert found("BACKUP-1", serial="B") is None
    assert NO_RULES.followed_by(rules).volume == rules.volume
