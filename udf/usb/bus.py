"""What a bus is to the supervisor: the devices that are there now, and a connection to one of them.

Owns: the interface that every bus implements, and what is known of a device. Must never: decide what becomes of a
device; that is the binder's, who is only told "look again".
Called by: the supervisor's device registry; udf/testing/usb_conformance.py checks implementations.
"""

from __future__ import annotations

import base64
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from udf.messages import DeviceSpec
from udf.usb.descriptors import MAX_CONFIGURATIONS, Configuration, parse_configuration

MAX_CONFIGURATION_BYTES = 32 * 1024  # of one device in all: what it says has to fit into one message to its driver
MAX_TEXT = 126  # characters: a string descriptor cannot have more


@dataclass(frozen=True, slots=True)
class BusDevice:
    """One arrival of a device. Its texts are as the device gave them: whoever shows them makes them harmless."""

    key: str  # this arrival: the same device plugged in again has another key
    busid: str  # the port it is in: 1-1.4
    busnum: int
    devnum: int
    speed: int  # usbip.Speed
    vendor: int
    product: int
    bcd_device: int
    device_class: tuple[int, int, int]  # class, subclass, protocol of the device itself
    device_descriptor: bytes  # empty if it could not be read: then nothing can drive it
    configurations: tuple[bytes, ...]
    configuration: int = 0  # the active one's value; 0: not configured
    manufacturer: str = ""
    product_name: str = ""
    serial: str = ""
    name: str = ""  # what the bus calls it, if it has names (emulated devices)

    @property
    def port(self) -> str:
        """Where it is plugged in."""
        return self.busid

    def active(self) -> Configuration | None:
        """The active configuration, or while there is none the first: it is what the device will be configured to."""
        return _active(self.configurations, self.configuration)

    def interfaces(self) -> tuple[tuple[int, tuple[int, int, int]], ...]:
        """Number and class triple of each interface of the active configuration, in its first setting."""
        active = self.active()
        return tuple((each[0].number, each[0].triple) for each in active.interfaces) if active is not None else ()

    def spec(self, interface: int | None = None) -> DeviceSpec:
        """What a driver host is told: of the whole device, or bound to one interface of it."""
        return DeviceSpec(
            bus="usbip",
            key=self.key,
            busnum=self.busnum,
            devnum=self.devnum,
            port=self.busid,
            speed=self.speed,
            device_descriptor=base64.b64encode(self.device_descriptor).decode(),
            configurations=[base64.b64encode(each).decode() for each in self.configurations],
            configuration=self.configuration,
            manufacturer=self.manufacturer,
            product=self.product_name,
            serial=self.serial,
            interface=interface,
        )


def spec_configuration(spec: DeviceSpec) -> Configuration | None:
    """As BusDevice.active(), from what a driver host is told."""
    return _active([base64.b64decode(each) for each in spec.configurations], spec.configuration)


def _active(configurations: Sequence[bytes], value: int) -> Configuration | None:
    parsed = [parse_configuration(each, lenient=True) for each in configurations]
    return next((each for each in parsed if each.value == value), parsed[0] if parsed else None)


def bounded(configurations: list[bytes]) -> tuple[bytes, ...]:
    """As many configurations as a device may show."""
    kept, room = [], MAX_CONFIGURATION_BYTES
    for each in configurations[:MAX_CONFIGURATIONS]:
        if len(each) > room:
            break
        room -= len(each)
        kept.append(each)
    return tuple(kept)


def clean(text: str) -> str:
    """A device's text, not longer than a device can say."""
    return text[:MAX_TEXT]


class Bus(ABC):
    """Devices that come and go. Everything runs in one trio loop."""

    name: str

    @abstractmethod
    async def run(
        self, changed: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep `devices` true until cancelled, calling `changed` after each change.

        Started when what was there at the beginning is known (or cannot be reached). Never raises for what a device
        or a server does.
        """

    @abstractmethod
    def devices(self) -> Mapping[str, BusDevice]:
        """What is present now, by key, in the order of arrival. Devices that we use count as present."""

    @abstractmethod
    async def open(self, key: str) -> socket.socket:
        """A connection to a device, past its import: it speaks URBs, and its end is the device's.

        Raises DeviceGone if the device is not there any more, OSError EBUSY if somebody uses it, another OSError if the
        bus cannot be reached. One connection at a time for each device; `devices` then tells its configuration anew.
        The bus keeps a duplicate to see the end, so that closing ends nothing: shut it down (which also fences a driver
        that has died, or should have).
        """
