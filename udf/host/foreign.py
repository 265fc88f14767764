"""Foreign FUSE programs: any program that mounts, unmodified.

Owns: the private mountpoint, the stand-in over fusermount, handing over the link, and what the supervisor is told of
such a program (it has no code of ours inside). Must never: import anything but the standard library, or keep the link
open once the program has it. Called by: init.py.

How the program comes to the link: without CAP_SYS_ADMIN its mount(2) fails, and libfuse (2 and 3) runs fusermount by
its absolute path. There, in the private mount namespace, lies the stand-in (standin.py), which asks us for the link and
passes it on over _FUSE_COMMFD, as fusermount passes /dev/fuse. Without a mount namespace the program is given /dev/fd/N
as its mountpoint instead, which libfuse 3 understands.

A spare goes as far as that without executing the program: its process waits at the gate, a socket between init and it,
until `take_over` has brought the link.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shlex
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from udf.host import syscalls as sys_

STANDIN = os.path.join(os.path.dirname(__file__), "standin.py")
_FUSERMOUNTS = ("fusermount3", "fusermount")
_FUSERMOUNT_DIRECTORIES = ("/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin", "/sbin")
# Directories that a program hardly needs; the first that exists and has no kept path below it is covered.
_COVERS = ("/sys/fs/fuse/connections", "/mnt", "/media", "/srv", "/opt", "/home")
_MAX_REQUEST = 64 * 1024
_MAX_FDS = 4
_MAX_LINE = 2000
_MAX_CHUNKS = 16
_STANDIN_TIMEOUT = 2.0  # heartbeats wait as long; the stand-in is quick


class Program:
    """One foreign program, from its mountpoint to its end."""

    def __init__(self, control: socket.socket, fds: list[int], start: dict[str, Any], private: bool) -> None:
        """Everything that needs privileges; they are dropped after this. Without `fds` it is a spare."""
        self._control = control
        self._link: int | None = fds[0] if fds else None
        self._gate = None if fds else socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for fd in fds[1:]:
            os.close(fd)  # a program that knows nothing of us keeps no state with us
        self._beat = max(0.05, float(start["heartbeat"]))
        self._next_beat = time.monotonic() + self._beat
        self._listener: socket.socket | None = None
        self._poll: select.poll | None = None
        self._last_line = b""
        self.end_by_signal = False  # it is to be told so, while it has its link
        self._environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH",)}
        self._start = start
        self._mountpoint = f"/dev/fd/{self._link}"
        if private:
            room = _private_room(start["sandbox"], [*start["sandbox"]["keep_paths"], *named_paths(start)])
            if room is None:
                raise OSError("no place for a private mountpoint")
            self._mountpoint = os.path.join(room, "mnt")
            self._listener = _listen(os.path.join(room, "link"), start["sandbox"])
            _cover_fusermount(room)
            _cover_device()
            self._environment["PATH"] = f"{room}/bin:{self._environment.get('PATH', os.defpath)}"
        self._errors, self._errors_write = os.pipe2(os.O_CLOEXEC)

    def execute(self) -> NoReturn:
        """In the driver's process: become the program."""
        os.dup2(self._errors_write, 2)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)  # ignored by our interpreter or by us; exec would pass that on
        if self._gate is not None:
            self._gate[0].close()
            word, fds, _, _ = socket.recv_fds(self._gate[1], 16, 1)
            if not word:
                os._exit(0)  # its turn never came
            if fds:
                self._link = int(word)
                self._mountpoint = f"/dev/fd/{self._link}"
                if fds[0] != self._link:
                    os.dup2(fds[0], self._link)  # over whatever is there: exec closes all the rest
        if self._listener is None and self._link is not None:
            os.set_inheritable(self._link, True)
        arguments = _arguments(self._start, self._mountpoint)
        program = arguments[0]
        try:
            os.execvpe(program, arguments, self._environment)  # noqa: S606 - a shell is what is not wanted
        except OSError as exc:
            os.write(2, f"{program}: {os.strerror(exc.errno or 0)}\n".encode())
        os._exit(127)

    def started(self) -> None:
        """In init, after the fork."""
        os.close(self._errors_write)
        os.set_blocking(self._errors, False)
        if self._gate is not None:
            self._gate[1].close()
            self._send({"t": "warm"})
        self._serves_at_once()

    def _serves_at_once(self) -> None:
        if self._listener is None and self._link is not None:
            os.close(self._link)  # the program has inherited it
            self._link = None
            self._send({"t": "ready", "services": [], "mount_options": {}})

    def register(self, poll: select.poll) -> None:
        """Say what is waited for."""
        self._poll = poll
        poll.register(self._errors, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        if self._listener is not None:
            poll.register(self._listener, select.POLLIN)

    def timeout(self) -> float:
        """Seconds until there is something to do without an event."""
        return max(0.0, self._next_beat - time.monotonic())

    def serve(self, ready: set[int]) -> None:
        """Do what is due. Nothing here may wait for the program."""
        if self._errors in ready:
            self._pass_errors()
        if self._listener is not None and self._listener.fileno() in ready:
            self._serve_standin(self._listener)
        if self._control.fileno() in ready:
            self._read_control()
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + self._beat
            # Nothing is known of a foreign program's loop: requests that it leaves unanswered tell instead.
            self._send({"t": "heartbeat", "loop_age": 0.0})

    def ended(self, status: int) -> None:
        """All of the program's processes are gone."""
        self._pass_errors()
        if self._link is not None:
            code = os.waitstatus_to_exitcode(status)
            how = f"exited with status {code}" if code >= 0 else f"was ended by signal {-code}"
            last = self._last_line.decode("utf-8", "replace").strip()
            said = f"; it said: {last}" if last else ""
            name = os.path.basename(shlex.split(self._start["driver"]["command"])[0])
            self._send({"t": "failed", "error": f"{name} {how} before it mounted{said}"})

    def _pass_errors(self) -> None:
        for _ in range(_MAX_CHUNKS):  # a program that never stops talking must not keep us from the rest
            try:
                data = os.read(self._errors, 65536)
            except BlockingIOError:
                return
            if not data:
                if self._poll is not None:
                    self._poll.unregister(self._errors)
                    self._poll = None
                return
            # What libfuse says as root at its end: the mount is not its own, and there is nothing to be done about it.
            expected = f"fuse: failed to unmount {self._mountpoint}: {os.strerror(errno.EPERM)}\n"
            data = data.replace(expected.encode(), b"")
            tail = (self._last_line + data).rstrip(b"\n")
            self._last_line = tail.rpartition(b"\n")[2][-_MAX_LINE:] + (b"\n" if data.endswith(b"\n") else b"")
            try:
                os.write(2, data)
            except OSError:
                pass  # nobody reads our log any more

    def _read_control(self) -> None:
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        fds: list[int] = []
        try:
            packet, fds, _, _ = socket.recv_fds(self._control, _MAX_REQUEST, _MAX_FDS, flags)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            os._exit(1)  # the supervisor is gone, and with us everything in here
        try:
            message = json.loads(packet)
            word = message.get("t")
        except (ValueError, AttributeError):
            message, word = {}, None
        if self._gate is not None:
            if word == "take_over" and fds:
                self._open_gate(self._gate[0], fds.pop(0))
            elif word == "stop":
                os._exit(0)  # it has served nothing
        for fd in fds:
            os.close(fd)
        # The shim has closed its end: the program sees that and finishes what it has in memory (fuse-zip writes its
        # archive now), with libfuse's signal handlers already taken away, so that a SIGTERM would cut it off.
        # The supervisor sends one when its patience ends, and asks for one before the link is closed.
        if word == "stop" and self._link is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        elif word == "stop" and message.get("linked"):
            self.end_by_signal = True

    def _open_gate(self, gate: socket.socket, link: int) -> None:
        self._gate, self._link = None, link
        number = b"%d" % link  # the same in both processes, as if it had been inherited
        if self._listener is None:
            self._mountpoint = f"/dev/fd/{link}"
        try:
            socket.send_fds(gate, [number], [link] if self._listener is None else [])
        except OSError:
            pass  # it has just ended, and we shall hear of that
        gate.close()
        self._serves_at_once()

    def _serve_standin(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_STANDIN_TIMEOUT)
            try:
                options = json.loads(connection.recv(_MAX_REQUEST))
                if not isinstance(options, dict):
                    return
                if self._link is None:
                    connection.send(b"taken")
                    return
                socket.send_fds(connection, [b"link"], [self._link])
                # Only when the stand-in says that the program has it; until then it may have to be handed out again.
                if connection.recv(16) != b"done":
                    return
            except (OSError, ValueError):
                return
        os.close(self._link)
        self._link = None
        self._send({"t": "ready", "services": [], "mount_options": options})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass  # a full socket loses a heartbeat; a closed one ends us where it is read


def named_paths(start: dict[str, Any]) -> list[str]:
    """The absolute paths in a program's command and in a driver's options: what it works with, as with its source."""
    words = shlex.split(start["driver"].get("command") or "")
    words += [value for value in start["options"].values() if isinstance(value, str)]
    return [path for word in words for path in re.findall(r"(?:^|[=:,])(/[^:,]*)", word)]


def _arguments(start: dict[str, Any], mountpoint: str) -> list[str]:
    values = {key: _text(value) for key, value in start["options"].items()}
    values["source"] = start["source"] or ""
    values["mountpoint"] = mountpoint
    # All values at once, so that braces inside one are left alone.
    placeholder = re.compile("|".join(re.escape("{" + key + "}") for key in values))
    words = shlex.split(start["driver"]["command"])
    return [placeholder.sub(lambda match: values[match[0][1:-1]], word) for word in words]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _private_room(limits: dict[str, Any], kept_paths: list[str]) -> str | None:
    """A small private filesystem with an empty `mnt`, which belongs to the program's user."""
    kept = [os.path.abspath(path) + "/" for path in kept_paths]
    for cover in _COVERS:
        if not os.path.isdir(cover) or any(path.startswith(cover + "/") for path in kept):
            continue
        try:
            sys_.mount("udf", cover, "tmpfs", sys_.MS_NOSUID | sys_.MS_NODEV, "size=256k,mode=0755")
        except OSError:
            continue
        for name in ("mnt", "bin"):
            os.mkdir(os.path.join(cover, name), 0o755)
        os.chown(os.path.join(cover, "mnt"), int(limits["uid"]), int(limits["gid"]))
        return cover
    return None


def _listen(path: str, limits: dict[str, Any]) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    os.chown(path, int(limits["uid"]), int(limits["gid"]))
    os.chmod(path, 0o600)
    listener.listen(4)
    return listener


def _cover_fusermount(room: str) -> None:
    with open(STANDIN) as file:
        text = file.read()
    standin = os.path.join(room, "bin", "fusermount3")
    with open(standin, "w") as file:
        file.write(f"#!{sys.executable} -IS\n{text}\n\nsys.exit(main({os.path.join(room, 'link')!r}))\n")
    os.chmod(standin, 0o755)  # noqa: S103 - the driver's user runs it
    os.symlink("fusermount3", os.path.join(room, "bin", "fusermount"))
    # What libfuse calls is a fixed path, usually a link to one file; the file itself is covered.
    for target in {
        os.path.realpath(path)
        for directory in _FUSERMOUNT_DIRECTORIES
        for name in _FUSERMOUNTS
        if os.path.exists(path := os.path.join(directory, name))
    }:
        sys_.mount(standin, target, None, sys_.MS_BIND)


def _cover_device() -> None:
    # libfuse gives up when it cannot open the device, which not every user may; and no driver needs the real one.
    if os.path.exists("/dev/fuse"):
        sys_.mount(os.devnull, "/dev/fuse", None, sys_.MS_BIND)
