"""The USB/IP wire, both sides: pure packing and unpacking, no sockets.

Owns: the layout of every packet of protocol 1.1.1. Source: the kernel's Documentation/usb/usbip_protocol.rst and
drivers/usb/usbip/usbip_common.h. Must never: do I/O, or believe a length: who reads a packet checks it first.
Called by: client.py and remote.py toward a server, udf/testing/devices toward a client.

A connection has two phases. First the operations (list, import), each with its own header; after an import that was
granted both sides speak URBs only: 48 bytes, then the data, if there are any, then the isochronous descriptors.
All numbers are big-endian but for the 8 setup bytes, which are as on the bus.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NamedTuple

VERSION = 0x0111
PORT = 3240

# struct op_common: version, code, status.
OPERATION = struct.Struct(">HHI")
REQUEST_DEVLIST, REPLY_DEVLIST = 0x8005, 0x0005
REQUEST_IMPORT, REPLY_IMPORT = 0x8003, 0x0003
BUSID_SIZE = 32
COUNT = struct.Struct(">I")

# enum usbip_device_status / op status words of a reply.
ST_OK, ST_NA, ST_DEV_BUSY, ST_DEV_ERR, ST_NODEV, ST_ERROR = range(6)

# struct usbip_usb_device and usbip_usb_interface.
DEVICE = struct.Struct(">256s32sIIIHHHBBBBBB")
INTERFACE = struct.Struct(">BBBx")

# struct usbip_header: the basic part and one of four bodies, 48 bytes together.
URB_SIZE = 48
SUBMIT = struct.Struct(">IIIIIIiiii8s")
RET_SUBMIT = struct.Struct(">IIIIIiiiii8x")
UNLINK = struct.Struct(">IIIIII24x")
RET_UNLINK = struct.Struct(">IIIIIi24x")
CMD_SUBMIT, CMD_UNLINK, RET_SUBMIT_CODE, RET_UNLINK_CODE = 1, 2, 3, 4
DIRECTION_OUT, DIRECTION_IN = 0, 1
NO_PACKETS = 0  # what the kernel sends as number_of_packets when a transfer is not isochronous; others send -1

# struct usbip_iso_packet_descriptor: offset, length, actual length, status.
ISO_PACKET = struct.Struct(">IIIi")

# transfer_flags (linux/usb.h).
URB_SHORT_NOT_OK = 0x0001
URB_ISO_ASAP = 0x0002
URB_ZERO_PACKET = 0x0040
URB_DIR_IN = 0x0200

MAX_TRANSFER = 16 * 1024 * 1024  # usbfs has the same order of limit; a longer claim is a broken peer
MAX_ISO_PACKETS = 1024  # USBIP_MAX_ISO_PACKETS
MAX_DEVICES = 4096
MAX_INTERFACES = 32  # USB_MAXINTERFACES


class Speed(enum.IntEnum):
    """enum usb_device_speed."""

    UNKNOWN = 0
    LOW = 1
    FULL = 2
    HIGH = 3
    WIRELESS = 4
    SUPER = 5
    SUPER_PLUS = 6


@dataclass(frozen=True)
class DeviceRecord:
    """A device as the operations describe it."""

    path: str
    busid: str
    busnum: int
    devnum: int
    speed: int
    vendor: int
    product: int
    bcd_device: int
    device_class: tuple[int, int, int]
    configuration: int
    configurations: int
    interface_count: int
    interfaces: tuple[tuple[int, int, int], ...] = ()  # only a list has them: class, subclass, protocol

    @property
    def devid(self) -> int:
        """What every URB names the device by."""
        return (self.busnum << 16 | self.devnum) & 0xFFFFFFFF

    def pack(self, *, interfaces: bool) -> bytes:
        """As a reply carries it: with its interfaces in a list, without in an import."""
        head = DEVICE.pack(
            self.path.encode()[:255],
            self.busid.encode()[: BUSID_SIZE - 1],
            self.busnum,
            self.devnum,
            self.speed,
            self.vendor,
            self.product,
            self.bcd_device,
            *self.device_class,
            self.configuration,
            self.configurations,
            self.interface_count,
        )
        return head + b"".join(INTERFACE.pack(*each) for each in self.interfaces) if interfaces else head


def unpack_device(data: bytes) -> DeviceRecord:
    """Read DEVICE.size bytes; names are cut at their NUL and what is not UTF-8 in them is replaced."""
    path, busid, busnum, devnum, speed, vendor, product, bcd, cls, sub, proto, value, count, interfaces = DEVICE.unpack(
        data
    )
    return DeviceRecord(
        _text(path), _text(busid), busnum, devnum, speed, vendor, product, bcd, (cls, sub, proto), value, count,
        interfaces,
    )  # fmt: skip


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")


class Submit(NamedTuple):
    """CMD_SUBMIT. `length` counts the data that follow (OUT) or are wanted (IN)."""

    seqnum: int
    devid: int
    direction: int
    endpoint: int  # its number, without the direction bit
    flags: int
    length: int
    start_frame: int
    packets: int
    interval: int
    setup: bytes

    def pack(self) -> bytes:
        """The 48 bytes."""
        return SUBMIT.pack(
            CMD_SUBMIT, self.seqnum, self.devid, self.direction, self.endpoint, self.flags, self.length,
            self.start_frame, self.packets, self.interval, self.setup,
        )  # fmt: skip


class RetSubmit(NamedTuple):
    """RET_SUBMIT. `status` is 0 or minus an errno; `actual` counts the data that follow (IN) or were taken (OUT).

    Devid, direction and endpoint are 0 here, so only the seqnum says what is answered.
    """

    seqnum: int
    status: int
    actual: int
    start_frame: int = 0
    packets: int = 0
    errors: int = 0

    def pack(self) -> bytes:
        """The 48 bytes."""
        return RET_SUBMIT.pack(
            RET_SUBMIT_CODE, self.seqnum, 0, 0, 0, self.status, self.actual, self.start_frame, self.packets, self.errors
        )


def code_of(header: bytes) -> int:
    """The command of a URB header: CMD_SUBMIT, CMD_UNLINK, RET_SUBMIT_CODE, RET_UNLINK_CODE, or something unknown."""
    return int.from_bytes(header[:4], "big")


def unpack_submit(header: bytes) -> Submit:
    """Read the 48 bytes of a CMD_SUBMIT."""
    return Submit(*SUBMIT.unpack(header)[1:])


def unpack_ret_submit(header: bytes) -> RetSubmit:
    """Read the 48 bytes of a RET_SUBMIT."""
    _, seqnum, _, _, _, *rest = RET_SUBMIT.unpack(header)
    return RetSubmit(seqnum, *rest)


def pack_unlink(seqnum: int, devid: int, unlinked: int) -> bytes:
    """CMD_UNLINK: give up the request `unlinked`."""
    return UNLINK.pack(CMD_UNLINK, seqnum, devid, 0, 0, unlinked)


def unpack_unlink(header: bytes) -> tuple[int, int]:
    """A CMD_UNLINK's own seqnum and the one that it gives up."""
    _, seqnum, _, _, _, unlinked = UNLINK.unpack(header)
    return seqnum, unlinked


def pack_ret_unlink(seqnum: int, status: int) -> bytes:
    """RET_UNLINK: -ECONNRESET if the request was given up and will not be answered, 0 if its answer came before."""
    return RET_UNLINK.pack(RET_UNLINK_CODE, seqnum, 0, 0, 0, status)


def unpack_ret_unlink(header: bytes) -> tuple[int, int]:
    """A RET_UNLINK's seqnum and status."""
    _, seqnum, _, _, _, status = RET_UNLINK.unpack(header)
    return seqnum, status
