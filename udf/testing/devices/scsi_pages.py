"""The fixed layouts of SCSI: sense data, INQUIRY with its vital product data, mode pages.

Owns: these layouts (SPC-4 clauses 4.5, 6.6, 7.5, 7.8; SBC-3 clauses 6.5, 6.6). Must never: change a unit.
Called by: scsi.py.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from udf.testing.devices.scsi import Unit

RECOVERY, CACHING, EXCEPTIONS = 0x01, 0x08, 0x1C
# The most blocks and descriptors of one UNMAP, and the most blocks of one WRITE SAME.
MAX_UNMAP, MAX_ROWS, MAX_SAME = 1 << 22, 64, 1 << 16


def sense(key: int, asc: int, ascq: int, information: int | None, *, descriptors: bool) -> bytes:
    """Sense data, fixed or as descriptors."""
    if descriptors:
        rows = struct.pack(">BBBxQ", 0, 10, 0x80, information) if information is not None else b""
        return struct.pack(">BBBB3xB", 0x72, key, asc, ascq, len(rows)) + rows
    valid = 0x80 if information is not None and information <= 0xFFFFFFFF else 0
    return struct.pack(">BxBIB4xBBx3x", 0x70 | valid, key, (information or 0) if valid else 0, 10, asc, ascq)


def standard(unit: Unit) -> bytes:
    """Standard INQUIRY data, 36 bytes."""
    return struct.pack(
        ">BBBBBBBB8s16s4s", 0, 0x80 if unit.removable else 0, 6, 2, 31, 0, 0, 0,
        _text(unit.vendor, 8), _text(unit.product, 16), b"1.00",
    )  # fmt: skip


def unknown() -> bytes:
    """INQUIRY data of a logical unit that is not there."""
    return struct.pack(">BBBB", 0x7F, 0, 6, 2) + b"\x1f" + bytes(31)


def vital(unit: Unit, page: int) -> bytes | None:
    """A page of vital product data; None if there is no such page."""
    maker = _VITAL.get(page)
    if maker is None or (page == 0xB2 and not unit.trims):
        return None
    body = maker(unit)
    return struct.pack(">BBH", 0, page, len(body)) + body


def mode(unit: Unit, page: int, subpage: int, *, changeable: bool) -> bytes | None:
    """Mode pages, one or (0x3F) all; None if there is no such page."""
    if subpage not in (0, 0xFF) or (subpage and page != 0x3F):
        return None
    caches = unit.medium is not None and bool(unit.medium.cache)
    flags = (4 if caches else 0) if changeable else (4 if caches and unit.caching else 0)
    known = {
        RECOVERY: struct.pack(">BB10x", RECOVERY, 10),
        CACHING: struct.pack(">BBB17x", CACHING, 18, flags),
        EXCEPTIONS: struct.pack(">BB10x", EXCEPTIONS, 10),
    }
    if page == 0x3F:
        return b"".join(known.values())
    return b"" if page == 0 else known.get(page)


def _supported(unit: Unit) -> bytes:
    return bytes(sorted(page for page in _VITAL if page != 0xB2 or unit.trims))


def _serial(unit: Unit) -> bytes:
    return unit.serial.encode("ascii", "replace")[:252] or b" "


def _identification(unit: Unit) -> bytes:
    name = _text(unit.vendor, 8) + _serial(unit) + f"-{unit.number}".encode()
    digest = hashlib.sha256(name).digest()[:7]
    local = bytes((0x30 | digest[0] & 0x0F,)) + digest  # NAA 3: locally assigned
    return (
        struct.pack(">BBBB", 2, 1, 0, len(name)) + name  # T10 vendor identification, ASCII
        + struct.pack(">BBBB", 1, 3, 0, len(local)) + local
    )  # fmt: skip


def _limits(unit: Unit) -> bytes:
    return struct.pack(
        ">BBHIIIIIIIQ20x", 1, 0, 0, unit.max_transfer, 0, 0, MAX_UNMAP if unit.trims else 0,
        MAX_ROWS if unit.trims else 0, 1 if unit.trims else 0, 0, MAX_SAME,
    )  # fmt: skip


def _characteristics(_unit: Unit) -> bytes:
    return struct.pack(">H58x", 1)  # nothing rotates


def _provisioning(_unit: Unit) -> bytes:
    return struct.pack(">BBBB", 0, 0xE4, 2, 0)  # UNMAP, WRITE SAME(16) and (10); unmapped blocks are zeros; thin


_VITAL = {
    0x00: _supported,
    0x80: _serial,
    0x83: _identification,
    0xB0: _limits,
    0xB1: _characteristics,
    0xB2: _provisioning,
}


def _text(text: str, size: int) -> bytes:
    return text.encode("ascii", "replace")[:size].ljust(size)
