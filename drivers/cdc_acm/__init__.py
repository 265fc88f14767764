# /// udf
# kind = "usb"
# interface = 1
# class = "CdcAcm"
# description = "USB serial ports and modems (CDC-ACM)"
# provides = "terminal"
# names = "serial"
# match = [{ class = 0x02, subclass = 0x02 }]
#
# [option.format]
# type = "str"
# default = "8N1"
# help = "data bits, parity (N, O, E, M, S) and stop bits; a program's stop bits and speed go before it"
# ///
"""cdc_acm: a serial port as a pseudo-terminal.

What a program sets on its terminal goes to the device: speed, stop bits, B0 (hang up), HUPCL, and opening and closing
(DTR and RTS). What a pseudo-terminal does not let through: data bits and parity (the kernel forces 8 bits without
parity: the option `format` says what the line has), breaks, and the modem lines as TIOCMGET and TIOCMSET know them.

From the device inwards: functional (descriptors, line coding, notifications, pure), port (the device's requests), line
(the terminal), driver (both together).
"""

from __future__ import annotations

from .driver import CdcAcm

__all__ = ["CdcAcm"]
