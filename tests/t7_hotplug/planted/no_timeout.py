"""A scale. The report is waited for without end."""

import errno

import usb.core
import usb.util


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    try:
        device.clear_halt(0x81)
        # BUG: data = device.read(0x81, 8, timeout=0)
        data = device.read(0x81, 8, timeout=500)  # FIX
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 6:
        raise OSError(errno.EPROTO, "no report of a scale")
    return data[4] + data[5] * 256


use = weight
