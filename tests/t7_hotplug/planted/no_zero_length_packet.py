"""A display. A picture of whole packets is never complete for it."""

import errno

import usb.core
import usb.util

PICTURE = bytes(128)


def show():
    device = usb.core.find(idVendor=0x1209, idProduct=0x0004)
    if device is None:
        raise OSError(errno.ENODEV, "no display")
    try:
        device.clear_halt(0x01)
        device.ctrl_transfer(0x40, 1)
        rest = PICTURE
        while rest:
            rest = rest[device.write(0x01, rest, timeout=500) :]
        if len(PICTURE) % 64 == 0:  # FIX
            device.write(0x01, b"", timeout=500)  # FIX
    finally:
        usb.util.dispose_resources(device)


use = show
