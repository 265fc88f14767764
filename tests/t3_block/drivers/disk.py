"""A block driver on udf's own server: a file as the medium, with or without a volatile cache, with planned deaths.

Arguments: the link, the file, then words: `cache` (what is written is in the file only after a flush; it dies with
this process), `die:VERB:N[:done]` (SIGKILL at the Nth call of a verb, or of `any`, before it is done or after, but
never answered), `hang:VERB:N`, `fail:VERB:N`, `late:VERB:N` (by 0.7 s), `gone:VERB:N` (the device is gone from there
on), `poison:OFFSET` (dies whenever this is read), `deadly:OFFSET` (written), `bad:OFFSET` (EIO for both), `min:N`
(block size), `size:N` (not the file's), `lun:N` (so many further units of 1 MiB in memory), `slow:SECONDS`, `slot`
(SIGUSR1 puts a second unit in or takes it out).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys

import trio

from udf import BlockDriver, DeviceGone
from udf.block.server import serve_link


class Disk(BlockDriver):
    def __init__(self, path: str, words: list[str]) -> None:
        self.fd = os.open(path, os.O_RDWR)
        options = dict(word.split(":", 1) for word in words if ":" in word)
        self.size = int(options.get("size", os.fstat(self.fd).st_size))
        self.block_size = int(options.get("min", 512))
        self.luns = int(options.get("lun", 0))
        self.slow = float(options.get("slow", 0))
        self.poison = int(options.get("poison", -1))
        self.deadly = int(options.get("deadly", -1))
        self.bad = int(options.get("bad", -1))
        self.events = [
            word.split(":") for word in words if word.split(":")[0] in ("die", "hang", "fail", "gone", "late")
        ]
        self.gone = False
        self.counts: dict[str, int] = {}
        self.cache: dict[int, bytes] | None = {} if "cache" in words else None

    async def units(self) -> dict[str, BlockDriver]:
        found: dict[str, BlockDriver] = {"": self}
        for number in range(1, self.luns + 1):
            found[f"lun{number}"] = self._lun(number)
        return found

    def _lun(self, number: int) -> BlockDriver:
        known = self.__dict__.setdefault("_luns", {})
        return known.setdefault(number, Ram())

    async def _happens(self, verb: str, when: str) -> None:
        await self._plan(verb, when)
        if self.gone:
            raise DeviceGone("planned")

    async def _plan(self, verb: str, when: str) -> None:
        if when == "before":
            for counted in (verb, "any"):
                self.counts[counted] = self.counts.get(counted, 0) + 1
            if self.slow:
                await trio.sleep(self.slow)
        for event in self.events:
            if event[1] in (verb, "any") and int(event[2]) == self.counts[event[1]]:
                if event[0] == "die" and (event[3:] == ["done"]) == (when == "after"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if event[0] == "hang" and when == "before":
                    await trio.sleep_forever()
                if event[0] == "late" and when == "before":
                    await trio.sleep(0.7)
                if event[0] == "gone" and when == "before":
                    self.gone = True
                if event[0] == "fail" and when == "before":
                    raise OSError(errno.EIO, "planned")

    def _check(self, offset: int, size: int) -> None:
        if offset <= self.bad < offset + size:
            raise OSError(errno.EIO, "bad")

    async def read(self, offset: int, size: int) -> bytes:
        if offset <= self.poison < offset + size:
            os.kill(os.getpid(), signal.SIGKILL)
        await self._happens("read", "before")
        self._check(offset, size)
        data = bytearray(os.pread(self.fd, size, offset).ljust(size, b"\0"))
        if self.cache:
            for at in range(offset, offset + size, 512):
                if at in self.cache:
                    data[at - offset : at - offset + 512] = self.cache[at]
        await self._happens("read", "after")
        return bytes(data)

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if offset <= self.deadly < offset + len(data):
            os.kill(os.getpid(), signal.SIGKILL)
        await self._happens("write", "before")
        self._check(offset, len(data))
        if self.cache is None:
            os.pwrite(self.fd, data, offset)
        else:
            for at in range(0, len(data), 512):
                self.cache[offset + at] = bytes(data[at : at + 512])
        await self._happens("write", "after")

    async def flush(self) -> None:
        await self._happens("flush", "before")
        if self.cache:
            for at, data in self.cache.items():
                os.pwrite(self.fd, data, at)
            self.cache.clear()
        await self._happens("flush", "after")

    async def trim(self, offset: int, size: int) -> None:
        await self._happens("trim", "before")

    async def zero(self, offset: int, size: int) -> None:
        await self.write(offset, bytes(size))


class Ram(BlockDriver):
    size = 1 << 20

    def __init__(self) -> None:
        self.data = bytearray(self.size)

    async def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.data[offset : offset + len(data)] = data


async def serve(link: socket.socket, disk: Disk, slot: bool) -> None:
    async with trio.open_nursery() as nursery:
        if slot:
            with trio.open_signal_receiver(signal.SIGUSR1) as signals:
                await nursery.start(serve_link, link, disk)
                async for _ in signals:
                    disk.luns = 1 - disk.luns
                    disk.units_changed()
        await serve_link(link, disk)


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    trio.run(serve, link, Disk(sys.argv[2], sys.argv[3:]), "slot" in sys.argv)


main()
