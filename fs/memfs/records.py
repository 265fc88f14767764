"""What memfs writes into its journal: one record for each change, in formats that are packed and read quickly.

Owns the formats and nothing else; tree, contents, xattrs and operations write them, load.py reads them, snapshot.py
writes those of a whole tree. A change of names or attributes is one record, so it is there entirely or not at all.
Records name nodes by inode number and contents by slot (a row of the table, contents.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

SCHEMA = 1

# The first byte of a record.
CREATE, CREATE_MORE, LINK, UNLINK, RENAME, ATTRIBUTES, XATTR, GONE, HOLD, PAGES, MOVE, BATCH, NODE, NAMES, STATE = (
    range(1, 16)
)

create = struct.Struct("=BIIIIQQQq")  # mode uid gid rdev ino parent offset now; name
create_more = struct.Struct("=BIIIIQQQqH")  # the same and the length of the name; name, target or xattrs
link = struct.Struct("=BQQQq")  # ino parent offset now; name
unlink = struct.Struct("=BBQQq")  # flags parent ino now; name
rename = struct.Struct("=BBHQQQQQq")  # flags length-of-name parent new-parent ino old offset now; both names
attributes = struct.Struct("=BIIIQqqq")  # mode uid gid ino atime mtime ctime
xattr = struct.Struct("=BBHIQq")  # kept? length-of-name mode ino ctime; name, value
gone = struct.Struct("=BQ")  # ino
hold = struct.Struct("=BQQ")  # ino slot: the file has contents from here on
pages = struct.Struct("=BQI")  # slot count; so many runs
run = struct.Struct("=QQQ")  # page of the file, page of the arena, count
move = struct.Struct("=BQQQ")  # slot new-slot size: the contents are cut to this size and go on in another slot
node = struct.Struct("=BIIIIIQqqqQQIII")  # mode uid gid rdev nlink ino times a b lengths-of: runs, xattrs, target
names = struct.Struct("=BQI")  # directory count; so many entries, then their names
entry = struct.Struct("=QQH")  # offset ino length-of-name
state = struct.Struct("=BQ")  # the last inode number that was used

# Flags of UNLINK and RENAME.
IS_GONE, IS_DIRECTORY, EXCHANGE, OLD_IS_DIRECTORY = 1, 2, 4, 8

_LENGTH = struct.Struct("=I")
_XATTR = struct.Struct("=HI")


def batch(records: Iterable[bytes]) -> bytes:
    """Return one record that does what these do, all or none."""
    return bytes([BATCH]) + b"".join(_LENGTH.pack(len(record)) + record for record in records)


def split(record: bytes) -> Iterator[bytes]:
    """Yield the records of a batch."""
    at = 1
    while at < len(record):
        end = at + _LENGTH.size + _LENGTH.unpack_from(record, at)[0]
        yield record[at + _LENGTH.size : end]
        at = end


def pack_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    """Return all extended attributes of a node as one string."""
    return b"".join(_XATTR.pack(len(key), len(value)) + key + value for key, value in xattrs.items())


def unpack_xattrs(data: bytes) -> dict[bytes, bytes]:
    """Return what `pack_xattrs` was given."""
    result = {}
    at = 0
    while at < len(data):
        key_length, value_length = _XATTR.unpack_from(data, at)
        at += _XATTR.size
        key = data[at : at + key_length]
        at += key_length
        result[key] = data[at : at + value_length]
        at += value_length
    return result
