"""The one table from exceptions to errno: every row, the default, and what an exception says itself."""

from __future__ import annotations

import errno

import pyfuse3
import pytest

from udf.errors import (
    DEFAULT_ERRNO,
    ERRNO_TABLE,
    ContractError,
    DeviceGone,
    DriverCrashed,
    InternalError,
    UdfError,
    UserError,
    errno_of,
    is_fault,
)

ROWS: dict[type[BaseException], int] = {
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
    NotImplementedError: errno.EOPNOTSUPP,
    DeviceGone: errno.ENODEV,
    UserError: errno.EINVAL,
    DriverCrashed: errno.EIO,
    ContractError: errno.EIO,
    InternalError: errno.EIO,
}


def test_every_row_of_the_table_is_tested() -> None:
    assert set(ROWS) == set(ERRNO_TABLE)


@pytest.mark.parametrize(("cls", "number"), ROWS.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_each_class_has_its_errno(cls: type[BaseException], number: int) -> None:
    assert errno_of(cls("text")) == number

    class Own(cls):  # type: ignore[misc, valid-type]
        """A subclass counts as the nearest class in the table."""

    assert errno_of(Own("text")) == number


@pytest.mark.parametrize(
    "exc", [ValueError(), KeyError("x"), SystemExit(), KeyboardInterrupt(), Exception(), UdfError()]
)
def test_everything_else_is_the_default(exc: BaseException) -> None:
    assert errno_of(exc) == DEFAULT_ERRNO == errno.EIO


@pytest.mark.parametrize(
    ("exc", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOTDIR, "x"), errno.ENOTDIR),
        (OSError(0, "x"), errno.EIO),
        (OSError(-5, "x"), errno.EIO),
        (OSError(512, "x"), errno.EIO),
        (OSError(4711, "x"), errno.EIO),
        (OSError("5", "x"), errno.EIO),
        (FileNotFoundError(None, "x"), errno.ENOENT),
        (pyfuse3.FUSEError(errno.ENOENT), errno.ENOENT),
        (pyfuse3.FUSEError(-1), errno.EIO),
        (pyfuse3.FUSEError(0), errno.EIO),
    ],
)
def test_an_exceptions_own_errno_counts_if_it_is_one(exc: BaseException, number: int) -> None:
    assert errno_of(exc) == number


@pytest.mark.parametrize(
    ("exc", "fault"),
    [
        (FileNotFoundError(), False),
        (OSError(4711, "x"), False),
        (DeviceGone("x"), False),
        (NotImplementedError(), False),
        (pyfuse3.FUSEError(errno.ENOENT), False),
        (pyfuse3.FUSEError(-1), True),
        (ContractError("x"), True),
        (ValueError(), True),
        (SystemExit(), True),
        (MemoryError(), True),
    ],
)
def test_only_what_an_author_meant_is_no_fault(exc: BaseException, fault: bool) -> None:
    assert is_fault(exc) is fault
