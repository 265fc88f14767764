"""A supervisor and a shim for one driver host, over real sockets: what a test of the host talks with."""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from udf import messages
from udf.fuse import structs
from udf.fuse.flags import Init
from udf.fuse.opcodes import Opcode

REPO = Path(__file__).resolve().parents[2]
TIMEOUT = 40.0
BUFFER = 2 * 1024 * 1024
ROOT = 1


class Refused(Exception):
    """A reply that was an errno."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


class Link:
    """The shim's end of the link."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unique = 0
        self.replies: dict[int, tuple[int, bytes]] = {}

    def send(self, opcode: Opcode, node: int = ROOT, body: bytes = b"", uid: int = 0, gid: int = 0) -> int:
        self.unique += 2
        size = structs.IN_HEADER.size + len(body)
        header = structs.IN_HEADER.pack(size, opcode, self.unique, node, uid, gid, os.getpid(), 0)
        self.sock.send(header + body)
        return self.unique

    def receive(self, unique: int, timeout: float = TIMEOUT) -> bytes:
        until = time.monotonic() + timeout
        while unique not in self.replies:
            data = self.packet(until)
            size, error, answered = structs.OUT_HEADER.unpack_from(data)
            while len(data) < size:
                data += self.packet(until)
            self.replies[answered] = error, data[structs.OUT_HEADER.size :]
        error, body = self.replies.pop(unique)
        if error:
            raise Refused(-error)
        return body

    def packet(self, until: float) -> bytes:
        ready, _, _ = select.select([self.sock], [], [], max(0.0, until - time.monotonic()))
        assert ready, "no reply on the link"
        data = self.sock.recv(BUFFER)
        assert data, "the link is closed"
        return data

    def ask(self, opcode: Opcode, node: int = ROOT, body: bytes = b"", **who: int) -> bytes:
        return self.receive(self.send(opcode, node, body, **who))

    def init(self) -> tuple[Any, ...]:
        flags = (
            Init.DO_READDIRPLUS | Init.ASYNC_READ | Init.BIG_WRITES | Init.MAX_PAGES | Init.DONT_MASK | Init.POSIX_ACL
        )
        body = structs.INIT_IN.pack(7, 31, 131072, int(flags) & 0xFFFFFFFF, 0)
        return structs.INIT_OUT.unpack_from(self.ask(Opcode.INIT, 0, body).ljust(structs.INIT_OUT.size, b"\0"))

    def lookup(self, name: str, parent: int = ROOT, **who: int) -> dict[str, int]:
        return _fields(structs.ENTRY_OUT, self.ask(Opcode.LOOKUP, parent, os.fsencode(name) + b"\0", **who))

    def walk(self, path: str) -> dict[str, int]:
        entry: dict[str, int] = {"nodeid": ROOT}
        for name in path.strip("/").split("/"):
            entry = self.lookup(name, entry["nodeid"])
            if entry["nodeid"] == 0:
                raise Refused(2)
        return entry

    def getattr(self, node: int) -> dict[str, int]:
        return _fields(structs.ATTR_OUT, self.ask(Opcode.GETATTR, node, bytes(structs.GETATTR_IN.size)))

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        body = structs.OPEN_IN.pack(flags, 0)
        return _fields(structs.OPEN_OUT, self.ask(Opcode.OPEN, node, body))["fh"]

    def read(self, node: int, handle: int, offset: int = 0, size: int = 4096) -> bytes:
        return self.ask(Opcode.READ, node, named(structs.READ_IN, fh=handle, offset=offset, size=size))

    def write(self, node: int, handle: int, data: bytes, offset: int = 0) -> int:
        body = named(structs.WRITE_IN, fh=handle, offset=offset, size=len(data)) + data
        return _fields(structs.WRITE_OUT, self.ask(Opcode.WRITE, node, body))["size"]

    def release(self, node: int, handle: int) -> None:
        self.ask(Opcode.RELEASE, node, named(structs.RELEASE_IN, fh=handle))

    def create(self, name: str, parent: int = ROOT, mode: int = 0o644, **who: int) -> tuple[int, int]:
        """The node and the handle."""
        body = named(structs.CREATE_IN, flags=os.O_RDWR | os.O_CREAT, mode=0o100000 | mode)
        reply = self.ask(Opcode.CREATE, parent, body + os.fsencode(name) + b"\0", **who)
        entry = _fields(structs.ENTRY_OUT, reply)
        return entry["nodeid"], _fields(structs.OPEN_OUT, reply[structs.ENTRY_OUT.size :])["fh"]

    def mkdir(self, name: str, parent: int = ROOT) -> int:
        body = named(structs.MKDIR_IN, mode=0o755)
        reply = self.ask(Opcode.MKDIR, parent, body + os.fsencode(name) + b"\0")
        return _fields(structs.ENTRY_OUT, reply)["nodeid"]

    def link(self, node: int, name: str, parent: int = ROOT) -> dict[str, int]:
        body = named(structs.LINK_IN, oldnodeid=node)
        return _fields(structs.ENTRY_OUT, self.ask(Opcode.LINK, parent, body + os.fsencode(name) + b"\0"))

    def unlink(self, name: str, parent: int = ROOT) -> None:
        self.ask(Opcode.UNLINK, parent, os.fsencode(name) + b"\0")

    def rmdir(self, name: str, parent: int = ROOT) -> None:
        self.ask(Opcode.RMDIR, parent, os.fsencode(name) + b"\0")

    def rename(self, old: str, new: str, parent: int = ROOT, new_parent: int = ROOT, flags: int = 0) -> None:
        body = named(structs.RENAME2_IN, newdir=new_parent, flags=flags)
        self.ask(Opcode.RENAME2, parent, body + os.fsencode(old) + b"\0" + os.fsencode(new) + b"\0")

    def forget(self, node: int, count: int) -> None:
        self.send(Opcode.FORGET, node, structs.FORGET_IN.pack(count))

    def setattr(self, node: int, valid: int, **fields: int) -> dict[str, int]:
        return _fields(
            structs.ATTR_OUT, self.ask(Opcode.SETATTR, node, named(structs.SETATTR_IN, valid=valid, **fields))
        )

    def listing(self, node: int = ROOT, size: int = 4096) -> list[tuple[str, int]]:
        """Names and node ids, by as many READDIRPLUS as it takes."""
        body = structs.OPEN_IN.pack(os.O_RDONLY, 0)
        handle = _fields(structs.OPEN_OUT, self.ask(Opcode.OPENDIR, node, body))["fh"]
        found: list[tuple[str, int]] = []
        offset = 0
        while True:
            data = self.ask(Opcode.READDIRPLUS, node, named(structs.READ_IN, fh=handle, offset=offset, size=size))
            if not data:
                break
            position = 0
            while position < len(data):
                entry = _fields(structs.DIRENTPLUS, data[position:])
                length = entry["dirent.namelen"] if "dirent.namelen" in entry else entry["namelen"]
                offset = entry["dirent.off"] if "dirent.off" in entry else entry["off"]
                start = position + structs.DIRENTPLUS.size
                found.append((os.fsdecode(data[start : start + length]), _nodeid(entry)))
                position = start + (length + 7) // 8 * 8
        self.ask(Opcode.RELEASEDIR, node, named(structs.RELEASE_IN, fh=handle))
        return found


def _nodeid(entry: dict[str, int]) -> int:
    return next(value for key, value in entry.items() if key.endswith("nodeid"))


def _fields(layout: structs.Layout, data: bytes) -> dict[str, int]:
    return dict(zip(layout.fields, layout.unpack_from(data.ljust(layout.size, b"\0")), strict=True))


def named(layout: structs.Layout, **values: int) -> bytes:
    unknown = set(values) - set(layout.fields)
    assert not unknown, f"{layout.name} has no {unknown}"
    return layout.pack(*(values.get(field, 0) for field in layout.fields))


def interpreter(user: int | None) -> tuple[str, str]:
    """An interpreter that this user can run, and its PYTHONPATH; skips the test if there is none."""
    if user in (None, os.getuid()):
        return sys.executable, str(REPO)
    packages = str(Path(msgspec.__file__).parents[1])
    for program in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        paths = (Path(program).resolve(), Path(packages), REPO)
        if all(
            path.exists() and part.stat().st_mode & 0o005 == 0o005 for path in paths for part in (path, *path.parents)
        ):
            return program, f"{REPO}:{packages}"
    pytest.skip("no interpreter that another user can run")


class Forked:
    """A host that a zygote of its own has forked; like a subprocess.Popen as far as the tests use one."""

    def __init__(self, control: socket.socket, output: int, environment: dict[str, str], argv: list[str], **who: Any):
        self.returncode: int | None = None
        requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._zygote = subprocess.Popen(
                [*argv, "udf.host.zygote", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env=environment,
                **who,
            )
        self._report, fork = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._report.settimeout(TIMEOUT)
        self._report.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with fork:
            socket.send_fds(requests, [b"f"], [fork.fileno()])
        word, ancillary, _, _ = self._report.recvmsg(256, socket.CMSG_SPACE(12))
        assert word == b'{"t": "standing"}'
        self.pid = struct.unpack("iII", ancillary[0][2][:12])[0]
        self._report.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        order = messages.encode(messages.Become(name="test", environment=environment))
        socket.send_fds(self._report, [order], [control.fileno(), output])
        # What it has forked goes on without it.
        requests.close()
        assert self._zygote.wait(TIMEOUT) == 0

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._report.close()
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> int:
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                if not select.select([pidfd], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("a forked host", timeout)
            finally:
                os.close(pidfd)
        status = self.poll()
        assert status is not None
        return status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


class Host:
    """One host process, its control socket and its link."""

    forked = False  # whether a zygote makes it

    def __init__(self, *, user: int | None = None, sandbox_user: int | None = None) -> None:
        program, path = interpreter(user if sandbox_user is None else sandbox_user)  # or skip, with nothing open yet
        own = os.getuid() if user is None else user
        self.sandbox_user = own if sandbox_user is None else sandbox_user
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(TIMEOUT)
        ours, self.driver_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, self.driver_end):
            end.setsockopt(socket.SOL_SOCKET, 32 if os.geteuid() == 0 else socket.SO_SNDBUF, BUFFER)
        self.link = Link(ours)
        output, write = os.pipe()
        argv, environment = [program, "-P", "-m"], {**os.environ, "PYTHONPATH": path}
        who: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        self.process: subprocess.Popen[bytes] | Forked
        if self.forked:
            self.process = Forked(theirs, write, environment, argv, **who)
        else:
            self.process = subprocess.Popen(
                [*argv, "udf.host", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env=environment,
                **who,
            )
        theirs.close()
        os.close(write)
        self.messages: list[Any] = []
        self.output = bytearray()
        self._reader = threading.Thread(target=self._drain, args=(output,))
        self._reader.start()

    def _drain(self, output: int) -> None:
        while data := os.read(output, 65536):
            if len(self.output) < 1 << 20:
                self.output += data
        os.close(output)

    def start(
        self, path: Path | str = "", class_name: str | None = None, store: Sequence[int] = (), **fields: Any
    ) -> None:
        sandbox = {
            "uid": self.sandbox_user,
            "gid": self.sandbox_user,
            "keep_paths": [str(REPO)],
            **fields.pop("sandbox", {}),
        }
        message = messages.Start(
            name=fields.pop("name", "test"),
            driver=messages.DriverSpec(
                path=str(path),
                class_name=class_name,
                command=fields.pop("command", None),
                window=(window := fields.pop("window", 0)),
            ),
            sandbox=messages.Sandbox(**sandbox),
            store=bool(store) and not window,
            **fields,
        )
        if message.spare:
            self.control.send(messages.encode(message))
        else:
            self.give_link(message, *store)

    def give_link(self, message: messages.Message, *more: int) -> None:
        with self.driver_end:
            fds = array.array("i", [self.driver_end.fileno(), *more])
            self.control.sendmsg([messages.encode(message)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])

    def wait_for(self, kind: type, timeout: float = TIMEOUT) -> Any:
        """The next message of this type; the others are kept in `messages`."""
        for message in self.messages:
            if isinstance(message, kind):
                self.messages.remove(message)
                return message
        until = time.monotonic() + timeout
        while True:
            left = until - time.monotonic()
            assert left > 0, f"no {kind}; got {self.messages}; output {self.text()}"
            ready, _, _ = select.select([self.control], [], [], left)
            if not ready:
                continue
            data = self.control.recv(messages.MAX_MESSAGE)
            assert data, f"the host has ended without {kind}: {self.messages}, output {self.text()}"
            message = messages.decode_from_host(data)
            if isinstance(message, kind):
                return message
            if not isinstance(message, messages.HostHeartbeat):
                self.messages.append(message)

    def drain(self) -> None:
        """Keep in `messages` what has arrived."""
        while select.select([self.control], [], [], 0)[0] and (data := self.control.recv(messages.MAX_MESSAGE)):
            message = messages.decode_from_host(data)
            if not isinstance(message, messages.HostHeartbeat):
                self.messages.append(message)

    def ready(self) -> messages.Ready:
        message = self.wait_for(messages.Ready | messages.HostFailed)  # type: ignore[arg-type]
        assert isinstance(message, messages.Ready), f"{message}; output {self.text()}"
        return message

    def text(self) -> str:
        return self.output.decode(errors="replace")

    def driver_pid(self) -> int:
        pid = self.wait_for(messages.Started).pid
        assert isinstance(pid, int)
        return pid

    def wait(self, timeout: float = TIMEOUT) -> int:
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def close(self) -> None:
        self.control.close()
        self.link.sock.close()
        self.driver_end.close()
        if self.process.poll() is None:
            try:
                self.process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join(TIMEOUT)
        assert not self._reader.is_alive(), "something of the host still has its output open"


@contextmanager
def host(**options: Any) -> Iterator[Host]:
    peer = Host(**options)
    try:
        yield peer
    finally:
        peer.close()
