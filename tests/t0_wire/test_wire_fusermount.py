"""fusermount3: as root, as a user without rights, and when it fails."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rawserver import can_mount, detach

from udf.fuse import structs
from udf.fuse.mount import (
    Mount,
    MountError,
    MountOptions,
    clean_stale,
    find_mount,
    is_stale,
    mount_by_fusermount,
    mount_direct,
    unmount,
)
from udf.fuse.opcodes import Opcode
from udf.host import sandbox

NOBODY = 65534

has_fusermount = pytest.mark.skipif(shutil.which("fusermount3") is None, reason="needs fusermount3")


def found(path: str) -> Mount:
    mount = find_mount(path)
    assert mount is not None
    return mount


@can_mount
@has_fusermount
def test_fusermount_mounts_with_the_same_options(point: str) -> None:
    fd = mount_by_fusermount(point, MountOptions("src", noexec=True, noatime=True, read_only=True, max_read=65536))
    try:
        mount = found(point)
        assert (mount.fstype, mount.source) == ("fuse.udfd", "src")
        assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(mount.options.split(","))
        assert {"user_id=0", "default_permissions", "max_read=65536"} <= set(mount.super_options.split(","))
        assert not os.get_inheritable(fd)
        # The kernel's first request is there to be read.
        assert structs.IN_HEADER.unpack_from(os.read(fd, 1 << 16))[1] == Opcode.INIT
    finally:
        os.close(fd)
    assert is_stale(point)


@can_mount
@has_fusermount
def test_fusermounts_complaint_becomes_the_error(point: str) -> None:
    with pytest.raises(MountError) as caught:
        mount_by_fusermount(point + "/nowhere", MountOptions())
    assert caught.value.errno == errno.ENOENT
    assert "No such file or directory" in str(caught.value)
    assert "fusermount3: " not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "number", "words"),
    [
        ("exec sleep 60", errno.ETIMEDOUT, "no answer in time"),
        ("echo 'fusermount3: option allow_other only allowed if' >&2; exit 1", errno.EPERM, "option allow_other only"),
        ("echo 'fusermount3: mount failed: Device or resource busy' >&2; exit 1", errno.EBUSY, "busy"),
        ("exit 3", errno.EPERM, "exited with status 3"),
        ("exit 0", errno.EPERM, "exited with status 0"),
        (None, errno.ENOENT, "package fuse3"),
    ],
)
def test_a_helper_that_fails_is_reported_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, number: int, words: str
) -> None:
    if script is not None:
        (tmp_path / "fusermount3").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "fusermount3").chmod(0o755)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path) if script is None else f"{tmp_path}:{path}")
    timeout = 0.5 if number == errno.ETIMEDOUT else 40.0
    began = time.monotonic()
    with pytest.raises(MountError) as caught:
        mount_by_fusermount(str(tmp_path), MountOptions(), timeout=timeout)
    assert time.monotonic() - began < 40
    assert caught.value.errno == number
    assert words in str(caught.value)


def as_nobody(task: Callable[[], object]) -> str:
    """What str() shows of a function's result, or of its error, in a child process without any rights.

    The child has a mount namespace of its own, with a /dev/fuse that everyone may open.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            public_device()
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            if not os.access(sys.executable, os.X_OK):  # it lies in somebody's home
                sys.executable = shutil.which("python3", path=os.defpath) or ""
            result = str(task())
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        result = pipe.read()
    os.waitpid(pid, 0)
    if "cannot make" in result:
        pytest.skip(result)
    return result


def public_device() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_bind, ms_rec_private = 0x20000, 0x1000, 0x44000
    node = tempfile.mktemp(prefix="udf-wire-")
    os.mknod(node, stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    os.chmod(node, 0o666)
    try:
        if (
            libc.unshare(clone_newns)
            or libc.mount(None, b"/", None, ctypes.c_ulong(ms_rec_private), None)
            or libc.mount(node.encode(), b"/dev/fuse", None, ctypes.c_ulong(ms_bind), None)
        ):
            raise RuntimeError(f"cannot make a public /dev/fuse here: {os.strerror(ctypes.get_errno())}")
        sandbox.hide_fuse_mounts(())  # what others unmount must not wait for us
    finally:
        os.unlink(node)


@pytest.fixture
def open_point() -> Iterator[str]:
    """A mountpoint of an unprivileged user, who can reach it."""
    base = Path(tempfile.mkdtemp(prefix="udf-wire-"))
    point = base / "point"
    try:
        base.chmod(0o755)
        point.mkdir()
        os.chown(point, NOBODY, NOBODY)
        yield str(point)
    finally:
        detach(point)
        shutil.rmtree(base)


@can_mount
@has_fusermount
def test_an_unprivileged_user_mounts_and_unmounts(open_point: str) -> None:
    def task() -> object:
        fd = mount_by_fusermount(open_point, MountOptions("mine"))
        mount = found(open_point)
        with pytest.raises(MountError) as caught, open_elsewhere(open_point):
            unmount(open_point)
        unmount(open_point)
        gone = find_mount(open_point)
        os.close(fd)
        return (mount.fstype, mount.source, mount.super_option("user_id"), mount.options), caught.value.errno, gone

    result = as_nobody(task)
    assert result.startswith(f"(('fuse.udfd', 'mine', '{NOBODY}', 'rw,nosuid,nodev"), result
    assert result.endswith(f"), {errno.EBUSY}, None)"), result


@contextlib.contextmanager
def open_elsewhere(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_PATH)
    try:
        yield
    finally:
        os.close(fd)


@can_mount
@has_fusermount
def test_an_unprivileged_user_cleans_up_a_stale_mount(open_point: str) -> None:
    def task() -> object:
        os.close(mount_by_fusermount(open_point, MountOptions("mine")))
        return clean_stale(open_point), find_mount(open_point)

    result = as_nobody(task)
    assert result == f"('unmounted from {open_point}, whose server was gone: mine (fuse.udfd)', None)"


@can_mount
@has_fusermount
def test_an_unprivileged_user_is_told_what_is_missing(fd: int, open_point: str) -> None:
    mount_direct(fd, open_point, MountOptions())
    assert as_nobody(lambda: unmount(open_point)).startswith(f"MountError: cannot unmount {open_point}: ")
    detach(open_point)
    refused = as_nobody(lambda: mount_direct(0, open_point, MountOptions()))
    assert refused == f"MountError: cannot mount on {open_point}: only root may mount directly"
    os.chown(open_point, 0, 0)
    refused = as_nobody(lambda: mount_by_fusermount(open_point, MountOptions()))
    assert refused.startswith(f"MountError: cannot mount on {open_point}: user has no write access")
