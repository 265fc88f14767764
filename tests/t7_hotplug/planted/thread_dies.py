"""A scale that a thread reads. An error ends the thread, and nobody learns of it."""

import errno
import queue
import threading

import usb.core
import usb.util


def read(device, reports):
    # BUG: if True:
    try:  # FIX
        device.clear_halt(0x81)
        reports.put(device.read(0x81, 8, timeout=500))
    except usb.core.USBError as error:  # FIX
        reports.put(error)  # FIX


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    reports = queue.Queue()
    thread = threading.Thread(target=read, args=(device, reports), name="scale", daemon=True)
    thread.start()
    thread.join()
    usb.util.dispose_resources(device)
    data = reports.get(timeout=0.2)
    if isinstance(data, OSError):
        raise data
    if len(data) != 6:
        raise OSError(errno.EPROTO, "no report of a scale")
    return data[4] + data[5] * 256


use = weight
