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


def map_window(fd: int) -> mmap.mmap:
    """Map a window; the descriptor is not needed any more then. Raises NoWindow, OSError."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise NoWindow(f"it is no memory file: {error.strerror}") from None
    size = os.fstat(fd).st_size
    if seals & _SEALS != _SEALS or not HEAD + STAGE <= size <= HEAD + LARGEST:
        raise NoWindow(f"it has {size} bytes and the seals {seals:#x}")
    return mmap.mmap(fd, size)
