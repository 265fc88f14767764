"""Manifests: each mistake is one sentence that names the file and the key, and no code runs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from udf.errors import UserError
from udf.manifest import Manifest, check_manifest, check_requires, driver_options, read_manifest
from udf.manifest.size import parse_size

GOOD: dict[str, Any] = {"kind": "fs", "interface": 1, "class": "Good"}
FOREIGN: dict[str, Any] = {"kind": "fs", "interface": 1, "command": "prog {mountpoint}"}


def sentence(call: Any, *arguments: Any, **named: Any) -> str:
    """The one sentence of a refusal."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def write(path: Path, block: str, code: str = "raise SystemExit('code ran')\n") -> str:
    lines = "".join(f"# {line}\n" if line else "#\n" for line in block.splitlines())
    path.write_text(f'"""What it is."""\n\n# /// udf\n{lines}# ///\n{code}')
    return str(path)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"kind": None}, "'kind' is missing"),
    ({"interface": None}, "'interface' is missing"),
    ({"class": None}, "'class' is missing"),
    ({"kind": "network"}, "'kind' must be one of fs, not 'network'"),
    ({"kind": 7}, "'kind' must be one of fs"),
    ({"kind": "usb"}, "'kind' is 'usb', which this version of udf cannot run yet"),
    ({"kind": "block"}, "'kind' is 'block', which this version of udf cannot run yet"),
    ({"interface": 2}, "'interface' is 2, but this version of udf speaks 1"),
    ({"interface": "1"}, "'interface' must be a whole number"),
    ({"interface": True}, "'interface' must be a whole number"),
    ({"interface": 0}, "'interface' must be a whole number"),
    ({"class": "not a name"}, "'class' must be the name of a class"),
    ({"class": 7}, "'class' must be the name of a class"),
    ({"command": "prog {mountpoint}"}, "'command' is not a key of interface 1 for a Python file"),
    ({"description": 7}, "'description' must be a printable text"),
    ({"description": "a\nb"}, "'description' must be a printable text"),
    ({"source": "floppy"}, "'source' must be one of none, directory, file, device, url, any"),
    ({"capabilities": "CAP_CHOWN"}, "'capabilities' must be a list of texts"),
    ({"capabilities": ["CAP_EVERYTHING"]}, "names 'CAP_EVERYTHING', which is not a capability"),
    ({"capabilities": ["CAP_SYS_ADMIN"]}, "asks for CAP_SYS_ADMIN, which no driver gets"),
    ({"exclusive": "yes"}, "'exclusive' must be true or false"),
    ({"acl": 1}, "'acl' must be true or false"),
    ({"locks": []}, "'locks' must be true or false"),
    ({"open": "never"}, "'open' must be one of known, lazy, driver"),
    ({"durability": "some"}, "'durability' must be one of source, store, none"),
    ({"nodes": True}, "'nodes' must be one of stable, volatile"),
    ({"inodes": "unknown"}, "'inodes' must be one of stable, volatile"),
    ({"durability": "store", "option": {"store": {}}}, "'option.store' has the name by which a driver"),
    ({"deadline": 0}, "'deadline' must be a number of seconds"),
    ({"deadline": "30"}, "'deadline' must be a number of seconds"),
    ({"deadline": float("nan")}, "'deadline' must be a number of seconds"),
    ({"deadline": 1e9}, "'deadline' must be a number of seconds"),
    ({"requires": "prog"}, "'requires' must be a list of texts"),
    ({"requires": ["/bin/sh"]}, "names '/bin/sh', which is not the name of a program"),
    ({"clas": "Typo"}, "'clas' is not a key of interface 1: remove it, or put it below [optional]"),
    ({"optional": 7}, "'optional' must be a table"),
    ({"optional": {"exclusive": 7}}, "'exclusive' must be true or false"),
    ({"option": []}, "'option' must be a table"),
    ({"option": {"Size": {}}}, "'option.Size' is not a usable option name"),
    ({"option": {"ro": {}}}, "'option.ro' is a word that udf itself uses"),
    ({"option": {"size": 7}}, "'option.size' must be a table"),
    ({"option": {"size": {"typ": "int"}}}, "'option.size.typ' is not a key of an option"),
    ({"option": {"size": {"type": "number"}}}, "'option.size.type' must be one of"),
    ({"option": {"size": {"help": 7}}}, "'option.size.help' must be a printable text"),
    ({"option": {"size": {"required": 1}}}, "'option.size.required' must be true or false"),
    ({"option": {"size": {"required": True, "default": "x"}}}, "'option.size.default' makes no sense"),
    ({"option": {"size": {"type": "int", "default": "7"}}}, "'option.size.default' must be of type int"),
    ({"option": {"size": {"type": "int", "default": True}}}, "'option.size.default' must be of type int"),
    ({"option": {"size": {"type": "size", "default": "7X"}}}, "'option.size.default' must be of type size"),
    ({"option": {"size": {"type": "size", "default": -1}}}, "'option.size.default' must be of type size"),
    ({"option": {"size": {"type": "bool", "default": 1}}}, "'option.size.default' must be of type bool"),
]


@pytest.mark.parametrize(("changes", "expected"), MISTAKES, ids=[text[:50] for _, text in MISTAKES])
def test_each_wrong_key_is_one_sentence(changes: dict[str, Any], expected: str) -> None:
    table = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    text = sentence(check_manifest, table, "/drivers/x.py", "x", foreign=False)
    assert text.startswith("/drivers/x.py: the manifest key ")
    assert expected in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"command": None}, "'command' is missing"),
        ({"class": "X"}, "'class' is not a key of interface 1 for a .toml"),
        ({"command": 7}, "'command' must be a printable text"),
        ({"command": "prog"}, "'command' must contain {mountpoint}"),
        ({"command": "{mountpoint}"}, "'command' must begin with the name of a program"),
        ({"command": "prog 'x {mountpoint}"}, "'command' cannot be split into words"),
        ({"durability": "store"}, "'durability' is \"store\", which only a Python driver can have"),
        ({"command": "prog {image} {mountpoint}"}, "'command' uses {image}"),
        ({"command": "prog {source} {mountpoint}"}, 'uses {source}, but the key "source" is "none"'),
    ],
)
def test_each_wrong_key_of_a_foreign_program_is_one_sentence(changes: dict[str, Any], expected: str) -> None:
    table = {key: value for key, value in {**FOREIGN, **changes}.items() if value is not None}
    assert expected in sentence(check_manifest, table, "/drivers/x.toml", "x", foreign=True)


def test_a_manifest_is_read_without_running_the_code(tmp_path: Path) -> None:
    block = 'kind = "fs"\ninterface = 1\nclass = "X"\n\ndeadline = 5\n[option.size]\ntype = "size"\ndefault = "64M"'
    manifest = read_manifest(write(tmp_path / "x.py", block), "x")
    assert (manifest.name, manifest.class_name, manifest.deadline) == ("x", "X", 5.0)
    assert manifest.options["size"].default == 64 << 20
    assert manifest.description == "What it is."


def test_unknown_keys_below_optional_are_skipped_with_a_warning() -> None:
    table = {**GOOD, "optional": {"sparkle": True, "exclusive": True}}
    manifest = check_manifest(table, "/x.py", "x", foreign=False)
    assert manifest.exclusive
    assert [warning for warning in manifest.warnings if "'sparkle'" in warning]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"print(1)\n", "has no manifest block"),
        (b"# /// udf\n# kind = 1\n", "has no end"),
        (b"# /// udf\n# ///\n# /// udf\n# ///\n", "more than one manifest block"),
        (b"# /// udf\n# kind = \n# ///\n", "not valid TOML"),
        (b"# /// udf\n# x = " + b"[" * 5000 + b"\n# ///\n", "not valid TOML"),
        (b"# /// udf\n# kind = 'fs'\nx = 1\n# ///\n", "has no end"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"#\n" * 40000 + b"# /// udf\n# kind = 'fs'\n# ///\n", "in its first 64 KiB"),
    ],
)
def test_a_broken_block_is_one_sentence(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(content)
    assert expected in sentence(read_manifest, str(path), "x")


def test_a_large_toml_a_directory_and_a_missing_file_are_one_sentence(tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.write_text("#" * 70_000)
    assert "larger than 64 KiB" in sentence(read_manifest, str(large), "x")
    assert "cannot be read" in sentence(read_manifest, str(tmp_path / "missing.py"), "x")
    assert "not a regular file" in sentence(read_manifest, "/dev/null", "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(b'# /// udf\r\n# kind = "fs"\r\n# interface = 1\r\n# class = "X"\r\n# ///\r\n')
    assert read_manifest(str(path), "x").class_name == "X"


def with_options(**options: dict[str, Any]) -> Manifest:
    return check_manifest({**GOOD, "option": options}, "/x.py", "x", foreign=False)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("str", "text", "text"),
        ("int", "-7", -7),
        ("float", "1.5", 1.5),
        ("bool", "", True),
        ("bool", "no", False),
        ("bool", "ON", True),
        ("size", "64M", 64 << 20),
        ("size", "1kib", 1024),
        ("size", "512", 512),
        ("path", "a/b", "/work/a/b"),
        ("path", "/a", "/a"),
    ],
)
def test_options_become_their_declared_type(kind: str, text: str, value: object) -> None:
    got = driver_options(with_options(thing={"type": kind}), {"thing": text}, "/work")["thing"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("str", "", "needs a value, and it was given none"),
        ("int", "x", "needs a whole number, not 'x'"),
        ("int", "1.5", "needs a whole number"),
        ("float", "nan", "needs a number, not 'nan'"),
        ("bool", "perhaps", "needs yes or no"),
        ("size", "64X", "needs a size such as 64M, not '64X'"),
        ("size", "-1", "needs a size"),
        ("path", "", "needs a value"),
    ],
)
def test_options_of_the_wrong_type_are_one_sentence(kind: str, text: str, expected: str) -> None:
    manifest = with_options(thing={"type": kind})
    assert f"the option thing of the driver x {expected}" in sentence(driver_options, manifest, {"thing": text})


def test_unknown_required_and_default_options() -> None:
    manifest = with_options(a={"required": True}, b={"type": "int", "default": 7}, c={})
    assert "has no option 'd': it has a, b, c" in sentence(driver_options, manifest, {"d": "1"})
    assert "needs the option a: add -o a=" in sentence(driver_options, manifest, {})
    assert driver_options(manifest, {"a": "x"}) == {"a": "x", "b": 7}


def test_missing_programs_are_one_sentence() -> None:
    manifest = check_manifest({**GOOD, "requires": ["no-such-program"]}, "/x.py", "x", foreign=False)
    assert "needs the program no-such-program: install it first" in sentence(check_requires, manifest)
    check_requires(check_manifest({**FOREIGN, "command": "sh {mountpoint}"}, "/x.toml", "x", foreign=True))


@pytest.mark.parametrize("text", ["", "M", "1.5G", "1e3", "0x10", "64 M B", "\u0661"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)
