"""Notifications: from the driver, with its ids made the kernel's, to the kernel, from a thread of their own.

The loop must never write one: INVAL_INODE waits for pages that a READ in flight holds, INVAL_ENTRY for a directory
that a CREATE in flight has locked, and only the loop can answer those. The queue is bounded without losing an
invalidation: several of one node become one of the whole node, and when even that is too much every name is expired
at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from udf.fuse.device import (
    notify_delete,
    notify_inc_epoch,
    notify_inval_entry,
    notify_inval_inode,
    notify_poll,
    notify_retrieve,
    notify_store,
)
from udf.fuse.flags import EntryExpire
from udf.fuse.opcodes import STILL_WORKING, Notify
from udf.fuse.structs import (
    NOTIFY_DELETE_OUT,
    NOTIFY_INVAL_ENTRY_OUT,
    NOTIFY_INVAL_INODE_OUT,
    NOTIFY_POLL_WAKEUP_OUT,
    NOTIFY_RETRIEVE_OUT,
    NOTIFY_STORE_OUT,
)
from udf.shim.patience import still_working

if TYPE_CHECKING:
    from udf.shim.service import Service

_LIMIT = 4096  # notifications waiting; nodes and names beyond it are merged
_POLLS = 1024  # wake-ups of pollers that are kept when everything is merged
_STORE_LIMIT = 4 << 20  # bytes of data waiting for the page cache; beyond it data is dropped and the range invalidated


class Notifier:
    """The queue and its thread. `close` ends the thread once it is not inside the kernel."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._condition = threading.Condition()
        self._waiting: dict[object, bytes] = {}
        self._stored = 0
        self._limit = _LIMIT
        self._closed = False
        self._in_hand = 0
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._thread.start()

    def from_driver(self, s: Service, code: int, body: memoryview) -> None:
        """Check one notification of the driver's, note what it changes, queue it."""
        s.counters.notifications += 1
        translate = _TRANSLATE.get(code)
        if translate is None:
            s.fault(0, "notification", f"a notification that drivers do not send (code {code})")
            return
        try:
            queued = translate(s, body)
        except ValueError as error:
            s.fault(0, "notification", f"a malformed notification (code {code}): {error}")
            return
        if queued is not None:
            self._put(*queued)

    def __len__(self) -> int:
        """Return how many notifications the kernel has not taken."""
        return len(self._waiting) + self._in_hand

    def invalidate(self, node_id: int, *, pages: bool = True) -> None:
        """Have the kernel forget the attributes of a node, and its pages."""
        if pages:
            self._put(("inode", node_id), notify_inval_inode(node_id))
        else:
            self._put(("attributes", node_id), notify_inval_inode(node_id, -1, 0))

    def expire(self, parent_id: int, name: bytes) -> None:
        """Have the kernel look a name up again when it is next used."""
        self._put(("entry", parent_id, name), notify_inval_entry(parent_id, name, expire_only=True))

    def expire_names(self) -> None:
        """The same for every name and every listing; a kernel that is older than 7.44 does not know how."""
        self._put("epoch", notify_inc_epoch())

    def _put(self, key: object, message: bytes) -> None:
        with self._condition:
            replaced = self._waiting.pop(key, b"")  # the new one belongs behind what came in between
            if len(replaced) > _STORE_BIG:
                self._stored -= len(replaced)
            size = len(message) if len(message) > _STORE_BIG else 0
            if len(self._waiting) >= self._limit or self._stored + size > _STORE_LIMIT:
                self._merge()
            self._stored += size
            self._waiting[key] = message
            self._condition.notify()

    def _merge(self) -> None:
        """Replace everything that waits by less that invalidates more."""
        keys = [key for key in self._waiting if isinstance(key, tuple)]
        polls = {key: self._waiting[key] for key in keys if key[0] == "poll"}
        nodes = {key[1] for key in keys if key[0] in ("inode", "attributes", "store")}
        self._waiting = {("inode", node): notify_inval_inode(node) for node in nodes}
        self._waiting.update(list(polls.items())[-_POLLS:])
        self._waiting["epoch"] = notify_inc_epoch()
        self._stored = 0
        self._limit = max(_LIMIT, 2 * len(self._waiting))  # many nodes stay many: no merging of them at each new one

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._waiting and not self._closed:
                    self._limit = _LIMIT
                    self._condition.wait()
                if self._closed:
                    return
                key = next(iter(self._waiting))
                message = self._waiting.pop(key)
                self._in_hand = 1
                if len(message) > _STORE_BIG:
                    self._stored = max(0, self._stored - len(message))
            try:
                os.write(self._device, message)
            except OSError:
                pass  # the kernel does not know the node or the name (ENOENT), or is too old for the code (EINVAL)
            self._in_hand = 0

    def close(self) -> None:
        """End the thread; what waits is dropped, because the mount is gone."""
        with self._condition:
            self._closed = True
            self._condition.notify()


_STORE_BIG = 1024
Queued = tuple[object, bytes] | None


def _exactly(body: memoryview, size: int) -> None:
    if len(body) != size:
        raise ValueError(f"{len(body)} bytes instead of {size}")


def _name(body: memoryview, start: int, length: int) -> bytes:
    name = bytes(body[start : start + length])
    if len(body) != start + length + 1 or body[-1] or not name or b"/" in name or b"\0" in name:
        raise ValueError("a bad name")
    return name


def _inval_inode(s: Service, body: memoryview) -> Queued:
    _exactly(body, NOTIFY_INVAL_INODE_OUT.size)
    driver_id, offset, _ = NOTIFY_INVAL_INODE_OUT.unpack_from(body)
    slot = s.nodes.by_driver(driver_id)
    if not slot:
        return None
    s.nodes.touch(slot)
    node = s.nodes.node_id(slot)
    if offset >= 0:
        return ("inode", node), notify_inval_inode(node)  # the whole file: two ranges of one node become one
    return ("attributes", node), notify_inval_inode(node, -1, 0)


def _inval_entry(s: Service, body: memoryview) -> Queued:
    if len(body) < NOTIFY_INVAL_ENTRY_OUT.size:
        raise ValueError("too short")
    driver_id, length, flags = NOTIFY_INVAL_ENTRY_OUT.unpack_from(body)
    name = _name(body, NOTIFY_INVAL_ENTRY_OUT.size, length)
    parent = s.nodes.by_driver(driver_id)
    if not parent:
        return None
    s.nodes.expire(parent, name)
    s.nodes.touch(parent)
    node = s.nodes.node_id(parent)
    expire = bool(flags & int(EntryExpire.EXPIRE_ONLY))
    return ("entry", node, name), notify_inval_entry(node, name, expire_only=expire)


def _delete(s: Service, body: memoryview) -> Queued:
    if len(body) < NOTIFY_DELETE_OUT.size:
        raise ValueError("too short")
    parent_id, child_id, length = NOTIFY_DELETE_OUT.unpack_from(body)
    name = _name(body, NOTIFY_DELETE_OUT.size, length)
    parent, child = s.nodes.by_driver(parent_id), s.nodes.by_driver(child_id)
    if not parent:
        return None
    s.nodes.expire(parent, name)
    s.nodes.touch(parent)
    node = s.nodes.node_id(parent)
    if not child:
        return ("entry", node, name), notify_inval_entry(node, name)
    return ("entry", node, name), notify_delete(node, s.nodes.node_id(child), name)


def _store(s: Service, body: memoryview) -> Queued:
    if len(body) < NOTIFY_STORE_OUT.size:
        raise ValueError("too short")
    driver_id, offset, size = NOTIFY_STORE_OUT.unpack_from(body)
    if len(body) != NOTIFY_STORE_OUT.size + size:
        raise ValueError("its data is not as long as it says")
    slot = s.nodes.by_driver(driver_id)
    if not slot:
        return None
    s.nodes.touch(slot)
    node = s.nodes.node_id(slot)
    return ("store", node, offset), notify_store(node, offset, body[NOTIFY_STORE_OUT.size :])


def _retrieve(s: Service, body: memoryview) -> Queued:
    _exactly(body, NOTIFY_RETRIEVE_OUT.size)
    notify_unique, driver_id, offset, size = NOTIFY_RETRIEVE_OUT.unpack_from(body)
    slot = s.nodes.by_driver(driver_id)
    if not slot:
        return None
    return ("retrieve", notify_unique), notify_retrieve(notify_unique, s.nodes.node_id(slot), offset, size)


def _poll(s: Service, body: memoryview) -> Queued:
    _exactly(body, NOTIFY_POLL_WAKEUP_OUT.size)
    (kernel_handle,) = NOTIFY_POLL_WAKEUP_OUT.unpack_from(body)
    return ("poll", kernel_handle), notify_poll(kernel_handle)


def _still_working(s: Service, body: memoryview) -> Queued:
    """Not the kernel's business: the driver works on requests of this opcode."""
    _exactly(body, 4)
    still_working(s, int.from_bytes(body, "little"))
    return None


_TRANSLATE: dict[int, Callable[[Service, memoryview], Queued]] = {
    Notify.POLL: _poll,
    Notify.INVAL_INODE: _inval_inode,
    Notify.INVAL_ENTRY: _inval_entry,
    Notify.STORE: _store,
    Notify.RETRIEVE: _retrieve,
    Notify.DELETE: _delete,
    STILL_WORKING: _still_working,
}
