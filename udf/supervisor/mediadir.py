"""The directory below which volumes are mounted by themselves, and the directories in it that we made.

Owns: making and removing them. Must never: remove one that it did not make, or one with something in it; step out of
the directory, whatever a volume is called; follow a link; or touch what is mounted there.
Called by: daemon.py, automount.py.

What was made is written into a file beside it, so that a daemon that was killed leaves no directories for ever.
"""

from __future__ import annotations

import grp
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import trio

from udf.errors import InternalError, UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor import catalog, sockets

MEDIA = "media"
GROUP = "udf"
RECORD = ".udf-made"
MAX_RECORD = 64 * 1024
MAX_SAME = 1000  # volumes with one label

log = logging.getLogger("udf.automount")
T = TypeVar("T")


class MediaDirectory:
    """One such directory. What is asynchronous works in a thread: it may lie on something slow."""

    def __init__(self, path: Path, made_here: bool, group: int | None, lock: sockets.Lock) -> None:
        self.path = path
        self.group = group  # whose members use what is mounted there
        self._made_here = made_here
        self._made: list[str] = []
        self._lock = lock
        self._turn = trio.Lock()  # one thread at a time has the record

    @classmethod
    def take(cls, home: Path, chosen: str | None) -> MediaDirectory:
        """Have `home`/media, which goes with us, or the one that is chosen. UserError if it cannot be used.

        Root's own one is for the members of a group, if there is that group, and of a user for that user alone.
        """
        path = Path(chosen) if chosen else home / MEDIA
        made_here = not os.path.lexists(path) or not chosen
        group = _group() if os.geteuid() == 0 else None
        try:
            if not os.path.lexists(path):
                sockets.make_directory(path)
                if group is not None:
                    os.chown(path, -1, group)
                    os.chmod(path, 0o750)  # noqa: S103 - its members, and nobody else
                elif os.geteuid() != 0:
                    os.chmod(path, 0o700)
            path = Path(os.path.realpath(path))
            problem = _distrust(path)
            if problem is not None:
                raise UserError(f"nothing can be mounted below {path}: {problem}")
            lock = sockets.Lock.take(path / (RECORD + ".lock"))
        except OSError as exc:
            raise UserError(f"nothing can be mounted below {path}: {exc.strerror}") from None
        if lock is None:
            raise UserError(f"another daemon mounts below {path}: give --automount a directory of its own")
        return cls(path, made_here, group, lock)

    async def clean(self) -> None:
        """Take away what a killed daemon has left, when nothing is mounted there any more."""
        await self._work(self._clean)

    def _clean(self) -> None:
        for name in self._read():
            self._remove(name)
        self._write()

    async def make(self, name: str) -> Path:
        """A new directory of this name, or with a number behind it if there is something. UserError."""
        return await self._work(lambda: self._make(name))

    def _make(self, base: str) -> Path:
        if not base or "/" in base or "\0" in base or base.startswith("."):
            raise UserError(f"{base[:80]!r} cannot be the name of a directory")
        for number in range(1, MAX_SAME):
            name = base if number == 1 else f"{base}-{number}"
            try:
                os.mkdir(self.path / name, 0o755)
            except FileExistsError:
                continue
            self._made.append(name)
            self._write()
            return self.path / name
        raise UserError(f"there are {MAX_SAME} directories called {base} in {self.path}: take some away")

    async def remove(self, path: Path) -> None:
        """Take one away that was made; one with something in it stays."""
        await self._work(lambda: self._remove(path.name))

    def _remove(self, name: str) -> None:
        path = self.path / name
        try:
            # A mount that is there still is not ours any more, and rmdir would ask it nothing and refuse.
            if find_mount(str(path)) is None:
                os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            log.warning("%s cannot be removed: %s", path, exc.strerror)
        if name in self._made:
            self._made.remove(name)
            self._write()

    def leave(self) -> None:
        """Leave nothing of ours; for the end of the daemon."""
        try:
            for name in list(self._made):
                self._remove(name)
        finally:
            self._lock.release()
            if self._made_here:
                with suppress(OSError):
                    os.rmdir(self.path)

    async def _work(self, work: Callable[[], T]) -> T:
        # What is begun is finished, in bounded time: a directory that is made is known to be ours.
        try:
            with trio.CancelScope(shield=True):
                async with self._turn:
                    return await catalog.in_thread(work, str(self.path))
        except OSError as exc:
            raise UserError(f"{exc.filename or self.path}: {exc.strerror}") from exc
        raise InternalError("nobody cancels this scope")

    # ---- what was made

    def _read(self) -> list[str]:
        try:
            with open(self.path / RECORD, encoding="utf-8", errors="replace") as file:
                text = file.read(MAX_RECORD)
        except FileNotFoundError:
            return []
        return [name for name in text.splitlines() if name and "/" not in name and not name.startswith(".")]

    def _write(self) -> None:
        record = self.path / RECORD
        if not self._made:
            record.unlink(missing_ok=True)
            return
        new = record.with_suffix(".new")
        new.write_text("".join(f"{name}\n" for name in self._made), encoding="utf-8")
        new.replace(record)


def _distrust(path: Path) -> str | None:
    """Why somebody else could put something in our way there."""
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        return "it is no directory"
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to uid {status.st_uid}"
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        return "it can be written by others: chmod go-w"
    return None


def _group() -> int | None:
    with suppress(KeyError):
        return grp.getgrnam(GROUP).gr_gid
    return None
