"""What a program sees when a driver lacks a verb.

Owns: the one table of those errors. Called by: paths.py.
"""

from __future__ import annotations

import errno
import os

from udf.driver.fs import MUTATIONS

# As the man pages of the system calls say for filesystems that lack the feature. ENOSYS is for those where the kernel
# then stops asking and does the right thing itself: fsync and flush succeed, extended attributes are "not supported".
_ERRORS = {
    "write": errno.EACCES,
    "create": errno.EACCES,
    "mkdir": errno.EPERM,
    "remove": errno.EPERM,
    "rename": errno.EXDEV,  # mv(1) then copies and removes
    "truncate": errno.EOPNOTSUPP,
    "symlink": errno.EPERM,
    "link": errno.EPERM,
    "readlink": errno.EINVAL,
    "setattr": errno.EOPNOTSUPP,
    "fsync": errno.ENOSYS,
    "getxattr": errno.ENOSYS,
    "setxattr": errno.ENOSYS,
    "listxattr": errno.ENOSYS,
    "removexattr": errno.ENOSYS,
}


class MissingVerbs:
    """The verbs that one driver lacks."""

    def __init__(self, verbs: frozenset[str]) -> None:
        self.read_only = verbs.isdisjoint(MUTATIONS)
        self._errors = {verb: number for verb, number in _ERRORS.items() if verb not in verbs}
        if self.read_only:
            self._errors.update(dict.fromkeys(MUTATIONS, errno.EROFS))

    def check(self, verb: str) -> None:
        """OSError unless the driver has the verb."""
        number = self._errors.get(verb)
        if number is not None:
            raise OSError(number, os.strerror(number))
