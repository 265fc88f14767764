"""A thermometer, the one with the serial number "inside". The first one that is found will do."""

import errno

import usb.core
import usb.util


def is_inside(device):
    try:
        return device.serial_number == "inside"
    except ValueError:  # pyusb's word for a device that does not tell
        return False


def celsius():
    # BUG: device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57, custom_match=is_inside)  # FIX
    if device is None:
        raise OSError(errno.ENODEV, "no thermometer inside")
    try:
        data = device.ctrl_transfer(0xC0, 1, 0, 0, 2)
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 2:
        raise OSError(errno.EPROTO, "a short answer")
    return int.from_bytes(data, "little") / 100


use = celsius
