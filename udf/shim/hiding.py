"""Files that are removed while programs have them open: kept under a name of the shim's own until the last close.

A driver that knows files by their names forgets such a file when it dies; the next one can only find it by a name. So
before the UNLINK or RENAME that takes the last name away, the file gets another one, at the root: by LINK where there
are links (then the program's own request stays atomic), else by a RENAME of the victim. Programs never see the name: it
is not listed, not found, and not counted as a link.

Owns: the hidden names, from the first step to the removal at the last close, and those that a shim which was killed
has left behind. Not used for drivers whose node ids outlive them.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import zlib
from struct import Struct
from typing import TYPE_CHECKING

from udf.fuse.opcodes import Opcode
from udf.fuse.structs import ENTRY_OUT, IN_HEADER, OPEN_IN, OPEN_OUT, READ_IN, RELEASE_IN
from udf.shim.graph import HIDDEN, ROOT
from udf.shim.inflight import Ask
from udf.shim.resolve import forget_look, look, resolve

if TYPE_CHECKING:
    from collections.abc import Generator

    from udf.shim.service import Service

    Step = Generator[Ask, tuple[int, bytes], None]

HIDDEN_NAME = b".udf-hidden-"
BODY = IN_HEADER.size
_U64 = Struct("=Q")
_DIRENT = Struct("=QQII")
_CHUNK = 64 * 1024
_WHOLE = re.compile(re.escape(HIDDEN_NAME) + rb"[0-9a-f]{8}-[0-9a-f]{8}-[0-9]+-[0-9]+-[0-9a-f]+")
_CHUNKS = 1000  # of the root's listing that are looked through for what was left


class Hiding:
    """The hidden files of one mount."""

    def __init__(self) -> None:
        self._prefix = HIDDEN_NAME + _owner(os.getpid()).encode()
        self.removing: set[bytes] = set()  # names that no file needs any more and that may still be there

    def name(self, s: Service, slot: int) -> bytes:
        """Return the hidden name of a node: the same at each try, so that an interrupted step is found done."""
        return b"%s-%x" % (self._prefix, s.nodes.node_id(slot))

    def closed(self, s: Service, slot: int) -> None:
        """The last handle of a hidden file is closed: it may go."""
        name = self.name(s, slot)
        s.nodes.flags[slot] &= ~HIDDEN
        s.nodes.unlink(ROOT, name)
        self.removing.add(name)
        if s.connected:
            s.start_own(self._remove(s, name))

    def remove(self, s: Service) -> None:
        """Have a new generation remove what the one before was told to remove and did not say that it had."""
        for name in list(self.removing):
            s.start_own(self._remove(s, name))

    def _remove(self, s: Service, name: bytes) -> Step:
        error, _ = yield Ask(Opcode.UNLINK, ROOT, name + b"\0")
        if not error or error == errno.ENOENT:
            self.removing.discard(name)

    def clean_up(self, s: Service) -> Step:
        """Remove what shims that live no more have left at the root.

        What is exclusively ours nobody else has files open in, so there that is what any machine has left: a stick that
        was pulled out for good meanwhile, and is plugged in here.
        """
        error, reply = yield Ask(Opcode.OPENDIR, ROOT, OPEN_IN.pack(os.O_RDONLY | os.O_DIRECTORY, 0))
        if error and error != errno.ENOSYS:
            return
        handle = OPEN_OUT.unpack_from(reply)[0] if len(reply) == OPEN_OUT.size else 0
        plus = s.terms.readdirplus and not s.terms.readdir
        names: list[bytes] = []
        offset = 0
        for _ in range(_CHUNKS):
            op = Opcode.READDIRPLUS if plus else Opcode.READDIR
            error, chunk = yield Ask(op, ROOT, READ_IN.pack(handle, offset, _CHUNK, 0, 0, 0))
            before = offset
            at, head = 0, ENTRY_OUT.size if plus else 0
            while not error and at + head + _DIRENT.size <= len(chunk):
                _, offset, length, _ = _DIRENT.unpack_from(chunk, at + head)
                name = chunk[at + head + _DIRENT.size : at + head + _DIRENT.size + length]
                if plus and name not in (b".", b".."):
                    forget_look(s, 0, chunk[at : at + 8])
                if name.startswith(HIDDEN_NAME) and self._is_left(name, anybodys=s.exclusive):
                    names.append(name)
                at += (head + _DIRENT.size + length + 7) & ~7
            if error or not chunk or offset == before:
                break
        yield Ask(Opcode.RELEASEDIR, ROOT, RELEASE_IN.pack(handle, 0, 0, 0))
        for name in names:
            yield Ask(Opcode.UNLINK, ROOT, name + b"\0")

    def _is_left(self, name: bytes, *, anybodys: bool) -> bool:
        if anybodys:
            return _WHOLE.fullmatch(name) is not None and not name.startswith(self._prefix + b"-")
        return _is_left(name)


def needs_hiding(s: Service, slot: int) -> bool:
    """Whether removing one name of *slot* would leave an open file without any that we know."""
    nodes = s.nodes
    return (
        s.config.recover
        and s.config.hide
        and bool(slot)
        and nodes.opens[slot] > 0
        and not nodes.flags[slot] & HIDDEN
        and nodes.mode(slot) & 0o170000 != 0o040000
        and len(nodes.links_of(slot)) == 1
    )


def hide(s: Service, parent: int, name: bytes, slot: int, *, may_move: bool) -> Generator[Ask, tuple[int, bytes], bool]:
    """Give *slot* its hidden name. True if that took *name* in *parent* away, because there are no links."""
    nodes = s.nodes
    hidden = s.hiding.name(s, slot)
    driver_id = yield from resolve(s, slot)
    error, entry = yield Ask(Opcode.LINK, ROOT, _U64.pack(driver_id) + hidden + b"\0")
    if not error and len(entry) == ENTRY_OUT.size:
        forget_look(s, 0, entry)
    moved = False
    if error and error != errno.EEXIST:
        if not may_move:
            return False
        parent_id = yield from resolve(s, parent)
        error, _ = yield Ask(Opcode.RENAME, parent_id, _U64.pack(ROOT) + name + b"\0" + hidden + b"\0")
        moved = True
        if error == errno.ENOENT:  # done by a generation that died before it could say so?
            error, entry = yield from look(s, ROOT, hidden)
            forget_look(s, error, entry)
        if error:
            return False  # it cannot be kept: the removal goes on, and the driver has the file open while it lives
    if moved:
        nodes.unlink(parent, name)
    nodes.flags[slot] |= HIDDEN
    nodes.set_link(ROOT, hidden, slot, 0.0)
    if not nodes.opens[slot]:  # closed meanwhile
        s.hiding.closed(s, slot)
    return moved


def _owner(pid: int) -> str:
    """What tells a shim from all others: its machine, the machine's run, the process's number and its start."""
    started = (_read(f"/proc/{pid}/stat").rpartition(b")")[2].split() or [b"0"] * 20)[19].decode()
    machine = zlib.crc32(_read("/etc/machine-id") + socket.gethostname().encode())
    return f"{machine:08x}-{zlib.crc32(_read('/proc/sys/kernel/random/boot_id')):08x}-{pid}-{started}"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _is_left(name: bytes) -> bool:
    """Whether a hidden name was a shim's of this machine that has ended; another machine's may be in use there."""
    try:
        owner = name[len(HIDDEN_NAME) :].decode().rpartition("-")[0]
        machine, _, pid, _ = owner.split("-")
        now = _owner(int(pid))
    except (ValueError, UnicodeDecodeError):
        return False
    return now.startswith(machine) and now != owner
