"""A terminal: a pseudo-terminal by a stable name, behind which one driver after the other serves a serial device.

Owns: the pair: the master is kept here, so that programs keep the other end open over a driver's death, and each
generation gets it as its link; the name `PLACE/tty`, a symbolic link to the other end.
Must never: read or write the master (what is in it is the driver's and the programs').
Called by: registry.py.

There is no process before the driver, and nothing to drain or replay: the kernel keeps what is under way, and a program
that waits for the next generation waits in read(2) or write(2). When the master is closed for good the kernel hangs up.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from contextlib import suppress

import trio

from udf import messages
from udf.supervisor.bell import Bell
from udf.supervisor.endpoint import Endpoint
from udf.supervisor.front import Front, LinkEnd
from udf.supervisor.instance import Reason
from udf.supervisor.plan import TerminalPlan

LINK_NAME = "tty"
_TIOCSPTLCK, _TIOCGPTN = 0x40045431, 0x80045430
_INT = struct.Struct("i")


class Terminal(Front):
    """The pseudo-terminal of one endpoint."""

    def __init__(self, plan: TerminalPlan, bell: Bell) -> None:
        super().__init__()
        self.path = ""  # of the programs' end
        self._plan = plan
        self._bell = bell
        self._master = -1
        self._failed = ""
        self._up = self._over = False

    @property
    def is_up(self) -> bool:
        """Whether programs can use it."""
        return self._up

    @property
    def is_over(self) -> bool:
        """Whether it has been hung up."""
        return self._over

    @property
    def has_trouble(self) -> bool:
        """Whether there is no terminal to be had."""
        return bool(self._failed)

    def problem(self) -> tuple[str, Reason]:
        """Why that is so."""
        return self._failed, Reason.REFUSED

    def start(self, nursery: trio.Nursery, reaper: trio.Nursery) -> None:
        """Make the pair."""
        self._make()

    def _make(self) -> None:
        try:
            self._master, self.path = _make_pair()
            os.chown(self.path, self._plan.owner.uid, -1)
        except OSError as exc:
            self._failed = f"no terminal could be made: {exc.strerror}"

    def open(self) -> None:
        """The driver is ready: let programs find it."""
        assert self._plan.place is not None
        try:
            name = self._plan.place / LINK_NAME
            with suppress(FileNotFoundError):
                name.unlink()
            name.symlink_to(self.path)
            self._up = True
        except OSError as exc:
            self._failed = f"{self._plan.place}: {exc.strerror}"
        self._bell.ring()

    def link(self) -> tuple[LinkEnd, LinkEnd]:
        """The master twice; of the first nobody needs to make use."""
        if self._master < 0:
            self._make()  # the last one was hung up, because there was no driver
        if self._master < 0:
            null = open(os.devnull, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
            return LinkEnd(null), LinkEnd(null)
        first, second = (open(os.dup(self._master), "r+b", buffering=0) for _ in range(2))  # noqa: SIM115
        return LinkEnd(first), LinkEnd(second)

    async def attach(self, generation: int, *, counted: bool, link: list[int]) -> None:
        """It has had the master from its start, so it serves."""
        if not self._up:
            self.open()
        self.linked, self.lost = True, None
        self.answer = messages.Attached(generation=generation)
        self._bell.ring()

    async def fail(self, text: str) -> None:
        """Hang up: nobody shall wait for a driver that does not come. The next one gets another pair."""
        self.hang_up()

    async def detach(self, text: str, *, wait: float = 0.0, max_stale: float = 0.0) -> None:
        """Hang up, as far as that is ours; the driver's end goes with the driver."""
        self.hang_up()

    def driver_ended(self) -> None:
        """That is the end of its link."""
        self.linked = False
        self._bell.ring()

    def hang_up(self) -> None:
        """Let go of the master and the name."""
        if self._up:
            with suppress(FileNotFoundError):
                (self._plan.place / LINK_NAME).unlink()  # type: ignore[operator]  # it is up, so it has a place
        self._up = False
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def finish(self) -> None:
        """Hang up for good."""
        self.hang_up()
        self._over = True
        self._bell.ring()


class TerminalEndpoint(Endpoint):
    """A terminal from its start to GONE."""

    kind = "terminal"
    plan: TerminalPlan
    _front: Terminal

    def _make_front(self) -> Terminal:
        return Terminal(self.plan, self._bell)

    async def _open(self, ready: messages.Ready, link: list[int]) -> None:
        self._front.open()

    def _problem_of_front(self) -> tuple[str, Reason]:
        return self._front.problem()

    async def _end_front(self) -> str:
        self._front.finish()
        return ""

    def _why_gone(self) -> tuple[Reason, str]:
        return self._stopping or Reason.SHUTDOWN, "ended"

    async def unmount(self, reason: Reason, *, lazy: bool) -> None:
        """Hang up and wait until it is GONE."""
        self._stopping = self._stopping or reason
        self._front.finish()
        await self.ended.wait()

    def _hang_up(self) -> None:
        self._front.finish()


def _make_pair() -> tuple[int, str]:
    """A master, and the path of the other end, which nobody has opened yet: its first close would be a hang-up."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, _INT.pack(0))
        number = _INT.unpack(fcntl.ioctl(master, _TIOCGPTN, bytes(_INT.size)))[0]
        _make_raw(master)
    except BaseException:
        os.close(master)
        raise
    return master, f"/dev/pts/{number}"


def _make_raw(master: int) -> None:
    # As a serial port's program expects it: no echo of what the device says back to the device, no lines, no signals.
    iflag, oflag, cflag, lflag, ispeed, ospeed, control = termios.tcgetattr(master)
    iflag &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    oflag &= ~termios.OPOST
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cflag = (cflag & ~(termios.CSIZE | termios.PARENB)) | termios.CS8 | termios.CREAD
    termios.tcsetattr(master, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, control])
