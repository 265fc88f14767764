"""The first stage of a driver host: sandbox, then two forks; what is left of it is the anchor.

Owns: the three processes of a host and how they end together:
  anchor   the supervisor's child, outside the PID namespace; passes on SIGTERM and the driver's exit status
  init     the first process of the PID namespace (init.py): reaps; when it ends, the kernel kills all the rest
  driver   serve.py in this interpreter, or a foreign program (foreign.py)
The driver is not the namespace's first process itself: that one cannot be ended by most signals, not even its own.
Must never: import anything but the standard library (this stage is forked, not executed again), or run driver code.
Called by: `python -m udf.host`, and zygote.py in a process that it forked ahead.

When the supervisor dies, each of the three dies: by PR_SET_PDEATHSIG from its parent, and the anchor also when the
control socket hangs up (the supervisor's thread that started us may end before the supervisor does).

The report socket is the anchor's alone, so that the supervisor can believe what it hears there: `tree` with a pidfd
of init, before the driver is started; `ended` with the driver's exit status, before init ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from udf.host import init, sandbox
from udf.host import syscalls as sys_

MAX_MESSAGE = 64 * 1024
_MAX_FDS = 4
_UCRED = struct.Struct("iII")


def main(argv: list[str]) -> int:
    """Run a host on the sockets whose descriptors are the arguments. Returns the exit status."""
    if len(argv) not in (2, 3) or not all(number.isdigit() for number in argv[1:]):
        print("usage: python -m udf.host CONTROL [REPORT] (it is started by udf itself)", file=sys.stderr)
        return 2
    sockets = [socket.socket(fileno=int(number)) for number in argv[1:]]
    for each in sockets:
        each.set_inheritable(False)
    # First of all: from here on nothing of this host outlives the supervisor.
    sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
    sandbox.settle()
    return run(sockets[0], sockets[1] if len(sockets) > 1 else None)


@dataclass(frozen=True)
class Tree:
    """Init, and what the anchor has of it."""

    pid: int
    bond: socket.socket
    told: int  # the writing end of a pipe; init's descendants have the other


def run(
    control: socket.socket, report: socket.socket | None, hand_over: Callable[[init.Orders], Tree | None] | None = None
) -> int:
    """Run a host in a process that has settled. Returns the exit status.

    `hand_over` gives the orders to an init that was forked ahead, if there is one that can follow them.
    """
    received = _receive_start(control)
    if received is None:
        return 0
    packet, fds = received
    try:
        return _launch(control, report, fds, packet, hand_over)
    except Exception as exc:
        report_failure(control, f"the driver host could not be set up: {exc}")
        return 1


def report_failure(control: socket.socket, sentence: str) -> None:
    """Tell the supervisor that there will be no driver."""
    try:
        control.send(json.dumps({"t": "failed", "error": sentence[:4000]}).encode())
    except OSError:
        print(f"udf host: {sentence}", file=sys.stderr)


def _receive_start(control: socket.socket) -> tuple[bytes, list[int]] | None:
    while True:
        packet, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return None
        message = json.loads(packet)
        if message.get("t") == "stop":
            return None
        # A spare gets its link (and what else there is) when its turn comes.
        if message.get("t") == "start" and bool(fds) is not bool(message.get("spare")):
            return packet, fds
        for fd in fds:
            os.close(fd)


def _launch(
    control: socket.socket,
    report: socket.socket | None,
    fds: list[int],
    packet: bytes,
    hand_over: Callable[[init.Orders], Tree | None] | None,
) -> int:
    start = json.loads(packet)
    limits = start["sandbox"]
    sandbox.limit(int(limits["nofile"]))
    if hand_over is not None:
        orders = init.Orders(control, fds, packet, start, bool(limits["namespaces"]), -1)
        tree = hand_over(orders)
        if tree is not None:
            return _anchor(tree, control, report, fds, limits, private=True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    sandbox.close_other_descriptors([control.fileno(), *fds, *([] if report is None else [report.fileno()])])
    private = bool(limits["namespaces"]) and sandbox.leave_namespaces(int(limits["uid"]), int(limits["gid"]))
    if private:
        sandbox.hide_fuse_mounts(init.keep_paths(start))
    told, told_write = os.pipe2(os.O_CLOEXEC)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.close(told_write)
        if report is not None:
            report.close()
        _become_init(theirs, init.Orders(control, fds, packet, start, private, told))
    theirs.close()
    os.close(told)
    return _anchor(Tree(pid, ours, told_write), control, report, fds, limits, private=private)


def _become_init(bond: socket.socket, orders: init.Orders) -> NoReturn:
    status = 1
    try:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        # If the anchor died before the line above, its end is closed and nobody will say go.
        if bond.recv(1) == b"g":
            status = init.run(bond, orders)
    except BaseException as exc:
        report_failure(orders.control, f"the driver host could not be set up: {exc}")
    finally:
        os._exit(status)


def _anchor(
    tree: Tree,
    control: socket.socket,
    report: socket.socket | None,
    fds: list[int],
    limits: dict[str, Any],
    *,
    private: bool,
) -> int:
    bond = tree.bond
    sys_.set_name("udf-anchor")
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGTERM, lambda *_: None)
    init_fd = os.pidfd_open(tree.pid)
    _report(report, {"t": "tree", "private": private}, [init_fd])
    bond.send(b"g")
    for fd in fds:
        os.close(fd)
    # The capabilities are needed for nothing any more; init drops its own at the same time.
    sandbox.drop_privileges({**limits, "capabilities": []})

    poll = select.poll()
    poll.register(init_fd, select.POLLIN)
    poll.register(bond, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    poll.register(control, 0)  # only its end; what arrives there is for the driver
    status: int | None = None
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if wake_read in ready and signal.SIGTERM in os.read(wake_read, 64):
            _signal(init_fd, signal.SIGTERM)
        if bond.fileno() in ready:
            data, driver_pid = _receive(bond)
            if not data:
                poll.unregister(bond)
            elif data == b"d":
                _say_started(control, driver_pid)
                os.close(tree.told)
            else:
                status = _report_end(report, data)
        if control.fileno() in ready:
            _signal(init_fd, signal.SIGKILL)
            poll.unregister(control)
        if init_fd in ready:
            _, own = os.waitpid(tree.pid, 0)
            for data, _ in iter(lambda: _receive(bond), (b"", 0)):
                if len(data) == init.END.size:
                    status = _report_end(report, data)
            return _end_as(own if status is None else status)


def _signal(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass


def _receive(bond: socket.socket) -> tuple[bytes, int]:
    # The kernel writes the sender's pid as this process sees it, whatever namespace the sender is in.
    data, control, _, _ = bond.recvmsg(64, socket.CMSG_SPACE(_UCRED.size))
    for level, kind, value in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and data:
            return data, _UCRED.unpack(value[: _UCRED.size])[0]
    return data, 0


def _say_started(control: socket.socket, pid: int) -> None:
    try:
        control.send(json.dumps({"t": "started", "pid": pid}).encode())
    except OSError:
        pass  # the supervisor is gone; the hang-up ends us


def _report_end(report: socket.socket | None, data: bytes) -> int:
    """Tell the supervisor how the driver ended; init ends in the same moment, and we have to wait for that."""
    status, max_rss = init.END.unpack(data)
    _report(report, {"t": "ended", "status": os.waitstatus_to_exitcode(status), "max_rss": max_rss})
    return int(status)


def _report(report: socket.socket | None, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    if report is None:
        return
    try:
        socket.send_fds(report, [json.dumps(message).encode()], fds, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        pass  # the supervisor is gone; the hang-up of the control socket ends us


def _end_as(status: int) -> int:
    """End the way the driver did: with its exit status, or by its signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        signal.set_wakeup_fd(-1)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
