"""pyusb on one of our connections: unmodified `import usb.core` code sees the one device that the driver was given.

Owns: what libusb and usbfs keep for a device (claims by handle, the active configuration, alternate settings), and
their answers. Must never: show another device than this one, or be kinder than libusb: code that works here has to
work on the kernel's bus. Called by: pyusb, once install() has made it the answer to every default look-up.

Longer than other files, because pyusb wants all of it in one class: a method for each call of libusb, in its order.
Where usbfs or libusb has a peculiarity it is named beside the line that copies it. Time-outs are milliseconds here and
0 is none, as everywhere in pyusb.
"""

from __future__ import annotations

import array
import base64
import binascii
import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import usb.backend
import usb.backend.libusb0
import usb.backend.libusb1
import usb.backend.openusb
import usb.core

from udf.errors import ContractError
from udf.messages import DeviceSpec
from udf.usb import usbip
from udf.usb.client import Connection
from udf.usb.descriptors import INTERRUPT, ISOCHRONOUS, Configuration, Endpoint, parse_configuration, parse_device
from udf.usb.errors import Failure, usb_error
from udf.usb.urb import Buffer

STANDARD_TIMEOUT = 5000  # milliseconds for a standard request: USB_CTRL_SET_TIMEOUT
MAX_CONTROL = 4096  # libusb's MAX_CTRL_BUFFER_LENGTH on Linux
MAX_INTERFACE_NUMBER = 32  # USB_MAXINTERFACES: libusb refuses what does not fit into its bit set

# libusb's enum has no wireless speed, so that its numbers differ from the kernel's above HIGH.
_LIBUSB_SPEED: dict[int, int] = {
    usbip.Speed.LOW: 1,
    usbip.Speed.FULL: 2,
    usbip.Speed.HIGH: 3,
    usbip.Speed.SUPER: 4,
    usbip.Speed.SUPER_PLUS: 5,
}
_SET_CONFIGURATION, _SET_INTERFACE, _CLEAR_FEATURE, _SET_FEATURE = 9, 11, 1, 3
_ENDPOINT_HALT = 0
_HUB_PORT, _PORT_RESET = 0x23, 4  # usbipd takes a port's reset in a device's own stream for USBDEVFS_RESET


class _Handle:
    """An opened device: claims belong to it."""

    def __init__(self) -> None:
        self.claimed: set[int] = set()
        self.closed = False


class _Known(NamedTuple):
    """An endpoint that can be used now."""

    interface: int
    endpoint: Endpoint
    interval: int


class Backend(usb.backend.IBackend):  # type: ignore[misc]
    """The one device behind a connection."""

    def __init__(self, connection: Connection, spec: DeviceSpec) -> None:
        super().__init__()
        self._connection = connection
        self._spec = spec
        raw = _decode(spec.device_descriptor)
        self._raw_device = raw
        self._device = parse_device(raw)
        self._configurations = [parse_configuration(_decode(each), lenient=True) for each in spec.configurations]
        self._token = SimpleNamespace(spec=spec)  # what pyusb passes around as "the device"
        self._lock = threading.RLock()
        self._owners: dict[int, _Handle] = {}
        self._configuration = spec.configuration
        # Bound to one function: the interfaces of others are as if their drivers had claimed them.
        self._only = self._function(spec.interface)
        self._alternates: dict[int, int] = {}
        self._endpoints: dict[int, _Known] = {}  # of the active configuration and settings
        self._find_endpoints()

    def _function(self, interface: int | None) -> frozenset[int] | None:
        active = self._active() or next(iter(self._configurations), None)
        return None if interface is None else active.function(interface) if active else frozenset((interface,))

    def _may_have(self, number: int) -> bool:
        return self._only is None or number in self._only

    # ---- what the device is

    def enumerate_devices(self) -> Iterator[Any]:
        """The device, as long as it is there."""
        return iter(() if self._connection.gone else (self._token,))

    def get_parent(self, dev: Any) -> None:
        """Hubs are not shown."""
        return

    def get_device_descriptor(self, dev: Any) -> SimpleNamespace:
        """The 14 fields, and where the device is plugged in."""
        raw, device, spec = self._raw_device, self._device, self._spec
        ports = _port_numbers(spec.port)
        return SimpleNamespace(
            bLength=raw[0],
            bDescriptorType=raw[1],
            bcdUSB=device.usb_version,
            bDeviceClass=device.device_class,
            bDeviceSubClass=device.subclass,
            bDeviceProtocol=device.protocol,
            bMaxPacketSize0=device.max_packet_size0,
            idVendor=device.vendor,
            idProduct=device.product,
            bcdDevice=device.version,
            iManufacturer=device.manufacturer_index,
            iProduct=device.product_index,
            iSerialNumber=device.serial_index,
            # As many as can be shown: pyusb iterates to this number and nothing in it catches an IndexError.
            bNumConfigurations=min(device.configurations, len(self._configurations)),
            bus=spec.busnum,
            address=spec.devnum,
            speed=_LIBUSB_SPEED.get(spec.speed, 0),
            port_number=ports[-1] if ports else 0,
            port_numbers=ports or None,
        )

    def get_configuration_descriptor(self, dev: Any, config: int) -> SimpleNamespace:
        """By index; IndexError ends an iteration. Counts are those of what is there, as libusb corrects them."""
        found = _at(self._configurations, config, "configuration")
        return SimpleNamespace(
            bLength=found.length,
            bDescriptorType=2,
            wTotalLength=found.total_length,
            bNumInterfaces=len(found.interfaces),
            bConfigurationValue=found.value,
            iConfiguration=found.name_index,
            bmAttributes=found.attributes,
            bMaxPower=found.max_power,
            extra_descriptors=list(found.extra),
        )

    def get_interface_descriptor(self, dev: Any, intf: int, alt: int, config: int) -> SimpleNamespace:
        """By indexes."""
        alternates = _at(_at(self._configurations, config, "configuration").interfaces, intf, "interface")
        found = _at(alternates, alt, "alternate setting")
        return SimpleNamespace(
            bLength=found.length,
            bDescriptorType=4,
            bInterfaceNumber=found.number,
            bAlternateSetting=found.alternate,
            bNumEndpoints=len(found.endpoints),
            bInterfaceClass=found.interface_class,
            bInterfaceSubClass=found.subclass,
            bInterfaceProtocol=found.protocol,
            iInterface=found.name_index,
            extra_descriptors=list(found.extra),
        )

    def get_endpoint_descriptor(self, dev: Any, ep: int, intf: int, alt: int, config: int) -> SimpleNamespace:
        """By indexes."""
        alternates = _at(_at(self._configurations, config, "configuration").interfaces, intf, "interface")
        found = _at(_at(alternates, alt, "alternate setting").endpoints, ep, "endpoint")
        return SimpleNamespace(
            bLength=found.length,
            bDescriptorType=5,
            bEndpointAddress=found.address,
            bmAttributes=found.attributes,
            wMaxPacketSize=found.max_packet_size,
            bInterval=found.interval,
            bRefresh=found.refresh,
            bSynchAddress=found.synch_address,
            extra_descriptors=list(found.extra),
        )

    # ---- handles and claims

    def open_device(self, dev: Any) -> _Handle:
        """A new handle."""
        self._check()
        return _Handle()

    def close_device(self, dev_handle: _Handle) -> None:
        """Drop its claims. Never raises: pyusb calls it from finalizers."""
        with self._lock:
            for number in list(dev_handle.claimed):
                try:
                    self._release(dev_handle, number)
                except usb.core.USBError:
                    pass
            dev_handle.closed = True

    def claim_interface(self, dev_handle: _Handle, intf: int) -> None:
        """For this handle; a second claim of the same handle is nothing new, one of another is EBUSY."""
        if not 0 <= intf < MAX_INTERFACE_NUMBER:
            raise usb_error(Failure.INVALID_PARAM)
        with self._lock:
            self._check(dev_handle)
            failure = self._claim(dev_handle, intf)
            if failure is not None:
                raise usb_error(failure)

    def _claim(self, handle: _Handle, number: int) -> Failure | None:
        active = self._active()
        if active is None or not any(alternates[0].number == number for alternates in active.interfaces):
            return Failure.NOT_FOUND
        if self._owners.get(number, handle) is not handle or not self._may_have(number):
            return Failure.BUSY
        self._owners[number] = handle
        handle.claimed.add(number)
        return None

    def release_interface(self, dev_handle: _Handle, intf: int) -> None:
        """ENOENT if this handle has not claimed it."""
        with self._lock:
            if intf not in dev_handle.claimed:
                raise usb_error(Failure.NOT_FOUND)
            self._release(dev_handle, intf)
            self._check()

    def _release(self, handle: _Handle, number: int) -> None:
        handle.claimed.discard(number)
        self._owners.pop(number, None)
        # The kernel puts an interface that nobody drives any more back to its first setting.
        if self._alternates.pop(number, 0) and not self._connection.gone:
            self._find_endpoints()
            self._standard(0x01, _SET_INTERFACE, 0, number)

    # ---- configurations and settings

    def set_configuration(self, dev_handle: _Handle, config_value: int) -> None:
        """EBUSY while any interface is claimed, ENOENT if there is no such configuration."""
        with self._lock:
            self._check(dev_handle)
            if self._only is not None:
                # Other drivers have the rest of the device: what is set already is set, anything else is not ours.
                if config_value != self._configuration:
                    raise usb_error(Failure.BUSY)
                return
            if self._owners:
                raise usb_error(Failure.BUSY)
            if config_value == -1:
                config_value = 0  # libusb's way to say "not configured"
            if config_value and all(each.value != config_value for each in self._configurations):
                raise usb_error(Failure.NOT_FOUND)
            self._standard(0x00, _SET_CONFIGURATION, config_value, 0)
            self._configured(config_value)

    def get_configuration(self, dev_handle: _Handle) -> int:
        """The active one's value, 0 if there is none; known, not asked for (the kernel keeps it in sysfs)."""
        self._check(dev_handle)
        return self._configuration

    def set_interface_altsetting(self, dev_handle: _Handle, intf: int, altsetting: int) -> None:
        """ENOENT if the handle has not claimed the interface or it has no such setting."""
        with self._lock:
            self._check(dev_handle)
            active = self._active()
            if intf not in dev_handle.claimed or active is None or active.interface(intf, altsetting) is None:
                raise usb_error(Failure.NOT_FOUND)
            try:
                self._standard(0x01, _SET_INTERFACE, altsetting, intf)
            except usb.core.USBError as exc:
                # The kernel forgives a device whose interface has one setting only that it refuses the request.
                single = sum(each.number == intf for each in active.all_interfaces()) == 1
                if not (single and exc.backend_error_code == Failure.PIPE):
                    raise
            self._alternates[intf] = altsetting
            self._find_endpoints()

    def _active(self) -> Configuration | None:
        return next((each for each in self._configurations if each.value == self._configuration), None)

    def _configured(self, value: int) -> None:
        self._configuration = value
        self._alternates.clear()
        self._find_endpoints()

    def _find_endpoints(self) -> None:
        active = self._active()
        self._endpoints = {
            endpoint.address: _Known(interface.number, endpoint, self._interval(endpoint))
            for interface in (active.all_interfaces() if active is not None else ())
            if interface.alternate == self._alternates.get(interface.number, 0)
            for endpoint in interface.endpoints
        }

    # ---- transfers

    def bulk_write(self, dev_handle: _Handle, ep: int, intf: int, data: Buffer, timeout: int) -> int:
        """The number of bytes that were taken."""
        return self._transfer(dev_handle, ep & 0x7F, data, timeout)

    def bulk_read(self, dev_handle: _Handle, ep: int, intf: int, buff: Buffer, timeout: int) -> int:
        """Into `buff`; a short packet ends it."""
        return self._transfer(dev_handle, ep | 0x80, buff, timeout)

    intr_write = iso_write = bulk_write
    intr_read = iso_read = bulk_read

    def _transfer(self, handle: _Handle, address: int, data: Buffer, timeout: int) -> int:
        known = self._endpoints.get(address)
        if known is None or known.interface not in handle.claimed:
            known = self._checked(handle, address)
        if known.endpoint.type != ISOCHRONOUS:
            return self._connection.move(address, data, timeout, known.interval)
        lengths = _packet_lengths(memoryview(data).nbytes, known.endpoint.packet_bytes)
        seconds = timeout / 1000 if timeout else None
        done = self._connection.transfer(address, data, timeout=seconds, interval=known.interval, packets=lengths)
        return sum(actual for actual, _ in done.packets)

    def _checked(self, handle: _Handle, address: int) -> _Known:
        """The endpoint must exist and its interface not be another's; the kernel claims silently what nobody has."""
        with self._lock:
            self._check(handle)
            known = self._endpoints.get(address)
            # libusb knows no better word for what usbfs says to a URB that it does not take (ENOENT, EBUSY).
            if known is None or self._claim(handle, known.interface) is not None:
                raise usb_error(Failure.IO)
            return known

    def _interval(self, endpoint: Endpoint) -> int:
        """In frames, or in microframes from high speed on, where the descriptor has an exponent."""
        if endpoint.type not in (INTERRUPT, ISOCHRONOUS):
            return 0
        if endpoint.type == ISOCHRONOUS or self._spec.speed >= usbip.Speed.HIGH:
            return 1 << min(max(endpoint.interval, 1), 16) - 1
        return max(endpoint.interval, 1)

    def ctrl_transfer(
        self,
        dev_handle: _Handle,
        bmRequestType: int,
        bRequest: int,
        wValue: int,
        wIndex: int,
        data: array.array[int],
        timeout: int,
    ) -> int:
        """On endpoint 0. What is addressed to an interface that another handle has claimed is refused, as by usbfs."""
        length = len(data) * data.itemsize
        if length > MAX_CONTROL:
            raise usb_error(Failure.INVALID_PARAM)
        self._check(dev_handle)
        self._check_recipient(dev_handle, bmRequestType, wIndex)
        seconds = timeout / 1000 if timeout else None
        done = self._connection.control(bmRequestType, bRequest, wValue, wIndex, data, seconds)
        if (bmRequestType, bRequest) == (0x00, _SET_CONFIGURATION):
            with self._lock:
                self._configured(wValue & 0xFF)
        elif (bmRequestType, bRequest) == (0x01, _SET_INTERFACE):
            with self._lock:
                self._alternates[wIndex & 0xFF] = wValue & 0xFF
                self._find_endpoints()
        return done.actual

    def _check_recipient(self, handle: _Handle, request_type: int, index: int) -> None:
        # usbfs: check_ctrlrecip(). Vendor requests are not looked at.
        recipient = request_type & 0x1F
        if request_type & 0x60 == 0x40 or recipient not in (1, 2):
            return
        number: int | None = index & 0xFF
        if recipient == 2:
            found = self._endpoints.get(index & 0xFF)
            number = found.interface if found else None
        if number is not None and self._owners.get(number, handle) is not handle:
            raise usb_error(Failure.IO)
        if number is not None and not self._may_have(number):
            raise usb_error(Failure.IO)

    def clear_halt(self, dev_handle: _Handle, ep: int) -> None:
        """End an endpoint's stall and set its toggle to 0."""
        with self._lock:
            self._check(dev_handle)
            found = self._endpoints.get(ep)
            if found is None:
                raise usb_error(Failure.NOT_FOUND)
            if self._claim(dev_handle, found.interface) is not None:
                raise usb_error(Failure.OTHER)
            self._standard(0x02, _CLEAR_FEATURE, _ENDPOINT_HALT, ep)

    def reset_device(self, dev_handle: _Handle) -> None:
        """A bus reset; then the configuration is restored and every interface has its first setting."""
        with self._lock:
            self._check(dev_handle)
            if self._only is not None or any(owner is not dev_handle for owner in self._owners.values()):
                raise usb_error(Failure.OTHER)  # usbfs: EACCES, it would be reset under other drivers' hands
            self.reset()

    # ---- for drivers that use no pyusb: no handles, no claims

    @property
    def connection(self) -> Connection:
        """The transfers themselves."""
        return self._connection

    def endpoint(self, address: int) -> Endpoint | None:
        """What the active configuration and settings have at an address."""
        known = self._endpoints.get(address)
        return known.endpoint if known is not None else None

    def interval(self, address: int) -> int:
        """As a URB says it; 0 where there is none to say."""
        known = self._endpoints.get(address)
        return known.interval if known is not None else 0

    def configure(self) -> None:
        """As the kernel does for each device that appears: if it is not configured yet, its first configuration."""
        with self._lock:
            if not self._configuration and self._configurations:
                value = self._configurations[0].value
                self._standard(0x00, _SET_CONFIGURATION, value, 0)
                self._configured(value)

    def reset(self) -> None:
        """A bus reset; the configuration is restored."""
        ports = _port_numbers(self._spec.port)
        with self._lock:
            try:
                self._standard(_HUB_PORT, _SET_FEATURE, _PORT_RESET, ports[-1] if ports else 0)
            except usb.core.USBError as exc:
                # usbipd resets the device and then passes the request on; a device is no hub, and says so.
                if exc.backend_error_code != Failure.PIPE:
                    raise
            if self._configuration:
                self._standard(0x00, _SET_CONFIGURATION, self._configuration, 0)
            self._configured(self._configuration)

    # ---- kernel drivers: there is no kernel on this bus

    def is_kernel_driver_active(self, dev_handle: _Handle, intf: int) -> bool:
        """No."""
        self._check(dev_handle)
        return False

    def detach_kernel_driver(self, dev_handle: _Handle, intf: int) -> None:
        """ENOENT: there is none, or (usbfs itself) none that counts."""
        self._check(dev_handle)
        raise usb_error(Failure.NOT_FOUND)

    def attach_kernel_driver(self, dev_handle: _Handle, intf: int) -> None:
        """ENOENT: none was detached."""
        self._check(dev_handle)
        raise usb_error(Failure.NOT_FOUND)

    # ---- inside

    def _check(self, handle: _Handle | None = None) -> None:
        if self._connection.gone:
            raise usb_error(Failure.NO_DEVICE)
        if handle is not None and handle.closed:
            raise usb_error(Failure.INVALID_PARAM)

    def _standard(self, request_type: int, request: int, value: int, index: int) -> None:
        self._connection.control(request_type, request, value, index, b"", STANDARD_TIMEOUT / 1000)


def install(connection: Connection, spec: DeviceSpec) -> Backend:
    """Make the device the only one that pyusb finds in this process, whichever backend a program asks for."""
    backend = Backend(connection, spec)
    usb.backend.libusb1._lib_object = backend  # its get_backend() returns this to those that have imported it already
    for module in (usb.backend.libusb1, usb.backend.libusb0, usb.backend.openusb):
        _ORIGINALS.setdefault(module, module.get_backend)
        module.get_backend = _always(backend)
    return backend


def uninstall() -> None:
    """Undo install(), for tests: a driver host never does."""
    for module, original in _ORIGINALS.items():
        module.get_backend = original
    _ORIGINALS.clear()
    usb.backend.libusb1._lib_object = None


_ORIGINALS: dict[Any, Callable[..., Any]] = {}


def _always(backend: Backend) -> Callable[..., Backend]:
    def get_backend(find_library: Callable[[str], str | None] | None = None) -> Backend:
        return backend

    return get_backend


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise ContractError(f"a descriptor is not base64: {exc}") from exc


def _port_numbers(port: str) -> tuple[int, ...]:
    """1-1.4 is port 4 of the hub at port 1 of bus 1. At most seven, USB's depth."""
    numbers = port.partition("-")[2].split(".")[:7]
    return tuple(int(each) & 0xFF for each in numbers) if all(each.isdecimal() for each in numbers) else ()


def _packet_lengths(total: int, packet: int) -> list[int]:
    if not packet:
        raise usb_error(Failure.IO)
    count = math.ceil(total / packet)
    if count > usbip.MAX_ISO_PACKETS:
        raise usb_error(Failure.INVALID_PARAM)
    return [min(packet, total - n * packet) for n in range(count)]


def _at(sequence: Any, index: int, what: str) -> Any:
    if not 0 <= index < len(sequence):
        raise IndexError(f"Invalid {what} index {index}")
    return sequence[index]
