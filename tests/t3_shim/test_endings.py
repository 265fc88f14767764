"""Without a driver, without a mount, without a supervisor: what goes on, what fails at once, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from statistics import median

import pytest

from tests.t3_shim.program import PATIENCE
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.supervising import Mount, can_mount, mounted
from tests.t3_shim.test_lazy_opens import grow
from udf.fuse.opcodes import Opcode

pytestmark = can_mount


def lose(mount: Mount) -> None:
    mount.driver.stop()
    mount.shim.wait_for("link_lost")


def warm(driver: RawDriver) -> None:
    grow(driver)
    driver.tree.file("third", b"third")
    driver.tree.valid = 1000.0


def test_what_is_cached_goes_on_without_the_driver():
    with mounted(warm, exclusive=True, open="lazy") as mount:
        fd = mount.do("open", "file", os.O_RDONLY)
        assert mount.do("slurp", "file") == b"first"
        assert mount.do("names", "d") == ["f"]
        mount.do("walk")
        space = mount.do("statfs")
        lose(mount)
        for _ in range(2):
            assert mount.do("stat", "file")["st_size"] == 5
            assert mount.do("slurp", "file") == b"first"
            assert mount.usual.do("pread", fd, 10, 0) == b"first"
            assert mount.do("mapped", "file") == b"first"
            assert mount.do("names", "d") == ["f"]
            assert mount.do("walk") == 5
            assert mount.do("statfs") == space
        mount.usual.do("close", fd)


def test_what_is_not_cached_is_eio_at_once_without_the_driver():
    with mounted(warm, exclusive=True, open="lazy") as mount:
        mount.do("stat", "file")
        mount.do("stat", "other")
        lose(mount)
        for call, name, *args in (
            ("slurp", "file"),
            ("spill", "new", b"x"),
            ("spill", "file", b"x"),
            ("mkdir", "new"),
            ("unlink", "file"),
            ("rename_to", "file", "moved"),
            ("chmod", "file", 0o600),
            ("names", "d"),
            ("stat", "d/f"),
            ("statfs", ""),
            ("getxattr", "file", "user.x"),
        ):
            assert mount.fails(call, name, *args, seconds=8) == errno.EIO, call
        assert mount.counters()["waiting"] == 0


def test_all_that_waits_ends_at_once_when_the_driver_dies():
    waiting = (
        (Opcode.READ, "direct_read", "file"),
        (Opcode.OPENDIR, "names", "d"),
        (Opcode.CREATE, "spill", "d/new", b"x"),  # the kernel locks the directory meanwhile
        (Opcode.SETATTR, "chmod", "other", 0o600),
        (Opcode.WRITE, "overwrite", "third", b"x"),
        (Opcode.STATFS, "statfs", ""),
    )
    with mounted(warm, deadline=60.0) as mount:
        for name in ("file", "other", "d"):
            mount.do("stat", name)
        programs = []
        for op, call, name, *args in waiting:
            program = mount.program()
            mount.driver.hold(op)
            program.start(call, mount.path(name), *args)
            mount.driver.wait_for(op)
            programs.append(program)
        lose(mount)
        for program in programs:
            with pytest.raises(OSError, match="Input/output error"):
                program.wait()
        lost = mount.shim.wait_for("link_lost")
        assert lost["pending"] == len(waiting)


def test_a_mount_without_a_driver_unmounts_and_tells_nobody_twice():
    with mounted(warm) as mount:
        fd = mount.do("open", "file", os.O_RDWR)
        mount.usual.do("pwrite", fd, b"x", 0)
        lose(mount)
        assert mount.usual.fails("close", fd) == errno.EIO  # its FLUSH
        mount.usual.do("drop_caches")
        mount.unmount()
        assert len(mount.shim.said("link_lost")) == 1
        assert mount.shim.said("unmounted")[0]["external"] is False


def test_an_umount_from_outside_is_noticed():
    with mounted(warm) as mount:
        mount.do("walk")
        mount.end_programs()
        mount.umount()
        assert mount.shim.wait_for("unmounted")["external"] is True
        assert mount.shim.process.wait(PATIENCE) == 0


def test_a_connection_that_is_aborted_ends_the_shim_in_order():
    """Reading the device gives ECONNABORTED then, not ENODEV: the shim ended with a traceback and said nothing."""
    with mounted(warm) as mount:
        mount.do("walk")
        mount.abort()
        assert mount.shim.wait_for("unmounted")["external"] is True
        assert mount.shim.process.wait(PATIENCE) == 0
        assert not os.path.ismount(mount.root)


def test_a_lazy_unmount_serves_what_is_open_until_it_is_closed():
    with mounted(warm) as mount:
        fd = mount.do("open", "file", os.O_RDONLY)
        mount.shim.send({"t": "unmount", "lazy": True})
        mount.shim.wait_for("detached")
        assert mount.usual.do("pread", fd, 10, 0) == b"first"
        mount.usual.do("close", fd)
        mount.shim.wait_for("unmounted")
        assert mount.shim.process.wait(PATIENCE) == 0


def test_a_busy_mount_says_so_and_stays():
    with mounted(warm) as mount:
        fd = mount.do("open", "file", os.O_RDONLY)
        mount.shim.send({"t": "unmount", "lazy": False})
        mount.shim.wait_for("busy")
        assert mount.do("slurp", "other") == b"second"
        mount.usual.do("close", fd)


def test_a_supervisor_that_is_gone_takes_the_mount_with_it():
    with mounted(warm) as mount:
        fd = mount.do("open", "file", os.O_RDONLY)
        mount.shim.forget_descriptors()
        mount.shim.control.shutdown(socket.SHUT_RDWR)
        assert mount.shim.process.wait(PATIENCE) == 1
        assert not mount.is_mounted()
        assert fd
        mount.ended_as_wanted = True


def test_a_supervisor_that_is_stopped_does_not_stop_the_mount():
    """Each message waited five seconds for it, the heartbeats too."""
    with mounted(warm, control_size=1) as mount:
        mount.shim.listening.clear()
        mount.shim.send({"t": "counters", "id": 0})  # ends the listener's last wait
        times = []
        for number in range(20):
            mount.shim.send({"t": "counters", "id": 1000 + number})
            began = time.monotonic()
            assert mount.do("stat", "file")["st_size"] == 5
            times.append(time.monotonic() - began)
        assert median(times) < 1
        mount.shim.listening.set()
        for number in range(20):
            mount.shim.wait_for("counters", id=1000 + number)
        assert mount.counters()["waiting"] == 0


def test_sigterm_unmounts():
    with mounted(warm) as mount:
        mount.do("walk")
        mount.end_programs()
        mount.shim.process.terminate()
        mount.shim.wait_for("unmounted")
        assert mount.shim.process.wait(PATIENCE) == 0
        assert not mount.is_mounted()


def test_the_terminals_signals_are_not_the_shims():
    with mounted(warm) as mount:
        for number in (signal.SIGINT, signal.SIGHUP):
            mount.shim.process.send_signal(number)
        assert mount.do("walk") == 5
