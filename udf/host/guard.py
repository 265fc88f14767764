"""Between pyfuse3 and a driver's operations: whatever the driver does, pyfuse3 gets an answer that it can send.

Owns: turning every exception and every unusable result into one FUSEError, and reporting each kind of fault once.
pyfuse3 itself ends its main loop at any other exception, and at a result of a type that it cannot convert.
Must never: add an await of its own, or swallow a cancellation of the whole driver. Called by: serve.py.
"""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import trio

from udf.errors import ContractError, errno_of, is_fault
from udf.host.progress import OPCODES, kind

MAX_TRACEBACK = 16 * 1024
MAX_TEXT = 1000
_MAX_KINDS = 500  # different faults that are remembered; beyond that only the errno tells

Report = Callable[[str, str, str], None]
"""Takes the operation, one line, and the traceback."""


def _any(result: Any) -> Any:
    return result


def _instance(cls: type) -> Callable[[Any], Any]:
    def check(result: Any) -> Any:
        if not isinstance(result, cls):
            raise ContractError(f"answered {_kind_of(result)} instead of {cls.__name__}")
        return result

    return check


def _buffer(result: Any) -> Any:
    if not isinstance(result, bytes | bytearray | memoryview):
        raise ContractError(f"answered {_kind_of(result)} instead of bytes")
    return bytes(result) if isinstance(result, memoryview) else result


def _bytes(result: Any) -> bytes:
    if not isinstance(result, bytes):
        raise ContractError(f"answered {_kind_of(result)} instead of bytes")
    return result


def _path(result: Any) -> bytes:
    if not isinstance(result, bytes) or b"\0" in result or not 0 < len(result) < 4096:
        raise ContractError(f"answered {_kind_of(result)} that is no target of a link")
    return result


def _names(result: Any) -> list[bytes]:
    names = list(result)
    if not all(isinstance(name, bytes) and name and b"\0" not in name for name in names):
        raise ContractError("answered names of extended attributes that are no bytes")
    return names


def _number(result: Any) -> int:
    if not isinstance(result, int) or not 0 <= result < 1 << 64:
        raise ContractError(f"answered {result!r:.80} instead of a number")
    return result


def _events(result: Any) -> int:
    return 0 if result is None else _number(result) & 0xFFFFFFFF


def _created(result: Any) -> Any:
    if (
        not isinstance(result, tuple)
        or len(result) != 2
        or not isinstance(result[0], pyfuse3.FileInfo)
        or not isinstance(result[1], pyfuse3.EntryAttributes)
    ):
        raise ContractError(f"answered {_kind_of(result)} instead of (FileInfo, EntryAttributes)")
    return result


_entry = _instance(pyfuse3.EntryAttributes)

# Every handler that pyfuse3 calls, and what it can take from it. read and write are apart: their bound is an argument.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "lookup": _entry,
    "getattr": _entry,
    "setattr": _entry,
    "readlink": _path,
    "mknod": _entry,
    "mkdir": _entry,
    "unlink": _any,
    "rmdir": _any,
    "symlink": _entry,
    "rename": _any,
    "link": _entry,
    "open": _instance(pyfuse3.FileInfo),
    "create": _created,
    "flush": _any,
    "release": _any,
    "fsync": _any,
    "opendir": _number,
    "readdir": _any,
    "releasedir": _any,
    "fsyncdir": _any,
    "statfs": _instance(pyfuse3.StatvfsData),
    "setxattr": _any,
    "getxattr": _bytes,
    "listxattr": _names,
    "removexattr": _any,
    "access": bool,
    "poll": _events,
}


class Guard(pyfuse3.Operations):
    """Operations that never raise anything but FUSEError. Its handlers are made once, one closure for each."""

    def __init__(self, operations: pyfuse3.Operations, report: Report) -> None:
        super().__init__()
        self._operations = operations
        self._report = report
        self._seen: set[tuple[str, type]] = set()
        for name in ("supports_dot_lookup", "enable_writeback_cache", "enable_acl"):
            setattr(self, name, bool(getattr(operations, name, False)))
        handlers = {name: self._guarded(name, getattr(operations, name), check) for name, check in CHECKS.items()}
        handlers["read"] = self._guarded_read(operations.read)
        handlers["write"] = self._guarded_write(operations.write)
        handlers["forget"] = self._guarded_forget(operations.forget)
        for name, handler in handlers.items():
            setattr(self, name, handler)

    def init(self) -> None:
        """Called by libfuse's thread of C code, which has no way to fail."""
        try:
            self._operations.init()
        except BaseException as exc:
            self._failure("init", exc)

    def _guarded(
        self, op: str, handler: Callable[..., Awaitable[Any]], check: Callable[[Any], Any]
    ) -> Callable[..., Awaitable[Any]]:
        failure = self._failure
        opcode, note = OPCODES[op], kind.set

        async def call(*arguments: Any) -> Any:
            note(opcode)
            try:
                return check(await handler(*arguments))
            except BaseException as exc:
                raise failure(op, exc) from None

        return call

    def _guarded_read(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        failure = self._failure
        opcode, note = OPCODES["read"], kind.set

        async def read(handle: int, offset: int, size: int) -> Any:
            note(opcode)
            try:
                data = await handler(handle, offset, size)
                if type(data) is not bytes:
                    data = _buffer(data)
                if len(data) > size:
                    raise ContractError(f"answered {len(data)} bytes when {size} were asked for")
                return data
            except BaseException as exc:
                raise failure("read", exc) from None

        return read

    def _guarded_write(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        failure = self._failure

        opcode, note = OPCODES["write"], kind.set

        async def write(handle: int, offset: int, data: bytes) -> Any:
            note(opcode)
            try:
                count = await handler(handle, offset, data)
                if type(count) is not int or not 0 <= count <= len(data):
                    raise ContractError(f"answered {count!r:.80} for {len(data)} bytes")
                return count
            except BaseException as exc:
                raise failure("write", exc) from None

        return write

    def _guarded_forget(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        failure = self._failure

        async def forget(inodes: Any) -> None:
            try:
                await handler(inodes)
            except BaseException as exc:
                failure("forget", exc)

        return forget

    def _failure(self, op: str, exc: BaseException) -> BaseException:
        """What to raise instead of `exc`."""
        if isinstance(exc, trio.Cancelled | GeneratorExit):
            return exc
        if isinstance(exc, BaseExceptionGroup):
            if exc.subgroup(trio.Cancelled) is not None:
                return exc
            # A nursery wraps what its tasks raise; one error stays that error.
            while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
                exc = exc.exceptions[0]
        if is_fault(exc):
            self._note(op, exc)
        return pyfuse3.FUSEError(errno_of(exc))

    def _note(self, op: str, exc: BaseException) -> None:
        kind = op, type(exc)
        if kind in self._seen or len(self._seen) >= _MAX_KINDS:
            return
        self._seen.add(kind)
        try:
            text = "".join(traceback.format_exception(exc))[-MAX_TRACEBACK:]
            line = f"{type(exc).__name__}: {exc}"[:MAX_TEXT]
        except BaseException:
            text, line = "", type(exc).__name__
        self._report(op, line, text)


def _kind_of(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
