"""ptrace(2), as far as the crash matrix needs it: stopping threads, seeing their system calls, making one for them.

Owns: the numbers and layouts of the kernel's interface; those of registers and system calls are x86-64's. Knows nothing
of drivers. Every function must be called by the thread that seized the tracee. Called by: tracer.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Sequence
from typing import NamedTuple

SUPPORTED = os.uname().machine == "x86_64"

WAIT_ALL = 0x40000000  # __WALL: threads too
WAIT_OWN = 0x20000000  # __WNOTHREAD: only what this very thread traces
SYSCALL_STOP = signal.SIGTRAP | 0x80  # with TRACESYSGOOD

_PEEKTEXT, _CONT, _SINGLESTEP, _GETREGS, _SETREGS, _SYSCALL = 1, 7, 9, 12, 13, 24
_GETSIGINFO, _SEIZE, _INTERRUPT, _GET_SYSCALL_INFO = 0x4202, 0x4206, 0x4207, 0x420E
# Stops at system calls are marked; new threads and children are traced too; nothing lives on without us.
_OPTIONS = 1 | 2 | 4 | 8 | 0x100000

_REGISTERS = struct.Struct("27Q")
_RAX, _RCX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP = 10, 11, 12, 13, 14, 15, 16
_INFO = struct.Struct("=B7xQQQ6Q")  # op, then instruction pointer, stack pointer, number, arguments
_ENTRY = 1
_SYSCALL_CODE = 0x050F

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Call(NamedTuple):
    """A system call that a thread is about to make."""

    number: int
    args: tuple[int, ...]


class Gone(Exception):
    """The thread has ended."""


def _ptrace(request: int, tid: int, address: int | None, data: int | None) -> int:
    ctypes.set_errno(0)
    result: int = _libc.ptrace(request, tid, address, data)
    number = ctypes.get_errno()
    if result == -1 and number:
        if number == 3:  # ESRCH
            raise Gone(tid)
        raise OSError(number, f"ptrace {request:#x} of thread {tid}: {os.strerror(number)}")
    return result


def seize(tid: int) -> None:
    """Trace this thread, and what it starts."""
    _ptrace(_SEIZE, tid, None, _OPTIONS)


def interrupt(tid: int) -> None:
    """Have it stop."""
    _ptrace(_INTERRUPT, tid, None, None)


def go_on(tid: int, number: int = 0) -> None:
    """Let it run to its next system call, with this signal."""
    _ptrace(_SYSCALL, tid, None, number)


def entered(tid: int) -> Call | int:
    """The system call at whose entry it has stopped, or, at the exit of one, what that returned."""
    buffer = ctypes.create_string_buffer(_INFO.size)
    _ptrace(_GET_SYSCALL_INFO, tid, _INFO.size, ctypes.addressof(buffer))
    op, _, _, number, *args = _INFO.unpack(buffer.raw)
    return Call(number, tuple(args)) if op == _ENTRY else _signed(number)


def fault_address(tid: int) -> int:
    """The address at which it has got its SIGSEGV."""
    buffer = ctypes.create_string_buffer(128)
    _ptrace(_GETSIGINFO, tid, None, ctypes.addressof(buffer))
    return int.from_bytes(buffer.raw[16:24], "little")


def registers(tid: int) -> list[int]:
    """Its registers."""
    buffer = ctypes.create_string_buffer(_REGISTERS.size)
    _ptrace(_GETREGS, tid, None, ctypes.addressof(buffer))
    return list(_REGISTERS.unpack(buffer.raw))


def _set_registers(tid: int, values: Sequence[int]) -> None:
    buffer = ctypes.create_string_buffer(_REGISTERS.pack(*values), _REGISTERS.size)
    _ptrace(_SETREGS, tid, None, ctypes.addressof(buffer))


def instruction(tid: int) -> int:
    """The address of its next instruction."""
    return registers(tid)[_RIP]


def syscall_instruction(tid: int) -> int | None:
    """The address of the `syscall` instruction in which it waits; None if it does not."""
    address = instruction(tid) - 2
    return address if _ptrace(_PEEKTEXT, tid, address, None) & 0xFFFF == _SYSCALL_CODE else None


def step(tid: int) -> int:
    """Execute one instruction; the signal with which it stops then (SIGTRAP if nothing else happened)."""
    _ptrace(_SINGLESTEP, tid, None, None)
    _, status = os.waitpid(tid, WAIT_ALL)
    if not os.WIFSTOPPED(status):
        raise Gone(tid)
    return os.WSTOPSIG(status)


def call(tid: int, at: int, number: int, *args: int) -> int:
    """Make a system call in its name, with the `syscall` instruction at that address; what it returned.

    The thread has stopped, but not at the entry of a system call of its own, which it would lose.
    """
    before = registers(tid)
    changed = list(before)
    changed[_RIP], changed[_RAX] = at, number
    changed[_ORIG_RAX] = (1 << 64) - 1  # nothing is to be restarted
    changed[_RDI], changed[_RSI], changed[_RDX] = (*args, 0, 0, 0)[:3]
    _set_registers(tid, changed)
    stopped = step(tid)
    result = registers(tid)[_RAX]
    _set_registers(tid, before)
    if stopped != signal.SIGTRAP:
        raise OSError(f"thread {tid} got signal {stopped} in a system call made in its name")
    return _signed(result)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
