"""Names: long ones, short ones, when two are the same, and how a short one is made up.

Owns: what may be in a name, decoding of what the volume has, comparison without case, 8.3 and its code page.
Must never: do I/O, or give out a name that the kernel cannot have: '/' and NUL, '.' and '..', half a surrogate pair.
Called by: directory.py, index.py; fatcore for names from and to the kernel.

Case is that of Windows: one character to one character, as its table has it, nothing that would turn another
alphabet's letter into one of ASCII. Dots at the end of a name do not count (Linux, Windows); a blank at its end is
refused (Linux). A short name that needs no long one keeps the case of its two halves in two bits (Windows NT).
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable

from udf import UserError

MAX_UNITS = 255
LOWER_BASE, LOWER_EXTENSION = 0x08, 0x10

_FORBIDDEN = frozenset('"*/:<>?\\|').union(map(chr, range(32)))
_REPLACED = frozenset("[];,+=\x7f")  # fine in a long name, '_' in the short one
_SKIPPED = frozenset(". ")
_NOT_AFTER = frozenset(b'"*+,./:;<=>?[\\]|\x7f').union(range(32))  # as the second byte of a character
_KANJI = 0xE5  # would mean a free slot
_STANDS_FOR_KANJI = 0x05

# Short names made of these need no look at the code page, and no entry of their own among the names.
_PLAIN = bytes(sorted(set(range(0x20, 0x7F)) - set(range(0x61, 0x7B)) - set(b"./")))


def codec(codepage: int) -> str:
    """The Python codec of a code page. UserError when it is none that short names can be in."""
    name = f"cp{codepage}"
    try:
        if (
            bytes(range(32, 127)).decode(name) == "".join(map(chr, range(32, 127)))
            and len("\u00e9\u3042".encode(name, "replace")) < 5
        ):
            return name
    except (LookupError, UnicodeError):
        pass
    raise UserError(f"there is no code page {codepage} for short names; 437, 850, 852, 866 and 932 are common ones")


def from_kernel(name: bytes) -> str:
    """A name as a program gave it. EINVAL when it is not UTF-8; ENAMETOOLONG when none can be so long."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise OSError(errno.EINVAL, "the name is not UTF-8") from None
    if len(name) > MAX_UNITS and len(trimmed(text).encode("utf-16-le")) > 2 * MAX_UNITS:
        raise OSError(errno.ENAMETOOLONG, "the name has more than 255 characters")
    return text


def to_kernel(name: str) -> bytes:
    """A name of an entry, for a program."""
    return name.encode()


def trimmed(name: str) -> str:
    """What counts of a name."""
    return name.rstrip(".")


def checked(name: str) -> tuple[str, bytes]:
    """A name that is to be made: without its dots at the end, and in UTF-16. OSError as Linux has it."""
    name = trimmed(name)
    if not name:
        raise FileNotFoundError(errno.ENOENT, "a name of nothing but dots")
    if name[-1] == " " or not _FORBIDDEN.isdisjoint(name):
        raise OSError(errno.EINVAL, "FAT cannot have this name")
    if not name.strip(". "):
        raise OSError(errno.EINVAL, "a name of nothing but dots and blanks")
    try:
        units = name.encode("utf-16-le")
    except UnicodeEncodeError:
        raise OSError(errno.EINVAL, "the name is not Unicode") from None
    if len(units) > 2 * MAX_UNITS:
        raise OSError(errno.ENAMETOOLONG, "the name has more than 255 characters")
    return name, units


def key(name: str) -> str:
    """Equal for names that are the same."""
    name = name.rstrip(".")
    return name.upper() if name.isascii() else "".join(map(_upper, name))


@functools.lru_cache(maxsize=4096)
def _upper(char: str) -> str:
    upper = char.upper()
    if len(upper) != 1 or ord(char) > 0xFFFF or char == "\u00b5" or (upper.isascii() and not char.isascii()):
        return char
    return upper


def from_units(units: bytes) -> str:
    """A long name as it may be shown; empty when there is no way."""
    return _fit(units.decode("utf-16-le", "replace"))


def from_short(short: bytes, case: int, codepage: str) -> str:
    """A short name as it may be shown; empty when there is no way."""
    if case & (LOWER_BASE | LOWER_EXTENSION) == 0 and is_plain(short):
        name = short[:8].decode("ascii").rstrip(" ")
        return f"{name}.{last}" if (last := short[8:].decode("ascii").rstrip(" ")) else name
    base, extension = _unmasked(short[:8]), short[8:]
    name = _half(base, codepage, case & LOWER_BASE)
    if last := _half(extension, codepage, case & LOWER_EXTENSION):
        name = f"{name}.{last}"
    return _fit(name)


def label(short: bytes, codepage: str) -> str:
    """A volume's label; empty when the volume says that it has none."""
    text = _unmasked(short).partition(b"\0")[0].decode(codepage, "replace").rstrip()
    return "" if text == "NO NAME" else text


def _unmasked(short: bytes) -> bytes:
    return bytes((_KANJI,)) + short[1:] if short[0] == _STANDS_FOR_KANJI else short


def _half(part: bytes, codepage: str, lower: int) -> str:
    text = part.partition(b"\0")[0].rstrip(b" ").decode(codepage, "replace")
    return "".join(c if len(low := c.lower()) != 1 else low for c in text) if lower else text


def _fit(name: str) -> str:
    if "/" in name or "\0" in name:
        name = name.replace("/", "_").replace("\0", "_")
    return "" if name in (".", "..") else name


def is_plain(short: bytes) -> bool:
    """Whether `as_short` finds this short name by what `from_short` says."""
    return not short.translate(None, _PLAIN)


def as_short(name: str, codepage: str) -> bytes | None:
    """The 11 bytes under which exactly this name, whatever its case, would be without a long one."""
    base, dot, extension = name.rstrip(".").rpartition(".")
    if not dot:
        base, extension = extension, ""
    halves = _upper_bytes(base, codepage), _upper_bytes(extension, codepage)
    if halves[0] is None or halves[1] is None or not 1 <= len(halves[0]) <= 8 or len(halves[1]) > 3:
        return None
    if halves[0][-1:] == b" " or halves[1][-1:] == b" ":
        return None
    return _joined(halves[0], halves[1])


def _joined(base: bytes, extension: bytes) -> bytes:
    if base[0] == _KANJI:
        base = bytes((_STANDS_FOR_KANJI,)) + base[1:]
    return base.ljust(8) + extension.ljust(3)


def _upper_bytes(text: str, codepage: str) -> bytes | None:
    if text.isascii():
        return text.upper().encode()
    chars = [_char(c, codepage) for c in text]
    return None if None in chars else b"".join(c for c in chars if c is not None)


@functools.lru_cache(maxsize=4096)
def _char(char: str, codepage: str) -> bytes | None:
    """One character in upper case in the code page."""
    for candidate in (_upper(char), char):
        try:
            encoded = candidate.encode(codepage)
        except UnicodeEncodeError:
            continue
        if len(encoded) == 1 or (len(encoded) == 2 and encoded[1] not in _NOT_AFTER):
            return encoded
    return None


class Alias:
    """The short name that a new long name wants: as it is when that is possible, else with a number behind '~'."""

    __slots__ = ("_chars", "case", "extension", "is_exact", "needs_long", "short")

    def __init__(self, name: str, codepage: str) -> None:
        """*name* went through `checked`."""
        stem, extension = _split(name)
        base = _Half(stem, 8, codepage)
        last = _Half(extension, 3, codepage)
        self._chars = base.chars
        self.extension = b"".join(last.chars)
        self.short = _joined(b"".join(base.chars), self.extension)
        self.is_exact = base.is_exact and last.is_exact  # the short name says the same, but for case
        self.case = 0
        self.needs_long = not (self.is_exact and base.has_one_case and last.has_one_case)
        if not self.needs_long:
            self.case = (LOWER_BASE if base.is_lower else 0) | (LOWER_EXTENSION if last.is_lower else 0)

    def prefix(self, length: int) -> bytes:
        """As much of the base as fits into so many bytes, in whole characters."""
        out = b""
        for char in self._chars:
            if len(out) + len(char) > length:
                break
            out += char
        return out

    def numbered(self, prefix: bytes, number: int) -> bytes:
        """The short name with this number."""
        return _joined(prefix + b"~%d" % number, self.extension)


def _split(name: str) -> tuple[str, str]:
    """Base and extension. A name that only begins with dots and blanks has no extension."""
    stem, dot, extension = name.rpartition(".")
    if not dot or not extension or _SKIPPED.issuperset(stem):
        return name, ""
    return stem, extension


class _Half:
    __slots__ = ("chars", "has_one_case", "is_exact", "is_lower")

    def __init__(self, text: str, room: int, codepage: str) -> None:
        self.chars: list[bytes] = []
        self.is_exact = True
        lower = upper = foreign = False
        for char in text:
            if char in _SKIPPED:
                self.is_exact = False
                continue
            encoded = None if char in _REPLACED else _char(char, codepage)
            if encoded is None:
                encoded = b"_"
                self.is_exact = False
            if len(encoded) > room:
                self.is_exact = False
                break
            room -= len(encoded)
            self.chars.append(encoded)
            if not char.isascii():
                foreign = True
            elif char.isalpha():
                lower = lower or char.islower()
                upper = upper or char.isupper()
        self.has_one_case = not foreign and not (lower and upper)
        self.is_lower = lower and not upper


class Numbers:
    """Which number to try next, for each beginning of a short name: nothing is tried twice in a directory's life."""

    _LONGEST = 6  # digits
    _MOST = 8192  # beginnings that are remembered

    def __init__(self) -> None:
        self._next: dict[tuple[bytes, int, bytes], int] = {}

    def pick(self, alias: Alias, is_taken: Callable[[bytes], bool]) -> bytes:
        """A free short name with a number. FileExistsError when a million are not enough."""
        if len(self._next) > self._MOST:
            self._next.clear()
        for _ in range(2):
            for digits in range(1, self._LONGEST + 1):
                prefix = alias.prefix(7 - digits)
                place = prefix, digits, alias.extension
                end = 10**digits
                for number in range(self._next.get(place, end // 10), end):
                    short = alias.numbered(prefix, number)
                    if not is_taken(short):
                        self._next[place] = number + 1
                        return short
                self._next[place] = end
            self._next.clear()  # some may have become free
        raise FileExistsError(errno.EEXIST, "no short name is left for this name")
