"""A scale. What was claimed is given back when the program ends: too late for the next one who wants it."""

import atexit
import errno

import usb.core
import usb.util


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    atexit.register(usb.util.dispose_resources, device)
    try:
        usb.util.claim_interface(device, 0)
        device.clear_halt(0x81)
        data = device.read(0x81, 8, timeout=500)
        if len(data) != 6:
            raise OSError(errno.EPROTO, "no report of a scale")
    except OSError:
        usb.util.dispose_resources(device)  # FIX
        raise
    usb.util.dispose_resources(device)
    return data[4] + data[5] * 256


use = weight
