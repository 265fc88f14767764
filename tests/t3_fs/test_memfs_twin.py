"""memfs and the filesystem below it are given the same operations: both must say the same and hold the same."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from directmount import direct_mount, fuse_works

pytestmark = pytest.mark.skipif(not fuse_works() or os.geteuid() != 0, reason="needs /dev/fuse and root")

NAMES = [
    "a",
    "b",
    "c",
    "d",
    "a/b",
    "a/c",
    "b/a",
    "b/d",
    "c/c",
    "a/b/a",
    "a/b/c",
    "b/a/d",
    "a/b/a/a",
    "x" * 255,
    "y" * 256,
]
XATTRS = [
    "user.one",
    "user.two",
    "trusted.one",
    "security.one",
    "system.nothing",
    "user.",
    "nothing",
    "user." + "n" * 250,
]
ACLS = ["system.posix_acl_access", "system.posix_acl_default"]
LIBC = ctypes.CDLL(None, use_errno=True)
Result = object


def renameat2(old: Path, new: Path, flags: int) -> None:
    if LIBC.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def access_list(dice: random.Random) -> bytes:
    """A list that is mostly valid."""
    named = [(2, dice.randrange(8), uid) for uid in sorted(dice.sample(range(1, 9), dice.randrange(3)))]
    groups = [(8, dice.randrange(8), gid) for gid in sorted(dice.sample(range(1, 9), dice.randrange(2)))]
    entries = [(1, dice.randrange(8), 2**32 - 1), *named, (4, dice.randrange(8), 2**32 - 1), *groups]
    if named or groups or dice.random() < 0.5:
        entries.append((16, dice.randrange(8), 2**32 - 1))
    entries.append((32, dice.randrange(8), 2**32 - 1))
    if dice.random() < 0.1:
        entries.remove(dice.choice(entries))
    if dice.random() < 0.05:
        dice.shuffle(entries)
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def write(path: Path, offset: int, data: bytes) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # a fifo without a reader must not block us
    try:
        return os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def create(path: Path, flags: int, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | flags, mode))


def operation(dice: random.Random) -> tuple[str, Callable[[Path], Result]]:
    """One operation, to be done below any directory, and its description."""
    name, other = dice.choice(NAMES), dice.choice(NAMES)
    mode = dice.choice([0o755, 0o644, 0o600, 0o777, 0o4755, 0o2755, 0o2770, 0o1777, 0])
    size = dice.choice([0, 1, 4095, 4096, 5000, 70000, 1 << 33])
    data = bytes([dice.randrange(256)]) * dice.choice([1, 100, 4096, 20000])
    xattr, value = dice.choice(XATTRS), bytes(dice.choice([0, 1, 100, 300]))  # ext4 has little room
    acl, entries, flags = dice.choice(ACLS), access_list(dice), dice.randrange(8)
    uid, gid = dice.choice([-1, 0, 5]), dice.choice([-1, 0, 6])
    how = dice.choice([os.O_EXCL, 0, os.O_TRUNC])
    flag = dice.choice([os.XATTR_CREATE, os.XATTR_REPLACE, 0, 0])
    choices: list[tuple[int, str, Callable[[Path], Result]]] = [
        (6, f"mkdir {name} {mode:o}", lambda at: os.mkdir(at / name, mode)),
        (3, f"rmdir {name}", lambda at: os.rmdir(at / name)),
        (6, f"create {name} {how:o} {mode:o}", lambda at: create(at / name, how, mode)),
        (1, f"mkfifo {name} {mode:o}", lambda at: os.mkfifo(at / name, mode)),
        (1, f"mknod {name}", lambda at: os.mknod(at / name, mode | stat.S_IFCHR, os.makedev(300, 70000))),
        (4, f"unlink {name}", lambda at: os.unlink(at / name)),
        (4, f"link {name} {other}", lambda at: os.link(at / name, at / other, follow_symlinks=False)),
        (2, f"symlink {other} {name}", lambda at: os.symlink(other, at / name)),
        (6, f"rename {name} {other}", lambda at: os.rename(at / name, at / other)),
        (5, f"renameat2 {name} {other} {flags}", lambda at: renameat2(at / name, at / other, flags & 3)),
        (5, f"write {name} {size} {len(data)}", lambda at: write(at / name, size, data)),
        (3, f"truncate {name} {size}", lambda at: os.truncate(at / name, size)),
        (4, f"chmod {name} {mode:o}", lambda at: os.chmod(at / name, mode)),
        (3, f"chown {name} {uid} {gid}", lambda at: os.lchown(at / name, uid, gid)),
        (5, f"setxattr {name} {xattr} {flag}", lambda at: os.setxattr(at / name, xattr, value, flag)),
        (2, f"removexattr {name} {xattr}", lambda at: os.removexattr(at / name, xattr)),
        (2, f"getxattr {name} {xattr}", lambda at: os.getxattr(at / name, xattr)),
        (5, f"set {acl} {name} {entries!r}", lambda at: os.setxattr(at / name, acl, entries)),
        (2, f"remove {acl} {name}", lambda at: os.removexattr(at / name, acl)),
        (2, f"utime {name}", lambda at: os.utime(at / name, ns=(size + 123456789, size))),
    ]
    chosen = dice.choices(choices, [weight for weight, _, _ in choices])[0]
    return chosen[1], chosen[2]


def outcome(action: Callable[[Path], Result], at: Path) -> Result:
    try:
        return action(at)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def picture(at: Path) -> dict[str, object]:
    """All that programs can see below *at*, except times of change and what is the filesystem's own business."""
    result: dict[str, object] = {}
    for path in [at, *sorted(at.rglob("*"))]:
        st = path.lstat()
        kind = stat.S_IFMT(st.st_mode)
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
            if not name.startswith("security.selinux")
        }
        content: object = None
        if kind == stat.S_IFREG:
            with path.open("rb") as file:
                content = (st.st_size, file.read(100000), file.seek(max(0, st.st_size - 30000)), file.read())
        elif kind == stat.S_IFLNK:
            content = os.readlink(path)
        elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
            content = st.st_rdev
        names = str(path.relative_to(at))
        result[names] = (oct(st.st_mode), st.st_nlink, st.st_uid, st.st_gid, content, xattrs)
    return result


def empty(mount: Path) -> None:
    """Remove everything; all inodes and all space are to be free again."""
    for path in mount.iterdir():
        subprocess.run(["rm", "-rf", str(path)], check=True)
    until = time.monotonic() + 20
    while (free := os.statvfs(mount)).f_files - free.f_ffree > 1 and time.monotonic() < until:
        time.sleep(0.01)  # the kernel forgets when it likes
    assert (free.f_files - free.f_ffree, free.f_blocks - free.f_bfree) == (1, 0)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_operations_have_the_same_results(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    twin = tmp_path / "twin"
    twin.mkdir(mode=0o755)
    try:
        os.setxattr(twin, "user.probe", b"")
        os.removexattr(twin, "user.probe")
    except OSError:
        pytest.skip("the temporary directory's filesystem has no xattrs to compare with")
    old = os.umask(0)  # a direct mount does not negotiate DONT_MASK
    try:
        with direct_mount("memfs", tmp_path / "mnt", fuse_options=("default_permissions", "suid", "dev")) as direct:
            done: list[str] = []
            for step in range(600):
                text, action = operation(dice)
                here, there = outcome(action, direct.path), outcome(action, twin)
                done.append(f"{text[:80]}: {here}")
                assert here == there, f"seed {seed}, step {step}:\n" + "\n".join(done[-25:])
                if step % 20 == 0:
                    assert picture(direct.path) == picture(twin), f"seed {seed}, step {step}:\n" + "\n".join(done[-25:])
            empty(direct.path)
    finally:
        os.umask(old)
