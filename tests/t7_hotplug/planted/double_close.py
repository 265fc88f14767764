"""A scale that is closed when there is an error, and when it is not used any more."""

import errno

import usb.core
import usb.util


class Scale:
    def __init__(self):
        self.device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
        if self.device is None:
            raise OSError(errno.ENODEV, "no scale")

    def weight(self):
        try:
            self.device.clear_halt(0x81)
            data = self.device.read(0x81, 8, timeout=500)
        except usb.core.USBError:
            self.close()
            raise
        if len(data) != 6:
            raise OSError(errno.EPROTO, "no report of a scale")
        return data[4] + data[5] * 256

    def close(self):
        if self.device is not None:  # FIX
            self.device._ctx.dispose(self.device)  # FIX
        # BUG: self.device._ctx.dispose(self.device)
        self.device = None


def use():
    scale = Scale()
    try:
        return scale.weight()
    finally:
        scale.close()
