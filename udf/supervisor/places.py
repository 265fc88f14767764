"""The directories below R/dev in which what devices serve is found, one for each instance, and its socket in R/block.

Owns: making and removing them, and who has which. Must never: look into one (a mount may lie on it), or take away what
another supervisor uses. Called by: registry.py, daemon.py.

A place is locked as a mountpoint is, so it is the kernel that says whether who made it still lives.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from udf.errors import UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor import sockets
from udf.supervisor.plan import BusyError
from udf.supervisor.terminals import LINK_NAME

BY_ID = "by-id"  # the one directory in R/dev that is no place: names that follow the device (devices.py)

log = logging.getLogger("udf.places")


class Place:
    """One directory that is ours."""

    def __init__(self, path: Path, lock: sockets.Lock) -> None:
        self.path = path
        self._lock = lock

    def give_back(self) -> None:
        """Remove it; what was in it is gone already. Harmless when that has been done."""
        _remove(self.path)
        self._lock.release()


class Places:
    """All places of one supervisor. `home` is its own directory (R)."""

    def __init__(self, home: Path) -> None:
        # Mounts are known by their real paths, and this one is ours and local.
        self._home = Path(os.path.realpath(home))

    def path(self, name: str) -> Path:
        """Where the instance of this name is found."""
        return self._home / "dev" / name

    def socket(self, name: str) -> Path:
        """Where the block devices of this name are served."""
        return self._home / "block" / f"{name}.sock"

    def take(self, name: str, owner: int) -> Place:
        """Make the directory, for this user to mount on. BusyError when somebody has it."""
        path = self.path(name)
        try:
            sockets.make_directory(path.parent)
            sockets.make_directory(self.socket(name).parent)
            lock = sockets.lock_mountpoint(str(path))
            if lock is None:
                raise BusyError(str(path), f"{path} is used by another udf: choose another name")
            place = Place(path, lock)
            try:
                if find_mount(str(path)) is not None:
                    raise BusyError(str(path), f"{path} is a mountpoint already: unmount it, or choose another name")
                _remove(path)  # of a supervisor that was killed
                path.mkdir(0o755)
                if owner != os.geteuid():
                    os.chown(path, owner, -1)
            except BaseException:
                lock.release()
                raise
        except OSError as exc:
            raise UserError(f"{path} cannot be made: {exc.strerror}") from exc
        return place

    def sweep(self) -> None:
        """Remove what supervisors that were killed have left; their mounts are gone already."""
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            for name in sorted(set(os.listdir(self._home / "dev")) - {BY_ID}):
                path = self.path(name)
                lock = sockets.lock_mountpoint(str(path))
                if lock is not None:
                    if find_mount(str(path)) is None:
                        _remove(path)
                        with suppress(OSError):
                            self.socket(name).unlink()
                    lock.release()


def _remove(path: Path) -> None:
    # rmdir looks at the directory that is covered, if one is, and never asks a filesystem that is mounted there.
    try:
        if find_mount(str(path)) is None:
            with suppress(FileNotFoundError, NotADirectoryError):
                (path / LINK_NAME).unlink()
        path.rmdir()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as exc:
        log.warning("%s cannot be removed: %s", path, exc.strerror)
