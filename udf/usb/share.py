"""One imported device for several drivers, each bound to an interface of its own.

Owns: the device's one connection, the numbers under which requests travel on it, and who may ask what. Must never: let
a driver reach another driver's endpoints or change what all share (the configuration, the address, the bus's state),
wait for a driver that does not read, or outlive the connection: its end is every driver's end.
Called by: the supervisor, for composite devices whose interfaces have different drivers.

Each driver's end is a connection like any other (client.py). All of them are served by one thread.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from udf.messages import DeviceSpec
from udf.usb import usbip
from udf.usb.bus import spec_configuration

log = logging.getLogger(__name__)

MAX_PENDING = 1024  # requests of one driver under way
MAX_UNREAD = 64 * 1024 * 1024  # bytes that a driver has asked for and does not take: then it is cut off
MAX_UNSENT = 4 * 1024 * 1024  # bytes for the device that wait: then no driver is listened to
CONFIGURE_TIMEOUT = 5.0
_CHUNK = 256 * 1024
_SETUP = struct.Struct("<BBHHH")
_SET_CONFIGURATION = 9


class _Broken(Exception):
    """The other end does not keep to the protocol."""


@dataclass(eq=False)
class _Port:
    """A driver's end."""

    sock: socket.socket
    interface: int
    function: frozenset[int]  # the interfaces that belong together with it
    endpoints: frozenset[int]  # addresses of these, in all settings
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    sent: dict[int, int] = field(default_factory=dict)  # its numbers of what is under way -> those upstream
    open: bool = True


class _Asked(NamedTuple):
    """What travels upstream under a number of ours."""

    port: _Port
    number: int  # the driver's
    unlinks: int | None = None  # an UNLINK, of this number of ours
    is_in: bool = False
    length: int = 0
    packets: int = 0


class Share:
    """Takes an imported connection over; connect() gives a driver one for its interface."""

    def __init__(self, sock: socket.socket, spec: DeviceSpec) -> None:
        self._up = sock
        self._spec = spec
        self._devid = (spec.busnum << 16 | spec.devnum) & 0xFFFFFFFF
        self._active = spec_configuration(spec)
        self._received = bytearray()
        self._unsent = bytearray()
        self._asked: dict[int, _Asked] = {}
        self._last = 0
        self._ports: dict[int, _Port] = {}
        self._new: list[_Port] = []  # not listened to yet
        self._replaced: list[_Port] = []  # whose drivers have ended, and which others follow
        self._lock = threading.Lock()  # of `_ports`, `_new`, `_replaced` and `_ended`; the rest is the thread's
        self._ended = False
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="usb-share", daemon=True)
        self._thread.start()

    # ---- from any thread

    def connect(self, interface: int) -> socket.socket:
        """A connection for the driver of this interface. OSError: EBUSY if there is one, ENOENT, ENODEV.

        When the driver before has ended, what it had asked for is taken back before the new one is listened to.
        """
        numbers = {each.number for each in self._active.all_interfaces()} if self._active is not None else set()
        if self._active is None or interface not in numbers:
            raise OSError(errno.ENOENT, f"the device has no interface {interface}")
        function = self._active.function(interface)
        endpoints = frozenset(
            endpoint.address
            for each in self._active.all_interfaces()
            if each.number in function
            for endpoint in each.endpoints
        )
        with self._lock:
            if self._ended:
                raise OSError(errno.ENODEV, "the device is gone")
            before = [each for each in self._ports.values() if each.function & function]
            if not all(_hung_up(each.sock) for each in before):
                raise OSError(errno.EBUSY, f"interface {interface} is in use")
            for each in before:
                del self._ports[each.interface]
            self._replaced += before
            theirs, ours = socket.socketpair()
            ours.setblocking(False)
            port = _Port(ours, interface, function, endpoints)
            self._ports[interface] = port
            self._new.append(port)
            os.eventfd_write(self._wake, 1)
        return theirs

    def close(self) -> None:
        """End all connections; the device can be imported again."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    # ---- the thread

    def _run(self) -> None:
        try:
            self._configure()
            self._up.setblocking(False)
            self._selector.register(self._up, selectors.EVENT_READ, None)
            self._selector.register(self._wake, selectors.EVENT_READ, None)
            while not self._closing:
                self._turn()
        except (OSError, EOFError):
            pass  # the device is gone
        except _Broken as exc:
            log.warning("the connection to %s is given up: %s", self._spec.port or "a USB device", exc)
        finally:
            with self._lock:
                self._ended = True
                served = [key.data for key in self._selector.get_map().values() if key.data is not None]
                ports = {*self._ports.values(), *self._new, *self._replaced, *served}
            for port in ports:
                port.sock.close()
            self._up.close()
            self._selector.close()

    def _configure(self) -> None:
        """Before anyone is served: no driver may do it, because it is everybody's."""
        if self._spec.configuration or self._active is None:
            return
        setup = _SETUP.pack(0, _SET_CONFIGURATION, self._active.value, 0, 0)
        self._up.settimeout(CONFIGURE_TIMEOUT)
        self._up.sendall(usbip.Submit(self._number(), self._devid, 0, 0, 0, 0, 0, 0, 0, setup).pack())
        header = self._up.recv(usbip.URB_SIZE, socket.MSG_WAITALL)
        if len(header) < usbip.URB_SIZE:
            raise EOFError
        reply = usbip.unpack_ret_submit(header)
        if usbip.code_of(header) != usbip.RET_SUBMIT_CODE or reply.seqnum != self._last or reply.actual:
            raise _Broken("it does not answer what it was asked")
        if reply.status:
            log.info("%s refuses its configuration (status %d)", self._spec.port, reply.status)

    def _turn(self) -> None:
        listening = len(self._unsent) < MAX_UNSENT
        self._watch(self._up, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0), None)
        for port in list(self._ports.values()):
            if port not in self._new:
                reads = selectors.EVENT_READ if listening else 0
                self._watch(port.sock, reads | (selectors.EVENT_WRITE if port.unsent else 0), port)
        for key, events in self._selector.select():
            if key.fileobj is self._up:
                self._serve_up(events)
            elif key.data is None:
                os.eventfd_read(self._wake)
                with self._lock:
                    replaced, self._replaced = self._replaced, []
                    self._new.clear()
                for port in replaced:
                    self._drop(port)
            elif key.data.open:
                self._guard(key.data, self._serve, events)

    def _watch(self, sock: socket.socket, events: int, data: _Port | None) -> None:
        known = self._selector.get_map().get(sock)
        if known is None and events:
            self._selector.register(sock, events, data)
        elif known is not None and not events:
            self._selector.unregister(sock)
        elif known is not None and known.events != events:
            self._selector.modify(sock, events, data)

    def _guard(self, port: _Port, action: Callable[..., None], *arguments: int) -> None:
        """A driver that ends or misbehaves ends alone."""
        try:
            action(port, *arguments)
        except (OSError, EOFError):
            self._drop(port)
        except _Broken as exc:
            log.warning("the driver of interface %d of %s is cut off: %s", port.interface, self._spec.port, exc)
            self._drop(port)

    def _drop(self, port: _Port) -> None:
        if not port.open:
            return
        port.open = False
        self._watch(port.sock, 0, port)
        port.sock.close()
        for number in port.sent.values():
            self._unlink(port, 0, number)
        with self._lock:
            if self._ports.get(port.interface) is port:
                del self._ports[port.interface]

    # ---- drivers to the device

    def _serve(self, port: _Port, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(port)
        if not events & selectors.EVENT_READ:
            return
        port.received += _receive(port.sock)
        while port.open and (size := self._size_of(port.received)) and len(port.received) >= size:
            packet = bytes(port.received[:size])
            del port.received[:size]
            if usbip.code_of(packet) == usbip.CMD_UNLINK:
                self._take_unlink(port, packet)
            else:
                self._take_submit(port, packet)

    def _size_of(self, data: bytearray) -> int:
        """Of the packet that begins; 0: not known yet."""
        if len(data) < usbip.URB_SIZE:
            return 0
        header = bytes(data[: usbip.URB_SIZE])
        if usbip.code_of(header) == usbip.CMD_UNLINK:
            return usbip.URB_SIZE
        submit = usbip.unpack_submit(header)
        if (
            usbip.code_of(header) != usbip.CMD_SUBMIT
            or not 0 <= submit.length <= usbip.MAX_TRANSFER
            or submit.packets > usbip.MAX_ISO_PACKETS
            or submit.endpoint > 15
            or submit.direction > 1
        ):
            raise _Broken("what it sends is no request")
        out = 0 if submit.direction == usbip.DIRECTION_IN else submit.length
        return usbip.URB_SIZE + out + usbip.ISO_PACKET.size * max(submit.packets, 0)

    def _take_submit(self, port: _Port, packet: bytes) -> None:
        submit = usbip.unpack_submit(packet[: usbip.URB_SIZE])
        if submit.seqnum in port.sent or len(port.sent) >= MAX_PENDING:
            raise _Broken("it has too many requests under way, or one number twice")
        if submit.endpoint == 0:
            verdict = self._judge(port, submit.setup)
        else:
            address = submit.endpoint | (0x80 if submit.direction == usbip.DIRECTION_IN else 0)
            verdict = None if address in port.endpoints else -errno.EPIPE
        if verdict is not None:
            self._tell(port, usbip.RetSubmit(submit.seqnum, verdict, 0).pack())
            return
        number = self._number()
        packets = max(submit.packets, 0)
        is_in = submit.direction == usbip.DIRECTION_IN
        self._asked[number] = _Asked(port, submit.seqnum, None, is_in, submit.length, packets)
        port.sent[submit.seqnum] = number
        self._send(submit._replace(seqnum=number, devid=self._devid).pack() + packet[usbip.URB_SIZE :])

    def _judge(self, port: _Port, setup: bytes) -> int | None:
        """What becomes of a control request: None, it may pass; else the status that answers it."""
        request_type, request, value, index, _ = _SETUP.unpack(setup)
        kind, recipient = request_type & 0x60, request_type & 0x1F
        if kind == 0x40:
            return None  # a vendor's requests: nobody knows what they mean, and usbfs lets them pass too
        if recipient == 0 and kind == 0x00 and not request_type & 0x80:
            same = request == _SET_CONFIGURATION and self._active is not None and value == self._active.value
            return 0 if same else -errno.EPIPE
        if recipient == 1:
            return None if index & 0xFF in port.function else -errno.EPIPE
        if recipient == 2:
            # Endpoint 0 is everybody's to look at, and nobody's to change.
            mine = index & 0xFF in port.endpoints or (not index & 0x7F and bool(request_type & 0x80))
            return None if mine else -errno.EPIPE
        return None if recipient == 0 else -errno.EPIPE

    def _take_unlink(self, port: _Port, packet: bytes) -> None:
        number, unlinked = usbip.unpack_unlink(packet)
        sent = port.sent.get(unlinked)
        if sent is None:
            self._tell(port, usbip.pack_ret_unlink(number, 0))  # it has been answered already
        else:
            self._unlink(port, number, sent)

    def _unlink(self, port: _Port, number: int, sent: int) -> None:
        ours = self._number()
        self._asked[ours] = _Asked(port, number, sent)
        self._send(usbip.pack_unlink(ours, self._devid, sent))

    def _number(self) -> int:
        while True:
            self._last = self._last % 0xFFFFFFFF + 1
            if self._last not in self._asked:
                return self._last

    def _send(self, data: bytes) -> None:
        self._unsent += data
        try:
            sent = self._up.send(self._unsent)
        except BlockingIOError:
            return
        del self._unsent[:sent]

    # ---- the device to its drivers

    def _serve_up(self, events: int) -> None:
        if events & selectors.EVENT_WRITE and self._unsent:
            self._send(b"")
        if not events & selectors.EVENT_READ:
            return
        self._received += _receive(self._up)
        while len(self._received) >= usbip.URB_SIZE:
            header = bytes(self._received[: usbip.URB_SIZE])
            code = usbip.code_of(header)
            if code == usbip.RET_UNLINK_CODE:
                del self._received[: usbip.URB_SIZE]
                self._answer_unlink(*usbip.unpack_ret_unlink(header))
                continue
            reply = usbip.unpack_ret_submit(header)
            asked = self._asked.get(reply.seqnum)
            if code != usbip.RET_SUBMIT_CODE or asked is None or asked.unlinks is not None:
                raise _Broken("it answered what nobody asked")
            if not 0 <= reply.actual <= asked.length or (reply.packets != asked.packets and reply.packets > 0):
                raise _Broken("it answered more than was asked for")
            packets = asked.packets * usbip.ISO_PACKET.size if reply.packets > 0 else 0
            size = usbip.URB_SIZE + (reply.actual if asked.is_in else 0) + packets
            if len(self._received) < size:
                return
            body = bytes(self._received[usbip.URB_SIZE : size])
            del self._received[:size], self._asked[reply.seqnum]
            asked.port.sent.pop(asked.number, None)
            self._tell(asked.port, reply._replace(seqnum=asked.number).pack() + body)

    def _answer_unlink(self, number: int, status: int) -> None:
        asked = self._asked.pop(number, None)
        if asked is None or asked.unlinks is None:
            raise _Broken("it answered an unlink that nobody asked for")
        unlinked = self._asked.pop(asked.unlinks, None)
        if unlinked is not None:
            unlinked.port.sent.pop(unlinked.number, None)
        self._tell(asked.port, usbip.pack_ret_unlink(asked.number, status))

    def _tell(self, port: _Port, data: bytes) -> None:
        if not port.open:
            return
        port.unsent += data
        self._guard(port, self._flush)

    def _flush(self, port: _Port) -> None:
        try:
            sent = port.sock.send(port.unsent) if port.unsent else 0
        except BlockingIOError:
            sent = 0
        del port.unsent[:sent]
        if len(port.unsent) > MAX_UNREAD:
            raise _Broken("it does not take what it asked for")


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    try:
        poll.register(sock, select.POLLRDHUP)
    except ValueError:
        return True  # closed by the thread in this moment
    return bool(poll.poll(0))


def _receive(sock: socket.socket) -> bytes:
    try:
        data = sock.recv(_CHUNK)
    except BlockingIOError:
        return b""
    if not data:
        raise EOFError
    return data
