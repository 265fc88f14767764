# /// udf
# kind = "usb"
# interface = 1
# class = "SensorLine"
# provides = "terminal"
# match = [{ vendor = 0x1209, product = 0x7e57 }]
# ///
"""A thermometer that answers each line that is written to a terminal; `die` ends its process."""

import errno
import os

import trio

from udf import UsbDriver


class SensorLine(UsbDriver):
    async def serve(self, terminal):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.end_with_device)
            await self.answer(terminal)

    async def end_with_device(self):
        await self.usb.gone.wait()
        os._exit(1)

    async def answer(self, terminal):
        os.set_blocking(terminal, False)
        while True:
            await trio.lowlevel.wait_readable(terminal)
            try:
                line = os.read(terminal, 1024)
            except OSError as exc:
                if exc.errno not in (errno.EIO, errno.EAGAIN):
                    raise
                await trio.sleep(0.01)  # nobody has it open
                continue
            if line.startswith(b"die"):
                os._exit(3)
            raw = await self.usb.control_in(0xC0, 1, length=2)
            os.write(terminal, b"%.2f\n" % (int.from_bytes(raw, "little", signed=True) / 100))
