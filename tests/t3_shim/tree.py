"""A driver's filesystem of a few dictionaries, and how it answers each request rightly.

Its counts say what a driver believes that the other side holds. It checks nothing: that is what the shim is for.
"""

from __future__ import annotations

import errno
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from udf.fuse import structs
from udf.fuse.flags import Fattr
from udf.fuse.opcodes import Opcode

ROOT = 1
NS = 1_000_000_000


@dataclass
class Request:
    """One request as it came."""

    op: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: bytes
    raw: bytes

    def fields(self, layout: structs.Layout) -> dict[str, int]:
        """The values of the structure that the body begins with."""
        return dict(zip(layout.fields, layout.unpack_from(self.body), strict=True))

    def names(self, layout: structs.Layout | None = None) -> list[bytes]:
        """The names behind that structure."""
        return self.body[layout.size if layout else 0 :].split(b"\0")[:-1]


@dataclass
class Packets:
    """What is sent as it is, one packet each."""

    packets: list[bytes]


Answer = bytes | int | Packets | None  # a body, an errno, packets as they are, or nothing
Handler = Callable[[Request], Answer]


def whole(unique: int, body: bytes = b"", error: int = 0) -> bytes:
    """A reply with a right header; *error* as on the wire."""
    return structs.OUT_HEADER.pack(structs.OUT_HEADER.size + len(body), error, unique) + body


def mode_of(body: bytes, at: int = 40) -> int:
    """The mode in an entry (or, at 16, in attributes)."""
    return struct.unpack_from("=I", body, at + 60)[0]


def with_mode(body: bytes, mode: int, at: int = 40) -> bytes:
    """The same with another mode."""
    return body[: at + 60] + struct.pack("=I", mode) + body[at + 64 :]


@dataclass
class Node:
    """One file."""

    ino: int
    mode: int
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    data: bytearray = field(default_factory=bytearray)
    children: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    mtime: int = 1_600_000_000 * NS
    lookups: int = 0  # given and not taken back
    id: int = 0  # what this generation of the driver calls it
    generation: int = 0  # of the inode number


class Tree:
    """The filesystem. Its counts say what the driver believes that the other side holds."""

    def __init__(self) -> None:
        self.nodes = {ROOT: Node(ROOT, stat.S_IFDIR | 0o755, 2, id=ROOT)}
        self.handles: dict[int, int] = {}
        self.unknown_forgets: list[tuple[int, int]] = []
        self.valid = 1000.0  # seconds; of names and attributes
        self.negative = 0.0
        self.fopen = 0
        self._next = 2
        self._next_handle = 100

    def add(self, parent: int, name: bytes | str, mode: int, data: bytes = b"", uid: int = 0, gid: int = 0) -> Node:
        """Make a file without the kernel."""
        name = name.encode() if isinstance(name, str) else name
        node = Node(self._next, mode, 2 if stat.S_ISDIR(mode) else 1, uid, gid, data=bytearray(data), id=self._next)
        self._next += 1
        self.nodes[node.ino] = node
        self.nodes[parent].children[name] = node.ino
        return node

    def file(self, name: str, data: bytes = b"", mode: int = 0o644, parent: int = ROOT, uid: int = 0) -> Node:
        return self.add(parent, name, stat.S_IFREG | mode, data, uid, uid)

    def directory(self, name: str, parent: int = ROOT, mode: int = 0o755) -> Node:
        return self.add(parent, name, stat.S_IFDIR | mode)

    def reborn(self, shift: int = 1000) -> Tree:
        """The same files as the next generation of a driver finds them: under other ids, and only those with a name."""
        tree = Tree()
        tree.valid, tree.negative, tree.fopen, tree._next = self.valid, self.negative, self.fopen, self._next + shift
        ids = {ROOT: ROOT}
        ways = [ROOT]
        while ways:
            for child in self.nodes[ways.pop()].children.values():
                if child not in ids:
                    ids[child] = child + shift
                    ways.append(child)
        for old, new in ids.items():
            children = {name: ids[child] for name, child in self.nodes[old].children.items()}
            tree.nodes[new] = replace(self.nodes[old], id=new, children=children, lookups=0)
        return tree

    def lookups(self) -> int:
        """How many look-ups the other side has not given back."""
        return sum(node.lookups for node in self.nodes.values())

    def attr(self, node: Node) -> bytes:
        seconds, nanos = divmod(node.mtime, NS)
        size = len(node.data)
        blocks = (size + 511) // 512
        times = (seconds, seconds, seconds, nanos, nanos, nanos)
        return structs.ATTR.pack(
            node.ino, size, blocks, *times, node.mode, node.nlink, node.uid, node.gid, node.rdev, 4096, 0
        )

    def _valid(self, seconds: float) -> tuple[int, int]:
        return int(seconds), int(seconds % 1 * 1e9)

    def entry(self, node: Node) -> bytes:
        """An entry, which is counted."""
        node.lookups += 1
        seconds, nanos = self._valid(self.valid)
        return struct.pack("=QQQQII", node.id, node.generation, seconds, seconds, nanos, nanos) + self.attr(node)

    def attr_out(self, node: Node) -> bytes:
        return struct.pack("=QI4x", *self._valid(self.valid)) + self.attr(node)

    # ---- what each opcode does

    def lookup(self, q: Request) -> Answer:
        child = self.nodes[q.node].children.get(q.names()[0])
        if child is None:
            if not self.negative:
                return errno.ENOENT
            seconds, nanos = self._valid(self.negative)
            return struct.pack("=QQQQII", 0, 0, seconds, 0, nanos, 0) + bytes(structs.ATTR.size)
        return self.entry(self.nodes[child])

    def forget(self, node: int, count: int) -> None:
        if node in self.nodes:
            self.nodes[node].lookups -= count
        else:
            self.unknown_forgets.append((node, count))

    def getattr(self, q: Request) -> Answer:
        return self.attr_out(self.nodes[q.node])

    def setattr(self, q: Request) -> Answer:
        node, values = self.nodes[q.node], q.fields(structs.SETATTR_IN)
        valid = values["valid"]
        if valid & Fattr.MODE:
            node.mode = node.mode & 0o170000 | values["mode"] & 0o7777
        if valid & Fattr.UID:
            node.uid = values["uid"]
        if valid & Fattr.GID:
            node.gid = values["gid"]
        if valid & Fattr.SIZE:
            size = values["size"]
            del node.data[size:]
            node.data += bytes(size - len(node.data))
        if valid & Fattr.MTIME:
            node.mtime = time.time_ns() if valid & Fattr.MTIME_NOW else values["mtime"] * NS + values["mtimensec"]
        return self.attr_out(node)

    def make(self, q: Request, name: bytes, mode: int, data: bytes = b"") -> Node | int:
        if name in self.nodes[q.node].children:
            return errno.EEXIST
        return self.add(q.node, name, mode, data, q.uid, q.gid)

    def _entry_or(self, made: Node | int) -> Answer:
        return made if isinstance(made, int) else self.entry(made)

    def symlink(self, q: Request) -> Answer:
        name, target = q.names()
        return self._entry_or(self.make(q, name, stat.S_IFLNK | 0o777, target))

    def mknod(self, q: Request) -> Answer:
        return self._entry_or(self.make(q, q.names(structs.MKNOD_IN)[0], q.fields(structs.MKNOD_IN)["mode"]))

    def mkdir(self, q: Request) -> Answer:
        mode = q.fields(structs.MKDIR_IN)["mode"] & 0o7777 | stat.S_IFDIR
        return self._entry_or(self.make(q, q.names(structs.MKDIR_IN)[0], mode))

    def create(self, q: Request) -> Answer:
        made = self.make(q, q.names(structs.CREATE_IN)[0], q.fields(structs.CREATE_IN)["mode"])
        return made if isinstance(made, int) else self.entry(made) + self.opened(made.id)

    def opened(self, node: int) -> bytes:
        self._next_handle += 1
        self.handles[self._next_handle] = node
        return structs.OPEN_OUT.pack(self._next_handle, self.fopen, 0)

    def remove(self, q: Request) -> Answer:
        children = self.nodes[q.node].children
        child = children.pop(q.names()[0], None)
        if child is None:
            return errno.ENOENT
        node = self.nodes[child]
        node.nlink -= 2 if stat.S_ISDIR(node.mode) else 1
        return b""

    def _rename(self, old_parent: int, new_parent: int, names: list[bytes], flags: int) -> Answer:
        (old, new), old_children, new_children = names, self.nodes[old_parent].children, self.nodes[new_parent].children
        if old not in old_children:
            return errno.ENOENT
        if flags & 1 and new in new_children:
            return errno.EEXIST
        if flags & 2:
            if new not in new_children:
                return errno.ENOENT
            old_children[old], new_children[new] = new_children[new], old_children[old]
            return b""
        moved = old_children.pop(old)
        if new in new_children:
            self.nodes[new_children[new]].nlink -= 1
        new_children[new] = moved
        return b""

    def rename(self, q: Request) -> Answer:
        return self._rename(q.node, q.fields(structs.RENAME_IN)["newdir"], q.names(structs.RENAME_IN), 0)

    def rename2(self, q: Request) -> Answer:
        values = q.fields(structs.RENAME2_IN)
        return self._rename(q.node, values["newdir"], q.names(structs.RENAME2_IN), values["flags"])

    def link(self, q: Request) -> Answer:
        node = self.nodes[q.fields(structs.LINK_IN)["oldnodeid"]]
        node.nlink += 1
        self.nodes[q.node].children[q.names(structs.LINK_IN)[0]] = node.id
        return self.entry(node)

    def open(self, q: Request) -> Answer:
        return self.opened(q.node)

    def release(self, q: Request) -> Answer:
        return b"" if self.handles.pop(q.fields(structs.RELEASE_IN)["fh"], None) else errno.EBADF

    def read(self, q: Request) -> Answer:
        values = q.fields(structs.READ_IN)
        if values["fh"] not in self.handles:
            return errno.EBADF
        return bytes(self.nodes[q.node].data[values["offset"] : values["offset"] + values["size"]])

    def write(self, q: Request) -> Answer:
        values = q.fields(structs.WRITE_IN)
        node, data, at = self.nodes[q.node], q.body[structs.WRITE_IN.size :], values["offset"]
        if values["fh"] not in self.handles:
            return errno.EBADF
        node.data += bytes(max(0, at - len(node.data)))
        node.data[at : at + len(data)] = data
        node.mtime = time.time_ns()
        return structs.WRITE_OUT.pack(len(data))

    def statfs(self, q: Request) -> Answer:
        return structs.STATFS_OUT.pack(1000, 600, 500, 100, 50, 4096, 255, 4096)

    def setxattr(self, q: Request) -> Answer:
        name, value = q.body[structs.SETXATTR_IN_COMPAT.size :].split(b"\0", 1)
        flags, xattrs = q.fields(structs.SETXATTR_IN_COMPAT)["flags"], self.nodes[q.node].xattrs
        if flags & 1 and name in xattrs:
            return errno.EEXIST
        if flags & 2 and name not in xattrs:
            return errno.ENODATA
        xattrs[name] = value
        return b""

    def _sized(self, q: Request, value: bytes) -> Answer:
        size = q.fields(structs.GETXATTR_IN)["size"]
        if not size:
            return structs.GETXATTR_OUT.pack(len(value))
        return value if len(value) <= size else errno.ERANGE

    def getxattr(self, q: Request) -> Answer:
        value = self.nodes[q.node].xattrs.get(q.names(structs.GETXATTR_IN)[0])
        return errno.ENODATA if value is None else self._sized(q, value)

    def listxattr(self, q: Request) -> Answer:
        return self._sized(q, b"".join(name + b"\0" for name in self.nodes[q.node].xattrs))

    def removexattr(self, q: Request) -> Answer:
        return errno.ENODATA if self.nodes[q.node].xattrs.pop(q.names()[0], None) is None else b""

    def readdir(self, q: Request) -> Answer:
        values, plus = q.fields(structs.READ_IN), q.op == Opcode.READDIRPLUS
        reply = b""
        for offset, (name, ino) in enumerate(list(self.nodes[q.node].children.items()), 1):
            if offset <= values["offset"]:
                continue
            node = self.nodes[ino]
            record = dirent(name, node.ino, offset, node.mode >> 12)
            if len(reply) + len(record) + (structs.ENTRY_OUT.size if plus else 0) > values["size"]:
                break
            reply += self.entry(node) + record if plus else record
        return reply

    def nothing(self, q: Request) -> Answer:
        return b""

    def table(self) -> dict[int, Handler]:
        return {
            Opcode.LOOKUP: self.lookup,
            Opcode.GETATTR: self.getattr,
            Opcode.SETATTR: self.setattr,
            Opcode.READLINK: lambda q: bytes(self.nodes[q.node].data),
            Opcode.SYMLINK: self.symlink,
            Opcode.MKNOD: self.mknod,
            Opcode.MKDIR: self.mkdir,
            Opcode.UNLINK: self.remove,
            Opcode.RMDIR: self.remove,
            Opcode.RENAME: self.rename,
            Opcode.RENAME2: self.rename2,
            Opcode.LINK: self.link,
            Opcode.OPEN: self.open,
            Opcode.READ: self.read,
            Opcode.WRITE: self.write,
            Opcode.STATFS: self.statfs,
            Opcode.RELEASE: self.release,
            Opcode.FSYNC: self.nothing,
            Opcode.SETXATTR: self.setxattr,
            Opcode.GETXATTR: self.getxattr,
            Opcode.LISTXATTR: self.listxattr,
            Opcode.REMOVEXATTR: self.removexattr,
            Opcode.FLUSH: self.nothing,
            Opcode.OPENDIR: self.open,
            Opcode.READDIR: self.readdir,
            Opcode.READDIRPLUS: self.readdir,
            Opcode.RELEASEDIR: self.release,
            Opcode.FSYNCDIR: self.nothing,
            Opcode.CREATE: self.create,
        }


def dirent(name: bytes, ino: int, offset: int, kind: int = 8) -> bytes:
    """One entry of a listing."""
    record = structs.DIRENT.pack(ino, offset, len(name), kind) + name
    return record + bytes(-len(record) % 8)
