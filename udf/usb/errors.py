"""What went wrong on the bus, in pyusb's words and libusb's numbers.

Owns: the one table from a URB's status to an error, and the table from an error to errno, code and text.
Must never: decide that a device is gone; only the end of its connection says so.
Called by: client.py and backend.py. The numbers are those that real libusb gives for the same status (measured).
"""

from __future__ import annotations

import enum
import errno

import usb.core


class Failure(enum.IntEnum):
    """enum libusb_error; pyusb shows it as `backend_error_code`."""

    IO = -1
    INVALID_PARAM = -2
    ACCESS = -3
    NO_DEVICE = -4
    NOT_FOUND = -5
    BUSY = -6
    TIMEOUT = -7
    OVERFLOW = -8
    PIPE = -9
    NO_MEM = -11
    OTHER = -99


# pyusb takes its texts from libusb_strerror(); errno None is pyusb's for "Other error" too.
TABLE: dict[Failure, tuple[int | None, str]] = {
    Failure.IO: (errno.EIO, "Input/Output Error"),
    Failure.INVALID_PARAM: (errno.EINVAL, "Invalid parameter"),
    Failure.ACCESS: (errno.EACCES, "Access denied (insufficient permissions)"),
    Failure.NO_DEVICE: (errno.ENODEV, "No such device (it may have been disconnected)"),
    Failure.NOT_FOUND: (errno.ENOENT, "Entity not found"),
    Failure.BUSY: (errno.EBUSY, "Resource busy"),
    Failure.TIMEOUT: (errno.ETIMEDOUT, "Operation timed out"),
    Failure.OVERFLOW: (errno.EOVERFLOW, "Overflow"),
    Failure.PIPE: (errno.EPIPE, "Pipe error"),
    Failure.NO_MEM: (errno.ENOMEM, "Insufficient memory"),
    Failure.OTHER: (None, "Other error"),
}

# A URB's status, minus an errno, as usbfs and libusb translate it. What is not here is an input/output error.
# EREMOTEIO is a short packet where none was allowed, ENOENT and ECONNRESET are unlinked URBs: libusb calls all three
# completed, with as many bytes as came.
STATUS: dict[int, Failure | None] = {
    0: None,
    -errno.EREMOTEIO: None,
    -errno.ENOENT: None,
    -errno.ECONNRESET: None,
    -errno.EPIPE: Failure.PIPE,
    -errno.EOVERFLOW: Failure.OVERFLOW,
    -errno.ENODEV: Failure.NO_DEVICE,
    -errno.ESHUTDOWN: Failure.NO_DEVICE,
}


def failure_of(status: int) -> Failure | None:
    """What a URB's status means; None: it was completed."""
    return STATUS.get(status, Failure.IO)


def usb_error(failure: Failure) -> usb.core.USBError:
    """The exception that pyusb over libusb raises for it."""
    number, text = TABLE[failure]
    cls = usb.core.USBTimeoutError if failure is Failure.TIMEOUT else usb.core.USBError
    return cls(text, int(failure), number)
