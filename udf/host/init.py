"""The second process of a driver host: the first of its PID namespace.

Owns: the last privileged steps (mounts), starting the driver, reaping, passing on SIGTERM, and the exit status.
When it ends, the kernel kills every process that the driver left behind; without a PID namespace it does that itself.
Must never: import anything but the standard library, run driver code, or keep the link open.
Called by: launcher.py, in a fork.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

from udf.host import foreign, sandbox
from udf.host import syscalls as sys_

END = struct.Struct("=iq")  # the last word on the bond: the driver's wait status, its largest resident set in KiB


def run(
    bond: socket.socket, control: socket.socket, fds: list[int], packet: bytes, start: dict[str, Any], private: bool
) -> int:
    """Start the driver and stay until it has ended; the exit status is only for when the bond is broken.

    `fds` are the link and the memfds of the state store; a spare has none yet.
    """
    sys_.set_name("udf-init")
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if private:
        sandbox.mount_fresh_proc()
    else:
        sys_.prctl(sys_.PR_SET_CHILD_SUBREAPER, 1)
    command = start["driver"].get("command")
    program = foreign.Program(control, fds, start, private) if command else None
    sandbox.drop_privileges(start["sandbox"])

    driver = os.fork()
    if driver == 0:
        _become_driver(bond, control, fds, packet, start["name"], program)
    if program is None:
        for fd in fds:
            os.close(fd)
        control.close()
    else:
        program.started()
    status, max_rss = _watch(wake_read, driver, program)
    if not private:
        _kill_the_rest()
    bond.send(END.pack(status, max_rss))
    return os.waitstatus_to_exitcode(status) & 0xFF


def _become_driver(
    bond: socket.socket,
    control: socket.socket,
    fds: list[int],
    packet: bytes,
    name: str,
    program: foreign.Program | None,
) -> NoReturn:
    status = 1
    try:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys_.set_name(f"udf:{name}")
        bond.send(b"d")
        bond.close()
        if program is not None:
            program.execute()
        sandbox.close_other_descriptors([control.fileno(), *fds])
        from udf.host import serve  # the first thing of this host that is more than the standard library

        status = serve.run(control, fds[0] if fds else None, packet, fds[1:])
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
