"""What a region of a disk holds, by its magic numbers.

Owns: the numbers, and where labels and ids are. Nothing of it is trusted: reads are few, bounded and inside the region.
Must never: raise for anything that is in the region. Called by: the block shim, filesystem binding, tests.
Types are named as blkid and mount(8) do.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Read = Callable[[int, int], Awaitable[bytes | bytearray | memoryview]]

HEAD = 68 * 1024  # bytes that are looked at: btrfs is the farthest
_MAX_ROOT = 64 * 1024  # bytes of a FAT's root directory that are looked at


@dataclass(frozen=True)
class Volume:
    """A filesystem, or something else that is recognised."""

    type: str
    label: str = ""  # whatever the disk says, without what is behind a NUL and blanks at its end
    uuid: str = ""
    version: str = ""  # of a vfat: FAT12, FAT16, FAT32


async def probe(read: Read, size: int) -> Volume | None:
    """What is in a region of `size` bytes; None if it is nothing that is known."""
    head = bytes(await read(0, min(size, HEAD))) if size > 0 else b""
    head = head.ljust(HEAD, b"\0")
    for find in (_boot_sector, _ext, _xfs, _btrfs, _squashfs, _erofs, _iso9660, _swap):
        found = find(head)
        if found is not None:
            return found
    return await _fat(read, size, head)


def _text(raw: bytes, encoding: str = "utf-8") -> str:
    return raw.decode(encoding, errors="replace").partition("\0")[0].rstrip()


def _uuid(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw)) if any(raw) else ""


def _serial(number: int) -> str:
    return f"{number >> 16:04X}-{number & 0xFFFF:04X}" if number else ""


def _boot_sector(head: bytes) -> Volume | None:
    if head[3:11] == b"NTFS    ":
        return Volume("ntfs", uuid=f"{int.from_bytes(head[0x48:0x50], 'little'):016X}")
    if head[3:11] == b"EXFAT   ":
        return Volume("exfat", uuid=_serial(int.from_bytes(head[100:104], "little")))
    return None


def _ext(head: bytes) -> Volume | None:
    block = head[1024:2048]
    if block[56:58] != b"\x53\xef":
        return None
    compatible, incompatible, read_only = struct.unpack_from("<III", block, 92)
    if incompatible & 0x8:  # a journal on a device of its own
        return Volume("jbd", uuid=_uuid(block[104:120]))
    journal = compatible & 0x4
    # What ext3 knows: filetype, recover, meta_bg; sparse_super, large_file, btree_dir.
    old = "ext3" if journal else "ext2"
    kind = "ext4" if incompatible & ~0x16 or read_only & ~0x7 else old
    return Volume(kind, _text(block[120:136]), _uuid(block[104:120]))


def _xfs(head: bytes) -> Volume | None:
    return Volume("xfs", _text(head[108:120]), _uuid(head[32:48])) if head[:4] == b"XFSB" else None


def _btrfs(head: bytes) -> Volume | None:
    block = head[65536:]
    if block[64:72] != b"_BHRfS_M":
        return None
    return Volume("btrfs", _text(block[0x12B : 0x12B + 256]), _uuid(block[32:48]))


def _squashfs(head: bytes) -> Volume | None:
    return Volume("squashfs") if head[:4] == b"hsqs" else None


def _erofs(head: bytes) -> Volume | None:
    block = head[1024:]
    if block[:4] != b"\xe2\xe1\xf5\xe0":
        return None
    return Volume("erofs", _text(block[64:80]), _uuid(block[48:64]))


def _iso9660(head: bytes) -> Volume | None:
    block = head[32768 : 32768 + 2048]
    if block[1:6] != b"CD001":
        return None
    stamp = b""
    for at in (830, 813):  # modified, created
        digits = block[at : at + 16]
        if digits.isdigit() and digits != b"0" * 16:
            stamp = digits
            break
    pieces = (stamp[:4], stamp[4:6], stamp[6:8], stamp[8:10], stamp[10:12], stamp[12:14], stamp[14:16])
    return Volume("iso9660", _text(block[40:72]), b"-".join(pieces).decode() if stamp else "")


def _swap(head: bytes) -> Volume | None:
    for page in (4096, 8192, 16384, 32768, 65536):
        if head[page - 10 : page] in (b"SWAPSPACE2", b"SWAP-SPACE"):
            if head[page - 1 : page] != b"2":
                return Volume("swap")
            return Volume("swap", _text(head[1052:1068]), _uuid(head[1036:1052]))
    return None


async def _fat(read: Read, size: int, head: bytes) -> Volume | None:
    """FAT has no magic number: its numbers must fit together, as Microsoft's specification says."""
    sector, cluster, reserved, fats, entries, small, media, short = struct.unpack_from("<HBHBHHBH", head, 11)
    (large, long) = struct.unpack_from("<II", head, 32)
    if sector not in (512, 1024, 2048, 4096) or cluster == 0 or cluster & (cluster - 1):
        return None
    if not reserved or fats not in (1, 2) or not (media == 0xF0 or media >= 0xF8):
        return None
    # MSX-DOS and DR-DOS leave out the signature; nobody makes such volumes now.
    if head[510:512] != b"\x55\xaa" or not (head[0] == 0xE9 or (head[0] == 0xEB and head[2] == 0x90)):
        return None
    root = -(-entries * 32 // sector)
    data = (small or large) - reserved - fats * (short or long) - root
    if data <= 0 or not (short or long):
        return None
    clusters = data // cluster
    wide = not short
    version = "FAT32" if wide else "FAT12" if clusters < 4085 else "FAT16"
    base = 64 if wide else 36
    extended = head[base + 2] in (0x28, 0x29)
    serial = int.from_bytes(head[base + 3 : base + 7], "little") if extended else 0
    label = _fat_label(head[base + 7 : base + 18]) if extended and head[base + 2] == 0x29 else ""
    # The label that is shown is the one in the root directory.
    at = (reserved + fats * (short or long)) * sector
    if wide:
        first = int.from_bytes(head[44:48], "little")
        at += (first - 2) * cluster * sector if 2 <= first < clusters + 2 else size
        length = cluster * sector
    else:
        length = entries * 32
    length = max(0, min(length, _MAX_ROOT, size - at))
    directory = bytes(await read(at, length)) if length and at < size else b""
    for entry in range(0, len(directory) - 31, 32):
        attributes = directory[entry + 11]
        if not directory[entry]:
            break
        if directory[entry] != 0xE5 and attributes & 0x3F != 0x0F and attributes & 0x18 == 0x08:
            label = _fat_label(directory[entry : entry + 11])
            break
    return Volume("vfat", label, _serial(serial), version)


def _fat_label(raw: bytes) -> str:
    if raw[:1] == b"\x05":
        raw = b"\xe5" + raw[1:]
    text = _text(raw, "cp437")
    return "" if text == "NO NAME" else text
