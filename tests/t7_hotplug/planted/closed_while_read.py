"""A button, with a callback. Its thread still reads when the device is closed, and calls back later."""

import errno
import threading
import time

import usb.core
import usb.util


def listen(device, stop, pressed):
    while not stop.is_set():
        try:
            pressed(bytes(device.read(0x81, 8, timeout=50)))
        except usb.core.USBError as error:
            if error.errno != errno.ETIMEDOUT:
                pressed(error)
                break


def use():
    device = usb.core.find(idVendor=0x1209, idProduct=0x0006)
    if device is None:
        raise OSError(errno.ENODEV, "no button")
    presses, first, stop = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=listen, args=(device, stop, lambda press: (presses.append(press), first.set())))
    try:
        device.clear_halt(0x81)
        device.ctrl_transfer(0x40, 1)
        thread.start()
        time.sleep(0.002 * first.wait(0.2))
    finally:
        stop.set()
        if thread.ident:  # FIX
            thread.join()  # FIX
        usb.util.dispose_resources(device)
    for press in presses or [OSError(errno.ETIMEDOUT, "not pressed")]:
        if press != b"\x07":
            raise press if isinstance(press, OSError) else OSError(errno.EPROTO, "no press")
    return presses
