"""A mount that is gone here and goes on elsewhere: in mount namespaces that have a copy of it.

Where mounts are private (in a container, in a chroot) each mount namespace that is made while the mount is there has a
copy that no unmount of ours reaches, and the kernel tells nobody of the end as long as there is one. Root's drivers
take such copies out of their namespaces; those of a user are locked there, so two mounts of a user would keep each
other for ever. Where mounts are shared, as systemd makes them, an unmount reaches all copies.

Owns: the look at the table of mounts, each time that it changes, for whether ours is still in it. Must never: touch a
path, or end a mount as long as a file is open on it. Called by: the loop, for users other than root.
"""

from __future__ import annotations

import os
import select
from time import monotonic
from typing import TYPE_CHECKING

from udf.fuse.mountinfo import find_mount

if TYPE_CHECKING:
    from udf.shim.service import Service

_TABLE = "/proc/self/mountinfo"
_UNTIL_TOLD = 0.2  # seconds in which the kernel would have told of the end, had this been the last of the mount


class Elsewhere:
    """Watches the table; `fd` is -1 if there is nothing to watch."""

    def __init__(self, service: Service, epoll: select.epoll) -> None:
        self._s = service
        self._number = b""  # the filesystem's, in the table
        self._since = 0.0
        self.fd = -1
        if os.geteuid() == 0:
            return
        mount = find_mount(service.config.mountpoint)
        if mount is None:
            return
        self._number = b"%d:%d" % mount.device
        if self._is_private():
            self.fd = os.open(_TABLE, os.O_RDONLY | os.O_CLOEXEC)
            epoll.register(self.fd, select.EPOLLPRI)  # the kernel says so after each change

    @property
    def is_gone(self) -> bool:
        """Whether it is not in our own namespace any more."""
        return self._since > 0.0

    def look(self) -> None:
        """The table has changed."""
        if not self._lines():
            self._since = self._since or monotonic()

    def is_over(self, now: float) -> bool:
        """Whether nobody here can use it any more."""
        return self.is_gone and now >= self._since + _UNTIL_TOLD and not len(self._s.handles)

    def _lines(self) -> list[list[bytes]]:
        with open(_TABLE, "rb") as table:
            rows = [line.split() for line in table]
        return [row for row in rows if row[2] == self._number]

    def _is_private(self) -> bool:
        return not any(field.startswith(b"shared:") for row in self._lines() for field in row[6 : row.index(b"-", 6)])
