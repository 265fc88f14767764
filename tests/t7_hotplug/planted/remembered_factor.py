"""A thermometer. Its factor is read once, whichever thermometer comes after."""

import errno

import usb.core
import usb.util

known = {}


def ask(device, request, size):
    data = device.ctrl_transfer(0xC0, request, 0, 0, size)
    if len(data) != size:
        raise OSError(errno.EPROTO, "a short answer")
    return int.from_bytes(data, "little")


def use():
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    if device is None:
        raise OSError(errno.ENODEV, "no thermometer")
    try:
        known.clear()  # FIX
        if "factor" not in known:
            known["factor"] = ask(device, 2, 1)
        return ask(device, 1, 2) * known["factor"] / 100
    finally:
        usb.util.dispose_resources(device)
