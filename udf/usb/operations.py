"""USB/IP's operations from the client's side: dial, list, import, watch; and what can be asked of an imported device.

Owns: connections before their import, and the bounds of what a server may answer. Must never: wait without a limit, or
keep anything about a device. Called by: remote.py. Nothing here uses threads: the supervisor's loop waits for it.

Everything raises OSError for a server that cannot be reached or breaks off, ProtocolError for one that talks nonsense.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec
import trio

from udf.errors import ContractError, UserError
from udf.usb import descriptors, usbip
from udf.usb.bus import bounded, clean

REQUEST_WATCH = 0x8055  # private to this project: usbipd closes the connection on it
DIAL_TIMEOUT = 5.0
OPERATION_TIMEOUT = 5.0
REQUEST_TIMEOUT = 1.0  # for one descriptor
MAX_LINE = 8 * 1024 * 1024  # a watched server's list of devices
_ENGLISH = 0x0409


class ProtocolError(ContractError):
    """The server said something that USB/IP does not have."""


@dataclass(frozen=True)
class Address:
    """Where a USB/IP server listens."""

    path: str = ""  # a unix socket, or
    host: str = ""
    port: int = usbip.PORT

    def __str__(self) -> str:
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")

    @classmethod
    def parse(cls, text: str) -> Address:
        """HOST, HOST:PORT, [V6]:PORT, or a path with a slash in it."""
        if "/" in text:
            return cls(path=os.path.abspath(text))
        if text.startswith("["):
            host, _, port = text[1:].partition("]")
            port = port.removeprefix(":") or str(usbip.PORT)
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        else:
            host, port = text, str(usbip.PORT)  # a name, or a bare IPv6 address
        if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"{text!r} is no address of a USB/IP server: say HOST, HOST:PORT or the path of a socket.")
        return cls(host=host, port=int(port))


async def dial(address: Address) -> trio.SocketStream:
    """Connect. A peer that vanishes without a word is noticed by TCP itself, in ten seconds or so."""
    try:
        with trio.fail_after(DIAL_TIMEOUT):
            if address.path:
                return await trio.open_unix_socket(address.path)
            stream = await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError:
        raise TimeoutError(errno.ETIMEDOUT, f"{address} does not answer") from None
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
    ):
        stream.setsockopt(level, option, value)
    return stream


async def receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    """So many bytes; ConnectionError at an end before."""
    data = bytearray()
    while len(data) < size:
        try:
            chunk = await stream.receive_some(min(size - len(data), 65536))
        except trio.BrokenResourceError as exc:
            raise ConnectionResetError(errno.ECONNRESET, "the USB/IP server hung up") from exc
        if not chunk:
            raise ConnectionResetError(errno.ECONNRESET, "the USB/IP server hung up")
        data += chunk
    return bytes(data)


async def _send(stream: trio.SocketStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError as exc:
        raise ConnectionResetError(errno.ECONNRESET, "the USB/IP server hung up") from exc


async def _ask(stream: trio.SocketStream, request: int, reply: int, payload: bytes = b"") -> int:
    """Send an operation and read the answer's header; its status."""
    await _send(stream, usbip.OPERATION.pack(usbip.VERSION, request, 0) + payload)
    version, code, status = usbip.OPERATION.unpack(await receive_exactly(stream, usbip.OPERATION.size))
    if code != reply or version >> 8 != usbip.VERSION >> 8:
        raise ProtocolError(f"the server answered operation {request:#06x} with {code:#06x} of version {version:#06x}")
    return int(status)


async def list_devices(address: Address) -> list[usbip.DeviceRecord]:
    """What a server offers now; devices that somebody has imported are not among them."""
    try:
        with trio.fail_after(OPERATION_TIMEOUT):
            async with await dial(address) as stream:
                status = await _ask(stream, usbip.REQUEST_DEVLIST, usbip.REPLY_DEVLIST)
                if status != usbip.ST_OK:
                    raise OSError(errno.EIO, f"the USB/IP server refuses to list its devices (status {status})")
                (count,) = usbip.COUNT.unpack(await receive_exactly(stream, usbip.COUNT.size))
                if count > usbip.MAX_DEVICES:
                    raise ProtocolError(f"the server announces {count} devices")
                return [await _record(stream) for _ in range(count)]
    except trio.TooSlowError:
        raise TimeoutError(errno.ETIMEDOUT, f"{address} does not finish its list") from None


async def _record(stream: trio.SocketStream) -> usbip.DeviceRecord:
    record = usbip.unpack_device(await receive_exactly(stream, usbip.DEVICE.size))
    # A byte counts them, so that no more than 1 KiB follows.
    await receive_exactly(stream, record.interface_count * usbip.INTERFACE.size)
    return record


async def import_device(address: Address, busid: str) -> tuple[trio.SocketStream, usbip.DeviceRecord]:
    """A connection that speaks URBs, and what the server says the device is.

    OSError: ENODEV if there is no such device, EBUSY if another client has it, EIO if it cannot be had.
    """
    stream = await dial(address)
    try:
        with trio.fail_after(OPERATION_TIMEOUT):
            wanted = busid.encode()[: usbip.BUSID_SIZE - 1].ljust(usbip.BUSID_SIZE, b"\0")
            status = await _ask(stream, usbip.REQUEST_IMPORT, usbip.REPLY_IMPORT, wanted)
            if status == usbip.ST_DEV_BUSY:
                raise OSError(errno.EBUSY, f"the device {busid} is in use")
            if status == usbip.ST_NODEV:
                raise OSError(errno.ENODEV, f"the USB/IP server has no device {busid}")
            if status != usbip.ST_OK:
                raise OSError(errno.EIO, f"the USB/IP server does not give the device {busid} (status {status})")
            record = usbip.unpack_device(await receive_exactly(stream, usbip.DEVICE.size))
            if record.busid != busid:
                raise ProtocolError(f"the server gave {record.busid[:40]!r} for {busid!r}")
            return stream, record
    except trio.TooSlowError:
        await trio.aclose_forcefully(stream)
        raise TimeoutError(errno.ETIMEDOUT, f"{address} does not answer") from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


# ---- what a device says about itself


@dataclass(frozen=True)
class Description:
    """Read from the device; empty where it gave nothing of use."""

    device_descriptor: bytes = b""
    configurations: tuple[bytes, ...] = ()
    manufacturer: str = ""
    product: str = ""
    serial: str = ""


async def describe(stream: trio.SocketStream, devid: int) -> Description:
    """Ask an imported device for its descriptors. A device that answers nonsense is described without it."""
    device = _Asked(stream, devid)
    raw = await device.descriptor(descriptors.DEVICE, 0, descriptors.DEVICE_LAYOUT.size)
    try:
        parsed = descriptors.parse_device(raw)
    except descriptors.DescriptorError:
        return Description()
    configurations = []
    for index in range(min(parsed.configurations, descriptors.MAX_CONFIGURATIONS)):
        head = await device.descriptor(descriptors.CONFIGURATION, index, descriptors.CONFIGURATION_LAYOUT.size)
        configurations.append(
            await device.descriptor(descriptors.CONFIGURATION, index, descriptors.total_length(head)) or head
        )
    languages = descriptors.parse_languages(await device.descriptor(descriptors.STRING, 0, 255))
    language = _ENGLISH if _ENGLISH in languages or not languages else languages[0]
    texts = [
        descriptors.parse_string(await device.descriptor(descriptors.STRING, index, 255, language)) if index else None
        for index in (parsed.manufacturer_index, parsed.product_index, parsed.serial_index)
    ]
    return Description(raw, bounded(configurations), *(clean(text or "") for text in texts))


class _Asked:
    """Control requests one after the other on a connection that is closed afterwards."""

    def __init__(self, stream: trio.SocketStream, devid: int) -> None:
        self._stream = stream
        self._devid = devid
        self._seqnum = 0

    async def descriptor(self, kind: int, index: int, length: int, language: int = 0) -> bytes:
        """GET_DESCRIPTOR; nothing if the device refuses, OSError if it does not answer at all."""
        if not length:
            return b""
        self._seqnum += 1
        setup = struct.pack("<BBHHH", 0x80, 6, kind << 8 | index, language, length)
        submit = usbip.Submit(
            self._seqnum, self._devid, usbip.DIRECTION_IN, 0, usbip.URB_DIR_IN, length, 0, usbip.NO_PACKETS, 0, setup
        )
        try:
            with trio.fail_after(REQUEST_TIMEOUT):
                await _send(self._stream, submit.pack())
                header = await receive_exactly(self._stream, usbip.URB_SIZE)
                reply = usbip.unpack_ret_submit(header)
                wrong = usbip.code_of(header) != usbip.RET_SUBMIT_CODE or reply.seqnum != self._seqnum
                if wrong or not 0 <= reply.actual <= length:
                    raise ProtocolError("the server's answer to a request for a descriptor makes no sense")
                data = await receive_exactly(self._stream, reply.actual)
        except trio.TooSlowError:
            raise TimeoutError(errno.ETIMEDOUT, "the device does not answer") from None
        return data if reply.status == 0 else b""


# ---- watching our own server


class Watched(msgspec.Struct, kw_only=True):
    """A device as our own server tells of it."""

    busid: str
    arrival: int
    busnum: int = 0
    devnum: int = 0
    speed: int = 0
    device_descriptor: bytes = b""  # base64 on the wire
    configurations: list[bytes] = []
    configuration: int = 0
    manufacturer: str = ""
    product: str = ""
    serial: str = ""
    name: str = ""
    imported: bool = False


class _Event(Watched, kw_only=True):
    t: str
    busid: str = ""
    arrival: int = 0
    devices: list[Watched] = []


_decoder = msgspec.json.Decoder(_Event)


async def watch(stream: trio.SocketStream) -> AsyncGenerator[tuple[str, list[Watched]], None]:
    """Events in their order: first ("devices", all), then ("arrived" | "removed" | "changed", [one]).

    Ends when the server hangs up; at once if it does not know this operation.
    """
    await _send(stream, usbip.OPERATION.pack(usbip.VERSION, REQUEST_WATCH, 0))
    pending = bytearray()
    while True:
        try:
            chunk = await stream.receive_some(65536)
        except trio.BrokenResourceError:
            return
        if not chunk:
            return
        begin = len(pending)
        pending += chunk
        while (end := pending.find(b"\n", begin)) >= 0:
            line, pending, begin = bytes(pending[:end]), pending[end + 1 :], 0
            try:
                event = _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                raise ProtocolError(f"the server's events cannot be read: {exc}") from exc
            yield event.t, event.devices if event.t == "devices" else [event]
        if len(pending) > MAX_LINE:
            raise ProtocolError(f"the server sent an event of more than {MAX_LINE} bytes")
