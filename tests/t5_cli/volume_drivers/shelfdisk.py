# /// udf
# kind = "fs"
# interface = 1
# class = "ShelfDisk"
# description = "a volume of one file: the last 4 KiB of its block device"
# source = "block"
# filesystems = ["xfs"]
# exclusive = true
# open = "driver"
#
# [option.gid]
# type = "int"
# default = 0
#
# [option.umask]
# type = "str"
# default = "022"
#
# [option.fail]
# type = "bool"
# default = false
# ///
"""A volume whose whole content is one file, `file`, so that tests can see what reaches a device."""

import os

from udf import Attr, BlockClient, FsDriver, UserError

SIZE = 4096


class ShelfDisk(FsDriver):
    def __init__(self, source: str, gid: int = 0, umask: str = "022", fail: bool = False) -> None:
        if fail:
            raise UserError("it was asked to fail")
        self._source, self._gid, self._umask = source, gid, int(umask, 8)
        self._client: BlockClient | None = None

    async def _open(self) -> BlockClient:
        if self._client is None:
            self._client = await BlockClient.open(self._source, claim=True)
        return self._client

    async def list(self, path: str) -> list[str]:
        return ["file"]

    async def stat(self, path: str) -> Attr:
        mode = 0o666 & ~self._umask
        if path == "/":
            return Attr("dir", mode=mode | 0o111, uid=os.getuid(), gid=self._gid)
        if path != "/file":
            raise FileNotFoundError(path)
        return Attr(size=SIZE, mode=mode, uid=os.getuid(), gid=self._gid)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        client = await self._open()
        size = min(size, SIZE - offset)
        return bytes(await client.read(client.size - SIZE + offset, size)) if size > 0 else b""

    async def truncate(self, path: str, size: int) -> None:
        pass  # it is always as long

    async def write(self, path: str, offset: int, data: bytes) -> int:
        client = await self._open()
        await client.write(client.size - SIZE + offset, data[: SIZE - offset])
        return min(len(data), SIZE - offset)

    async def fsync(self, path: str) -> None:
        await (await self._open()).flush()
