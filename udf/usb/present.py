"""A device of a USB/IP server as a BusDevice, whichever way we heard of it.

Owns: keys, and the bounds of what is kept of a device. Must never: do I/O. Called by: remote.py.
"""

from __future__ import annotations

from udf.usb import descriptors, usbip
from udf.usb.bus import BusDevice, bounded, clean
from udf.usb.operations import Description, Watched

Identity = tuple[str, int, int, int, int, int]  # what in a list tells one device from another


def key_of(busid: str, arrival: int, life: int = 0) -> str:
    """A key that no other arrival has: a server that was started again counts its arrivals from the beginning."""
    return f"{busid}@{arrival}" + (f"+{life}" if life else "")


def identity_of(record: usbip.DeviceRecord) -> Identity:
    """A device that was plugged in again has another device number."""
    return record.busid, record.busnum, record.devnum, record.vendor, record.product, record.bcd_device


def listed(key: str, record: usbip.DeviceRecord, description: Description) -> BusDevice:
    """From a list, and what the device said itself."""
    return BusDevice(
        key=key,
        busid=record.busid,
        busnum=record.busnum,
        devnum=record.devnum,
        speed=record.speed,
        vendor=record.vendor,
        product=record.product,
        bcd_device=record.bcd_device,
        device_class=record.device_class,
        device_descriptor=description.device_descriptor,
        configurations=description.configurations,
        configuration=record.configuration,
        manufacturer=description.manufacturer,
        product_name=description.product,
        serial=description.serial,
    )


def watched(each: Watched, life: int = 0) -> BusDevice:
    """From an event; a device whose descriptor is none is shown without."""
    try:
        parsed = descriptors.parse_device(each.device_descriptor)
        raw = each.device_descriptor[: descriptors.DEVICE_LAYOUT.size]
    except descriptors.DescriptorError:
        parsed, raw = descriptors.Device(*(0,) * 12), b""
    return BusDevice(
        key=key_of(each.busid, each.arrival, life),
        busid=each.busid,
        busnum=each.busnum,
        devnum=each.devnum,
        speed=each.speed,
        vendor=parsed.vendor,
        product=parsed.product,
        bcd_device=parsed.version,
        device_class=(parsed.device_class, parsed.subclass, parsed.protocol),
        device_descriptor=raw,
        configurations=bounded(each.configurations),
        configuration=each.configuration,
        manufacturer=clean(each.manufacturer),
        product_name=clean(each.product),
        serial=clean(each.serial),
        name=clean(each.name),
    )
