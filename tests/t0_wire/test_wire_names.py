"""What the running kernel sends when a program makes a system call, decoded with udf.fuse.structs.

The programs run in the root of a mount that tests/t0_wire/rawserver.py serves.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest
import rawserver
from rawserver import DIR, FILE, HANDLE, RawServer, can_mount, need, run, serving

from udf.fuse import device, structs
from udf.fuse.flags import (
    KERNEL_MINOR_VERSION,
    OLDEST_MINOR_VERSION,
    ExtType,
    Fattr,
    Fopen,
    GetattrFlag,
    Init,
)
from udf.fuse.opcodes import Opcode

pytestmark = can_mount


def text(*names: str) -> bytes:
    return b"".join(name.encode() + b"\0" for name in names)


# -- INIT ------------------------------------------------------------------------------------------


def test_every_flag_that_the_kernel_offers_has_a_name(server: RawServer) -> None:
    server.ready()
    assert server.minor >= OLDEST_MINOR_VERSION
    assert server.init_length == (structs.INIT_IN if server.minor >= 36 else structs.INIT_IN_COMPAT).size
    if server.minor > KERNEL_MINOR_VERSION:
        pytest.skip(f"this kernel's 7.{server.minor} is newer than what udf.fuse describes")
    known = 0
    for flag in Init:
        known |= flag
    assert not server.offered & ~known, f"unknown bits {server.offered & ~known:#x}"
    assert server.offered & Init.DO_READDIRPLUS
    if server.minor >= 40:
        assert server.offered & Init.HAS_RESEND


def test_the_kernel_takes_the_limits_of_the_init_reply(server: RawServer) -> None:
    server.open_flags = Fopen.DIRECT_IO
    run(server, "os.write(os.open('file', os.O_WRONLY), bytes(200_000))")
    # Without MAX_PAGES (not asked for here) the limit is 32 pages; max_write is half of that.
    sizes = [request.split(structs.WRITE_IN)[0]["size"] for request in server.of(Opcode.WRITE)]
    assert sizes == [65536, 65536, 65536, 200_000 - 3 * 65536]


def test_max_pages_and_max_write_make_larger_writes(tmp_path: Path) -> None:
    with serving(tmp_path, Init.MAX_PAGES, max_write=1 << 19) as server:
        server.open_flags = Fopen.DIRECT_IO
        run(server, "os.write(os.open('file', os.O_WRONLY), mmap.mmap(-1, 1 << 19))")
        assert [r.split(structs.WRITE_IN)[0]["size"] for r in server.of(Opcode.WRITE)] == [1 << 19]


# -- attributes ------------------------------------------------------------------------------------


def test_attributes_reach_the_program_field_by_field(server: RawServer) -> None:
    shown = run(server, "s = os.stat('file'); print(*s[:7], s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns, s.st_blocks)")
    mode, size = stat.S_IFREG | 0o644, len(rawserver.DATA)
    device = shown.split()[2]
    times = "1001000000001 1002000000002 1003000000003"
    assert shown.split() == f"{mode} {FILE} {device} 1 0 0 {size} {times} {(size + 511) // 512}".split()


def test_getattr_after_a_change_carries_the_handle(server: RawServer) -> None:
    run(server, "f = os.open('file', os.O_RDWR); os.write(f, b'x'); os.lseek(f, 0, os.SEEK_END)")
    (request,) = [request for request in server.of(Opcode.GETATTR) if request.nodeid == FILE]
    assert request.decode(structs.GETATTR_IN) == {"getattr_flags": GetattrFlag.FH, "fh": HANDLE}


def test_statx_asks_for_the_birth_time_and_gets_it(server: RawServer) -> None:
    values = dict.fromkeys(structs.STATX.fields, 0)
    values |= {"mask": 0xFFF, "blksize": 4096, "nlink": 1, "mode": stat.S_IFREG | 0o644, "ino": FILE, "size": 5}
    values |= {"btime.tv_sec": 77, "btime.tv_nsec": 88, "mtime.tv_sec": -5, "mtime.tv_nsec": 6}
    server.handlers[Opcode.STATX] = lambda _: structs.STATX_OUT.pack(3600, 0, 0, *values.values())
    # struct statx in C is what fuse_statx is.
    shown = run(
        server,
        """
        buffer = ctypes.create_string_buffer(256)
        call("statx", -100, b"file", 0, 0xfff, buffer)
        print(*struct.unpack_from("<qI", buffer, 80), *struct.unpack_from("<qI", buffer, 112))
        """,
    )
    if not server.of(Opcode.STATX):
        pytest.skip(f"this kernel (7.{server.minor}) has no STATX")
    request = server.one(Opcode.STATX)
    asked = request.decode(structs.STATX_IN)
    assert request.nodeid == FILE
    assert (asked["getattr_flags"], asked["fh"], asked["sx_mask"] & 0xFFF) == (0, 0, 0xFFF)
    assert shown.split() == ["77", "88", "-5", "6"]


def test_setattr_says_what_to_change(server: RawServer) -> None:
    run(
        server,
        """
        os.chmod("file", 0o600)
        os.chown("file", 11, 22)
        os.truncate("file", 1234567890123)
        os.utime("file", ns=(5_000000006, 7_000000008))
        f = os.open("file", os.O_RDWR)
        os.ftruncate(f, 9)
        """,
    )
    chmod, chown, truncate, utime, ftruncate = (r.decode(structs.SETATTR_IN) for r in server.of(Opcode.SETATTR))
    assert chmod["valid"] & Fattr.MODE
    assert chmod["mode"] == stat.S_IFREG | 0o600
    assert chown["valid"] & (Fattr.UID | Fattr.GID) == Fattr.UID | Fattr.GID
    assert (chown["uid"], chown["gid"]) == (11, 22)
    assert truncate["valid"] & Fattr.SIZE
    assert not truncate["valid"] & Fattr.FH
    assert truncate["size"] == 1234567890123
    assert utime["valid"] & (Fattr.ATIME | Fattr.MTIME) == Fattr.ATIME | Fattr.MTIME
    assert not utime["valid"] & (Fattr.ATIME_NOW | Fattr.MTIME_NOW)
    assert [utime[name] for name in ("atime", "atimensec", "mtime", "mtimensec")] == [5, 6, 7, 8]
    assert ftruncate["valid"] & Fattr.FH
    assert (ftruncate["fh"], ftruncate["size"]) == (HANDLE, 9)


def test_statfs_reaches_the_program_field_by_field(server: RawServer) -> None:
    shown = run(
        server, "s = os.statvfs('.'); print(s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_namemax)"
    )
    assert shown.split() == ["10", "9", "8", "7", "6", "255"]
    assert server.one(Opcode.STATFS).body == b""


# -- names -----------------------------------------------------------------------------------------


def test_requests_that_make_names(server: RawServer) -> None:
    run(
        server,
        """
        os.umask(0o027)
        os.mkdir("made", 0o755)
        os.mknod("node", 0o20640, os.makedev(4, 70))
        os.symlink("to/there", "link")
        os.link("file", "dir/other")
        os.open("created", os.O_CREAT | os.O_RDWR, 0o666)
        """,
    )
    mkdir, name = server.one(Opcode.MKDIR).split(structs.MKDIR_IN)
    assert (mkdir, name) == ({"mode": 0o750, "umask": 0o027}, text("made"))  # DONT_MASK was not asked for
    mknod, name = server.one(Opcode.MKNOD).split(structs.MKNOD_IN)
    assert (mknod, name) == ({"mode": 0o20640, "rdev": 4 << 8 | 70, "umask": 0o027}, text("node"))
    assert server.one(Opcode.SYMLINK).body == text("link", "to/there")
    link, name = server.one(Opcode.LINK).split(structs.LINK_IN)
    assert (link, name, server.one(Opcode.LINK).nodeid) == ({"oldnodeid": FILE}, text("other"), DIR)
    create, name = server.one(Opcode.CREATE).split(structs.CREATE_IN)
    assert name == text("created")
    assert create["flags"] & (os.O_CREAT | os.O_ACCMODE) == os.O_CREAT | os.O_RDWR
    assert (create["mode"], create["umask"], create["open_flags"]) == (stat.S_IFREG | 0o640, 0o027, 0)


def test_tmpfile(server: RawServer) -> None:
    run(
        server,
        """
        try:
            os.open("dir", os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            assert error.errno == 95, error
        """,
    )
    if not server.of(Opcode.TMPFILE):
        pytest.skip(f"this kernel (7.{server.minor}) has no TMPFILE")
    request = server.one(Opcode.TMPFILE)
    values, name = request.split(structs.CREATE_IN)
    assert request.nodeid == DIR
    assert values["flags"] & os.O_TMPFILE == os.O_TMPFILE
    assert values["mode"] == stat.S_IFREG | 0o600
    assert name.endswith(b"\0")
    assert name.count(b"\0") == 1


def test_requests_that_move_and_remove_names(server: RawServer) -> None:
    run(
        server,
        """
        os.rename("file", "dir/new")
        call("renameat2", -100, b"file1", -100, b"dir/newer", 1)  # RENAME_NOREPLACE
        os.unlink("file2")
        os.rmdir("dir")
        """,
    )
    rename, names = server.one(Opcode.RENAME).split(structs.RENAME_IN)
    assert (rename, names, server.one(Opcode.RENAME).nodeid) == ({"newdir": DIR}, text("file", "new"), 1)
    rename2, names = server.one(Opcode.RENAME2).split(structs.RENAME2_IN)
    assert (rename2, names) == ({"newdir": DIR, "flags": 1}, text("file1", "newer"))
    assert server.one(Opcode.UNLINK).body == text("file2")
    assert server.one(Opcode.RMDIR).body == text("dir")


def test_a_creating_request_carries_the_directorys_group(tmp_path: Path) -> None:
    with serving(tmp_path, Init.CREATE_SUPP_GROUP) as server:
        need(server, Init.CREATE_SUPP_GROUP)
        server.root_gid = 4242
        run(server, "os.setgroups([4242, 17]); os.mkdir('made')")
        extensions = server.one(Opcode.MKDIR).extensions
    assert structs.EXT_HEADER.unpack_from(extensions) == (len(extensions), ExtType.GROUPS)
    (count,) = structs.SUPP_GROUPS.unpack_from(extensions, structs.EXT_HEADER.size)
    groups = struct.unpack_from(f"={count}I", extensions, structs.EXT_HEADER.size + structs.SUPP_GROUPS.size)
    assert groups == (4242,)


def test_a_creating_request_carries_the_security_contexts(tmp_path: Path) -> None:
    with serving(tmp_path, Init.SECURITY_CTX) as server:
        need(server, Init.SECURITY_CTX)
        run(server, "os.mkdir('made')")
        extensions = server.one(Opcode.MKDIR).extensions
    size, count = structs.SECCTX_HEADER.unpack_from(extensions)
    assert size == len(extensions)
    offset = structs.SECCTX_HEADER.size
    for _ in range(count):  # none without a security module that labels files
        (length,) = structs.SECCTX.unpack_from(extensions, offset)
        offset = extensions.index(b"\0", offset + structs.SECCTX.size) + 1 + length
    assert structs.rec_align(offset) == size


def test_forgets_come_alone_or_in_a_batch(server: RawServer) -> None:
    names = [f"file{number}" for number in range(1, 21)]
    run(server, "for name in range(1, 21): os.stat(f'file{name}')")
    with server.gate:  # so that they queue up
        for name in names:
            server.notify(device.notify_inval_entry(1, name.encode()))
    rawserver.until(lambda: len(server.forgotten()) >= len(names))
    assert server.forgotten() == {100 + number: 1 for number in range(1, 21)}
    assert server.of(Opcode.BATCH_FORGET)
