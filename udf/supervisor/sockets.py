"""Where the control sockets are, and who may own one: run-time directory, locks, binding, clearing away dead ones.

Owns: <rundir>/io.udf.Supervisor (the daemon's), <rundir>/mounts/<pid>.sock (private supervisors'), <rundir>/locks, and
which directory a daemon has for its devices.
Must never: import trio or msgspec (the command line reads this file), or remove a socket that somebody listens on.
Called by: client.py, daemon.py, private.py, registry.py.

A lock, not a connection attempt, decides who lives: the kernel drops it with its holder, however that ends, so there
is no moment at which two daemons can both find "nobody there".
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from udf.errors import UserError

INTERFACE = "io.udf.Supervisor"
ROOT_RUNDIR = Path("/run/udf")
_MAX_LOCK_FILE = 8192
_SOCKET_PATH_LIMIT = 107  # sun_path without its NUL


def rundir() -> Path:
    """This user's directory for sockets; it need not exist yet."""
    uid = os.geteuid()
    if uid == 0:
        return ROOT_RUNDIR
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and _is_usable(runtime):
        return Path(runtime) / "udf"
    session = Path(f"/run/user/{uid}")
    return session / "udf" if session.is_dir() else Path(f"/tmp/udf-{uid}")  # noqa: S108 - checked by make_directory


def _is_usable(runtime: str) -> bool:
    """Whether we may make things in it; after `su`, which keeps the environment, it is somebody else's."""
    return os.access(runtime if os.path.exists(runtime) else os.path.dirname(runtime), os.W_OK | os.X_OK)


def daemon_socket() -> Path:
    """Where this user's daemon listens unless told otherwise."""
    return rundir() / INTERFACE


def home_of(control: Path) -> Path:
    """The directory in which a daemon keeps what belongs to its devices (R), by its control socket.

    It is the socket's own directory, unless others can write there: in /tmp names such as `dev` are anybody's.
    """
    found = os.stat(control.parent)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        return control.with_name(control.name + ".d")
    return control.parent


def lock_home(home: Path) -> Lock:
    """Make sure that no other daemon has the same one. UserError if one does."""
    make_directory(home)
    lock = Lock.take(home / "devices.lock")
    if lock is None:
        raise UserError(f"another daemon keeps its devices in {home}: give --socket a directory of its own")
    return lock


def private_directory() -> Path:
    """Where the private supervisors of `udf mount` listen."""
    return rundir() / "mounts"


def make_directory(path: Path) -> None:
    """Create a directory that others can read and only we can write, or check that it is such a one."""
    with suppress(FileExistsError):
        os.makedirs(path, 0o755)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is not a directory: remove it, sockets are kept there")
    if found.st_uid not in (os.geteuid(), 0) or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
        raise UserError(f"{path} can be written by others: change its owner and mode, or choose another --socket")


class Lock:
    """An exclusive lock on a file, dropped by the kernel when the process ends."""

    def __init__(self, path: Path, fd: int, left: bytes) -> None:
        self._path = path
        self._fd = fd
        self.left = left  # the note of a holder before us that ended without releasing it

    @classmethod
    def take(cls, path: Path, note: bytes = b"") -> Lock | None:
        """The lock, or None when another process (or another part of this one) holds it.

        The file says who has it, and `note`.
        """
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before us may have removed the name between our open and our lock.
                if os.fstat(fd).st_ino == os.stat(path).st_ino:
                    return cls._own(path, fd, note)
            except BlockingIOError:
                os.close(fd)
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    @classmethod
    def _own(cls, path: Path, fd: int, note: bytes) -> Lock:
        left = os.pread(fd, _MAX_LOCK_FILE, 0).partition(b"\n")[2]
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid() + note, 0)
        return cls(path, fd, left)

    @staticmethod
    def holder(path: Path) -> str:
        """The process id that the holder wrote, for a sentence."""
        try:
            return path.read_text(errors="replace").partition("\n")[0][:20] or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        """Remove the file while it is still locked, then let go."""
        if self._fd >= 0:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1


def lock_mountpoint(mountpoint: str) -> Lock | None:
    """Claim a mountpoint against every other supervisor of this user."""
    directory = rundir() / "locks"
    make_directory(directory)
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32] + ".lock"
    return Lock.take(directory / name, os.fsencode(mountpoint))


def abandoned_mountpoints() -> list[tuple[str, Lock]]:
    """Mountpoints of this user's supervisors that were killed, each with its lock, which is the caller's to release."""
    directory = rundir() / "locks"
    found = []
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for name in sorted(os.listdir(directory)):
            try:
                lock = Lock.take(directory / name) if name.endswith(".lock") else None
            except OSError:
                continue
            if lock is not None and lock.left.startswith(b"/"):
                found.append((os.fsdecode(lock.left), lock))
            elif lock is not None:
                lock.release()
    return found


class ControlSocket:
    """A bound, listening control socket with its lock."""

    def __init__(self, path: Path, sock: socket.socket, lock: Lock) -> None:
        self.path = path
        self.sock = sock
        self._lock = lock

    @classmethod
    def bind(cls, path: Path, *, mode: int = 0o600) -> ControlSocket:
        """Listen at `path`; UserError when another supervisor does. What a dead one left is replaced.

        The socket gets its name only when it listens, so that nobody can take a new one for a dead one.
        """
        if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT - 4:
            raise UserError(f"{path} is too long for a socket: choose a path of at most {_SOCKET_PATH_LIMIT - 4} bytes")
        try:
            make_directory(path.parent)
            lock_path = path.with_name(path.name + ".lock")
            lock = Lock.take(lock_path)
        except OSError as exc:
            raise UserError(f"cannot listen on {path}: {exc.strerror}") from exc
        if lock is None:
            raise UserError(f"a supervisor (process {Lock.holder(lock_path)}) already listens on {path}")
        try:
            return cls(path, _listen(path, mode), lock)
        except OSError as exc:
            lock.release()
            raise UserError(f"cannot listen on {path}: {exc.strerror}") from exc
        except BaseException:
            lock.release()
            raise

    def remove(self) -> None:
        """Stop listening and remove the name."""
        self.sock.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._lock.release()


def _listen(path: Path, mode: int) -> socket.socket:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISSOCK(found.st_mode):
            raise UserError(f"{path} exists and is not a socket: remove it or choose another --socket")
    temporary = path.with_name(path.name + ".new")
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o777)  # nobody can connect between bind and chmod
    try:
        sock.bind(os.fspath(temporary))
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(umask)
    try:
        os.chmod(temporary, mode)
        sock.listen(128)
        sock.setblocking(False)
        os.rename(temporary, path)
    except BaseException:
        sock.close()
        os.unlink(temporary)
        raise
    return sock


def private_sockets() -> list[Path]:
    """The sockets of living private supervisors; those of dead ones are removed with what lies beside them."""
    directory = private_directory()
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    living = []
    for name in names:
        if not name.endswith(".sock"):
            continue
        path = directory / name
        lock_path = directory / (name + ".lock")
        try:
            lock = Lock.take(lock_path)
        except OSError:
            continue  # another user's
        if lock is None:
            if path.is_socket():
                living.append(path)
            continue
        with suppress(FileNotFoundError):
            os.unlink(path)
        with suppress(FileNotFoundError):
            os.unlink(directory / (name.removesuffix(".sock") + ".log"))
        lock.release()
    return living
