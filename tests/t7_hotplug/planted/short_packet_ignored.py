"""A thermometer. Two bytes are asked for, and it is believed that two come."""

import errno

import usb.core
import usb.util


def celsius():
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    if device is None:
        raise OSError(errno.ENODEV, "no thermometer")
    try:
        data = device.ctrl_transfer(0xC0, 1, 0, 0, 2)
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 2:  # FIX
        raise OSError(errno.EPROTO, "a short answer")  # FIX
    return int.from_bytes(data, "little") / 100


use = celsius
