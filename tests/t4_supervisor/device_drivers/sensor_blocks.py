# /// udf
# kind = "usb"
# interface = 1
# class = "SensorBlocks"
# provides = "block"
# match = [{ vendor = 0x1209, product = 0x7e57 }]
# ///
"""A thermometer as a disk of 1 MiB, each block of which is the temperature; writes go nowhere."""

from udf import BlockUnit, UsbDriver


class Unit(BlockUnit):
    size = 1 << 20

    def __init__(self, usb):
        self.usb = usb

    async def read(self, offset, size):
        raw = await self.usb.control_in(0xC0, 1, length=2)
        return raw * (size // 2)

    async def write(self, offset, data):
        await self.usb.control_in(0xC0, 1, length=2)

    async def flush(self):
        await self.usb.control_in(0xC0, 1, length=2)


class SensorBlocks(UsbDriver):
    def __init__(self):
        self.unit = Unit(self.usb)

    async def units(self):
        return {"": self.unit}
