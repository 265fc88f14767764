"""Mounts whose server is gone are told from those whose server is slow, hung or unhelpful."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
from rawserver import Request, can_mount, leave_stale, run, serving, start

from udf.fuse import stale
from udf.fuse.mount import (
    MountOptions,
    clean_stale,
    find_mount,
    is_stale,
    mount_direct,
)
from udf.fuse.opcodes import Opcode

NOBODY = 65534


@can_mount
def test_a_mount_without_a_server_is_recognised_and_cleaned(point: str) -> None:
    leave_stale(point, MountOptions("gone"))
    assert is_stale(point)
    assert clean_stale(point) == f"unmounted from {point}, whose server was gone: gone (fuse.udfd)"
    assert find_mount(point) is None
    assert not is_stale(point)
    assert clean_stale(point) is None


@can_mount
def test_stale_mounts_on_top_of_each_other_are_all_cleaned(point: str) -> None:
    leave_stale(point, MountOptions("lower"))
    leave_stale(point, MountOptions("upper"))
    message = clean_stale(point)
    assert message is not None
    assert message.endswith("upper (fuse.udfd), lower (fuse.udfd)")
    assert find_mount(point) is None


@can_mount
def test_cached_answers_do_not_hide_that_the_server_is_gone(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        run(server, "os.stat('file'), os.statvfs('.')")
        assert not is_stale(str(server.mountpoint))
        server.stop()
        assert is_stale(str(server.mountpoint))


@can_mount
def test_another_users_mount_is_asked_as_that_user(point: str) -> None:
    # Without allow_other root gets an answer that does not come from the server.
    leave_stale(point, MountOptions(uid=NOBODY, gid=NOBODY))
    assert is_stale(point)


@can_mount
def test_a_stale_mount_in_use_is_cleaned(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        program = start(server, "print('in', flush=True); signal.pause()")
        assert program.stdout is not None
        assert program.stdout.readline() == "in\n"
        server.stop()
        assert clean_stale(str(server.mountpoint))
        assert find_mount(str(server.mountpoint)) is None


@can_mount
@pytest.mark.parametrize("reads", [True, False])
def test_a_server_that_hangs_is_not_gone(tmp_path: Path, reads: bool) -> None:
    with serving(tmp_path) as server:
        server.ready()
        server.handlers[Opcode.STATFS] = lambda _: None
        began = time.monotonic()
        if reads:
            assert not is_stale(str(server.mountpoint), timeout=0.5)
            server.wait(Opcode.STATFS)
        else:
            with server.gate:
                assert not is_stale(str(server.mountpoint), timeout=0.5)
                assert clean_stale(str(server.mountpoint), timeout=0.2) is None
        assert time.monotonic() - began < 20


@can_mount
def test_a_server_that_never_answered_init_is_not_gone(fd: int, point: str) -> None:
    mount_direct(fd, point, MountOptions())
    assert not is_stale(point, timeout=0.3)


def kernel_tells_holders(fd: int) -> bool:
    return "fuse_connection" in Path(f"/proc/self/fdinfo/{fd}").read_text()


@can_mount
def test_a_living_server_that_answers_enotconn_is_not_gone(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.handlers[Opcode.STATFS] = lambda _: -errno.ENOTCONN
        server.ready()
        if not kernel_tells_holders(server.fd):
            pytest.skip("this kernel does not say who holds a connection")
        assert not is_stale(str(server.mountpoint))
        assert server.of(Opcode.STATFS)


@can_mount
def test_a_connection_that_is_aborted_is_gone_although_it_is_held(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        program = start(server, "print('in', flush=True); signal.pause()")  # or the abort would unmount it
        assert program.stdout is not None
        assert program.stdout.readline() == "in\n"
        server.abort()
        assert server.fd >= 0
        assert find_mount(str(server.mountpoint))
        assert is_stale(str(server.mountpoint))


@can_mount
def test_a_server_that_dies_while_it_is_asked_is_gone(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        asked: list[Request] = []

        def die(request: Request) -> None:
            asked.append(request)
            server.abort()

        server.handlers[Opcode.STATFS] = die
        server.ready()
        assert is_stale(str(server.mountpoint))
        assert len(asked) == 1


def test_what_is_no_fuse_mount_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale, "_ask", pytest.fail)
    for path in ("/", "/proc", "/no/such/path"):
        assert not is_stale(path)
        assert clean_stale(path) is None
