"""A scale. The kernel is expected to have configured it."""

import errno

import usb.core
import usb.util


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    try:
        try:  # FIX
            device.get_active_configuration()  # FIX
        except usb.core.USBError:  # FIX
            device.set_configuration()  # FIX
        interface = device.get_active_configuration()[(0, 0)]
        device.clear_halt(interface[0])
        data = interface[0].read(8, timeout=500)
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 6:
        raise OSError(errno.EPROTO, "no report of a scale")
    return data[4] + data[5] * 256


use = weight
