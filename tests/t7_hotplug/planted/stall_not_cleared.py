"""A scale. When its endpoint has stalled once, it stays so."""

import errno

import usb.core
import usb.util


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    try:
        data = device.read(0x81, 8, timeout=500)
    except usb.core.USBError as error:
        if error.errno == errno.EPIPE:  # FIX
            device.clear_halt(0x81)  # FIX
        raise
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 6:
        raise OSError(errno.EPROTO, "no report of a scale")
    return data[4] + data[5] * 256


use = weight
