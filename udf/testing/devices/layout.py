"""How a device describes itself: descriptors as data.

Owns: the dataclasses that a model is declared with, and their bytes (USB 2.0 chapter 9.6, IAD). Must never: do I/O, or
know what the device does. Called by: models and device.py.

    Configuration([Interface(0xFF, endpoints=[BulkIn(1), BulkOut(2), InterruptIn(3, interval=4)])])

Interfaces are numbered as they stand. Sizes that are not given are the usual ones for the device's speed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from udf.usb.usbip import Speed

DEVICE, CONFIGURATION, STRING, INTERFACE, ENDPOINT, QUALIFIER, OTHER_SPEED, _POWER, _OTG, _DEBUG, ASSOCIATION = range(
    1, 12
)

_ENDPOINT = struct.Struct("<BBBBHB")
_INTERFACE = struct.Struct("<9B")
_CONFIGURATION = struct.Struct("<BBHBBBBB")


class Kind(IntEnum):
    """bmAttributes of an endpoint, bits 1..0."""

    CONTROL = 0
    ISO = 1
    BULK = 2
    INTERRUPT = 3


_SIZES = {  # full, high and super speed
    Kind.BULK: (64, 512, 1024),
    Kind.INTERRUPT: (64, 64, 64),
    Kind.ISO: (1023, 1024, 1024),
}


@dataclass(frozen=True)
class Endpoint:
    """One endpoint. `size` is the biggest packet; 0: what is usual for the kind and the device's speed."""

    address: int
    kind: Kind
    size: int = 0
    interval: int = 0
    extra: bytes = b""  # class-specific descriptors that follow it

    def packet_size(self, speed: Speed) -> int:
        """wMaxPacketSize."""
        if self.size:
            return self.size
        if self.kind is Kind.INTERRUPT and speed is Speed.LOW:
            return 8
        full, high, fast = _SIZES[self.kind]
        return fast if speed >= Speed.SUPER else high if speed is Speed.HIGH else full

    def pack(self, speed: Speed) -> bytes:
        """The descriptor, and at SuperSpeed its companion."""
        data = _ENDPOINT.pack(7, ENDPOINT, self.address, self.kind, self.packet_size(speed), self.interval)
        if speed >= Speed.SUPER:
            data += struct.pack("<BBBBH", 6, 0x30, 0, 0, 0)
        return data + self.extra


def BulkIn(number: int, size: int = 0, *, extra: bytes = b"") -> Endpoint:
    """A bulk endpoint to the host."""
    return Endpoint(0x80 | number, Kind.BULK, size, 0, extra)


def BulkOut(number: int, size: int = 0, *, extra: bytes = b"") -> Endpoint:
    """A bulk endpoint from the host."""
    return Endpoint(number, Kind.BULK, size, 0, extra)


def InterruptIn(number: int, size: int = 0, *, interval: int = 1, extra: bytes = b"") -> Endpoint:
    """An interrupt endpoint to the host."""
    return Endpoint(0x80 | number, Kind.INTERRUPT, size, interval, extra)


def InterruptOut(number: int, size: int = 0, *, interval: int = 1, extra: bytes = b"") -> Endpoint:
    """An interrupt endpoint from the host."""
    return Endpoint(number, Kind.INTERRUPT, size, interval, extra)


def IsoIn(number: int, size: int = 0, *, interval: int = 1, extra: bytes = b"") -> Endpoint:
    """An isochronous endpoint to the host."""
    return Endpoint(0x80 | number, Kind.ISO, size, interval, extra)


def IsoOut(number: int, size: int = 0, *, interval: int = 1, extra: bytes = b"") -> Endpoint:
    """An isochronous endpoint from the host."""
    return Endpoint(number, Kind.ISO, size, interval, extra)


@dataclass(frozen=True)
class Association:
    """`count` interfaces, from the one that carries this, are one function."""

    count: int
    device_class: int
    subclass: int = 0
    protocol: int = 0


@dataclass(frozen=True)
class Interface:
    """One interface in its setting 0; `alternates` are its settings 1, 2, …"""

    device_class: int
    subclass: int = 0
    protocol: int = 0
    endpoints: Sequence[Endpoint] = ()
    alternates: Sequence[Interface] = ()
    extra: bytes = b""  # class-specific descriptors, between the interface's and its endpoints'
    name: str | None = None
    association: Association | None = None

    @property
    def triple(self) -> tuple[int, int, int]:
        """Class, subclass, protocol."""
        return self.device_class, self.subclass, self.protocol

    def setting(self, alternate: int) -> Interface | None:
        """The interface as it is in one of its settings."""
        if alternate == 0:
            return self
        return self.alternates[alternate - 1] if alternate <= len(self.alternates) else None


@dataclass(frozen=True)
class Configuration:
    """One configuration; its value is what SET_CONFIGURATION chooses it by."""

    interfaces: Sequence[Interface]
    value: int = 1
    name: str | None = None
    self_powered: bool = False
    remote_wakeup: bool = False
    milliamperes: int = 100
    extra: bytes = b""  # between the configuration's descriptor and the first interface's


@dataclass
class Strings:
    """String descriptors in the order in which they were asked for; 0 is the list of languages."""

    texts: list[str] = field(default_factory=list)
    languages: tuple[int, ...] = (0x0409,)

    def index(self, text: str | None) -> int:
        """The number of a string; 0 for none."""
        if text is None:
            return 0
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def pack(self, index: int, language: int) -> bytes | None:
        """The descriptor, or None if there is no such string in that language."""
        if index == 0:
            body = struct.pack(f"<{len(self.languages)}H", *self.languages)
        elif 0 < index <= len(self.texts) and language in (0, *self.languages):
            body = self.texts[index - 1].encode("utf-16-le", "surrogatepass")[:252]  # bLength is one byte
        else:
            return None
        return bytes((len(body) + 2, STRING)) + body


def pack_configuration(configuration: Configuration, strings: Strings, speed: Speed) -> bytes:
    """A configuration with all that follows it."""
    body = configuration.extra + b"".join(
        _interface(number, each, strings, speed) for number, each in enumerate(configuration.interfaces)
    )
    attributes = 0x80 | configuration.self_powered << 6 | configuration.remote_wakeup << 5
    power = configuration.milliamperes // (8 if speed >= Speed.SUPER else 2)
    head = _CONFIGURATION.pack(
        9, CONFIGURATION, 9 + len(body), len(configuration.interfaces), configuration.value,
        strings.index(configuration.name), attributes, min(power, 255),
    )  # fmt: skip
    return head + body


def _interface(number: int, interface: Interface, strings: Strings, speed: Speed) -> bytes:
    data = b""
    if (group := interface.association) is not None:
        data = struct.pack(
            "<8B", 8, ASSOCIATION, number, group.count, group.device_class, group.subclass, group.protocol, 0
        )
    for alternate, each in settings(interface):
        head = _INTERFACE.pack(
            9, INTERFACE, number, alternate, len(each.endpoints), *each.triple, strings.index(each.name)
        )
        data += head + each.extra + b"".join(endpoint.pack(speed) for endpoint in each.endpoints)
    return data


def settings(interface: Interface) -> Iterator[tuple[int, Interface]]:
    """All settings of an interface with their numbers."""
    yield 0, interface
    yield from enumerate(interface.alternates, 1)
