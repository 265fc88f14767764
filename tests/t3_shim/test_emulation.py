"""What a driver lacks, the mount has all the same; what it refuses once, it is not asked again."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.tree import Request
from udf.fuse import structs
from udf.fuse.flags import Fattr, Init, LkFlag
from udf.fuse.opcodes import Opcode

pytestmark = can_mount

USER = 12345
LISTING = int(Init.DO_READDIRPLUS | Init.READDIRPLUS_AUTO)


def grow(driver: RawDriver) -> None:
    tree = driver.tree
    tree.nodes[1].mode = stat.S_IFDIR | 0o777
    tree.file("file", b"0123456789" * 1000)
    tree.file("copy", b"")
    directory = tree.directory("d", mode=0o777)
    for number in range(200):
        tree.file(f"f{number}", b"x" * number, parent=directory.ino)


# ---- umask


@pytest.mark.parametrize("masks", [False, True])
def test_the_umask_is_applied_once(masks):
    with mounted(grow, driver_flags=int(Init.DONT_MASK) if masks else 0) as mount:
        mount.usual.do("umask", 0o027)
        mount.usual.do("open", mount.path("new"), os.O_CREAT | os.O_WRONLY, 0o666)
        mount.usual.do("mkdir", mount.path("e"), 0o777)
        mount.usual.do("mknod", mount.path("pipe"), stat.S_IFIFO | 0o666)
        sent = {
            Opcode(request.op): request.fields(layout)["mode"] & 0o777
            for op, layout in (
                (Opcode.CREATE, structs.CREATE_IN),
                (Opcode.MKDIR, structs.MKDIR_IN),
                (Opcode.MKNOD, structs.MKNOD_IN),
            )
            for request in mount.driver.log
            if request.op == op
        }
        if masks:
            assert sent == {Opcode.CREATE: 0o666, Opcode.MKDIR: 0o777, Opcode.MKNOD: 0o666}
            (request,) = [request for request in mount.driver.log if request.op == Opcode.CREATE]
            assert request.fields(structs.CREATE_IN)["umask"] == 0o027
        else:
            assert sent == {Opcode.CREATE: 0o640, Opcode.MKDIR: 0o750, Opcode.MKNOD: 0o640}


# ---- suid and sgid


def set_modes(driver: RawDriver) -> list[tuple[bool, int, int]]:
    """What SETATTRs the driver got: (sets the mode, the mode's permission bits, sets anything that only we know)."""
    found = []
    for request in driver.log:
        if request.op == Opcode.SETATTR:
            values = request.fields(structs.SETATTR_IN)
            valid = values["valid"]
            found.append((bool(valid & Fattr.MODE), values["mode"] & 0o7777, valid & Fattr.KILL_SUIDGID))
    return found


def dangerous(mode: int):
    def prepare(driver: RawDriver) -> None:
        grow(driver)
        driver.tree.file("s", b"suid", mode, uid=USER)

    return prepare


KILLS = {
    "a write": ("overwrite", (b"w",)),
    "a truncation": ("truncate", (1,)),
    "an open that truncates": ("spill", (b"w", os.O_TRUNC)),
    "fallocate": ("fallocate", (100,)),
}


@pytest.mark.parametrize("what", KILLS)
@pytest.mark.parametrize(("mode", "left"), [(0o6775, 0o775), (0o4755, 0o755), (0o2767, 0o2767), (0o644, 0o644)])
def test_a_user_takes_suid_and_sgid_away(what, mode, left):
    """sgid without group execution is no sgid but mandatory locking, and stays."""
    call, args = KILLS[what]
    with mounted(dangerous(mode)) as mount:
        mount.driver.answers[Opcode.FALLOCATE] = lambda q: b""
        program = mount.program(USER)
        program.do(call, mount.path("s"), *args)
        assert stat.S_IMODE(mount.do("stat", "s")["st_mode"]) == left
        assert stat.S_IMODE(next(n for n in mount.tree.nodes.values() if n.uid == USER).mode) == left
        assert not any(only_ours for _, _, only_ours in set_modes(mount.driver)), "it was not offered KILLPRIV_V2"
        sent = [bits for sets, bits, _ in set_modes(mount.driver) if sets]
        assert sent == ([left] if mode != left else [])
        if call == "overwrite":
            (write,) = [request for request in mount.driver.log if request.op == Opcode.WRITE]
            assert write.fields(structs.WRITE_IN)["write_flags"] & 4 == 0


def test_root_keeps_suid_when_it_writes():
    with mounted(dangerous(0o6775)) as mount:
        mount.do("overwrite", "s", b"w")
        assert stat.S_IMODE(mount.do("stat", "s")["st_mode"]) == 0o6775


@pytest.mark.parametrize("owner", [(USER, -1), (-1, USER), (7, 8)])
def test_a_new_owner_takes_suid_and_sgid_away_even_from_root(owner):
    with mounted(dangerous(0o6775)) as mount:
        mount.do("chown", "s", *owner)
        assert stat.S_IMODE(mount.do("stat", "s")["st_mode"]) == 0o775
        assert len(set_modes(mount.driver)) == 1, "in one request"


def test_a_directory_keeps_sgid_under_a_new_owner():
    def prepare(driver: RawDriver) -> None:
        driver.tree.directory("d", mode=0o2775)

    with mounted(prepare) as mount:
        mount.do("chown", "d", 7, 8)
        assert stat.S_IMODE(mount.do("stat", "d")["st_mode"]) == 0o2775


def test_a_mode_that_cannot_be_cleared_refuses_the_write():
    with mounted(dangerous(0o6775)) as mount:
        mount.driver.answers[Opcode.SETATTR] = lambda q: errno.EROFS
        program = mount.program(USER)
        assert program.fails("overwrite", mount.path("s"), b"w") == errno.EROFS
        assert mount.do("slurp", "s") == b"suid"
        assert mount.driver.count(Opcode.WRITE) == 0


# ---- listings


@pytest.mark.parametrize("flags", [0, int(Init.DO_READDIRPLUS), LISTING], ids=["READDIR", "READDIRPLUS", "both"])
def test_a_driver_with_either_kind_of_listing_is_listed(flags):
    wanted = [f"f{number}" for number in range(200)]
    with mounted(grow, driver_flags=flags) as mount:
        refused = {0: [Opcode.READDIRPLUS], int(Init.DO_READDIRPLUS): [Opcode.READDIR]}.get(flags, [])
        for op in refused:
            mount.driver.answers[op] = lambda q: errno.ENOSYS
        assert mount.do("names", "d") == sorted(wanted)
        assert mount.do("scan", "d") == {name: int(name[1:]) for name in wanted}
        assert mount.driver.count(*refused) == 0 if refused else True
        assert not mount.faults()


def test_a_driver_that_does_not_know_what_it_accepted_is_listed_the_other_way():
    with mounted(grow, driver_flags=LISTING) as mount:
        mount.driver.answers[Opcode.READDIRPLUS] = lambda q: errno.ENOSYS
        for _ in range(2):
            assert len(mount.do("scan", "d")) == 200
        assert mount.driver.count(Opcode.READDIRPLUS) == 1


def test_offsets_of_an_open_directory_stay_right_when_the_drivers_own_change():
    with mounted(grow, driver_flags=0) as mount:
        fd = mount.do("open", "d", 0o200000)
        first = mount.usual.do("entries", fd)
        for number in range(0, 200, 2):
            del mount.tree.nodes[4].children[b"f%d" % number]
        rest = []
        while more := mount.usual.do("entries", fd):
            rest += more
        assert len(set(first + rest)) == len(first + rest)
        assert {f"f{number}" for number in range(1, 200, 2)} <= set(first + rest)
        mount.usual.do("close", fd)


# ---- refusals


def test_a_driver_without_fallocate_has_it_emulated_by_libc():
    with mounted(grow) as mount:
        assert mount.do("fallocate", "file", 50_000) == 50_000
        assert len(mount.tree.nodes[2].data) == 50_000
        assert mount.do("fallocate", "copy", 5_000) == 5_000
        assert mount.driver.count(Opcode.FALLOCATE) == 1
        assert mount.fails("punch", "file", 3) == errno.EOPNOTSUPP


def test_a_driver_without_lseek_has_no_holes():
    with mounted(grow) as mount:
        for _ in range(2):
            assert mount.do("lseek", "file", 10, os.SEEK_DATA) == 10
            assert mount.do("lseek", "file", 10, os.SEEK_HOLE) == 10_000
        assert mount.fails("lseek", "file", 10_000, os.SEEK_DATA) == errno.ENXIO
        assert mount.driver.count(Opcode.LSEEK) == 1


def test_a_driver_without_copy_file_range_is_copied_by_the_kernel():
    with mounted(grow) as mount:
        for name in ("copy", "copy2"):
            assert mount.do("copy_range", "file", mount.path(name), 10_000) == 10_000
            assert mount.do("slurp", name) == b"0123456789" * 1000
        assert mount.driver.count(Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64) <= 2


REFUSED = {
    "ioctl": (Opcode.IOCTL, ("ioctl", "file", 0x80086601), errno.ENOTTY),
    "O_TMPFILE": (Opcode.TMPFILE, ("open", "d", 0o20200002, 0o644), errno.EOPNOTSUPP),
    "setxattr": (Opcode.SETXATTR, ("setxattr", "file", "user.x", b"x"), errno.EOPNOTSUPP),
    "getxattr": (Opcode.GETXATTR, ("getxattr", "file", "user.x"), errno.EOPNOTSUPP),
    "listxattr": (Opcode.LISTXATTR, ("listxattr", "file"), errno.EOPNOTSUPP),
    "removexattr": (Opcode.REMOVEXATTR, ("removexattr", "file", "user.x"), errno.EOPNOTSUPP),
    "exchange": (Opcode.RENAME2, ("renamed_2", "file", "copy"), errno.EINVAL),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_driver_does_not_know_has_the_right_errno_and_is_asked_once(what):
    op, (call, name, *args), number = REFUSED[what]
    with mounted(grow) as mount:
        mount.driver.answers[op] = lambda q: errno.ENOSYS
        for _ in range(3):
            assert mount.fails(call, name, *args) == number
        assert mount.driver.count(op) == 1
        assert not mount.faults()


@pytest.mark.parametrize("op", [Opcode.FSYNC, Opcode.FLUSH, Opcode.FSYNCDIR])
def test_what_needs_no_doing_is_not_refused(op):
    with mounted(grow) as mount:
        mount.driver.answers[op] = lambda q: errno.ENOSYS
        for _ in range(3):
            mount.do("spill", "file", b"x")
            mount.do("fsync", "file")
            mount.do("fsync_directory", "d")
        assert mount.driver.count(op) == 1


def test_a_driver_without_open_is_read_and_listed():
    with mounted(grow, open="driver") as mount:
        driver = mount.driver
        for op in (Opcode.OPEN, Opcode.OPENDIR):
            driver.answers[op] = lambda q: errno.ENOSYS
        driver.answers[Opcode.READ] = lambda q: bytes(
            driver.tree.nodes[q.node].data[q.fields(structs.READ_IN)["offset"] :][: q.fields(structs.READ_IN)["size"]]
        )
        assert len(mount.do("slurp", "file")) == 10_000
        assert len(mount.do("names", "d")) == 200


def test_a_birth_time_that_a_driver_has_not_is_not_asked_for_again():
    with mounted(grow) as mount:
        for _ in range(3):
            mount.do("btime", "file")
        assert mount.driver.count(Opcode.STATX) <= 1


# ---- what a driver has gets through


def test_rename_flags_reach_the_driver():
    with mounted(grow) as mount:
        mount.do("renamed_2", "file", "copy")
        request = mount.driver.wait_for(Opcode.RENAME2)
        assert request.fields(structs.RENAME2_IN)["flags"] == 2
        assert len(mount.do("slurp", "copy")) == 10_000
        assert mount.fails("renameat2", "copy", mount.path("file"), 1) == errno.EEXIST
        mount.do("renameat2", "copy", mount.path("moved"), 1)
        assert mount.do("names") == ["d", "file", "moved"]


def test_holes_ranges_and_ioctls_of_a_driver_get_through():
    with mounted(grow) as mount:
        driver, tree = mount.driver, mount.tree

        def copied(q: Request):
            values = q.fields(structs.COPY_FILE_RANGE_IN)
            assert values["fh_in"] in tree.handles
            assert tree.handles[values["fh_out"]] == values["nodeid_out"] == 3
            tree.nodes[3].data[:] = tree.nodes[q.node].data
            layout = structs.COPY_FILE_RANGE_OUT if q.op == Opcode.COPY_FILE_RANGE_64 else structs.WRITE_OUT
            return layout.pack(values["len"])

        driver.answers[Opcode.LSEEK] = lambda q: structs.LSEEK_OUT.pack(4096)
        driver.answers[Opcode.COPY_FILE_RANGE] = driver.answers[Opcode.COPY_FILE_RANGE_64] = copied
        driver.answers[Opcode.FALLOCATE] = lambda q: b""
        driver.answers[Opcode.IOCTL] = lambda q: (
            structs.IOCTL_OUT.pack(0, 0, 0, 0) + bytes(q.fields(structs.IOCTL_IN)["out_size"])
        )
        assert mount.do("lseek", "file", 10, os.SEEK_HOLE) == 4096
        assert mount.do("copy_range", "file", mount.path("copy"), 10_000) == 10_000
        assert len(mount.do("slurp", "copy")) == 10_000
        mount.do("punch", "file", 3)
        assert mount.do("ioctl", "file", 0x80086601) == 0
        assert not mount.faults()


# ---- locks


def locks_locally(mount: Mount) -> None:
    """Between two programs of this machine, with no word to the driver."""
    other = mount.program()
    for kind, call in (("flock", "flock"), ("record", "lockf")):
        fd = mount.do("open", "file", os.O_RDWR)
        mount.usual.do("lock_open", fd, call)
        assert other.fails("lock", mount.path("file"), kind) == errno.EAGAIN
        mount.usual.do("close", fd)
        other.do("lock", mount.path("file"), kind)


def test_locks_are_the_kernels_own_unless_a_manifest_asks():
    with mounted(grow) as mount:
        locks_locally(mount)
        assert mount.driver.count(Opcode.GETLK, Opcode.SETLK, Opcode.SETLKW) == 0


def test_locks_of_a_driver_without_them_stay_the_kernels():
    with mounted(grow, locks=True) as mount:
        locks_locally(mount)
        assert mount.driver.count(Opcode.SETLK) == 0, "it did not accept them"


def test_locks_reach_a_driver_that_has_them():
    flags = LISTING | int(Init.POSIX_LOCKS | Init.FLOCK_LOCKS)
    with mounted(grow, driver_flags=flags, locks=True) as mount:
        driver = mount.driver
        driver.answers[Opcode.SETLK] = lambda q: b""
        driver.answers[Opcode.SETLKW] = lambda q: b""
        driver.answers[Opcode.GETLK] = lambda q: structs.LK_OUT.pack(0, 99, 1, 4711)
        mount.do("lock", "file", "record")
        mount.do("lock", "file", "wait")
        mount.do("lock", "file", "flock")
        assert driver.wait_for(Opcode.SETLKW).fields(structs.LK_IN)["fh"] in range(100, 200)
        flocks = [q for q in driver.log if q.op == Opcode.SETLK and q.fields(structs.LK_IN)["lk_flags"] & LkFlag.FLOCK]
        assert flocks
        driver.answers[Opcode.SETLK] = lambda q: errno.EAGAIN
        assert mount.fails("lock", "file", "record") == errno.EAGAIN
        assert not mount.faults()


def test_a_lock_that_is_waited_for_has_no_deadline_and_ends_with_its_program():
    flags = LISTING | int(Init.POSIX_LOCKS | Init.FLOCK_LOCKS)
    with mounted(grow, driver_flags=flags, locks=True, deadline=1.0) as mount:
        driver, waiter = mount.driver, mount.program()
        driver.answers[Opcode.SETLK] = lambda q: b""
        driver.hold(Opcode.SETLKW)
        waiter.start("lock", mount.path("file"), "wait")
        request = driver.wait_for(Opcode.SETLKW)
        with pytest.raises(AssertionError):
            waiter.wait(2.5)
        waiter.signal(9)
        driver.wait_for(Opcode.INTERRUPT)
        driver.reply(request, errno.EINTR)
        assert waiter.ended()
