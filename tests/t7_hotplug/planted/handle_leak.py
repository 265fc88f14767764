"""A thermometer. Those that are in use are in a table, where an error leaves them."""

import errno

import usb.core
import usb.util

in_use = {}


def close(device):
    in_use.pop((device.bus, device.address), None)
    usb.util.dispose_resources(device)


def celsius():
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    if device is None:
        raise OSError(errno.ENODEV, "no thermometer")
    in_use[device.bus, device.address] = device
    try:
        data = device.ctrl_transfer(0xC0, 1, 0, 0, 2)
    except usb.core.USBError:
        close(device)  # FIX
        raise
    close(device)
    if len(data) != 2:
        raise OSError(errno.EPROTO, "a short answer")
    return int.from_bytes(data, "little") / 100


use = celsius
