"""A host that stands by: forked from the zygote ahead of its turn, as far as that goes without knowing its driver.

Owns: the way from such a fork to launcher.py, and, for root, an init and a driver's process that were forked ahead too;
each fork costs a millisecond that a program would wait for. Without root (a user namespace depends on the driver), for
foreign programs (their init does more) and without namespaces they are forked when it is known what for.
Must never: run a driver's code before the sandbox stands, or keep a mount busy: the mount namespace is made when the
turn comes, so that nothing that is mounted now is held, and nothing that is mounted until then is missed.
Called by: zygote.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

import trio

from udf.host import init, launcher, sandbox
from udf.host import syscalls as sys_


def stand_by(report: socket.socket) -> NoReturn:
    """Say `standing`, wait for `become`, and be a host to its end."""
    status = 1
    try:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        sys_.set_name("udf-standby")
        sandbox.settle()
        ahead = _fork_tree(report) if os.geteuid() == 0 else None
        report.send(json.dumps({"t": "standing"}).encode())
        status = _become(report, ahead)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as exc:
        print(f"udf host: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _become(report: socket.socket, ahead: launcher.Tree | None) -> int:
    packet, fds = _receive(report)
    if len(fds) != 2:
        return 0  # the supervisor is gone, or needs us no longer
    control, output = socket.socket(fileno=fds[0]), fds[1]
    _dress(packet, output)

    def hand_over(orders: init.Orders) -> launcher.Tree | None:
        if ahead is None:
            return None
        if not orders.private or orders.start["driver"].get("command"):
            ahead.bond.close()  # which ends it
            os.close(ahead.told)
            os.waitpid(ahead.pid, 0)
            return None
        socket.send_fds(ahead.bond, [packet], [output])
        socket.send_fds(ahead.bond, [orders.packet], [orders.control.fileno(), *orders.fds])
        os.close(output)
        return ahead

    return launcher.run(control, report, hand_over)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    packet, fds, _, _ = socket.recv_fds(sock, launcher.MAX_MESSAGE, 8, socket.MSG_CMSG_CLOEXEC)
    return packet, list(fds)


def _dress(become: bytes, output: int) -> None:
    """Output and environment as the `become` message says."""
    # New objects too: the old ones know what they were opened on, which may have been a file.
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output, number)
        stream = open(number, "w", encoding=getattr(sys, name).encoding, closefd=False)  # noqa: SIM115 - lasts
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    environment = json.loads(become)["environment"]
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
        time.tzset()
    sys.argv = ["udf.host"]


def _fork_tree(report: socket.socket) -> launcher.Tree | None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    told, told_write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = sys_.fork(sys_.CLONE_NEWPID)
    except OSError:
        pid = -1  # no namespaces here, which is said when one is needed
    if pid == 0:
        report.close()
        ours.close()
        os.close(told_write)
        _be_init(theirs, told)
    theirs.close()
    os.close(told)
    if pid < 0:
        ours.close()
        os.close(told_write)
        return None
    return launcher.Tree(pid, ours, told_write)


def _be_init(bond: socket.socket, told: int) -> NoReturn:
    status = 1
    control: socket.socket | None = None
    try:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        sys_.set_name("udf-init")
        wake = init.catch_signals()
        way, drivers_way = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        driver = os.fork()
        if driver == 0:
            way.close()
            _be_driver(bond, drivers_way, told)
        drivers_way.close()
        os.close(told)
        sandbox.fuse_mountpoints()  # whatever is touched for the first time costs less now than later
        become, outputs = _receive(bond)
        packet, fds = _receive(bond) if become else (b"", [])
        # If the anchor dies, its end is closed, and nobody says go.
        if not fds or bond.recv(1) != b"g":
            os._exit(0)
        control = socket.socket(fileno=fds.pop(0))
        _prepare(become, outputs[0], json.loads(packet))
        namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        sandbox.mount_fresh_proc()
        socket.send_fds(way, [become], outputs)
        socket.send_fds(way, [packet], [namespace, control.fileno(), *fds])
        for fd in (namespace, *fds, *outputs):
            os.close(fd)
        sandbox.drop_privileges(json.loads(packet)["sandbox"])
        way.close()
        control.close()
        status = init.watch_over(bond, wake, driver, None, private=True)
    except BaseException as exc:
        if control is not None:
            launcher.report_failure(control, f"the driver host could not be set up: {exc}")
    finally:
        os._exit(status)


def _prepare(become: bytes, output: int, start: dict[str, Any]) -> None:
    _dress(become, output)
    sandbox.limit(int(start["sandbox"]["nofile"]))
    sys_.unshare(sys_.CLONE_NEWNS)
    sandbox.hide_fuse_mounts(init.keep_paths(start))


def _be_driver(bond: socket.socket, way: socket.socket, told: int) -> NoReturn:
    try:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)  # init's
        trio.run(trio.lowlevel.checkpoint)  # what a first run brings in is there for the real one
        become, outputs = _receive(way)
        packet, fds = _receive(way) if become else (b"", [])
        if not fds:
            os._exit(0)  # its turn never came
        start = json.loads(packet)
        namespace, number, *fds = fds
        control = socket.socket(fileno=number)
        _dress(become, outputs[0])
        sandbox.limit(int(start["sandbox"]["nofile"]))
        sys_.setns(namespace, sys_.CLONE_NEWNS)
        sandbox.drop_privileges(start["sandbox"])
    except BaseException as exc:
        print(f"udf host: {type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        os._exit(1)
    init.become_driver(bond, init.Orders(control, fds, packet, start, private=True, told=told), None)
