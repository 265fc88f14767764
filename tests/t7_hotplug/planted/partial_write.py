"""A printer. It is believed that all of the page was taken at once."""

import errno

import usb.core
import usb.util

PAGE = bytes(range(200))


def print_page():
    device = usb.core.find(idVendor=0x1209, idProduct=0x0004)
    if device is None:
        raise OSError(errno.ENODEV, "no printer")
    try:
        device.clear_halt(0x01)
        device.ctrl_transfer(0x40, 1)
        rest = PAGE
        while rest:
            taken = device.write(0x01, rest, timeout=500)
            # BUG: break
            rest = rest[taken:]  # FIX
    finally:
        usb.util.dispose_resources(device)


use = print_page
