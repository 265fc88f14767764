"""What a memfs may use: bytes and inodes.

Owns the two counters and nothing else; the arena (pages), the tree (inodes, names) and the attributes (symlink
targets, xattrs) draw on them. The sum never overshoots the limit: `take` refuses before anything is changed.
"""

from __future__ import annotations

import errno

from pyfuse3 import FUSEError


class Space:
    """The limits of one filesystem and what is left of them."""

    __slots__ = ("inodes", "inodes_left", "left", "size")

    def __init__(self, size: int, inodes: int) -> None:
        self.size = size
        self.left = size
        self.inodes = inodes
        self.inodes_left = inodes

    def take(self, count: int) -> None:
        """Take *count* bytes, or raise ENOSPC and take none; a negative count gives back."""
        if count > self.left:
            raise FUSEError(errno.ENOSPC)
        self.left -= count

    def require_inode(self, count: int = 0) -> None:
        """Raise ENOSPC unless there are one inode and *count* bytes; they are taken once the change is committed.

        A further hard link takes an inode too, as on tmpfs: names cost memory.
        """
        if self.inodes_left <= 0 or count > self.left:
            raise FUSEError(errno.ENOSPC)

    def take_inode(self, count: int = 0) -> None:
        """Take one inode and *count* bytes that `require_inode` has found."""
        self.inodes_left -= 1
        self.left -= count

    def give_inode(self) -> None:
        """Give one inode back."""
        self.inodes_left += 1
