"""A HID scale. The kernel's driver for HID has it already."""

import errno

import usb.core
import usb.util


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    try:
        if device.is_kernel_driver_active(0):  # FIX
            device.detach_kernel_driver(0)  # FIX
        try:
            device.get_active_configuration()
        except usb.core.USBError:
            device.set_configuration()
        device.clear_halt(0x81)
        data = device.read(0x81, 8, timeout=500)
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 6:
        raise OSError(errno.EPROTO, "no report of a scale")
    return data[4] + data[5] * 256


use = weight
