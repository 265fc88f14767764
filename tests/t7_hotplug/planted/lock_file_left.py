"""A thermometer, with a lock file, so that two programs do not ask at the same time."""

import errno
import fcntl
import os
import tempfile

import usb.core
import usb.util


def celsius():
    device = usb.core.find(idVendor=0x1209, idProduct=0x7E57)
    if device is None:
        raise OSError(errno.ENODEV, "no thermometer")
    lock = os.open(tempfile.gettempdir() + f"/thermometer-{os.getuid()}.lock", os.O_CREAT | os.O_RDWR)
    fcntl.lockf(lock, fcntl.LOCK_EX)
    try:
        data = device.ctrl_transfer(0xC0, 1, 0, 0, 2)
    except usb.core.USBError:
        os.close(lock)  # FIX
        raise
    finally:
        usb.util.dispose_resources(device)
    os.close(lock)
    if len(data) != 2:
        raise OSError(errno.EPROTO, "a short answer")
    return int.from_bytes(data, "little") / 100


use = celsius
