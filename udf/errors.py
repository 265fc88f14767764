"""Exceptions that say whose fault it is, and the one table that turns an exception into an errno.

Owns: the exception classes of the whole project and `errno_of`.
Must never: import anything of `udf`, or pyfuse3 (the shim and the command line read this file too).
Called by: everyone; the driver host's guard is the only place that turns an author's exception into a reply.
"""

from __future__ import annotations

import errno
import sys


class UdfError(Exception):
    """Anything that UDF itself raises."""


class DeviceGone(UdfError):
    """The world's fault: the device, server or source behind a driver is no longer there."""


class DriverCrashed(UdfError):
    """The driver's fault: its process ended although it should serve."""

    def __init__(self, message: str, *, driver: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.driver = driver
        self.status = status


class ContractError(UdfError):
    """The driver's fault: it answered something that the interface does not allow."""

    def __init__(self, message: str, *, driver: str = "", operation: str = "") -> None:
        super().__init__(message)
        self.driver = driver
        self.operation = operation


class InternalError(UdfError):
    """Our own fault: UDF broke one of its own rules."""


class UserError(UdfError):
    """The operator's fault: one sentence that says what is wrong and, if it can, what to do. Never a traceback."""


DEFAULT_ERRNO = errno.EIO

# Looked up along the exception's classes, nearest first. An OSError with a sane errno of its own never gets here.
ERRNO_TABLE: dict[type[BaseException], int] = {
    BlockingIOError: errno.EAGAIN,
    BrokenPipeError: errno.EPIPE,
    ChildProcessError: errno.ECHILD,
    ConnectionAbortedError: errno.ECONNABORTED,
    ConnectionRefusedError: errno.ECONNREFUSED,
    ConnectionResetError: errno.ECONNRESET,
    FileExistsError: errno.EEXIST,
    FileNotFoundError: errno.ENOENT,
    InterruptedError: errno.EINTR,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
    ProcessLookupError: errno.ESRCH,
    TimeoutError: errno.ETIMEDOUT,
    OSError: errno.EIO,
    MemoryError: errno.ENOMEM,
    # EOPNOTSUPP and not ENOSYS: on ENOSYS the kernel never asks again, and a file may support what another does not.
    NotImplementedError: errno.EOPNOTSUPP,
    DeviceGone: errno.ENODEV,
    UserError: errno.EINVAL,
    DriverCrashed: errno.EIO,
    ContractError: errno.EIO,
    InternalError: errno.EIO,
}

# The kernel refuses a reply with an error of 512 or more (its own restart codes begin there).
_ERRNO_LIMIT = 512

# Raised on purpose to say something to the program; everything else in a handler is a fault worth a traceback.
_DELIBERATE: tuple[type[BaseException], ...] = (OSError, NotImplementedError, DeviceGone)


def sane_errno(value: object) -> int | None:
    """The number if a reply may carry it as an errno, else None."""
    if type(value) is int and 0 < value < _ERRNO_LIMIT and value in errno.errorcode:
        return value
    return None


def errno_of(exc: BaseException) -> int:
    """The errno a program sees when a handler raised `exc`: positive, and always one the kernel accepts."""
    if isinstance(exc, OSError):
        own = sane_errno(exc.errno)
        if own is not None:
            return own
    elif _is_fuse_error(exc):
        own = sane_errno(getattr(exc, "errno", None))
        return DEFAULT_ERRNO if own is None else own
    for cls in type(exc).__mro__:
        if cls in ERRNO_TABLE:
            return ERRNO_TABLE[cls]
    return DEFAULT_ERRNO


def is_fault(exc: BaseException) -> bool:
    """Whether `exc` is a mistake in the driver, and not an answer that its author meant to give."""
    if _is_fuse_error(exc):
        return sane_errno(getattr(exc, "errno", None)) is None
    return not isinstance(exc, _DELIBERATE)


def _is_fuse_error(exc: BaseException) -> bool:
    # Without importing pyfuse3: if nobody has loaded it, nobody can have raised its exception.
    pyfuse3 = sys.modules.get("pyfuse3")
    return pyfuse3 is not None and isinstance(exc, getattr(pyfuse3, "FUSEError", ()))
