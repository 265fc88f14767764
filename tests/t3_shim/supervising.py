"""Plays the supervisor for one shim process: starts it, mounts with it, hears what it says, unmounts, ends it.

`mounted` is what tests use. It leaves nothing behind, and fails the test when the shim crashed, printed a traceback or
did not unmount.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, make_runtime_dir
from tests.t3_shim.program import PATIENCE, Program
from tests.t3_shim.raw_driver import RawDriver
from tests.t3_shim.tree import Tree
from udf.driver.window import PIECE, Window
from udf.window import create_window

can_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs root and /dev/fuse"
)
Message = dict[str, Any]


def new_window() -> Window:
    """A driver's side of a new window, with room for four pieces."""
    return Window(create_window("test", 4 * PIECE))


def socket_pair(size: int = 4 << 20) -> tuple[socket.socket, socket.socket]:
    """Two ends of a link."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, size)
    return pair


class Shim:
    """A shim process and its control socket."""

    def __init__(self, log: Path, control_size: int = 4 << 20) -> None:
        self._log = log
        self.listening = threading.Event()
        self.listening.set()
        self.messages: list[Message] = []
        self.descriptors: list[int] = []
        self._changed = threading.Condition()
        ours, theirs = socket_pair(control_size)
        self.control = ours
        with theirs, log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "udf.shim", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            self.listening.wait()
            try:
                data, fds, _, _ = socket.recv_fds(self.control, 65536, 4)
            except OSError:
                return
            self.descriptors += fds
            with self._changed:
                self.messages.append(json.loads(data) if data else {"t": "end"})
                self._changed.notify_all()
            if not data:
                return

    def send(self, message: Message, *fds: int) -> None:
        socket.send_fds(self.control, [json.dumps(message).encode()], list(fds))

    def said(self, kind: str, **values: object) -> list[Message]:
        """What it has said of one kind, with these values."""
        found = [message for message in list(self.messages) if message["t"] == kind]
        return [message for message in found if all(message.get(key) == value for key, value in values.items())]

    def wait_for(self, kind: str, seconds: float = PATIENCE, **values: object) -> Message:
        """Wait until it says this."""
        until = time.monotonic() + seconds
        with self._changed:
            while not (found := self.said(kind, **values)):
                left = until - time.monotonic()
                assert left > 0, f"it did not say {kind} {values}: {self.messages} {self.log()}"
                assert not self.said("end"), f"it ended without {kind} {values}: {self.messages} {self.log()}"
                self._changed.wait(left)
        return found[-1]

    def wait_for_count(self, kind: str, count: int, seconds: float = PATIENCE) -> Message:
        """Wait until it has said this so many times."""
        until = time.monotonic() + seconds
        with self._changed:
            while len(found := self.said(kind)) < count:
                left = until - time.monotonic()
                assert left > 0, f"it did not say {kind} {count} times: {self.messages} {self.log()}"
                self._changed.wait(left)
        return found[-1]

    def faults(self) -> list[tuple[str, str]]:
        """The faults of the driver that it reported."""
        return [(message["op"], message["error"]) for message in self.said("fault")]

    def counters(self) -> dict[str, int]:
        """Ask for its counters."""
        number = len(self.messages) + 1
        self.send({"t": "counters", "id": number})
        counts: dict[str, int] = self.wait_for("counters", id=number)["counters"]
        return counts

    def memory(self) -> int:
        """Its resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def log(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")

    def forget_descriptors(self) -> None:
        """Close what it gave: its device keeps a connection, and what waits on it."""
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors.clear()

    def close(self) -> None:
        """End it and forget it."""
        self.listening.set()
        self.forget_descriptors()
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self.control.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE)
            raise


class Mount:
    """A mount with its shim, its driver and the programs that use it."""

    def __init__(self, shim: Shim, driver: RawDriver, point: Path) -> None:
        self.shim = shim
        self.driver = driver
        self.point = point
        self.root = str(point)
        self._programs: list[Program] = []
        self._usual: Program | None = None
        self.ended_as_wanted = False  # it may end without `unmounted`
        self.generation = 1
        self.window: Window | None = None  # the driver's side of it
        self.past_drivers: list[RawDriver] = []

    def stop_driver(self) -> None:
        """End the driver that serves now."""
        self.driver.stop()

    def close_window(self) -> None:
        """Have no window any more, and let the next driver have none."""
        if self.window is not None:
            self.window.close()
            self.window = None

    def lose_driver(self) -> Message:
        """Kill the driver; returns what the shim says of it."""
        self.driver.stop()
        return self.wait_lost()

    def wait_lost(self) -> Message:
        """Wait until the shim has lost the driver of this generation."""
        return self.shim.wait_for_count("link_lost", self.generation)

    def next_driver(
        self, prepare: Callable[[RawDriver], object] = lambda driver: None, *, counted: bool = False, **options: Any
    ) -> RawDriver:
        """Attach another generation, with the same files under other ids unless *prepare* changes that."""
        self.driver.stop()
        self.generation += 1
        self.send_attach(prepare, counted=counted, **options)
        self.shim.wait_for("attached", generation=self.generation)
        return self.driver

    def send_attach(self, prepare: Callable[[RawDriver], object], *, counted: bool = False, **options: Any) -> None:
        ours, theirs = socket_pair()
        old, self.driver = self.driver, RawDriver(theirs, **options)
        self.driver.take_tree(old.tree.reborn())
        prepare(self.driver)
        self.driver.start()
        self.past_drivers.append(old)
        fds = [ours.fileno()]
        if self.window is not None:
            self.window.close()
            self.window = new_window()
            fds.append(self.window.fd)
        with ours:
            self.shim.send({"t": "attach", "generation": self.generation, "counted": counted}, *fds)

    @property
    def tree(self) -> Tree:
        """The driver's filesystem."""
        return self.driver.tree

    def path(self, name: str = "") -> str:
        """A path in the mount."""
        return f"{self.root}/{name}" if name else self.root

    def program(self, uid: int | None = None) -> Program:
        """Start another program."""
        program = Program(uid)
        self._programs.append(program)
        return program

    @property
    def usual(self) -> Program:
        """The program that `do` and `fails` use."""
        if self._usual is None:
            self._usual = self.program()
        return self._usual

    def do(self, call: str, name: str = "", *args: object, seconds: float = PATIENCE) -> Any:
        """Do *call* on a path in the mount."""
        return self.usual.do(call, self.path(name), *args, seconds=seconds)

    def fails(self, call: str, name: str = "", *args: object, seconds: float = PATIENCE) -> int:
        """The errno of a call on a path in the mount, which must fail."""
        return self.usual.fails(call, self.path(name), *args, seconds=seconds)

    def counters(self) -> dict[str, int]:
        return self.shim.counters()

    def faults(self) -> list[tuple[str, str]]:
        """The driver's faults that were reported until now."""
        self.counters()  # what was said before is heard before
        return self.shim.faults()

    def round_trips(self, act: Callable[[], object]) -> int:
        """How many round trips to the driver it costs to do this."""
        before = self.counters()["driver_round_trips"]
        act()
        return self.counters()["driver_round_trips"] - before

    def is_mounted(self) -> bool:
        """Whether it is in the table of mounts."""
        return any(line.split()[4] == self.root for line in Path("/proc/self/mountinfo").read_text().splitlines())

    def umount(self) -> None:
        """As umount(8) does."""
        subprocess.run(["umount", self.root], check=True, capture_output=True)

    def abort(self) -> None:
        """As an administrator does with a filesystem that hangs."""
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        (number,) = [fields[2].partition(":")[2] for fields in mounts if fields[4] == self.root]
        control = self.point.parent / "control"
        control.mkdir()
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
        try:
            (control / number / "abort").write_text("1")
        finally:
            subprocess.run(["umount", control], check=True)

    def end_programs(self) -> None:
        for program in self._programs:
            program.end()
        self._programs.clear()
        self._usual = None

    def _where_it_waits(self) -> str:
        stacks = [path.read_text() for path in Path(f"/proc/{self.shim.process.pid}/task").glob("*/stack")]
        return "\n".join([*stacks, f"unanswered: {self.driver.unanswered}", self.shim.log()])

    def unmount(self) -> None:
        """Unmount in order, as the supervisor does. The kernel may still be closing what ended programs had open."""
        until = time.monotonic() + PATIENCE
        while True:
            self.shim.messages[:] = [message for message in self.shim.messages if message["t"] != "busy"]
            with contextlib.suppress(BrokenPipeError):  # a lazy unmount before this one has just come to its end
                self.shim.send({"t": "unmount", "lazy": False})
            while not (done := self.shim.said("unmounted") or self.shim.said("end")) and not self.shim.said("busy"):
                assert time.monotonic() < until, f"it does not unmount: {self.shim.messages} {self._where_it_waits()}"
                time.sleep(0.002)
            if done:
                assert self.shim.said("unmounted"), f"the shim ended: {self.shim.messages} {self.shim.log()}"
                break
            assert time.monotonic() < until, "it stays busy"
            time.sleep(0.02)
        assert self.shim.process.wait(PATIENCE) == 0, self.shim.log()


@contextlib.contextmanager
def mounted(
    prepare: Callable[[RawDriver], object] = lambda driver: None,
    *,
    driver_flags: int | None = None,
    driver_minor: int = 45,
    max_write: int = 131072,
    link_size: int = 4 << 20,
    control_size: int = 4 << 20,
    window: bool = False,
    **config: object,
) -> Iterator[Mount]:
    """A mount for one test; *prepare* fills the driver's tree, *config* is what the mount message says besides."""
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(make_runtime_dir())
        base.chmod(0o755)
        point = base / "m"
        point.mkdir()
        ours, theirs = socket_pair(link_size)
        options = {} if driver_flags is None else {"flags": driver_flags}
        driver = RawDriver(theirs, minor=driver_minor, max_write=max_write, **options)
        prepare(driver)
        driver.start()
        shim = Shim(base / "log", control_size)
        stack.callback(shim.close)
        mount = Mount(shim, driver, point)
        stack.callback(mount.stop_driver)
        stack.callback(mount.close_window)
        stack.callback(_detach, mount)
        message: Message = {"t": "mount", "mountpoint": str(point), "name": "m", "driver": "test", "fsname": "test"}
        message.update({"allow_other": True, "nodev": False, "nosuid": False, "deadline": 20.0}, **config)
        fds = [ours.fileno()]
        if window:
            mount.window = new_window()
            fds.append(mount.window.fd)
        with ours:
            shim.send(message, *fds)
        shim.wait_for("mounted")
        yield mount
        mount.end_programs()
        if shim.process.poll() is not None:
            shim.wait_for("end")  # what it said last may lie in the socket still
        if not shim.said("end"):
            mount.unmount()
        else:
            assert shim.said("unmounted") or mount.ended_as_wanted, f"the shim ended: {shim.log()}"
        assert "Traceback" not in shim.log(), shim.log()
        for each in (*mount.past_drivers, mount.driver):
            assert not each.errors, each.errors


def _detach(mount: Mount) -> None:
    """After a failure: nobody may be left waiting."""
    if mount.shim.process.poll() is None:
        subprocess.run(["umount", "-l", mount.root], check=False, capture_output=True)
    for program in list(mount._programs):
        with contextlib.suppress(ProcessLookupError):
            program.signal(9)
    if not mount.shim.said("unmounted"):
        mount.shim.process.kill()
        mount.shim.forget_descriptors()
    for program in list(mount._programs):
        program.end()
