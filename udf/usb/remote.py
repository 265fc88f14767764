"""The devices of a USB/IP server, wherever it is.

Owns: which of a server's devices are present, under which key, and which of them we have imported. Must never: wait on
the server while somebody asks for devices(), or believe that a device has gone because a list lacks it: usbipd does not
list what is imported, so our own imports are present until their connection ends.
Called by: the supervisor, as a Bus.

Our own server tells what happens (operations.watch). Others have no events: they are listed every second, and a device
that is new is imported for a moment to read its descriptors.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import trio

from udf.errors import DeviceGone
from udf.usb import usbip
from udf.usb.bus import Bus, BusDevice
from udf.usb.operations import (
    Address,
    Description,
    ProtocolError,
    Watched,
    describe,
    import_device,
    list_devices,
    watch,
)
from udf.usb.operations import dial as _dial
from udf.usb.present import Identity, identity_of, key_of, listed, watched

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SLOWEST_POLL = 10.0  # seconds between two attempts at a server that cannot be reached
FIRST_RETRY = 0.1
WATCH_TIMEOUT = 3.0  # a server that neither answers nor hangs up does not know how to be watched
DESCRIBE_TIMEOUT = 5.0
AT_ONCE = 8  # devices that are being described
BACK_IN_LIST = 1.0  # seconds that usbipd may need to list a device again whose import has ended
RELEASED = 1.5  # seconds in which a device that we have let go of may still be called busy
RETRY_DESCRIBE = 5.0  # seconds until a device is asked again that could not be read
MAX_DEVICES = 1024


@dataclass(eq=False)
class _Import:
    """A connection of ours; our duplicate of it only sees its end."""

    key: str
    sock: socket.socket


@dataclass
class _Listing:
    """What polling knows: devices by how a list shows them."""

    keys: dict[Identity, str] = field(default_factory=dict)
    asked: set[Identity] = field(default_factory=set)  # being described: not listed meanwhile
    not_before: dict[Identity, float] = field(default_factory=dict)
    stays_until: dict[str, float] = field(default_factory=dict)  # by key: unlisted for a moment, and yet there


class UsbipBus(Bus):
    """A USB/IP server as a bus: "HOST", "HOST:PORT", or the path of a unix socket."""

    def __init__(self, address: str | Address, name: str = "") -> None:
        self._address = Address.parse(address) if isinstance(address, str) else address
        self.name = name or f"usbip:{self._address}"
        self._devices: dict[str, BusDevice] = {}
        self._imports: dict[int, _Import] = {}  # by descriptor
        self._released: dict[str, float] = {}  # when our last import of a device ended
        self._epoll: select.epoll | None = None
        self._changed: Callable[[], None] = lambda: None
        self._listing: _Listing | None = None  # None: the server is watched, or was not reached yet
        self._look = trio.Event()  # poll now
        self._arrivals = 0  # of a server that we poll
        self._life = -1  # of a server that we watch: how often it was another one
        self._said = ""  # the last complaint about the server
        self._limit = trio.Semaphore(AT_ONCE)

    # ---- Bus

    def devices(self) -> Mapping[str, BusDevice]:
        """What is present now."""
        return dict(self._devices)

    async def run(
        self, changed: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See Bus.run."""
        self._changed = changed
        self._epoll = select.epoll()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._see_ends)
                await self._follow_server(nursery, _Once(task_status))
        finally:
            for each in self._imports.values():
                each.sock.close()
            self._imports.clear()
            self._devices.clear()
            self._epoll.close()
            self._epoll = None

    async def open(self, key: str) -> socket.socket:
        """See Bus.open."""
        device = self._devices.get(key)
        if device is None:
            raise DeviceGone(f"the device {key} is not there any more")
        self._reap()
        if self._imported(key):
            raise OSError(errno.EBUSY, f"the device {device.busid} is in use")
        try:
            stream, record = await self._import(device)
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                self._look.set()
                raise DeviceGone(f"the device {device.busid} is not there any more") from exc
            raise
        except ProtocolError as exc:
            raise OSError(errno.EPROTO, str(exc)) from exc
        same = (record.devnum, record.vendor, record.product) == (device.devnum, device.vendor, device.product)
        if not same or key not in self._devices:
            await trio.aclose_forcefully(stream)
            self._look.set()
            raise DeviceGone(f"the device {device.busid} was replaced by another one")
        self._devices[key] = replace(self._devices[key], configuration=record.configuration)
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(True)
        self._keep(key, sock)
        return sock

    async def _import(self, device: BusDevice) -> tuple[trio.SocketStream, usbip.DeviceRecord]:
        """The server may take a moment to see that our import before this one has ended, and tells nobody when."""
        while True:
            try:
                return await import_device(self._address, device.busid)
            except OSError as exc:
                # usbipd resets a device that was let go, and calls it busy or broken until that is done.
                waits = exc.errno in (errno.EBUSY, errno.EIO)
                if not waits or trio.current_time() >= self._released.get(device.key, 0.0) + RELEASED:
                    raise
            await trio.sleep(RELEASED / 50)

    # ---- our imports

    def _keep(self, key: str, sock: socket.socket) -> None:
        if self._epoll is None:
            return  # the bus is not running: nobody asks what is present
        duplicate = sock.dup()
        self._imports[duplicate.fileno()] = _Import(key, duplicate)
        # Data that wait are no event here: only the peer's end is.
        self._epoll.register(duplicate.fileno(), select.EPOLLRDHUP)

    async def _see_ends(self) -> None:
        epoll = self._epoll
        assert epoll is not None
        while True:
            await trio.lowlevel.wait_readable(epoll.fileno())
            self._reap()

    def _reap(self) -> None:
        if self._epoll is None:
            return
        for fd, _ in self._epoll.poll(0):
            ended = self._imports.pop(fd)
            self._epoll.unregister(fd)  # our duplicate is not the last one: closing it would not do
            ended.sock.close()
            self._released = {
                key: when for key, when in self._released.items() if when + RELEASED > trio.current_time()
            }
            self._released[ended.key] = trio.current_time()
            self._import_ended(ended.key)

    def _import_ended(self, key: str) -> None:
        """Perhaps the device has gone, perhaps only its driver. The server knows; if we are watching it tells."""
        if self._listing is not None and key in self._listing.keys.values():
            self._listing.stays_until[key] = trio.current_time() + BACK_IN_LIST
            self._look.set()
        elif self._listing is not None:
            self._remove(key)

    def _imported(self, key: str) -> bool:
        return any(each.key == key for each in self._imports.values())

    # ---- the server

    async def _follow_server(self, nursery: trio.Nursery, ready: _Once) -> None:
        pause = FIRST_RETRY
        while True:
            reached, watched = False, False
            try:
                watched = await self._watch(ready)
                reached = watched or await self._poll(nursery, ready)
                self._said = "" if reached else self._said
            except (OSError, ProtocolError) as exc:
                self._complain(exc)
            self._forget_all()
            ready.now()
            pause = FIRST_RETRY if reached else min(pause * 2, SLOWEST_POLL)
            with trio.move_on_after(pause):
                await self._look.wait()
            self._look = trio.Event()

    def _complain(self, exc: Exception) -> None:
        """Once for each thing that goes wrong, until something goes right."""
        text = f"it cannot be reached: {exc.strerror or exc}" if isinstance(exc, OSError) else str(exc)
        if text != self._said:
            log.info("%s: %s", self.name, text)
        self._said = text

    def _forget_all(self) -> None:
        """The server has gone, and its devices with it; what is imported has a connection of its own to tell."""
        for key in [key for key in self._devices if not self._imported(key)]:
            self._remove(key)

    def _add(self, device: BusDevice) -> None:
        if len(self._devices) >= MAX_DEVICES and device.key not in self._devices:
            self._complain(ProtocolError(f"more than {MAX_DEVICES} devices: the rest is left out"))
            return
        if self._devices.get(device.key) != device:
            self._devices[device.key] = device
            self._changed()

    def _remove(self, key: str) -> None:
        if self._devices.pop(key, None) is not None:
            self._changed()

    # ---- our own server: it tells

    async def _watch(self, ready: _Once) -> bool:
        """Follow its events until it hangs up. False if it does not know how to be watched."""
        self._listing = None
        known = False
        async with await _dial(self._address) as stream, aclosing(watch(stream)) as events:
            with trio.move_on_after(WATCH_TIMEOUT) as patience:
                async for what, devices in events:
                    patience.deadline = float("inf")
                    if not known and what != "devices":
                        return False
                    if not known:
                        self._begin_life()
                    known = True
                    self._event(what, devices)
                    ready.now()
        if known:
            self._listing = _Listing()  # the imports that are left: their end is the device's
        return known

    def _begin_life(self) -> None:
        """While an import of ours lives it is the same server, which only cut us off: its numbers mean the same."""
        self._reap()
        if not self._imports:
            self._life += 1

    def _event(self, what: str, devices: list[Watched]) -> None:
        if what == "devices":
            found = [watched(each, self._life) for each in devices[:MAX_DEVICES]]
            for key in self._devices.keys() - {each.key for each in found}:
                self._remove(key)
            for device in found:
                self._add(device)
            return
        for each in devices:
            if what == "removed":
                self._remove(key_of(each.busid, each.arrival, self._life))
            elif what == "arrived" or (
                what == "changed" and key_of(each.busid, each.arrival, self._life) in self._devices
            ):
                self._add(watched(each, self._life))

    # ---- any server: it is asked

    async def _poll(self, nursery: trio.Nursery, ready: _Once) -> bool:
        """List until the server cannot be reached any more. True if it was, ever."""
        listing = self._listing = _Listing()
        reached = False
        while True:
            try:
                records = await list_devices(self._address)
            except (OSError, ProtocolError):
                if not reached:
                    raise
                return True
            reached = True
            self._take_list(records, nursery, listing)
            if not listing.asked:
                ready.now()
            soon = bool(listing.stays_until) or bool(listing.asked)
            with trio.move_on_after(POLL_SECONDS / 5 if soon else POLL_SECONDS):
                await self._look.wait()
            self._look = trio.Event()

    def _take_list(self, records: list[usbip.DeviceRecord], nursery: trio.Nursery, listing: _Listing) -> None:
        now = trio.current_time()
        present = {identity_of(each): each for each in records}
        for identity, key in list(listing.keys.items()):
            if identity in present or self._imported(key):
                if identity in present:
                    listing.stays_until.pop(key, None)
            elif listing.stays_until.get(key, 0.0) <= now:
                listing.stays_until.pop(key, None)
                del listing.keys[identity]
                self._remove(key)
        for identity in [each for each, when in listing.not_before.items() if when <= now or each not in present]:
            del listing.not_before[identity]
        for identity, record in present.items():
            known = identity in listing.keys or identity in listing.asked or identity in listing.not_before
            if not known and len(listing.asked) < AT_ONCE:
                listing.asked.add(identity)
                nursery.start_soon(self._meet, record, identity, listing)

    async def _meet(self, record: usbip.DeviceRecord, identity: Identity, listing: _Listing) -> None:
        """A new device: import it for a moment and read what it is."""
        try:
            description = await self._describe(record)
        except OSError as exc:
            # In use by somebody else, or gone again.
            log.debug("%s: %s is not read: %s", self.name, record.busid, exc)
            listing.not_before[identity] = trio.current_time() + RETRY_DESCRIBE
            return
        finally:
            listing.asked.discard(identity)
            self._look.set()
        if self._listing is not listing:
            return  # the server was lost meanwhile
        self._arrivals += 1
        key = key_of(record.busid, self._arrivals)
        listing.keys[identity] = key
        self._released[key] = trio.current_time()
        listing.stays_until[key] = self._released[key] + BACK_IN_LIST
        self._add(listed(key, record, description))

    async def _describe(self, record: usbip.DeviceRecord) -> Description:
        stream, imported = await import_device(self._address, record.busid)
        async with stream:
            if identity_of(imported)[:5] != identity_of(record)[:5]:
                raise OSError(errno.ENODEV, "it was replaced by another one")
            try:
                with trio.fail_after(DESCRIBE_TIMEOUT):
                    return await describe(stream, imported.devid)
            except (trio.TooSlowError, TimeoutError, ProtocolError) as exc:
                log.info("%s: the device %s is listed without descriptors: %s", self.name, record.busid, exc)
                return Description()


class _Once:
    """A TaskStatus that may be told more than once."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._status: trio.TaskStatus[None] | None = task_status

    def now(self) -> None:
        if self._status is not None:
            self._status.started()
            self._status = None
