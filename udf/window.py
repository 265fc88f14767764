"""A window: memory that a driver's process and its shim share, so that the bytes of a large read are not sent, but
pointed at.

Owns: its layout, the form of an answer that points into it, and what makes it safe to map. Must never: be believed:
either side may write into it at any moment. Called by: the supervisor (makes one for each generation), the driver's
host (puts bytes into it), the shim (passes them on; the kernel knows nothing of it).

The first page has one number, the shim's: how many answers out of the window it has dealt with, whatever became of
them. What an answer pointed at may be written again as soon as it is counted. All behind that page is the driver's.

Such an answer is a FUSE header with `IN_WINDOW` where an error would be (a driver's are negative), then spans in the
order in which they make up the bytes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from struct import Struct

IN_WINDOW = 1
HEAD = 4096  # bytes before the driver's
SPAN = Struct("=II")  # offset in the window, length
MAX_SPANS = 16
LARGEST = 64 * 1024 * 1024
MAX_READ = 512 * 1024  # bytes of one read through a window: what the kernel reads ahead of a program at once
STAGE = 2 * MAX_READ  # bytes at the end, for answers that the driver has elsewhere: its host copies them

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class NoWindow(Exception):
    """This is no memory that can be mapped without fear; one sentence."""


def create_window(name: str, size: int) -> int:
    """A descriptor of a new window with *size* bytes for the driver; memory is taken as it is written."""
    fd = os.memfd_create(f"udf-window-{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, HEAD + size + STAGE)
        # What one side cuts off would be the other's SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Mapped:
    """A window in our memory, whoever has made it."""

    def __init__(self, fd: int) -> None:
        """Map it; the descriptor stays the caller's, and is not needed any more. Raises NoWindow, OSError."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise NoWindow(f"it is no memory file: {error.strerror}") from None
        size = os.fstat(fd).st_size
        if seals & _SEALS != _SEALS or not HEAD + STAGE <= size <= HEAD + LARGEST:
            raise NoWindow(f"it has {size} bytes and the seals {seals:#x}")
        self._memory = mmap.mmap(fd, size)
        self.view = memoryview(self._memory)
        self.size = size

    def piece(self, offset: int, length: int) -> memoryview:
        """What somebody points at. Raises NoWindow if it is not in what is the driver's."""
        if offset < HEAD or length <= 0 or offset + length > self.size:
            raise NoWindow(f"{length} bytes at {offset}, which is not in a window of {self.size}")
        return self.view[offset : offset + length]

    def close(self) -> None:
        """Unmap it, now or when the last piece of it is let go."""
        self.view.release()
        del self._memory  # each piece keeps it alive
