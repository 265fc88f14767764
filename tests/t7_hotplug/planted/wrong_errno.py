"""A thermometer. Whatever goes wrong is said to be a time-out."""

import errno

import usb.core
import usb.util


def celsius():
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    if device is None:
        raise OSError(errno.ENODEV, "no thermometer")
    try:
        data = device.ctrl_transfer(0xC0, 1, 0, 0, 2)
    # BUG: except usb.core.USBError as error:
    except usb.core.USBTimeoutError as error:  # FIX
        raise TimeoutError(errno.ETIMEDOUT, "the thermometer does not answer") from error
    finally:
        usb.util.dispose_resources(device)
    if len(data) != 2:
        raise OSError(errno.EPROTO, "a short answer")
    return int.from_bytes(data, "little") / 100


use = celsius
