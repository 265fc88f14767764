"""What the running kernel sends about open files, listings and extended attributes, decoded with udf.fuse.structs.

The programs run in the root of a mount that tests/t0_wire/rawserver.py serves.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from pathlib import Path

import pytest
import rawserver
from rawserver import DIR, FILE, HANDLE, NEW, RawServer, Request, can_mount, need, run, serving

from udf.fuse import device, structs
from udf.fuse.flags import (
    Fopen,
    Init,
    IoctlFlag,
    LkFlag,
    PollFlag,
    WriteFlag,
)
from udf.fuse.opcodes import Opcode

pytestmark = can_mount


# -- open files ------------------------------------------------------------------------------------


def test_the_life_of_an_open_file(server: RawServer) -> None:
    server.open_flags = Fopen.DIRECT_IO
    pid, shown = run(
        server,
        """
        f = os.open("file", os.O_RDWR | os.O_APPEND)
        print(os.getpid())
        print(os.pread(f, 7, 3).decode())
        os.write(f, b"hello")
        os.fsync(f)
        os.fdatasync(f)
        os.close(f)
        """,
    ).split()
    assert shown == "3456789"
    opened = server.one(Opcode.OPEN)
    assert (opened.nodeid, opened.pid) == (FILE, int(pid))
    assert opened.decode(structs.OPEN_IN)["flags"] & (os.O_ACCMODE | os.O_APPEND) == os.O_RDWR | os.O_APPEND
    read = server.one(Opcode.READ).decode(structs.READ_IN)
    assert (read["fh"], read["offset"], read["size"]) == (HANDLE, 3, 7)
    assert read["flags"] & os.O_ACCMODE == os.O_RDWR
    write, data = server.one(Opcode.WRITE).split(structs.WRITE_IN)
    assert (write["fh"], write["offset"], write["size"], data) == (HANDLE, len(rawserver.DATA), 5, b"hello")
    assert not write["write_flags"] & WriteFlag.CACHE
    syncs = [request.decode(structs.FSYNC_IN) for request in server.of(Opcode.FSYNC)]
    assert syncs == [{"fh": HANDLE, "fsync_flags": 0}, {"fh": HANDLE, "fsync_flags": 1}]
    flush = server.one(Opcode.FLUSH).decode(structs.FLUSH_IN)
    assert flush["fh"] == HANDLE
    assert flush["lock_owner"]
    (released,) = server.wait(Opcode.RELEASE)
    release = released.decode(structs.RELEASE_IN)
    assert (release["fh"], release["flags"] & os.O_ACCMODE) == (HANDLE, os.O_RDWR)


def test_lseek_for_data_and_holes(server: RawServer) -> None:
    server.handlers[Opcode.LSEEK] = lambda request: structs.LSEEK_OUT.pack(
        request.decode(structs.LSEEK_IN)["offset"] + 5
    )
    shown = run(
        server,
        "f = os.open('file', os.O_RDONLY); print(os.lseek(f, 7, os.SEEK_DATA), os.lseek(f, 1 << 40, os.SEEK_HOLE))",
    )
    assert shown.split() == ["12", str((1 << 40) + 5)]
    asked = [request.decode(structs.LSEEK_IN) for request in server.of(Opcode.LSEEK)]
    assert [(a["fh"], a["offset"], a["whence"]) for a in asked] == [
        (HANDLE, 7, os.SEEK_DATA),
        (HANDLE, 1 << 40, os.SEEK_HOLE),
    ]


def test_fallocate(server: RawServer) -> None:
    server.handlers[Opcode.FALLOCATE] = lambda _: b""
    run(
        server,
        """
        f = os.open("file", os.O_RDWR)
        call("fallocate", f, 1 | 2, ctypes.c_long(4096), ctypes.c_long(1 << 33))  # PUNCH_HOLE, KEEP_SIZE
        """,
    )
    asked = server.one(Opcode.FALLOCATE).decode(structs.FALLOCATE_IN)
    assert asked == {"fh": HANDLE, "offset": 4096, "length": 1 << 33, "mode": 3}


@pytest.mark.parametrize("opcode", [Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64])
def test_copy_file_range(server: RawServer, opcode: Opcode) -> None:
    # A server that knows only the older form answers the newer one with ENOSYS and gets the older one.
    reply = structs.WRITE_OUT if opcode == Opcode.COPY_FILE_RANGE else structs.COPY_FILE_RANGE_OUT
    server.handlers[opcode] = lambda _: reply.pack(1000)
    shown = run(
        server,
        """
        source, target = os.open("file", os.O_RDONLY), os.open("file1", os.O_WRONLY)
        print(os.copy_file_range(source, target, 3000, 11, 22))
        """,
    )
    if not server.of(opcode):
        pytest.skip(f"this kernel (7.{server.minor}) has no {opcode.name}")
    request = server.one(opcode)
    assert shown.strip() == "1000"
    assert request.nodeid == FILE
    asked = request.decode(structs.COPY_FILE_RANGE_IN)
    expected = {
        "fh_in": HANDLE,
        "off_in": 11,
        "nodeid_out": 101,
        "fh_out": HANDLE,
        "off_out": 22,
        "len": 3000,
        "flags": 0,
    }
    assert asked == expected


def test_ioctl_carries_its_data_both_ways(server: RawServer) -> None:
    server.handlers[Opcode.IOCTL] = lambda _: structs.IOCTL_OUT.pack(3, 0, 0, 0) + b"ABCDEFGHIJKLMNOP"
    shown = run(
        server,
        """
        buffer = bytearray(b"abcdefghijklmnop")
        result = fcntl.ioctl(os.open("file", os.O_RDWR), 0xC0105501, buffer)  # _IOWR('U', 1, 16 bytes)
        print(result, buffer.decode())
        """,
    )
    assert shown.split() == ["3", "ABCDEFGHIJKLMNOP"]
    asked, data = server.one(Opcode.IOCTL).split(structs.IOCTL_IN)
    assert (asked["fh"], asked["cmd"], asked["in_size"], asked["out_size"]) == (HANDLE, 0xC0105501, 16, 16)
    assert not asked["flags"] & IoctlFlag.UNRESTRICTED
    assert asked["arg"]
    assert data == b"abcdefghijklmnop"


def test_poll_waits_for_a_notification(server: RawServer) -> None:
    ready: list[bool] = []
    server.handlers[Opcode.POLL] = lambda _: structs.POLL_OUT.pack(1 if ready else 0)
    program = rawserver.start(
        server,
        """
        poll = select.poll()
        poll.register(os.open("file", os.O_RDONLY), select.POLLIN)
        print(poll.poll(9000)[0][1])
        """,
    )
    (first,) = server.wait(Opcode.POLL)
    asked = first.decode(structs.POLL_IN)
    ready.append(True)
    server.notify(device.notify_poll(asked["kh"]))
    assert rawserver.finish(server, program).strip() == "1"
    assert asked["fh"] == HANDLE
    assert asked["flags"] & PollFlag.SCHEDULE_NOTIFY
    assert asked["events"] & 1


def test_locks_of_both_kinds(tmp_path: Path) -> None:
    with serving(tmp_path, Init.POSIX_LOCKS | Init.FLOCK_LOCKS) as server:
        need(server, Init.POSIX_LOCKS | Init.FLOCK_LOCKS)
        server.handlers |= {Opcode.SETLK: lambda _: b"", Opcode.SETLKW: lambda _: b""}
        server.handlers[Opcode.GETLK] = lambda _: structs.LK_OUT.pack(100, 199, fcntl.F_WRLCK, os.getpid())
        shown = run(
            server,
            """
            f = os.open("file", os.O_RDWR)
            print(os.getpid())
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
            fcntl.lockf(f, fcntl.LOCK_SH, 0, 1)
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock = fcntl.fcntl(f, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 3, 4, 0))
            print(*struct.unpack("hhqqi4x", lock))
            """,
        ).splitlines()
        setlk, flock = (request.decode(structs.LK_IN) for request in server.of(Opcode.SETLK)[:2])
        setlkw = server.of(Opcode.SETLKW)[0].decode(structs.LK_IN)
        getlk = server.one(Opcode.GETLK).decode(structs.LK_IN)
    pid = int(shown[0])
    end = (1 << 63) - 1
    fields = ("lk.start", "lk.end", "lk.type", "lk.pid", "lk_flags")
    assert [setlk[f] for f in fields] == [5, 14, fcntl.F_WRLCK, pid, 0]
    assert [setlkw[f] for f in fields] == [1, end, fcntl.F_RDLCK, pid, 0]
    assert [flock[f] for f in fields] == [0, end, fcntl.F_WRLCK, pid, LkFlag.FLOCK]
    assert [getlk[f] for f in fields[:3]] == [3, 6, fcntl.F_RDLCK]
    assert setlk["owner"]
    assert setlk["owner"] == setlkw["owner"] == getlk["owner"] != flock["owner"]
    assert shown[1].split() == [str(number) for number in (fcntl.F_WRLCK, os.SEEK_SET, 100, 100, os.getpid())]


def test_an_interrupt_names_the_request_it_is_about(server: RawServer) -> None:
    server.open_flags = Fopen.DIRECT_IO
    server.handlers[Opcode.READ] = lambda _: None
    program = rawserver.start(
        server,
        """
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
        os.read(os.open("file", os.O_RDONLY), 10)
        """,
    )
    (read,) = server.wait(Opcode.READ)
    program.send_signal(signal.SIGUSR1)
    (interrupt,) = server.wait(Opcode.INTERRUPT)
    assert interrupt.decode(structs.INTERRUPT_IN) == {"unique": read.unique}
    server.answer(read, -errno.EINTR)
    rawserver.finish(server, program)


def test_syncfs(server: RawServer) -> None:
    run(server, "call('syncfs', os.open('.', os.O_RDONLY))")
    if not server.of(Opcode.SYNCFS):
        pytest.skip("this kernel sends SYNCFS to no server on /dev/fuse")
    assert server.one(Opcode.SYNCFS).decode(structs.SYNCFS_IN) == {}


# -- directories -----------------------------------------------------------------------------------


def entries(request: Request, server: RawServer) -> bytes:
    """One page of a listing: two names, one of them of odd length and one found by READDIRPLUS."""
    listing = b""
    for offset, (name, nodeid, kind) in enumerate(((b"file", FILE, 8), (b"a directory", DIR, 4)), start=1):
        if offset <= request.split(structs.READ_IN)[0]["offset"]:
            continue
        entry = structs.DIRENT.pack(nodeid, offset, len(name), kind) + name
        if request.opcode == Opcode.READDIRPLUS:
            mode = stat.S_IFREG | 0o644 if kind == 8 else stat.S_IFDIR | 0o755
            entry = server.entry_out(nodeid, mode, 4711) + entry
        listing += entry.ljust(structs.rec_align(len(entry)), b"\0")
    return listing


def test_readdir(server: RawServer) -> None:
    server.handlers[Opcode.READDIR] = lambda request: entries(request, server)
    assert run(server, "print(*sorted(os.listdir('.')), sep='/')").strip() == "a directory/file"
    first, *_, last = [request.decode(structs.READ_IN) for request in server.of(Opcode.READDIR)]
    assert (first["fh"], first["offset"], last["offset"]) == (HANDLE, 0, 2)
    assert first["size"] >= 4096


def test_readdirplus_fills_the_kernels_caches(tmp_path: Path) -> None:
    with serving(tmp_path, Init.DO_READDIRPLUS) as server:
        need(server, Init.DO_READDIRPLUS)
        server.handlers[Opcode.READDIRPLUS] = lambda request: entries(request, server)
        shown = run(
            server,
            """
            for entry in sorted(os.scandir("."), key=lambda entry: entry.name):
                print(entry.name, entry.inode(), entry.stat().st_size, sep="/")
            """,
        )
        first = server.of(Opcode.READDIRPLUS)[0].decode(structs.READ_IN)
        looked_up = server.of(Opcode.LOOKUP)
    assert shown.splitlines() == [f"a directory/{DIR}/4711", f"file/{FILE}/4711"]
    assert (first["fh"], first["offset"]) == (HANDLE, 0)
    assert structs.DIRENTPLUS.size == structs.ENTRY_OUT.size + structs.DIRENT.size
    assert not looked_up


# -- extended attributes ---------------------------------------------------------------------------


@pytest.mark.parametrize("extended", [False, True])
def test_setxattr_in_its_shorter_and_longer_form(tmp_path: Path, extended: bool) -> None:
    layout = structs.SETXATTR_IN if extended else structs.SETXATTR_IN_COMPAT
    with serving(tmp_path, Init.SETXATTR_EXT if extended else Init(0)) as server:
        if extended:
            need(server, Init.SETXATTR_EXT)
        server.handlers[Opcode.SETXATTR] = lambda _: b""
        run(server, "os.setxattr('file', 'user.colour', b'red', os.XATTR_CREATE)")
        values, rest = server.one(Opcode.SETXATTR).split(layout)
    assert values == {"size": 3, "flags": os.XATTR_CREATE} | ({"setxattr_flags": 0} if extended else {})
    assert rest == b"user.colour\0red"


def test_extended_attributes_are_read_and_removed(server: RawServer) -> None:
    value, names = b"red", b"user.colour\0user.size\0"

    def sized(data: bytes, request: Request) -> bytes | int:
        (size,) = structs.GETXATTR_IN.unpack_from(request.body)
        if size == 0:
            return structs.GETXATTR_OUT.pack(len(data))
        return data if len(data) <= size else -errno.ERANGE

    server.handlers[Opcode.GETXATTR] = lambda request: sized(value, request)
    server.handlers[Opcode.LISTXATTR] = lambda request: sized(names, request)
    server.handlers[Opcode.REMOVEXATTR] = lambda _: b""
    shown = run(
        server,
        """
        print(os.getxattr("file", "user.colour").decode(), *os.listxattr("file"))
        os.removexattr("file", "user.colour")
        buffer = ctypes.create_string_buffer(10)
        print(call("getxattr", b"file", b"user.colour", buffer, 0), call("listxattr", b"file", buffer, 0))
        """,
    )
    assert shown.split() == ["red", "user.colour", "user.size", "3", "22"]
    values, name = server.of(Opcode.GETXATTR)[-1].split(structs.GETXATTR_IN)
    assert (values, name) == ({"size": 0}, b"user.colour\0")
    assert server.of(Opcode.LISTXATTR)[-1].decode(structs.GETXATTR_IN) == {"size": 0}
    assert server.one(Opcode.REMOVEXATTR).body == b"user.colour\0"


def test_a_new_file_is_used_by_the_node_and_handle_of_its_reply(server: RawServer) -> None:
    run(server, "f = os.open('created', os.O_CREAT | os.O_WRONLY); os.write(f, b'x')")
    write = server.one(Opcode.WRITE)
    assert (write.nodeid, write.split(structs.WRITE_IN)[0]["fh"]) == (NEW + Opcode.CREATE, HANDLE)
