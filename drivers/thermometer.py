# /// udf
# kind = "usb"
# interface = 1
# class = "Thermometer"
# match = [{ vendor = 0x1209, product = 0x7e57 }]
# ///
"""A USB thermometer: `cat /run/udf/dev/thermometer0/celsius`."""

from udf import Attr, UsbDriver


class Thermometer(UsbDriver):
    """One file with the temperature, which the device is asked for each time the file is opened and read."""

    async def list(self, path: str) -> list[str]:
        return ["celsius"]

    async def stat(self, path: str) -> Attr:
        if path not in ("/", "/celsius"):
            raise FileNotFoundError(path)
        return Attr("dir") if path == "/" else Attr(size=None)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        low, high = await self.usb.control_in(0xC0, 1, length=2)  # hundredths of a degree
        return b"%.2f\n" % (int.from_bytes((low, high), "little", signed=True) / 100)
