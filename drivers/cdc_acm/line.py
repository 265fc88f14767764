"""The terminal: a pseudo-terminal's master end, whose slave end programs open and close as they like.

Owns: knowing whether a program has it open, what it has set, and bytes in both directions without losing any.
Must never: close the master or set what a program has set: both outlive this process. Called by: driver.py.

A master cannot wait for the slave to be opened: while it is closed, every wait ends at once (POLLHUP). So inotify tells
of opens and closes where the sandbox lets it, and a slow clock looks as well; which of both is right POLLHUP tells.
A new master has no POLLHUP although nobody has opened the slave: it is opened and closed once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct
import sys
import termios
from collections.abc import Iterator
from typing import NamedTuple

import trio

TCGETS2 = 0x802C542A
TIOCGPTN = 0x80045430
TIOCGPTPEER = 0x5441
TIOCVHANGUP = 0x5437
_TERMIOS2 = struct.Struct("=IIIIB19xII")
_IN_OPEN, _IN_CLOSE = 0x20, 0x08 | 0x10
SLOW_LOOK = 0.25  # seconds between looks at a closed terminal: inotify is quicker, where it works
STUCK_LOOK = 0.2  # seconds after which a terminal is tried again: the last close after a hang-up wakes nobody


class Settings(NamedTuple):
    """What a program has set, as far as it can be seen from the master."""

    baud: int
    two_stops: bool
    hangs_up: bool  # HUPCL: the last close drops DTR
    is_local: bool  # CLOCAL: the carrier is of no interest


class Terminal:
    """One master."""

    def __init__(self, master: int) -> None:
        self._master = master
        os.set_blocking(master, False)
        self._settle()
        self._watch = _watch(master)

    def close(self) -> None:
        """Stop watching; the master stays."""
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1

    @property
    def is_open(self) -> bool:
        """Whether any program has the slave open."""
        poll = select.poll()
        poll.register(self._master, 0)
        return not any(events & select.POLLHUP for _, events in poll.poll(0))

    async def wait_open(self) -> None:
        """Until a program has it open."""
        while not self.is_open:
            with trio.move_on_after(SLOW_LOOK):
                if self._watch < 0:
                    await trio.sleep_forever()
                await trio.lowlevel.wait_readable(self._watch)
            self._drain_watch()

    def settings(self) -> Settings:
        """What is set now."""
        _, _, control, _, _, _, baud = _TERMIOS2.unpack(fcntl.ioctl(self._master, TCGETS2, bytes(_TERMIOS2.size)))
        return Settings(
            baud, bool(control & termios.CSTOPB), bool(control & termios.HUPCL), bool(control & termios.CLOCAL)
        )

    async def read(self, size: int) -> bytes:
        """What the program has written; nothing when the last program has closed it and all is read."""
        while True:
            try:
                return os.read(self._master, size)
            except BlockingIOError:
                with trio.move_on_after(STUCK_LOOK):
                    await trio.lowlevel.wait_readable(self._master)
            except OSError as exc:
                if exc.errno != errno.EIO:
                    raise
                return b""

    async def write(self, data: bytes) -> None:
        """Give the program all of it, as fast as it takes it."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._master, view) :]
            except BlockingIOError:
                with trio.move_on_after(STUCK_LOOK):
                    await trio.lowlevel.wait_writable(self._master)

    def forget_input(self) -> None:
        """What the last program did not read is not for the next one."""
        with slave_of(self._master) as slave:
            termios.tcflush(slave, termios.TCIFLUSH)

    def hang_up(self) -> bool:
        """Hang up on the programs that have it open; False if this process may not."""
        try:
            with slave_of(self._master) as slave:
                fcntl.ioctl(slave, TIOCVHANGUP)
        except PermissionError:
            return False
        self._preset()  # the kernel has set it as a new terminal is
        return True

    def _settle(self) -> None:
        """A new terminal is made a serial port's, and can be told from one that is open."""
        if not self.is_open:
            return  # closed, and so not new
        with slave_of(self._master):
            pass
        if self.is_open:
            return  # a program has it: the generation before this one was at this point
        self._preset()

    def _preset(self) -> None:
        """Nothing is echoed to the device before a program has said what it wants."""
        settings = termios.tcgetattr(self._master)
        settings[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
        settings[0] &= ~(termios.ICRNL | termios.IXON)
        settings[1] &= ~termios.OPOST
        settings[2] |= termios.CLOCAL | termios.HUPCL
        settings[4] = settings[5] = termios.B9600
        termios.tcsetattr(self._master, termios.TCSANOW, settings)

    def _drain_watch(self) -> None:
        if self._watch >= 0:
            try:
                os.read(self._watch, 4096)
            except BlockingIOError:
                pass


def open_slave(master: int) -> int:
    """The other end, without its name: that may mean nothing in this sandbox."""
    return fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


@contextlib.contextmanager
def slave_of(master: int) -> Iterator[int]:
    """The other end, open for a moment."""
    slave = open_slave(master)
    try:
        yield slave
    finally:
        os.close(slave)


def _watch(master: int) -> int:
    """An inotify descriptor for opens and closes of the slave; -1 where there can be none."""
    try:
        number = int.from_bytes(fcntl.ioctl(master, TIOCGPTN, bytes(4)), sys.byteorder)
        path = f"/dev/pts/{number}"
        with slave_of(master) as slave:
            is_it = os.path.samestat(os.stat(path), os.fstat(slave))
    except OSError:
        return -1
    libc = ctypes.CDLL(None, use_errno=True)
    watch: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC) if is_it else -1
    if watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(path), _IN_OPEN | _IN_CLOSE) < 0:
        os.close(watch)
        return -1
    return watch
