"""Manifests: each mistake is one sentence that names the file and the key, and no code runs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from udf.errors import UserError
from udf.manifest import Manifest, Match, check_manifest, check_requires, driver_options, read_manifest
from udf.manifest.size import parse_size

GOOD: dict[str, Any] = {"kind": "fs", "interface": 1, "class": "Good"}
USB: dict[str, Any] = {**GOOD, "kind": "usb", "match": [{"vendor": 0x1209, "product": 0x7E57}]}
BLOCK: dict[str, Any] = {**GOOD, "kind": "block", "source": "file"}
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
    ({"kind": "network"}, "'kind' must be one of fs, block, usb, not 'network'"),
    ({"kind": 7}, "'kind' must be one of fs"),
    ({"interface": 2}, "'interface' is 2, but this version of udf speaks 1"),
    ({"interface": "1"}, "'interface' must be a whole number"),
    ({"interface": True}, "'interface' must be a whole number"),
    ({"interface": 0}, "'interface' must be a whole number"),
    ({"class": "not a name"}, "'class' must be the name of a class"),
    ({"class": 7}, "'class' must be the name of a class"),
    ({"command": "prog {mountpoint}"}, "'command' is not a key of interface 1 for a Python file"),
    ({"description": 7}, "'description' must be a printable text"),
    ({"description": "a\nb"}, "'description' must be a printable text"),
    ({"source": "floppy"}, "'source' must be one of none, directory, file, block, device, url, any"),
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
    ({"requires": ["/bin/sh"]}, "names '/bin/sh', which is neither a program on PATH nor drivers:NAME"),
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

DEVICE_MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (USB, {"match": None}, "'match' is missing: a driver of kind usb says which devices"),
    (USB, {"match": []}, "'match' must be a list such as"),
    (USB, {"match": {"vendor": 1}}, "'match' must be a list such as"),
    (USB, {"match": [7]}, "'match[0]' must be a table such as"),
    (USB, {"match": [{"vendor": 1}] * 201}, "'match' has 201 entries, more than 200"),
    (USB, {"match": [{"vendor": 1}, {"vendor": 0x10000}]}, "'match[1].vendor' must be a number from 0 to 0xffff"),
    (USB, {"match": [{"vendor": "1209"}]}, "'match[0].vendor' must be a number"),
    (USB, {"match": [{"vendor": True}]}, "'match[0].vendor' must be a number"),
    (USB, {"match": [{"class": 256}]}, "'match[0].class' must be a number from 0 to 0xff"),
    (USB, {"match": [{"product": 1}]}, "'match[0].product' means nothing without vendor"),
    (USB, {"match": [{"class": 8, "protocol": 80}]}, "'match[0].protocol' means nothing without subclass"),
    (USB, {"match": [{"subclass": 6}]}, "'match[0].subclass' means nothing without class"),
    (USB, {"match": [{"serial": "x"}]}, "'match[0]' names neither a vendor nor a class"),
    (USB, {"match": [{}]}, "'match[0]' names neither a vendor nor a class"),
    (USB, {"match": [{"vendor": 1, "serial": ""}]}, "'match[0].serial' must be a printable text"),
    (USB, {"match": [{"vendor": 1, "serial": "a\nb"}]}, "'match[0].serial' must be a printable text"),
    (USB, {"match": [{"vendor": 1, "serial": "x" * 127}]}, "'match[0].serial' must be a printable text"),
    (USB, {"match": [{"vendor": 1, "device": 1}]}, "'match[0].device' must be true or false"),
    (USB, {"match": [{"vendor": 1, "device": True, "interface": 0}]}, "'match[0].interface' contradicts device"),
    (USB, {"match": [{"vendor": 1, "any": True}]}, "'match[0].any' makes no sense beside a vendor"),
    (USB, {"match": [{"vendor": 1, "colour": "red"}]}, "'match[0].colour' is not known there"),
    (USB, {"source": "file"}, "'source' is 'file', but the source of a driver of kind usb is its device"),
    (USB, {"provides": "coffee"}, "'provides' must be one of files, block, terminal"),
    (USB, {"names": "Disk"}, "'names' must be a short word of small letters"),
    (USB, {"names": "disk1"}, "'names' must be a short word of small letters"),
    (USB, {"names": "../x"}, "'names' must be a short word of small letters"),
    (USB, {"names": 7}, "'names' must be a short word of small letters"),
    (USB, {"requires": ["drivers:../x"]}, "'requires' names 'drivers:../x'"),
    (USB, {"filesystems": ["ext4"]}, "'filesystems' is for drivers of kind fs, and this one is of kind usb"),
    (BLOCK, {"match": [{"vendor": 1}]}, "'match' is for drivers of kind usb, and this one is of kind block"),
    (BLOCK, {"provides": "files"}, "'provides' is 'files', and a driver of kind block provides \"block\""),
    (BLOCK, {"source": None}, "'source' is missing: a driver of kind block"),
    (BLOCK, {"requires": ["drivers:usb_storage"]}, "'requires' names drivers, which only a driver of kind usb"),
    (GOOD, {"match": [{"vendor": 1}]}, "'match' is for drivers of kind usb, and this one is of kind fs"),
    (GOOD, {"provides": "files"}, "'provides' is for drivers of kinds usb and block"),
    (GOOD, {"names": "disk"}, "'names' is for drivers of kinds usb and block"),
    (GOOD, {"filesystems": ["ext4"]}, "'filesystems' needs a source in which they are"),
    (GOOD, {"source": "block", "filesystems": ["EXT 4"]}, "'filesystems' names 'EXT 4', which is not a filesystem"),
    (GOOD, {"source": "block", "filesystems": "ext4"}, "'filesystems' must be a list of texts"),
]


@pytest.mark.parametrize(
    ("base", "changes", "expected"), DEVICE_MISTAKES, ids=[text[:50] for _, _, text in DEVICE_MISTAKES]
)
def test_each_wrong_key_of_a_device_driver_is_one_sentence(
    base: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    table = {key: value for key, value in {**base, **changes}.items() if value is not None}
    text = sentence(check_manifest, table, "/drivers/x.py", "x", foreign=False)
    assert text.startswith("/drivers/x.py: the manifest key ")
    assert expected in text


def test_a_program_cannot_be_a_device_driver() -> None:
    text = sentence(check_manifest, {**FOREIGN, "kind": "usb"}, "/drivers/x.toml", "x", foreign=True)
    assert "'kind' is 'usb', which only a Python driver can be" in text


def test_device_drivers_say_what_they_are_for_and_what_they_provide() -> None:
    storage = check_manifest(
        {
            **USB,
            "match": [{"class": 8, "subclass": 6, "protocol": 0x50}, {"vendor": 1, "serial": "A*"}],
            "provides": "block",
            "names": "disk",
            "requires": ["sh", "drivers:hub"],
        },
        "/d/usb_storage/__init__.py",
        "usb_storage",
        foreign=False,
    )
    assert (storage.kind, storage.provides, storage.names) == ("usb", "block", "disk")
    assert storage.match == (Match(class_code=8, subclass=6, protocol=0x50), Match(vendor=1, serial="A*"))
    assert [entry.whole_device for entry in storage.match] == [False, True]
    assert [str(entry) for entry in storage.match] == ["interface class 08/06/50", "vendor 0001, serial 'A*'"]
    check_requires(storage)  # a driver that is waited for is no program
    image = check_manifest({**BLOCK, "class": "Image"}, "/d/image.py", "image", foreign=False)
    assert (image.provides, image.names, image.source) == ("block", "image", "file")
    fat = check_manifest({**GOOD, "source": "block", "filesystems": ["vfat"]}, "/d/fat.py", "fat", foreign=False)
    assert (fat.source, fat.filesystems, fat.provides, fat.names) == ("block", ("vfat",), "files", "")


@pytest.mark.parametrize(
    ("name", "names"),
    [("thermometer", "thermometer"), ("My.Thing-2", "my-thing"), ("7", "device"), ("x" * 60, "x" * 31)],
)
def test_instances_are_called_as_their_driver_unless_it_says_otherwise(name: str, names: str) -> None:
    assert check_manifest(USB, "/d/x.py", name, foreign=False).names == names


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
