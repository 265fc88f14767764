"""A scale. Errors are taken for a bad contact, and it is tried again for as long as there are any."""

import errno

import usb.core
import usb.util


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    try:
        # BUG: while True:
        for attempt in (1, 2, 3):  # FIX
            try:
                device.clear_halt(0x81)
                data = device.read(0x81, 8, timeout=500)
                if len(data) == 6:
                    return data[4] + data[5] * 256
            except usb.core.USBError:
                if attempt == 3:  # FIX
                    raise  # FIX
                # BUG: pass
        raise OSError(errno.EPROTO, "no report of a scale")  # FIX
    finally:
        usb.util.dispose_resources(device)


use = weight
