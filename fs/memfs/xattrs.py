"""Extended attributes of a node, with the rules of the access control lists among them.

Owns which names exist, their bounds and what they cost of the space. Who may do what is checked by the kernel
(default_permissions) before a request comes; the mode bits that go with an access list are changed here.
"""

from __future__ import annotations

import errno
import stat
import time

from pyfuse3 import ENOATTR, FUSEError

from . import acl
from .nodes import Node
from .space import Space

VALUE_MAX = 65536
LIST_MAX = 65536
NAME_MAX = 255
CAPABILITY = b"security.capability"
_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)


def get(node: Node, name: bytes) -> bytes:
    """Return a value, or raise ENODATA."""
    value = node.xattrs.get(name) if node.xattrs is not None else None
    if value is None:
        _check_name(name)
        raise FUSEError(ENOATTR)
    return value


def names(node: Node, privileged: bool) -> list[bytes]:
    """Return the names; those of trusted attributes exist for the privileged only."""
    if node.xattrs is None:
        return []
    return [name for name in node.xattrs if privileged or not name.startswith(b"trusted.")]


def put(space: Space, node: Node, name: bytes, value: bytes) -> None:
    """Set a value. An access list changes the mode, and is not kept when the mode says all of it."""
    _check_name(name)
    if len(value) > VALUE_MAX:
        raise FUSEError(errno.E2BIG)
    mode = node.mode
    kept: bytes | None = value
    if name in _ACLS:
        try:
            if name == acl.ACCESS:
                mode, kept = acl.set_access(value, mode)
            else:
                kept = acl.pack(acl.parse(value))
        except ValueError as error:
            raise FUSEError(errno.EINVAL) from error
        if stat.S_ISLNK(mode):
            raise FUSEError(errno.EOPNOTSUPP)
        if name == acl.DEFAULT and not node.is_directory:
            raise FUSEError(errno.EACCES)
    _store(space, node, name, kept)
    node.mode = mode
    node.ctime = time.time_ns()


def remove(space: Space, node: Node, name: bytes) -> None:
    """Remove a value, or raise ENODATA; a list that is not there may be removed, as on other filesystems."""
    _check_name(name)
    if node.xattrs is None or name not in node.xattrs:
        if name in _ACLS:
            return
        raise FUSEError(ENOATTR)
    _store(space, node, name, None)
    node.ctime = time.time_ns()


def chmod(node: Node, mode: int) -> None:
    """Set the permission bits of a node, and those of its access list where it has one."""
    node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
    if node.xattrs is not None and acl.ACCESS in node.xattrs:
        node.xattrs[acl.ACCESS] = acl.chmod(node.xattrs[acl.ACCESS], mode)  # as long as before


def drop_capability(space: Space, node: Node) -> None:
    """Forget the file's capabilities, as every change of its contents or owner must."""
    if node.xattrs is not None and CAPABILITY in node.xattrs:
        _store(space, node, CAPABILITY, None)


def _check_name(name: bytes) -> None:
    if name in _ACLS:
        return
    if not name.startswith(_NAMESPACES):
        raise FUSEError(errno.EOPNOTSUPP)
    if name in _NAMESPACES:
        raise FUSEError(errno.EINVAL)
    if len(name) > NAME_MAX:
        raise FUSEError(errno.ERANGE)


def _store(space: Space, node: Node, name: bytes, value: bytes | None) -> None:
    """Put or drop one value with its account; raises before it changes anything."""
    xattrs = node.xattrs if node.xattrs is not None else {}
    old = xattrs.get(name)
    before = 0 if old is None else len(name) + len(old)
    if value is None:
        space.take(-before)
        xattrs.pop(name, None)
    else:
        if old is None and sum(len(key) + 1 for key in xattrs) + len(name) + 1 > LIST_MAX:
            raise FUSEError(errno.ENOSPC)
        space.take(len(name) + len(value) - before)
        xattrs[name] = value
    node.xattrs = xattrs or None
