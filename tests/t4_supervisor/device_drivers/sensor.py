# /// udf
# kind = "usb"
# interface = 1
# class = "Sensor"
# match = [{ vendor = 0x1209, product = 0x7e57 }]
# ///
"""A thermometer as a file, and two files that show from outside what the driver does."""

import os

from udf import Attr, UsbDriver


class Sensor(UsbDriver):
    async def start(self):
        assert self.device.idVendor == 0x1209
        await self.usb.control_in(0xC0, 1, length=2)

    async def stop(self):
        print("stopped in order", flush=True)

    async def list(self, path):
        return ["celsius", "die", "slow"]

    async def stat(self, path):
        return Attr("dir") if path == "/" else Attr(size=6)

    async def read(self, path, offset, size):
        if path == "/die":
            os._exit(3)
        if path == "/slow":
            await self.usb.gone.wait()
        raw = await self.usb.control_in(0xC0, 1, length=2)
        return b"%5.2f\n" % (int.from_bytes(raw, "little", signed=True) / 100)
