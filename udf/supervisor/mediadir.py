"""The directory below which volumes are mounted by themselves, and the directories in it that we made.

Owns: making and removing them. Must never: remove one that it did not make, or one with something in it; step out of
the directory, whatever a volume is called; follow a link; or touch what is mounted there. Called by: automount.py.

What was made is written into a file beside it, so that a daemon that was killed leaves no directories for ever.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import trio

from udf.errors import InternalError, UserError
from udf.fuse.mountinfo import find_mount
from udf.supervisor import catalog, sockets

RECORD = ".udf-made"
MAX_RECORD = 64 * 1024
MAX_SAME = 1000  # volumes with one label

log = logging.getLogger("udf.automount")
T = TypeVar("T")


class MediaDirectory:
    """One such directory. Each method works in a thread: it may lie on something slow."""

    def __init__(self, path: Path, *, is_ours: bool) -> None:
        """`is_ours`: nobody else has anything to do with it, and it goes with us."""
        self._path = path
        self._made: list[str] = []
        self._is_ours = is_ours
        self._lock: sockets.Lock | None = None
        self._turn = trio.Lock()  # one thread at a time has the record

    async def open(self, group: int | None) -> None:
        """Have it: made if need be (for a group, if one is named), and rid of what a killed daemon has left."""
        await self._work(lambda: self._open(group))

    def _open(self, group: int | None) -> None:
        if not os.path.lexists(self._path):
            sockets.make_directory(self._path)
            self._is_ours = True
            if group is not None:
                os.chown(self._path, -1, group)
                os.chmod(self._path, 0o750)  # noqa: S103 - its members, and nobody else
            elif os.geteuid() != 0:
                os.chmod(self._path, 0o700)
        self._path = Path(os.path.realpath(self._path))
        sockets.make_directory(self._path)  # checks that nobody else can put anything in our way there
        self._lock = sockets.Lock.take(self._path / (RECORD + ".lock"))
        if self._lock is None:
            raise UserError(f"another daemon mounts below {self._path}: give --automount a directory of its own")
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
                os.mkdir(self._path / name, 0o755)
            except FileExistsError:
                continue
            self._made.append(name)
            self._write()
            return self._path / name
        raise UserError(f"there are {MAX_SAME} directories called {base} in {self._path}: take some away")

    async def remove(self, path: Path) -> None:
        """Take one away that was made; one with something in it stays."""
        await self._work(lambda: self._remove(path.name))

    def _remove(self, name: str) -> None:
        path = self._path / name
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

    async def close(self) -> None:
        """Leave nothing of ours."""
        await self._work(self._close)

    def _close(self) -> None:
        for name in list(self._made):
            self._remove(name)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._is_ours:
            with suppress(OSError):
                os.rmdir(self._path)

    async def _work(self, work: Callable[[], T]) -> T:
        # What is begun is finished, in bounded time: a directory that is made is known to be ours.
        try:
            with trio.CancelScope(shield=True):
                async with self._turn:
                    return await catalog.in_thread(work, str(self._path))
        except OSError as exc:
            raise UserError(f"{exc.filename or self._path}: {exc.strerror}") from exc
        raise InternalError("nobody cancels this scope")

    # ---- what was made

    def _read(self) -> list[str]:
        try:
            with open(self._path / RECORD, encoding="utf-8", errors="replace") as file:
                text = file.read(MAX_RECORD)
        except FileNotFoundError:
            return []
        return [name for name in text.splitlines() if name and "/" not in name and not name.startswith(".")]

    def _write(self) -> None:
        record = self._path / RECORD
        if not self._made:
            record.unlink(missing_ok=True)
            return
        new = record.with_suffix(".new")
        new.write_text("".join(f"{name}\n" for name in self._made), encoding="utf-8")
        new.replace(record)
