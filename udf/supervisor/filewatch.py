"""Being told when files in some directories change: inotify.

Owns: the one descriptor, its watches, and directories that are not there yet (their nearest parent is watched).
Must never: say what has changed; who is told looks again. Called by: offers.py.

Watching only makes us quick. What inotify does not tell (a network filesystem, a full queue) is found by the slow look.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path

import trio

MAX_WATCHES = 1000
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_IN_ATTRIB, _IN_CLOSE_WRITE, _IN_MOVED_FROM, _IN_MOVED_TO = 0x4, 0x8, 0x40, 0x80
_IN_CREATE, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF, _IN_ONLYDIR = 0x100, 0x200, 0x400, 0x800, 0x01000000
_IN_IGNORED = 0x8000
_MASK = (
    _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF
    | _IN_MOVE_SELF | _IN_ONLYDIR
)  # fmt: skip
_PARENT_MASK = _IN_CREATE | _IN_MOVED_TO | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ONLYDIR
_BUFFER = 64 * 1024
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Watches directories. Use it as a context manager; `changed` waits for the next change in any of them."""

    def __init__(self) -> None:
        # Without inotify (its instances are few per user) there is only the slow look.
        self._fd: int = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        self._watches: dict[str, int] = {}
        self._changing = threading.Lock()
        self._awaited: dict[int, str] = {}  # of a parent's watch: the only name in it that matters

    def __enter__(self) -> FileWatch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def watch(self, directories: Iterable[Path]) -> None:
        """Watch these, and nothing else from now on. One that is not there is watched for by its nearest parent.

        It touches the paths, so it belongs into a worker thread; one call at a time.
        """
        with self._changing:
            self._watch(directories)

    def _watch(self, directories: Iterable[Path]) -> None:
        wanted = dict(_nearest(each) for each in list(directories)[:MAX_WATCHES])
        if self._fd < 0:
            return
        for path in [path for path in self._watches if path not in wanted]:
            number = self._watches.pop(path)
            self._awaited.pop(number, None)
            _libc.inotify_rm_watch(self._fd, number)
        for path, awaited in wanted.items():
            # Added again each time: the directory may be another one by now, and for the same one that changes nothing.
            mask = _PARENT_MASK if awaited else _MASK
            number = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
            self._awaited.pop(self._watches.pop(path, -1), None)
            if number >= 0:
                self._watches[path] = number
                if awaited:
                    self._awaited[number] = awaited

    async def changed(self) -> None:
        """Return when something has changed since the last call."""
        if self._fd < 0:
            await trio.sleep_forever()
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                data = os.read(self._fd, _BUFFER)
            except OSError as exc:
                if exc.errno not in (errno.EAGAIN, errno.EINTR):
                    raise
                continue
            if self._matters(data):
                return

    def _matters(self, data: bytes) -> bool:
        offset = 0
        while offset + _EVENT.size <= len(data):
            number, mask, _, length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size
            name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
            offset += length
            if not mask & _IN_IGNORED and self._awaited.get(number, name) == name:
                return True
        return False


def _nearest(path: Path) -> tuple[str, str]:
    """The path itself, or the nearest parent that there is with the name to wait for in it."""
    awaited = ""
    for each in (path, *path.parents):
        if each.is_dir():
            return str(each), awaited
        awaited = each.name
    return "/", awaited
