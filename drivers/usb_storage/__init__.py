# /// udf
# kind = "usb"
# interface = 1
# class = "UsbStorage"
# description = "USB sticks, disks and card readers (Bulk-Only Transport)"
# provides = "block"
# names = "disk"
# deadline = 60.0
# match = [
#     { class = 0x08, subclass = 0x06, protocol = 0x50 },
#     { class = 0x08, subclass = 0x05, protocol = 0x50 },
#     { class = 0x08, subclass = 0x02, protocol = 0x50 },
# ]
#
# [option.max_transfer]
# type = "size"
# default = 0
# help = "most bytes in one command; 0: what devices of this speed are known to take"
#
# [option.queue]
# type = "bool"
# default = true
# help = "queue the transfers of a command at the host; false: one after another"
# ///
"""usb_storage: mass storage over Bulk-Only Transport and SCSI.

From the programs inwards: driver (block units, in the host's loop), engine (the one thread that talks to the device),
unit (a LUN: retries, media, flushes), probe (what a LUN is), scsi and sense (commands, answers and errors as pure
values), transport (one command over the bus, and recovery), wire (CBW, CSW and the turns of a command, pure), pipes
(transfers).
"""

from __future__ import annotations

from .driver import UsbStorage

__all__ = ["UsbStorage"]
