"""POSIX.1e access control lists in their xattr form: what a mode becomes, and what becomes of a mode.

Pure functions over `bytes`; no nodes, no I/O. The kernel negotiates FUSE_POSIX_ACL, checks permissions with the lists
that it gets as xattrs, and leaves to the filesystem: the mode that follows from a new access list, the list
that follows from a new mode, and what a new file inherits from its directory's default list.
"""

from __future__ import annotations

import struct

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")  # tag, permissions, id
_VERSION = 2
_UNDEFINED = 0xFFFFFFFF

Entry = tuple[int, int, int]


def parse(value: bytes) -> list[Entry]:
    """Return the entries; ValueError when the kernel would not have let this list through."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise ValueError("length")
    if _HEADER.unpack_from(value)[0] != _VERSION:
        raise ValueError("version")
    entries: list[Entry] = [(tag, perm, who) for tag, perm, who in _ENTRY.iter_unpack(value[_HEADER.size :])]
    tags = [tag for tag, _, _ in entries]
    named = USER in tags or GROUP in tags
    for tag, count in ((USER_OBJ, (1,)), (GROUP_OBJ, (1,)), (OTHER, (1,)), (MASK, (1,) if named else (0, 1))):
        if tags.count(tag) not in count:
            raise ValueError("entries")
    if tags != sorted(tags) or any(perm > 7 for _, perm, _ in entries):
        raise ValueError("order")
    return entries


def pack(entries: list[Entry]) -> bytes:
    """Return the xattr value of these entries."""
    return _HEADER.pack(_VERSION) + b"".join(
        _ENTRY.pack(tag, perm, who if tag in {USER, GROUP} else _UNDEFINED) for tag, perm, who in entries
    )


def set_access(value: bytes, mode: int) -> tuple[int, bytes | None]:
    """Return the mode that an access list gives, and the list to keep: none when the mode says all of it."""
    entries = parse(value)
    bits = {tag: perm for tag, perm, _ in entries if tag not in {USER, GROUP}}
    group = bits.get(MASK, bits[GROUP_OBJ])
    mode = (mode & ~0o777) | bits[USER_OBJ] << 6 | group << 3 | bits[OTHER]
    return mode, (pack(entries) if len(entries) > 3 else None)


def chmod(value: bytes, mode: int) -> bytes:
    """Return the access list after chmod(mode): the group bits go to the mask, which every such list has."""
    entries = parse(value)
    group = MASK if any(tag == MASK for tag, _, _ in entries) else GROUP_OBJ
    new = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return pack([(tag, new.get(tag, perm), who) for tag, perm, who in entries])


def inherit(default: bytes, mode: int) -> tuple[int, bytes | None]:
    """Return mode and access list of a new file below a directory with this default list; umask has no say."""
    entries = parse(default)
    group = MASK if any(tag == MASK for tag, _, _ in entries) else GROUP_OBJ
    asked = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    entries = [(tag, perm & asked.get(tag, 7), who) for tag, perm, who in entries]
    bits = {tag: perm for tag, perm, _ in entries if tag in asked}
    mode = (mode & ~0o777) | bits[USER_OBJ] << 6 | bits[group] << 3 | bits[OTHER]
    return mode, (pack(entries) if len(entries) > 3 else None)
