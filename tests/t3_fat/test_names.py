"""Names: which are possible, which are the same, and the short ones."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udf import UserError

from .formats import names

CP437 = "cp437"

# Name, its short name without a number, whether that says the same, case bits or None where a long name is needed.
ALIASES = [
    ("README.TXT", b"README  TXT", True, 0),
    ("readme.txt", b"README  TXT", True, 0x18),
    ("readme.TXT", b"README  TXT", True, 0x08),
    ("README.txt", b"README  TXT", True, 0x10),
    ("Readme.txt", b"README  TXT", True, None),
    ("12345678.123", b"12345678123", True, 0),
    ("a", b"A          ", True, 0x08),
    ("a~1", b"A~1        ", True, 0x08),
    ("123456789", b"12345678   ", False, None),
    ("a.html", b"A       HTM", False, None),
    ("a b", b"AB         ", False, None),
    ("a+b,c.t[", b"A_B_C   T_ ", False, None),
    ("a.tar.gz", b"ATAR    GZ ", False, None),
    (".profile", b"PROFILE    ", False, None),
    ("..a.b", b"A       B  ", False, None),
    (" .x", b"X          ", False, None),
    ("\u00e4.txt", b"\x8e       TXT", True, None),
    ("\u00df", b"\xe1          ", True, None),
    ("\u03c3x", b"\xe4X         ", True, None),
    ("\u65e5\u672c", b"__         ", False, None),
    ("\U0001f600.txt", b"_       TXT", False, None),
    ("a\x7f", b"A_         ", False, None),
]


@pytest.mark.parametrize(("name", "short", "is_exact", "case"), ALIASES)
def test_the_short_name_is_that_of_linux_and_windows(name: str, short: bytes, is_exact: bool, case: int | None) -> None:
    alias = names.Alias(name, CP437)
    assert (alias.short, alias.is_exact) == (short, is_exact)
    assert (None if alias.needs_long else alias.case) == case
    if case is not None:
        assert names.from_short(short, case, CP437) == name
    if is_exact:
        assert names.as_short(name, CP437) == short


def test_a_first_byte_that_would_mean_deleted_is_written_as_another() -> None:
    alias = names.Alias("\u00f5x", "cp850")
    assert alias.short == b"\x05X         "
    assert names.from_short(alias.short, 0, "cp850") == "\u00d5X"
    assert names.as_short("\u00d5x", "cp850") == alias.short


def test_characters_of_two_bytes_are_not_cut() -> None:
    alias = names.Alias("\u65e5\u672c\u8a9e\u306e\u540d\u524d.txt", "cp932")
    assert alias.short == "\u65e5\u672c\u8a9e\u306e".encode("cp932") + b"TXT"
    assert not alias.is_exact
    assert alias.prefix(5) == "\u65e5\u672c".encode("cp932")
    assert names.from_short(alias.short, 0, "cp932") == "\u65e5\u672c\u8a9e\u306e.TXT"
    # A second byte that looks like a backslash or a bar is none that fsck.fat would let pass.
    assert names.Alias("\u8868.txt", "cp932").short == b"_       TXT"


def test_names_that_cannot_be_made_are_refused_as_linux_does() -> None:
    for name in ("...", "."):
        with pytest.raises(FileNotFoundError):
            names.checked(name)
    for name in ("a ", "a .", "a:b", "a*", "a\\b", "a?", "a<", "a>", "a|", 'a"', "a\nb", "\ud800x", ". .", "a/b", "\0"):
        with pytest.raises(OSError) as refused:
            names.checked(name)
        assert refused.value.errno == errno.EINVAL
    for name in ("x" * 256, "\U0001f600" * 128):
        with pytest.raises(OSError) as refused:
            names.checked(name)
        assert refused.value.errno == errno.ENAMETOOLONG
    assert names.checked("x" * 255)[1] == ("x" * 255).encode("utf-16-le")
    assert names.checked("\U0001f600" * 127 + "x..")[0] == "\U0001f600" * 127 + "x"
    with pytest.raises(OSError):
        names.from_kernel(b"\xff")
    assert names.from_kernel(names.to_kernel("\U0001f600\u00e4")) == "\U0001f600\u00e4"


def test_names_are_the_same_without_case_and_dots_at_the_end() -> None:
    for one, other in (("a", "A"), ("\u00e4\u00df", "\u00c4\u00df"), ("a.", "A..."), ("\u0431", "\u0411")):
        assert names.key(one) == names.key(other)
    for one, other in (
        ("\u00df", "SS"),
        ("\u0131", "I"),
        ("\u017f", "S"),
        ("\u00b5", "\u039c"),
        ("a ", "a"),
        ("\ufb01", "FI"),
    ):
        assert names.key(one) != names.key(other)


def test_what_a_bad_volume_calls_its_files_never_harms_the_kernel() -> None:
    assert names.from_units("..".encode("utf-16-le")) == ""
    assert names.from_units("a/../b".encode("utf-16-le")) == "a_.._b"
    assert names.from_units(b"\x00\xd8a\x00") == "\ufffda"
    assert names.from_units(b"") == ""
    assert names.from_short(b".          ", 0, CP437) == ""
    assert names.from_short(b"        TXT", 0, CP437) == ".TXT"
    assert names.from_short(b"           ", 0, CP437) == ""
    assert names.from_short(b"A/B\0XXXX../", 0, CP437) == "A_B..._"
    assert names.from_short(b"\x05BC     \x81  ", 0, "cp1252") == "\xe5BC.\ufffd"
    assert names.label(b"NO NAME    ", CP437) == ""
    assert names.label(b"\x05 B        ", "cp850") == "\u00d5 B"


@given(st.binary(min_size=11, max_size=11), st.integers(0, 255), st.sampled_from([CP437, "cp932", "cp1252", "cp850"]))
def test_any_short_name_is_fit_for_the_kernel(short: bytes, case: int, codepage: str) -> None:
    name = names.from_short(short, case, codepage)
    assert name not in (".", "..")
    assert "/" not in name
    assert "\0" not in name
    assert len(names.to_kernel(name)) <= 255
    if name and names.is_plain(short) and short[0] not in b" \x05":
        assert names.as_short(name, codepage) == short


@given(st.binary(max_size=520).filter(lambda b: len(b) % 2 == 0))
def test_any_long_name_is_fit_for_the_kernel(units: bytes) -> None:
    name = names.from_units(units)
    assert name not in (".", "..")
    assert "/" not in name
    assert "\0" not in name
    assert len(names.to_kernel(name)) <= 1024


@given(st.text(max_size=40), st.sampled_from([CP437, "cp932"]))
def test_any_name_that_can_be_made_has_a_short_one_that_fsck_accepts(name: str, codepage: str) -> None:
    try:
        name, units = names.checked(name)
    except OSError:
        return
    assert names.from_units(units) == name
    alias = names.Alias(name, codepage)
    for short in (alias.short, alias.numbered(alias.prefix(6), 1), alias.numbered(alias.prefix(1), 999999)):
        assert len(short) == 11
        assert short[0] != 0xE5
        assert not set(short[1:]) & set(b'*?<>|"\\/:.\x7f').union(range(32))
        assert short[0] == 5 or short[0] > 32
        assert short.upper() == short or not short.isascii()
    if not alias.needs_long:
        assert names.from_short(alias.short, alias.case, codepage) == name


def test_only_code_pages_that_short_names_can_be_in_are_taken() -> None:
    assert names.codec(437) == CP437
    assert names.codec(932) == "cp932"
    for number in (0, 37, 1200, 65001, -1):
        with pytest.raises(UserError, match=str(number)):
            names.codec(number)


def test_numbers_are_not_tried_twice() -> None:
    taken: set[bytes] = set()
    tried = 0

    def is_taken(short: bytes) -> bool:
        nonlocal tried
        tried += 1
        return short in taken

    numbers = names.Numbers()
    for count in range(12000):
        short = numbers.pick(names.Alias(f"common prefix {count % 7}{count}.text", CP437), is_taken)
        assert short not in taken
        taken.add(short)
    assert b"COMMON~1TEX" in taken
    assert tried < 12100
