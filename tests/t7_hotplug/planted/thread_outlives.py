"""A scale that a thread reads. It goes on and on when there is nothing left to read from."""

import errno
import queue
import threading
import time

import usb.core
import usb.util


def read(device, reports):
    while True:
        try:
            device.clear_halt(0x81)
            data = device.read(0x81, 8, timeout=500)
        except usb.core.USBError as error:
            reports.put(error)
            # BUG: time.sleep(0.01); continue
            break  # FIX
        reports.put(data)
        if len(data) == 6:
            break
        time.sleep(0.001)
    usb.util.dispose_resources(device)


def weight():
    device = usb.core.find(idVendor=0x0922, idProduct=0x8003)
    if device is None:
        raise OSError(errno.ENODEV, "no scale")
    reports = queue.Queue()
    threading.Thread(target=read, args=(device, reports), name="scale", daemon=True).start()
    while isinstance(data := reports.get(timeout=5), usb.core.USBError) is False:
        if len(data) == 6:
            return data[4] + data[5] * 256
    raise data


use = weight
