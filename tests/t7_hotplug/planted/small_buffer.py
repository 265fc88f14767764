"""A meter. There is room for the names that are known, not for a packet."""

import errno

import usb.core
import usb.util


def use():
    device = usb.core.find(idVendor=0x1209, idProduct=0x0003)
    if device is None:
        raise OSError(errno.ENODEV, "no meter")
    try:
        device.clear_halt(0x01)
        device.clear_halt(0x81)
        device.ctrl_transfer(0x40, 5)
        device.write(0x01, b"*IDN?\n", timeout=500)
        # BUG: answer = bytes(device.read(0x81, 16, timeout=500))
        answer = bytes(device.read(0x81, 512, timeout=500))  # FIX
    finally:
        usb.util.dispose_resources(device)
    if not answer.startswith(b"UDF,") or not answer.endswith(b"\n"):
        raise OSError(errno.EPROTO, "half an answer")
    return answer.decode().strip()
