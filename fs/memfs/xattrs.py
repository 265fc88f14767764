"""Extended attributes of a node, with the rules of the access control lists among them.

Owns which names exist, their bounds and what they cost of the space. Who may do what is checked by the kernel
(default_permissions) before a request comes; the mode bits that go with an access list are changed here.
"""

from __future__ import annotations

import errno
import stat
import time

from pyfuse3 import ENOATTR, FUSEError

from udf import Journal

from . import acl, records
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


def put(journal: Journal, space: Space, node: Node, name: bytes, value: bytes) -> None:
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
    _commit(journal, space, node, name, kept, mode)


def remove(journal: Journal, space: Space, node: Node, name: bytes) -> None:
    """Remove a value, or raise ENODATA; a list that is not there may be removed, as on other filesystems."""
    _check_name(name)
    if node.xattrs is None or name not in node.xattrs:
        if name in _ACLS:
            return
        raise FUSEError(ENOATTR)
    _commit(journal, space, node, name, None, node.mode)


def drop_capability(journal: Journal, space: Space, node: Node) -> None:
    """Forget the file's capabilities, as every change of its contents must."""
    if node.xattrs is not None and CAPABILITY in node.xattrs:
        _commit(journal, space, node, CAPABILITY, None, node.mode)


def changed_list(node: Node, mode: int) -> bytes | None:
    """Return the access list that a chmod gives to a node that has one; it is as long as the one before."""
    value = node.xattrs.get(acl.ACCESS) if node.xattrs is not None else None
    return None if value is None else acl.chmod(value, mode)


def record(node: Node, name: bytes, value: bytes | None, mode: int, now: int) -> bytes:
    """Return the record that sets a value, or removes it, with the mode that goes with it."""
    head = records.xattr.pack(records.XATTR, value is not None, len(name), mode, node.ino, now)
    return head + name + (value or b"")


def _check_name(name: bytes) -> None:
    if name in _ACLS:
        return
    if not name.startswith(_NAMESPACES):
        raise FUSEError(errno.EOPNOTSUPP)
    if name in _NAMESPACES:
        raise FUSEError(errno.EINVAL)
    if len(name) > NAME_MAX:
        raise FUSEError(errno.ERANGE)


def _commit(journal: Journal, space: Space, node: Node, name: bytes, value: bytes | None, mode: int) -> None:
    """Put or drop one value and set the mode; raises before it changes anything."""
    if value is not None:
        _require(space, node, name, value)
    now = time.time_ns()
    journal.append(record(node, name, value, mode, now), frees=value is None)
    apply(space, node, name, value)
    node.mode = mode
    node.ctime = now


def _require(space: Space, node: Node, name: bytes, value: bytes) -> None:
    xattrs = node.xattrs or {}
    old = xattrs.get(name)
    if old is None and sum(len(key) + 1 for key in xattrs) + len(name) + 1 > LIST_MAX:
        raise FUSEError(errno.ENOSPC)
    if len(name) + len(value) - (0 if old is None else len(name) + len(old)) > space.left:
        raise FUSEError(errno.ENOSPC)


def apply(space: Space, node: Node, name: bytes, value: bytes | None) -> None:
    """Put or drop one value with its account, as a committed record says."""
    xattrs = node.xattrs if node.xattrs is not None else {}
    old = xattrs.get(name)
    before = 0 if old is None else len(name) + len(old)
    if value is None:
        space.take(-before)
        xattrs.pop(name, None)
    else:
        space.take(len(name) + len(value) - before)
        xattrs[name] = value
    node.xattrs = xattrs or None
