"""A meter. An answer that came too late is taken for the answer to the next question."""

import errno

import usb.core
import usb.util


def ask(device, question):
    device.write(0x01, question + b"\n", timeout=500)
    answer = bytes(device.read(0x81, 512, timeout=500))
    if not answer.endswith(b"\n"):
        raise OSError(errno.EPROTO, "half an answer")
    return answer.decode().strip()


def use():
    device = usb.core.find(idVendor=0x1209, idProduct=0x0003)
    if device is None:
        raise OSError(errno.ENODEV, "no meter")
    try:
        device.clear_halt(0x01)
        device.clear_halt(0x81)
        device.ctrl_transfer(0x40, 5)  # forget old answers  # FIX
        return ask(device, b"*IDN?"), ask(device, b"READ?")
    finally:
        usb.util.dispose_resources(device)
