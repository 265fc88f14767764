"""Mounting, unmounting and the table of mounts."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from rawserver import DATA, can_mount, detach, finish, leave_stale, serving, start

from udf.fuse import device
from udf.fuse.mount import (
    Mount,
    MountError,
    MountOptions,
    find_mount,
    is_stale,
    mount_by_fusermount,
    mount_direct,
    read_mountinfo,
    unmount,
)
from udf.fuse.mountinfo import parse_mountinfo

has_fusermount = pytest.mark.skipif(shutil.which("fusermount3") is None, reason="needs fusermount3")


def found(path: str) -> Mount:
    mount = find_mount(path)
    assert mount is not None
    return mount


# -- the table of mounts ---------------------------------------------------------------------------

TABLE = rb"""20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 20 0:30 / /home rw,nosuid shared:2 master:1 - tmpfs tmp rw,size=1k
31 30 0:31 / /home/a rw - fuse.sshfs host:/a\040b rw,user_id=1000,group_id=100
32 30 0:32 / /home rw - fuse over rw
33 32 0:33 /sub /home/b\134\012\011\040\043 rw - fuse.udfd x rw,user_id=7
34 32 0:34 / /home/b\134\012\011\040\043 rw - tmpfs beside rw
35 33 0:35 / /home/b\134\012\011\040\043 rw - fuseblk top rw
future line
"""


def test_the_table_is_read_with_its_escapes() -> None:
    mounts = {mount.id: mount for mount in parse_mountinfo(TABLE)}
    assert sorted(mounts) == [20, 30, 31, 32, 33, 34, 35]
    assert mounts[31].source == "host:/a b"
    assert (mounts[31].super_option("user_id"), mounts[31].super_option("nothing")) == ("1000", None)
    odd = mounts[33]
    assert odd == Mount(33, 32, (0, 33), "/sub", "/home/b\\\n\t #", "rw", "fuse.udfd", "x", "rw,user_id=7")
    assert [mount.id for mount in mounts.values() if mount.is_fuse] == [31, 32, 33, 35]


def test_the_mount_is_found_that_a_path_leads_to() -> None:
    mounts = parse_mountinfo(TABLE)

    def at(path: str) -> int | None:
        mount = find_mount(path, mounts)
        return mount.id if mount else None

    assert at("/") == 20
    assert at("/home") == 32
    assert at("/home/") == 32
    assert at("/home/a") is None, "hidden by what is mounted over /home"
    assert at("/home/b\\\n\t #") == 35
    assert at("/home/b") is None
    assert at("/homely") is None
    # In a change of root the mount that / lies in is not in the table.
    inside = [mount for mount in mounts if mount.id in (32, 33, 35)]
    assert find_mount("/home", inside) == inside[0]
    assert find_mount("/", inside) is None
    assert find_mount("/", []) is None


def test_our_own_table_is_readable() -> None:
    mounts = read_mountinfo()
    assert find_mount("/proc", mounts) in mounts


# -- mount(2) --------------------------------------------------------------------------------------


@can_mount
def test_a_mount_has_the_options_it_was_given(fd: int, point: str) -> None:
    options = MountOptions("a,source=x y", noexec=True, noatime=True, read_only=True, uid=123, gid=45)
    mount_direct(fd, point, replace(options, allow_other=True, max_read=65536))
    mount = found(point)
    assert (mount.fstype, mount.source, mount.root) == ("fuse.udfd", "a,source=x y", "/")
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(mount.options.split(","))
    words = {"user_id=123", "group_id=45", "default_permissions", "allow_other", "max_read=65536"}
    assert words <= set(mount.super_options.split(","))
    unmount(point)
    assert find_mount(point) is None


@can_mount
def test_a_mount_is_nosuid_and_nodev_unless_asked(fd: int, point: str) -> None:
    mount_direct(fd, point, MountOptions())
    assert {"rw", "nosuid", "nodev"} <= set(found(point).options.split(","))
    assert not {"noexec", "noatime"} & set(found(point).options.split(","))
    assert {"default_permissions"} <= set(found(point).super_options.split(","))
    assert "allow_other" not in found(point).super_options
    unmount(point)
    other = device.open_device()
    try:
        mount_direct(other, point, MountOptions(nosuid=False, nodev=False))
        assert not {"nosuid", "nodev"} & set(found(point).options.split(","))
    finally:
        os.close(other)


@can_mount
@pytest.mark.parametrize("name", ["a b", "back\\slash", "new\nline", "#\t\\040", "ünïcode", "-o", "a,b", "b\udc80ytes"])
@pytest.mark.parametrize("how", ["direct", pytest.param("fusermount", marks=has_fusermount)])
def test_odd_names_of_mountpoints(tmp_path: Path, fd: int, name: str, how: str) -> None:
    point = str(tmp_path / name)
    os.mkdir(point)
    options = MountOptions(fsname=name)
    own = -1
    try:
        if how == "direct":
            mount_direct(fd, point, options)
        else:
            own = mount_by_fusermount(point, options)
        assert (found(point).mountpoint, found(point).source, found(point).fstype) == (point, name, "fuse.udfd")
        unmount(point)
        assert find_mount(point) is None
    finally:
        detach(point)
        if own >= 0:
            os.close(own)


@can_mount
def test_a_file_can_be_mounted_on(tmp_path: Path, fd: int) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(MountError) as caught:
        leave_stale(str(path))
    assert caught.value.errno == errno.ENOTDIR
    try:
        mount_direct(fd, str(path), MountOptions(rootmode=stat.S_IFREG))
        unmount(str(path))
    finally:
        detach(path)


@can_mount
def test_a_connection_can_be_attached_twice(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        (tmp_path / "second").mkdir()
        try:
            mount_direct(server.fd, str(tmp_path / "second"), MountOptions())
            first, second = found(str(server.mountpoint)), found(str(tmp_path / "second"))
            assert first.device == second.device
            unmount(str(server.mountpoint))
            assert not is_stale(str(tmp_path / "second"))
        finally:
            detach(tmp_path / "second")


@can_mount
def test_a_failed_mount_says_why_in_a_sentence(fd: int, point: str) -> None:
    with pytest.raises(MountError) as caught:
        mount_direct(fd, point + "/nowhere", MountOptions())
    assert caught.value.errno == errno.ENOENT
    assert str(caught.value) == f"cannot mount on {point}/nowhere: there is no such directory"
    with pytest.raises(MountError) as caught:
        mount_direct(0, point, MountOptions())
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(MountError) as caught:
        mount_direct(fd, point + "\0x", MountOptions())
    assert caught.value.errno == errno.EINVAL
    assert find_mount(point) is None


# -- unmount ---------------------------------------------------------------------------------------


@can_mount
@pytest.mark.parametrize(
    ("use", "look", "seen"),
    [
        ("f = os.open('file', os.O_RDONLY); os.chdir('/')", "os.pread(f, 3, 5).decode()", "567"),
        ("pass", "os.stat('file').st_size", str(len(DATA))),
    ],
    ids=["open file", "working directory"],
)
def test_a_mount_in_use_is_busy_and_lazily_unmounted(tmp_path: Path, use: str, look: str, seen: str) -> None:
    with serving(tmp_path) as server:
        point = str(server.mountpoint)
        wait = "signal.pthread_sigmask(signal.SIG_BLOCK, [10]); print('in', flush=True); signal.sigwait([10])"
        program = start(server, f"{use}\n{wait}\nprint({look})")
        assert program.stdout is not None
        assert program.stdout.readline() == "in\n"
        with pytest.raises(MountError) as caught:
            unmount(point)
        assert caught.value.errno == errno.EBUSY
        assert str(caught.value).startswith(f"cannot unmount {point}: it is in use")
        unmount(point, lazy=True)
        assert find_mount(point) is None
        program.send_signal(10)
        assert finish(server, program).strip() == seen


@can_mount
def test_what_is_not_mounted_cannot_be_unmounted(point: str) -> None:
    with pytest.raises(MountError) as caught:
        unmount(point)
    assert caught.value.errno == errno.EINVAL
    assert str(caught.value) == f"cannot unmount {point}: nothing is mounted there"
    with pytest.raises(MountError) as caught:
        unmount(point + "/nowhere", lazy=True)
    assert caught.value.errno == errno.ENOENT


@can_mount
def test_a_link_to_a_mountpoint_is_not_followed(fd: int, point: str, tmp_path: Path) -> None:
    mount_direct(fd, point, MountOptions())
    (tmp_path / "link").symlink_to(point)
    with pytest.raises(MountError):
        unmount(str(tmp_path / "link"), lazy=True)
    assert find_mount(point)
