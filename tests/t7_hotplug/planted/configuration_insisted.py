"""A scale. It is configured as in pyusb's tutorial, whoever uses the device's other interface."""

import errno

import usb.core
import usb.util


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    try:
        # BUG: device.set_configuration()
        try:  # FIX
            device.get_active_configuration()  # FIX
        except usb.core.USBError:  # FIX
            device.set_configuration()  # FIX
        device.clear_halt(0x81)
        data = device.read(0x81, 8, timeout=500)
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 6:
        raise OSError(errno.EPROTO, "no report of a scale")
    return data[4] + data[5] * 256


use = weight
