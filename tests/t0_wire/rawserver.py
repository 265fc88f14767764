"""A FUSE server of a few lines on /dev/fuse, and programs that use its mount.

For tests of the wire: it records every request as it came, and answers from a table that the test may change. It runs
in a thread; whatever uses the mount runs in processes of their own, because a process that waits for its own
thread's answer can neither be timed out nor killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from udf.fuse import device, structs
from udf.fuse.flags import Fopen, Init, join_init_flags, split_init_flags
from udf.fuse.mount import MountOptions, mount_direct
from udf.fuse.opcodes import UNANSWERED, Opcode

MNT_FORCE, MNT_DETACH = 1, 2
PATIENCE = 40.0  # what takes longer is broken
FILE, DIR = 2, 3  # node ids of the file and the directory that exist
NEW = 10  # the node id of what a request makes: this + its opcode
DATA = b"0123456789" * 1000
can_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs root and /dev/fuse"
)
HANDLE = 0x1234567890ABCDEF
NO_FLAGS = Init(0)
NOTHING_TO_SAY = (
    *(Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.RENAME2, Opcode.ACCESS, Opcode.DESTROY),
    *(Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.FLUSH, Opcode.FSYNC, Opcode.FSYNCDIR),
)


@dataclass
class Request:
    """One request: its header's fields and what came after it."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    extensions: bytes
    body: bytes

    def decode(self, layout: structs.Layout) -> dict[str, int]:
        """The body's values by name; the body must be that structure and nothing more."""
        assert len(self.body) == layout.size, f"{Opcode(self.opcode).name}: {len(self.body)} bytes, not {layout}"
        return dict(zip(layout.fields, layout.unpack_from(self.body), strict=True))

    def split(self, layout: structs.Layout) -> tuple[dict[str, int], bytes]:
        """The values of the structure that the body begins with, and the rest."""
        values = dict(zip(layout.fields, layout.unpack_from(self.body), strict=True))
        return values, self.body[layout.size :]


Answer = bytes | int | None  # data, -errno, or nothing (for now)
Handler = Callable[[Request], Answer]


def attr(nodeid: int, mode: int, size: int = 0, gid: int = 0) -> bytes:
    """The attributes of a node, with times that say which field they are in."""
    return structs.ATTR.pack(nodeid, size, (size + 511) // 512, 1001, 1002, 1003, 1, 2, 3, mode, 1, 0, gid, 0, 4096, 0)


class RawServer:
    """A mounted connection with `file` and `dir` in its root. Time-outs are an hour, so nothing is asked twice."""

    def __init__(self, mountpoint: Path, want: Init, max_write: int, options: MountOptions) -> None:
        self.mountpoint = mountpoint
        self.want = want
        self.max_write = max_write
        self.ttl = 3600
        self.root_gid = 0
        self.offered = Init(0)
        self.minor = 0
        self.init_length = 0
        self.connected = False
        self.open_flags = Fopen(0)
        self.backing_id = 0
        self.requests: list[Request] = []
        self.handlers: dict[int, Handler] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: lambda request: self.attr_out(request.nodeid),
            Opcode.SETATTR: lambda request: self.attr_out(request.nodeid),
            Opcode.OPEN: lambda _: structs.OPEN_OUT.pack(HANDLE, self.open_flags, self.backing_id),
            Opcode.OPENDIR: lambda _: structs.OPEN_OUT.pack(HANDLE, 0, 0),
            Opcode.READ: self._read,
            Opcode.WRITE: lambda request: structs.WRITE_OUT.pack(request.split(structs.WRITE_IN)[0]["size"]),
            Opcode.READDIR: lambda _: b"",
            Opcode.STATFS: lambda _: structs.STATFS_OUT.pack(10, 9, 8, 7, 6, 4096, 255, 4096),
            Opcode.MKNOD: lambda request: self._made(request, request.split(structs.MKNOD_IN)[0]["mode"]),
            Opcode.MKDIR: lambda request: self._made(request, stat.S_IFDIR | 0o755),
            Opcode.SYMLINK: lambda request: self._made(request, stat.S_IFLNK | 0o777),
            Opcode.LINK: lambda _: self.entry_out(FILE, stat.S_IFREG | 0o644),
            Opcode.CREATE: self._create,
            Opcode.TMPFILE: self._create,
        }
        self.handlers |= dict.fromkeys(NOTHING_TO_SAY, lambda _: b"")
        self.programs: list[subprocess.Popen[str]] = []
        self.gate = threading.Lock()  # who holds it keeps the server from reading
        self._arrived = threading.Condition()
        self._stop = os.eventfd(0)
        self.fd = device.open_device(nonblocking=True)
        try:
            mount_direct(self.fd, str(mountpoint), options)
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._serve, name="raw FUSE server", daemon=True)
        self._thread.start()

    # -- serving -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._stop in ready:
                return
            with self.gate:
                try:
                    message = os.read(self.fd, 80 + max(self.max_write, 1 << 17))
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.EINTR):  # the request was taken back
                        continue
                    if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                        return
                    raise
            request = parse(message)
            # Before it is answered, so that whoever saw a program end has all its requests.
            with self._arrived:
                self.requests.append(request)
                self._arrived.notify_all()
            handler = self._init if request.opcode == Opcode.INIT else self.handlers.get(request.opcode)
            answer = -errno.ENOSYS if handler is None else handler(request)
            if request.opcode not in UNANSWERED and answer is not None:
                self.answer(request, answer)
            if request.opcode == Opcode.INIT:
                with self._arrived:
                    self.connected = True
                    self._arrived.notify_all()

    def answer(self, request: Request, answer: bytes | int, fd: int | None = None) -> None:
        """Answer a request that its handler left alone."""
        error, data = (answer, b"") if isinstance(answer, int) else (0, answer)
        head = structs.OUT_HEADER.pack(structs.OUT_HEADER.size + len(data), error, request.unique)
        with contextlib.suppress(FileNotFoundError):  # interrupted, or the mount is gone
            os.write(self.fd if fd is None else fd, head + data)

    def _init(self, request: Request) -> bytes:
        self.init_length = len(request.body)
        values, _ = request.split(
            structs.INIT_IN if self.init_length >= structs.INIT_IN.size else structs.INIT_IN_COMPAT
        )
        self.minor = values["minor"]
        self.offered = Init(join_init_flags(values["flags"], values.get("flags2", 0)))
        low, high = split_init_flags(self.offered & self.want)
        depth = 1 if self.offered & self.want & Init.PASSTHROUGH else 0
        pages = self.max_write // 4096
        return structs.INIT_OUT.pack(
            7, min(self.minor, 45), 1 << 17, low, 16, 12, self.max_write, 1, pages, 0, high, depth, 0
        )

    def attr_out(self, nodeid: int) -> bytes:
        """The answer to GETATTR and SETATTR."""
        return structs.ATTR_OUT.struct.pack(self.ttl, 0, *structs.ATTR.unpack_from(self._attr(nodeid)))

    def _attr(self, nodeid: int) -> bytes:
        if nodeid == 1:
            return attr(1, stat.S_IFDIR | 0o777, gid=self.root_gid)
        return attr(nodeid, stat.S_IFDIR | 0o755) if nodeid == DIR else attr(nodeid, stat.S_IFREG | 0o644, len(DATA))

    def entry_out(self, nodeid: int, mode: int, size: int = 0) -> bytes:
        """The answer to LOOKUP and to everything that makes a node."""
        times = (self.ttl, self.ttl, 0, 0)
        return structs.ENTRY_OUT.pack(nodeid, 1, *times, *structs.ATTR.unpack_from(attr(nodeid, mode, size)))

    def _lookup(self, request: Request) -> Answer:
        name = request.body.removesuffix(b"\0")
        if name == b"dir":
            return self.entry_out(DIR, stat.S_IFDIR | 0o755)
        if name.startswith(b"file"):  # file, file1, …: as many nodes as one likes
            number = int(name[4:] or b"0")
            return self.entry_out(100 + number if number else FILE, stat.S_IFREG | 0o644, len(DATA))
        return -errno.ENOENT

    def _read(self, request: Request) -> bytes:
        values = request.decode(structs.READ_IN)
        return DATA[values["offset"] : values["offset"] + values["size"]]

    def _made(self, request: Request, mode: int) -> bytes:
        return self.entry_out(NEW + request.opcode, mode)

    def _create(self, request: Request) -> bytes:
        return self._made(request, stat.S_IFREG | 0o644) + structs.OPEN_OUT.pack(HANDLE, self.open_flags, 0)

    # -- what came ---------------------------------------------------------------------------------

    def of(self, opcode: Opcode) -> list[Request]:
        """The requests of one kind so far."""
        return [request for request in self.requests if request.opcode == opcode]

    def wait(self, opcode: Opcode, count: int = 1) -> list[Request]:
        """The requests of one kind, once there are `count`."""
        with self._arrived:
            came = self._arrived.wait_for(lambda: len(self.of(opcode)) >= count, PATIENCE)
            assert came, f"no {opcode.name} came; these did: {[Opcode(r.opcode).name for r in self.requests]}"
            return self.of(opcode)

    def ready(self) -> None:
        """Return once the kernel has the answer to INIT."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.connected, PATIENCE), "no INIT came"

    def forgotten(self) -> dict[int, int]:
        """The lookup counts that were taken back so far, by node id."""
        counts: dict[int, int] = {}
        for request in self.of(Opcode.FORGET):
            counts[request.nodeid] = request.decode(structs.FORGET_IN)["nlookup"]
        for request in self.of(Opcode.BATCH_FORGET):
            values, rest = request.split(structs.BATCH_FORGET_IN)
            assert len(rest) == values["count"] * structs.FORGET_ONE.size
            counts.update(structs.FORGET_ONE.struct.iter_unpack(rest))
        return counts

    def one(self, opcode: Opcode) -> Request:
        """The only request of a kind."""
        (request,) = self.wait(opcode)
        return request

    def clear(self) -> None:
        """Forget what came."""
        with self._arrived:
            self.requests.clear()

    def notify(self, message: bytes) -> None:
        """Tell the kernel something."""
        assert os.write(self.fd, message) == len(message)

    # -- the end -----------------------------------------------------------------------------------

    def abort(self) -> None:
        """Break the connection: everyone who waits gets an error."""
        ctypes.CDLL(None).umount2(os.fsencode(self.mountpoint), MNT_FORCE)

    def stop(self) -> None:
        """Stop serving and let go of the connection; the mount stays, without a server."""
        os.eventfd_write(self._stop, 1)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._close()

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._stop)
            self.fd = -1


def parse(message: bytes) -> Request:
    """A request as read from the device; its lengths must agree."""
    length, opcode, unique, nodeid, uid, gid, pid, extended = structs.IN_HEADER.unpack_from(message)
    assert length == len(message)
    end = length - extended * 8
    return Request(opcode, unique, nodeid, uid, gid, pid, message[end:], message[structs.IN_HEADER.size : end])


@contextlib.contextmanager
def serving(
    base: Path, want: Init = NO_FLAGS, *, max_write: int = 1 << 16, options: MountOptions | None = None
) -> Iterator[RawServer]:
    """A served mount below `base`, gone at the end."""
    mountpoint = base / "mnt"
    mountpoint.mkdir()
    server = RawServer(mountpoint, want, max_write, options or MountOptions(fsname="raw"))
    try:
        yield server
    finally:
        server.abort()  # a kill alone does not end what waits for an answer
        for program in server.programs:
            program.kill()
            program.communicate()
        detach(mountpoint)
        if server.fd >= 0:
            server.stop()


def leave_stale(mountpoint: str, options: MountOptions | None = None) -> None:
    """Mount a connection and let go of it."""
    fd = device.open_device()
    try:
        mount_direct(fd, mountpoint, options or MountOptions())
    finally:
        os.close(fd)


def detach(mountpoint: Path | str) -> None:
    """Unmount whatever happens."""
    while ctypes.CDLL(None).umount2(os.fsencode(mountpoint), MNT_DETACH) == 0:
        pass


def need(server: RawServer, flag: Init) -> None:
    """Skip the test where the kernel does not offer this."""
    server.ready()
    if not server.offered & flag:
        pytest.skip(f"this kernel (7.{server.minor}) does not offer {flag.name}")


# -- programs --------------------------------------------------------------------------------------

_PRELUDE = """
import ctypes, fcntl, mmap, os, select, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result
os.chdir(sys.argv[1])
"""


def start(server: RawServer, program: str) -> subprocess.Popen[str]:
    """Run Python lines in the mount's root, in a process of their own, and go on."""
    source = _PRELUDE + textwrap.dedent(program)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", source, str(server.mountpoint)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    server.programs.append(process)
    return process


def finish(server: RawServer, process: subprocess.Popen[str]) -> str:
    """What a program printed; it must end well and in time."""
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        asked = ", ".join(Opcode(request.opcode).name for request in server.requests)
        raise AssertionError(f"the program did not end; these requests came: {asked}") from None
    assert process.returncode == 0, errors
    return output


def run(server: RawServer, program: str) -> str:
    """Run Python lines in the mount's root and return what they print."""
    return finish(server, start(server, program))


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that tells nobody when it happens (the kernel's own bookkeeping)."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
