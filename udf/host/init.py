"""The second process of a driver host: the first of its PID namespace.

Owns: the last privileged steps (mounts), starting the driver, reaping, passing on SIGTERM, and the exit status.
When it ends, the kernel kills every process that the driver left behind; without a PID namespace it does that itself.
Must never: import anything but the standard library, run driver code, or keep the link open.
Called by: launcher.py, in a fork; standby.py, in one that was made ahead.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from udf.host import foreign, sandbox
from udf.host import syscalls as sys_

END = struct.Struct("=iq")  # the last word on the bond: the driver's wait status, its largest resident set in KiB


@dataclass(frozen=True)
class Orders:
    """What a host has been told to do, and what it was given for that."""

    control: socket.socket
    fds: list[int]  # the link, then the memfds of the state store; a spare has none yet
    packet: bytes  # the `start` message
    start: dict[str, Any]  # the same, read
    private: bool  # it has namespaces of its own
    told: int  # a pipe that ends when the supervisor has been told of the driver's process


def keep_paths(start: dict[str, Any]) -> list[str]:
    """What a driver must be able to see."""
    return [*start["sandbox"]["keep_paths"], *foreign.named_paths(start)]


def run(bond: socket.socket, orders: Orders) -> int:
    """Start the driver and stay until it has ended; the exit status is only for when the bond is broken."""
    sys_.set_name("udf-init")
    wake = catch_signals()
    if orders.private:
        sandbox.mount_fresh_proc()
    else:
        sys_.prctl(sys_.PR_SET_CHILD_SUBREAPER, 1)
    command = orders.start["driver"].get("command")
    program = foreign.Program(orders.control, orders.fds, orders.start, orders.private) if command else None
    sandbox.drop_privileges(orders.start["sandbox"])

    driver = os.fork()
    if driver == 0:
        become_driver(bond, orders, program)
    os.close(orders.told)
    if program is None:
        for fd in orders.fds:
            os.close(fd)
        orders.control.close()
    else:
        program.started()
    return watch_over(bond, wake, driver, program, orders.private)


def catch_signals() -> int:
    """Be told of signals by a pipe; its reading end."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return wake_read


def watch_over(bond: socket.socket, wake: int, driver: int, program: foreign.Program | None, private: bool) -> int:
    """Stay until the driver, which has been forked, has ended."""
    status, max_rss = _watch(wake, driver, program)
    if not private:
        _kill_the_rest()
    bond.send(END.pack(status, max_rss))
    return os.waitstatus_to_exitcode(status) & 0xFF


def become_driver(bond: socket.socket, orders: Orders, program: foreign.Program | None) -> NoReturn:
    """In the driver's process, which has nothing left to give up: run the driver to its end."""
    status = 1
    try:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys_.set_name(f"udf:{orders.start['name']}")
        bond.send(b"d")
        bond.close()
        if program is not None:
            os.read(orders.told, 1)
            program.execute()
        fds = orders.fds
        sandbox.close_other_descriptors([orders.control.fileno(), *fds, orders.told])
        from udf.host import serve  # the first thing of this host that is more than the standard library

        status = serve.run(orders.control, fds[0] if fds else None, orders.packet, fds[1:], orders.told)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as exc:
        print(f"udf host: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _watch(wake: int, driver: int, program: foreign.Program | None) -> tuple[int, int]:
    """Reap until the driver has ended (a foreign program: all of it). Its wait status, its largest resident set."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    if program is not None:
        program.register(poll)
    first_status = max_rss = 0
    while True:
        timeout = None if program is None else program.timeout()
        ready = {fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)}
        if program is not None:
            program.serve(ready)
            if program.end_by_signal:
                program.end_by_signal = False
                _signal_who_catches()
        if wake not in ready:
            continue
        numbers = os.read(wake, 512)
        if signal.SIGTERM in numbers:
            # A program that has become a daemon is none of our children by number, so everyone gets it.
            _signal_all() if program is not None else os.kill(driver, signal.SIGTERM)
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                if program is not None:
                    program.ended(first_status)
                return first_status, max_rss
            if pid == 0:
                break
            if pid == driver and program is None:
                return status, usage.ru_maxrss
            max_rss = max(max_rss, usage.ru_maxrss)
            # Of a foreign program's processes the first that fails says how it ended.
            first_status = first_status or status


def _children() -> list[int]:
    own = os.getpid()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == own:
                found.append(int(entry))
    return found


def _signal_all() -> None:
    try:
        if os.getpid() == 1:
            os.kill(-1, signal.SIGTERM)
        else:
            for pid in _children():
                os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass


def _signal_who_catches() -> None:
    """SIGTERM for those to whom it is a word and not the end."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if os.getpid() == 1 else _children():
        try:
            with open(f"/proc/{pid}/status", "rb") as file:
                caught = next(line for line in file if line.startswith(b"SigCgt:"))
            if pid != os.getpid() and int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
                os.kill(pid, signal.SIGTERM)
        except (OSError, ValueError, IndexError, StopIteration):
            pass


def _kill_the_rest() -> None:
    # Orphans become our children (subreaper), so this ends when the last descendant has ended.
    while True:
        for pid in _children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
