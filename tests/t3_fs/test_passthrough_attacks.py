"""fs/passthrough where somebody works against it: races behind the mount, ways out, mounts inside, reused numbers.

What only a race would bring about on a mount is brought about on the handlers themselves, which need no mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import threading
import types
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
from directmount import direct_mount, fuse_works, load_driver

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
mounts = pytest.mark.skipif(not fuse_works(), reason="needs /dev/fuse")

ME = types.SimpleNamespace(uid=os.geteuid(), gid=os.getegid(), umask=0o022, pid=1)
Passthrough = load_driver("passthrough")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    where = tmp_path / "source"
    where.mkdir()
    return where


@pytest.fixture
def driver(source: Path) -> Iterator[Any]:
    umask = os.umask(0)
    made = Passthrough(str(source))
    yield made
    os.umask(umask)
    for fd in (made._nodes.root_fd, made._nodes.proc):
        os.close(fd)
    for node in made._nodes._cached.values():
        os.close(node.fd)


async def answer(call: Coroutine[Any, Any, Any]) -> Any:
    """What the handler replies: its result, or the errno's name."""
    try:
        return await call
    except pyfuse3.FUSEError as e:
        return errno.errorcode[e.errno]


async def test_names_that_lead_elsewhere_are_refused(driver: Any) -> None:
    for name in (b"..", b".", b"a/b", b"/etc", b"../source"):
        assert await answer(driver.lookup(pyfuse3.ROOT_INODE, name, ME)) == "EINVAL"


@pytest.mark.parametrize("kind", ["link out", "fifo", "file"])
async def test_create_never_opens_what_came_behind_the_mount(kind: str, source: Path, driver: Any) -> None:
    outside = source.parent / "outside"
    outside.write_text("untouched")
    if kind == "link out":
        os.symlink(outside, source / "new")
    elif kind == "fifo":
        os.mkfifo(source / "new")
    else:
        (source / "new").write_text("somebody's")
    flags = os.O_CREAT | os.O_RDWR | os.O_TRUNC
    # ESTALE makes the kernel look the name up again and open what it finds, with its own checks
    assert await answer(driver.create(1, b"new", 0o644, flags, ME)) == "ESTALE"
    assert await answer(driver.create(1, b"new", 0o644, flags | os.O_EXCL, ME)) == "EEXIST"
    assert outside.read_text() == "untouched"


async def test_a_file_that_became_a_link_is_still_the_file(source: Path, driver: Any) -> None:
    outside = source.parent / "outside"
    outside.write_text("secret")
    (source / "f").write_text("mine")
    entry = await driver.lookup(1, b"f", ME)
    os.rename(source / "f", source / "g")
    os.symlink(outside, source / "f")
    opened = await answer(driver.open(entry.st_ino, os.O_RDWR, ME))
    assert await driver.read(opened.fh, 0, 100) == b"mine"
    await driver.setxattr(entry.st_ino, b"user.a", b"1", ME)
    await driver.release(opened.fh)
    assert os.listxattr(outside) == []
    assert stat.S_ISLNK((await driver.lookup(1, b"f", ME)).st_mode)


async def test_without_handles_a_renamed_file_is_stale_not_another(
    source: Path, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = driver._nodes
    monkeypatch.setattr(nodes, "_handles", False)
    (source / "f").write_text("mine")
    entry = await driver.lookup(1, b"f", ME)
    nodes._by_id[entry.st_ino].used = False
    nodes._evict(1)
    os.rename(source / "f", source / "g")
    (source / "f").write_text("another")
    assert await answer(driver.getattr(entry.st_ino, ME)) == "ESTALE"
    again = await driver.lookup(1, b"g", ME)
    assert again.st_ino == entry.st_ino  # the number, and the node, are the file's
    assert (await driver.getattr(entry.st_ino, ME)).st_size == 4


@root
async def test_a_reused_inode_number_is_another_node(source: Path, driver: Any) -> None:
    if not driver._nodes.by_handle:
        pytest.skip("only handles tell them apart")
    (source / "old").write_text("old")
    old = await driver.lookup(1, b"old", ME)
    os.unlink(source / "old")
    for number in range(100):
        (source / f"new{number}").write_text("new!")
        if os.stat(source / f"new{number}").st_ino == old.st_ino:
            break
    else:
        pytest.skip("this filesystem does not reuse inode numbers at once")
    new = await driver.lookup(1, b"new%d" % number, ME)
    assert new.st_ino != old.st_ino
    assert await answer(driver.getattr(old.st_ino, ME)) == "ESTALE"
    assert (await driver.getattr(new.st_ino, ME)).st_size == 4
    assert (await driver.lookup(1, b"new%d" % number, ME)).st_ino == new.st_ino
    await driver.forget([(old.st_ino, 1), (new.st_ino, 2)])
    assert (await driver.lookup(1, b"new%d" % number, ME)).st_ino == os.stat(source / f"new{number}").st_ino


def test_node_ids_of_two_devices_and_of_the_root_do_not_clash(source: Path, driver: Any) -> None:
    nodes = driver._nodes
    found = [os.stat_result((0o100644, ino, device, 1, 0, 0, 0, 0, 0, 0)) for device in (7, 8) for ino in (1, 2, 3)]
    same = os.stat(source)
    found.append(os.stat_result((0o100644, 1, same.st_dev, 1, 0, 0, 0, 0, 0, 0)))
    ids = [nodes.add(st).id for st in found]
    assert len({*ids, pyfuse3.ROOT_INODE}) == len(found) + 1
    assert [nodes.find(st).id for st in found] == ids
    assert all(0 < node_id < 1 << 63 for node_id in ids)
    assert nodes.find(same) is nodes.root


async def test_the_umask_yields_to_a_default_acl(source: Path, driver: Any) -> None:
    caller = types.SimpleNamespace(uid=ME.uid, gid=ME.gid, umask=0o077)
    plain = await driver.mkdir(1, b"plain", 0o777, caller)
    nobody = (1 << 32) - 1
    entries = ((1, 7, nobody), (2, 7, 1234), (4, 5, nobody), (0x10, 7, nobody), (0x20, 5, nobody))
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(source / "plain", "system.posix_acl_default", value)
    except OSError:
        pytest.skip("the filesystem has no ACLs")
    below = await driver.mkdir(plain.st_ino, b"below", 0o777, caller)
    info, created = await driver.create(plain.st_ino, b"f", 0o666, os.O_RDWR, caller)
    await driver.release(info.fh)
    _, elsewhere = await driver.create(1, b"f", 0o666, os.O_RDWR, caller)
    await driver.release(_.fh)
    assert stat.S_IMODE(plain.st_mode) == 0o700
    assert stat.S_IMODE(below.st_mode) == 0o775
    assert stat.S_IMODE(created.st_mode) == 0o664
    assert stat.S_IMODE(elsewhere.st_mode) == 0o600
    assert os.getxattr(source / "plain" / "below", "system.posix_acl_default") == value
    assert b"system.posix_acl_access" in await driver.listxattr(created.st_ino, ME)


async def test_a_source_without_acls_does_not_refuse_everything(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> bytes:
        raise OSError(errno.EOPNOTSUPP, "no attributes here")

    monkeypatch.setattr(os, "getxattr", unsupported)
    assert await answer(driver.getxattr(1, b"system.posix_acl_access", ME)) == "ENODATA"
    assert await answer(driver.getxattr(1, b"user.x", ME)) in {"EOPNOTSUPP", "ENOTSUP"}


async def test_bad_options_and_sources_are_refused(source: Path) -> None:
    for timeout in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout"):
            Passthrough(str(source), timeout=timeout)
    with pytest.raises(FileNotFoundError):
        Passthrough(str(source / "missing"))
    (source / "file").touch()
    with pytest.raises(NotADirectoryError):
        Passthrough(str(source / "file"))


@mounts
def test_swapping_a_directory_for_a_link_never_leads_outside(source: Path, tmp_path: Path) -> None:
    """A directory and a link to a directory outside change places all the time, while we walk without following."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("SECRET")
    (source / "dir").mkdir()
    (source / "dir" / "f").write_text("public")
    os.symlink(outside, source / "link")
    libc = ctypes.CDLL(None)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            libc.renameat2(-100, os.fsencode(source / "dir"), -100, os.fsencode(source / "link"), 2)

    with direct_mount("passthrough", tmp_path / "mnt", source, options={"timeout": 0.0}) as direct:
        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            seen = [walk_without_following(direct.path, number) for number in range(400)]
        finally:
            stop.set()
            swapper.join()
    assert b"public" in seen
    assert b"SECRET" not in seen
    assert os.listdir(outside) == ["f"]


def walk_without_following(mnt: Path, number: int) -> bytes:
    try:
        directory = os.open(mnt / "dir", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return b""
    try:
        fd = os.open("f", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
        data = os.read(fd, 100)
        os.close(fd)
        os.close(os.open(f"made{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=directory))
        return data
    except OSError:
        return b""
    finally:
        os.close(directory)


@root
@mounts
@pytest.mark.parametrize("without", [(), (2,)], ids=["by handle", "by name"])
def test_mount_points_inside_the_source_are_not_entered(
    without: tuple[int, ...], source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (source / "inner").mkdir()
    (source / "own").mkdir()
    (source / "plain").write_text("x")
    unmounting(request, mount("-t", "tmpfs", "tmpfs", source / "inner"))
    (source / "inner" / "hidden").write_text("x")
    with direct_mount("passthrough", source / "own", source, without=without) as direct:  # asks nothing of itself
        assert sorted(os.listdir(direct.path)) == ["plain"]
        for name in ("inner", "own"):
            with pytest.raises(OSError) as caught:
                os.stat(direct.path / name)
            assert caught.value.errno == errno.EXDEV
        assert subprocess.run(["find", direct.path, "-type", "f"], check=True, capture_output=True).stdout.endswith(
            b"/plain\n"
        )


@root
@mounts
def test_a_source_with_several_devices_is_one_tree(
    source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On overlayfs files of lower layers may have other device numbers; handles are not to be had there."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, merged):
        directory.mkdir()
    unmounting(request, mount("-t", "tmpfs", "tmpfs", lower))
    (lower / "low").write_text("low")
    (upper / "up").write_text("up")
    try:
        mounted = mount("-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", merged)
    except subprocess.CalledProcessError:
        pytest.skip("no overlayfs here")
    unmounting(request, mounted)
    with direct_mount("passthrough", tmp_path / "mnt", merged) as direct:
        assert (direct.path / "low").read_text() == "low"
        assert (direct.path / "up").read_text() == "up"
        with open(direct.path / "low", "a") as copied_up:
            copied_up.write(" changed")
        assert (direct.path / "low").read_text() == "low changed"
        assert (lower / "low").read_text() == "low"
        os.rename(direct.path / "up", direct.path / "moved")
        os.unlink(direct.path / "low")
        assert os.listdir(direct.path) == ["moved"]
        assert (direct.path / "moved").read_text() == "up"


def mount(*arguments: object) -> Path:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)
    return Path(str(arguments[-1]))


def unmounting(request: pytest.FixtureRequest, where: Path) -> None:
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", where], check=True))
