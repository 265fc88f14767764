# /// udf
# kind = "fs"
# interface = 1
# class = "Window"
# source = "block"
# exclusive = true
#
# [option.die_at_start]
# type = "bool"
# default = false
# help = "never get as far as serving"
# ///
"""A volume as a filesystem of one file, its first MiB: what is written is on the device, what is synced is flushed."""

import os

import trio

from udf import Attr, BlockClient, FsDriver

SIZE = 1 << 20


class Window(FsDriver):
    def __init__(self, source, die_at_start=False):
        if die_at_start:
            os._exit(3)
        self._source = source
        self._client = None
        self._opening = trio.Lock()

    async def client(self):
        async with self._opening:
            if self._client is None:
                self._client = await BlockClient.open(self._source, claim=True, timeout=60)
        return self._client

    async def list(self, path):
        return ["data", "pid"]

    async def stat(self, path):
        return Attr("dir") if path == "/" else Attr(size=SIZE if path == "/data" else 20)

    async def read(self, path, offset, size):
        if path == "/pid":
            return b"%20d" % os.getpid()
        return bytes(await (await self.client()).read(offset, min(size, SIZE - offset)))

    async def write(self, path, offset, data):
        await (await self.client()).write(offset, data)

    async def fsync(self, path):
        await (await self.client()).flush()
