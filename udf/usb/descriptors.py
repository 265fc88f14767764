"""What a device says about itself: descriptors into frozen dataclasses.

Owns: the layout of device, configuration, interface, endpoint and string descriptors (USB 2.0 chapter 9.6), and which
nonsense in them is survived. Must never: do I/O, or raise anything but DescriptorError, whatever the bytes are: they
come from a device that anyone may have built.
Called by: backend.py, remote.py, matching.py, client code that wants more than pyusb shows.

Lenient parsing does what libusb does: it keeps everything up to the first thing that makes no sense, and counts what
is really there instead of what was announced. Strict parsing refuses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from udf.errors import ContractError

DEVICE, CONFIGURATION, STRING, INTERFACE, ENDPOINT = 1, 2, 3, 4, 5
ASSOCIATION = 11
CLASS_INTERFACE, CDC_UNION = 0x24, 6  # a communication class's functional descriptor (CDC 1.2, 5.2.3.2)
DEVICE_LAYOUT = struct.Struct("<BBHBBBBHHHBBBB")
CONFIGURATION_LAYOUT = struct.Struct("<BBHBBBBB")
INTERFACE_LAYOUT = struct.Struct("<BBBBBBBBB")
ENDPOINT_LAYOUT = struct.Struct("<BBBBHB")
AUDIO_ENDPOINT_SIZE = 9  # audio 1.0 endpoints have two more bytes: bRefresh and bSynchAddress

MAX_CONFIGURATION = 0xFFFF  # wTotalLength cannot say more
MAX_CONFIGURATIONS = 8  # USB_MAXCONFIG
MAX_INTERFACES = 32  # USB_MAXINTERFACES
MAX_ALTERNATES = 128  # USB_MAXALTSETTING
MAX_ENDPOINTS = 30  # 15 numbers in two directions

CONTROL, ISOCHRONOUS, BULK, INTERRUPT = range(4)  # the transfer type in an endpoint's attributes


class DescriptorError(ContractError):
    """A descriptor that does not follow the specification."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device descriptor."""

    usb_version: int  # bcdUSB
    device_class: int
    subclass: int
    protocol: int
    max_packet_size0: int
    vendor: int
    product: int
    version: int  # bcdDevice
    manufacturer_index: int
    product_index: int
    serial_index: int
    configurations: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint descriptor; `address` has the direction bit."""

    address: int
    attributes: int
    max_packet_size: int  # wMaxPacketSize as it stands; `packet_bytes` is what one packet carries
    interval: int
    refresh: int = 0
    synch_address: int = 0
    length: int = ENDPOINT_LAYOUT.size
    extra: bytes = b""

    @property
    def type(self) -> int:
        """CONTROL, ISOCHRONOUS, BULK or INTERRUPT."""
        return self.attributes & 3

    @property
    def is_in(self) -> bool:
        """From the device to the host."""
        return bool(self.address & 0x80)

    @property
    def packet_bytes(self) -> int:
        """The most that one (micro)frame carries: high-bandwidth endpoints have up to three transactions in one."""
        return (self.max_packet_size & 0x7FF) * (1 + (self.max_packet_size >> 11 & 3))


@dataclass(frozen=True, slots=True)
class Interface:
    """One alternate setting of an interface."""

    number: int
    alternate: int
    interface_class: int
    subclass: int
    protocol: int
    name_index: int = 0
    endpoints: tuple[Endpoint, ...] = ()
    length: int = INTERFACE_LAYOUT.size
    extra: bytes = b""  # class-specific descriptors between it and its first endpoint

    @property
    def triple(self) -> tuple[int, int, int]:
        """Class, subclass, protocol: what drivers are chosen by."""
        return self.interface_class, self.subclass, self.protocol


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration: for each interface its alternate settings, in the order of their first appearance."""

    value: int
    attributes: int
    max_power: int  # as it stands: units of 2 mA (8 mA at SuperSpeed)
    name_index: int = 0
    interfaces: tuple[tuple[Interface, ...], ...] = ()
    length: int = CONFIGURATION_LAYOUT.size
    total_length: int = 0
    extra: bytes = b""

    def all_interfaces(self) -> Iterator[Interface]:
        """Every alternate setting of every interface."""
        for alternates in self.interfaces:
            yield from alternates

    def function(self, number: int) -> frozenset[int]:
        """The interfaces that are one function with this one, itself included: what one driver has to have together.

        They say so by an interface association (USB 2.0 ECN, 9.6.X), or by a communication interface's union.
        """
        known = {each.number for each in self.all_interfaces()}
        found = {number}
        for extra in self._extras():
            if extra[1] == ASSOCIATION and len(extra) >= 4:
                group = set(range(extra[2], min(extra[2] + extra[3], 256)))
            elif extra[1] == CLASS_INTERFACE and len(extra) >= 5 and extra[2] == CDC_UNION:
                group = set(extra[3:])
            else:
                continue
            if number in group:
                found |= group
        return frozenset(found & (known | {number}))

    def _extras(self) -> Iterator[bytes]:
        """Every descriptor that is none of the standard ones. An association stands before its first interface."""
        texts = [self.extra]
        for each in self.all_interfaces():
            texts += [each.extra, *(endpoint.extra for endpoint in each.endpoints)]
        for text in texts:
            at = 0
            while at + 2 <= len(text) and text[at] >= 2:
                yield text[at : at + text[at]]
                at += text[at]

    def interface(self, number: int, alternate: int = 0) -> Interface | None:
        """By its number and alternate setting."""
        for each in self.all_interfaces():
            if each.number == number and each.alternate == alternate:
                return each
        return None


def parse_device(data: bytes) -> Device:
    """The 18 bytes of a device descriptor; DescriptorError if they are not one."""
    if len(data) < DEVICE_LAYOUT.size or data[0] < DEVICE_LAYOUT.size or data[1] != DEVICE:
        raise DescriptorError(f"no device descriptor: {bytes(data[: DEVICE_LAYOUT.size]).hex(' ') or 'nothing'}")
    _, _, *fields = DEVICE_LAYOUT.unpack_from(data)
    return Device(*fields)


def parse_configuration(data: bytes, *, lenient: bool = False) -> Configuration:
    """A configuration descriptor with all that belongs to it; DescriptorError, in lenient parsing never."""
    return _Parser(bytes(data[:MAX_CONFIGURATION]), lenient).configuration()


def parse_string(data: bytes) -> str | None:
    """A string descriptor's text; None if it is none. What is not UTF-16 in it is replaced."""
    if len(data) < 2 or data[1] != STRING or data[0] < 2:
        return None
    return data[2 : min(data[0], len(data)) & ~1].decode("utf-16-le", errors="replace")


def parse_languages(data: bytes) -> tuple[int, ...]:
    """String descriptor zero: the language ids."""
    if len(data) < 4 or data[1] != STRING:
        return ()
    end = min(data[0], len(data)) & ~1
    return struct.unpack_from(f"<{max(end - 2, 0) // 2}H", data, 2)


def total_length(data: bytes) -> int:
    """What the first bytes of a configuration descriptor announce for all of it, within our bounds; 0 if nothing."""
    if len(data) < 4 or data[1] != CONFIGURATION:
        return 0
    return int.from_bytes(data[2:4], "little")


@dataclass(slots=True)
class _Open:
    """An interface under construction; `wanted` endpoints were announced."""

    fields: tuple[int, ...]
    wanted: int
    endpoints: list[Endpoint] = field(default_factory=list)
    extra: bytearray = field(default_factory=bytearray)


class _Parser:
    def __init__(self, data: bytes, lenient: bool) -> None:
        self._data = data
        self._lenient = lenient
        self._found: dict[int, list[Interface]] = {}
        self._extra = bytearray()
        self._open: _Open | None = None

    def configuration(self) -> Configuration:
        data = self._data
        if len(data) < CONFIGURATION_LAYOUT.size or data[0] < CONFIGURATION_LAYOUT.size or data[1] != CONFIGURATION:
            self._wrong(f"no configuration descriptor: {data[: CONFIGURATION_LAYOUT.size].hex(' ') or 'nothing'}")
            return Configuration(0, 0, 0)
        length, _, total, announced, value, name, attributes, power = CONFIGURATION_LAYOUT.unpack_from(data)
        if total < length:
            self._wrong(f"the configuration announces {total} bytes in all, less than itself")
        elif len(data) < total:
            self._wrong(f"the configuration announces {total} bytes, there are {len(data)}")
        self._walk(length, min(total, len(data)))
        self._close()
        if len(self._found) != announced:
            self._wrong(f"the configuration announces {announced} interfaces, there are {len(self._found)}")
        return Configuration(
            value, attributes, power, name, tuple(map(tuple, self._found.values())), length, total, bytes(self._extra)
        )

    def _walk(self, at: int, end: int) -> None:
        # Every step goes forward by two bytes at least, so that zero lengths cannot hold us.
        while at < end:
            size = self._data[at]
            if size < 2 or at + size > end:
                self._wrong(f"a descriptor of {size} bytes at {at} of {end}")
                return
            if not self._take(self._data[at : at + size]):
                return
            at += size

    def _take(self, each: bytes) -> bool:
        """Add one descriptor; False ends a lenient parsing."""
        if each[1] == INTERFACE:
            return self._interface(each)
        if each[1] == ENDPOINT:
            return self._endpoint(each)
        if each[1] in (DEVICE, CONFIGURATION):
            return self._wrong(f"a descriptor of type {each[1]} inside a configuration")
        if self._open is None:
            self._extra += each
        elif self._open.endpoints:
            last = self._open.endpoints[-1]
            self._open.endpoints[-1] = Endpoint(
                last.address, last.attributes, last.max_packet_size, last.interval, last.refresh, last.synch_address,
                last.length, last.extra + each,
            )  # fmt: skip
        else:
            self._open.extra += each
        return True

    def _interface(self, each: bytes) -> bool:
        self._close()
        if len(each) < INTERFACE_LAYOUT.size:
            return self._wrong(f"an interface descriptor of {len(each)} bytes")
        length, _, number, alternate, endpoints, cls, sub, proto, name = INTERFACE_LAYOUT.unpack_from(each)
        known = self._found.get(number)
        if known is None and len(self._found) >= MAX_INTERFACES:
            return self._wrong(f"more than {MAX_INTERFACES} interfaces")
        if known is not None and len(known) >= MAX_ALTERNATES:
            return self._wrong(f"more than {MAX_ALTERNATES} alternate settings of interface {number}")
        if known is not None and any(other.alternate == alternate for other in known):
            return self._wrong(f"interface {number} has its alternate setting {alternate} twice")
        self._open = _Open((number, alternate, cls, sub, proto, name, length), endpoints)
        return True

    def _endpoint(self, each: bytes) -> bool:
        interface = self._open
        if interface is None:
            return self._wrong("an endpoint without an interface")
        if len(each) < ENDPOINT_LAYOUT.size:
            return self._wrong(f"an endpoint descriptor of {len(each)} bytes")
        length, _, address, attributes, packet, interval = ENDPOINT_LAYOUT.unpack_from(each)
        if not address & 0x0F or address & 0x70:
            return self._wrong(f"an endpoint with the address {address:#04x}")
        if len(interface.endpoints) >= min(interface.wanted, MAX_ENDPOINTS):
            return self._wrong(f"more endpoints than the {interface.wanted} that were announced")
        if any(other.address == address for other in interface.endpoints):
            return self._wrong(f"the endpoint {address:#04x} twice in one setting")
        refresh, synch = (each[7], each[8]) if len(each) >= AUDIO_ENDPOINT_SIZE else (0, 0)
        interface.endpoints.append(Endpoint(address, attributes, packet, interval, refresh, synch, length))
        return True

    def _close(self) -> None:
        """The interface under construction is complete."""
        done, self._open = self._open, None
        if done is None:
            return
        number, alternate, cls, sub, proto, name, length = done.fields
        if len(done.endpoints) < done.wanted:
            self._wrong(f"interface {number} announces {done.wanted} endpoints, there are {len(done.endpoints)}")
        self._found.setdefault(number, []).append(
            Interface(number, alternate, cls, sub, proto, name, tuple(done.endpoints), length, bytes(done.extra))
        )

    def _wrong(self, text: str) -> bool:
        if not self._lenient:
            raise DescriptorError(text)
        return False
