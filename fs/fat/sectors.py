"""Metadata in memory: pages of the volume that hold tables and directories, as they are on the device.

Owns: the pages, which of them are kept (the last used, at most `limit`), and that each is read once however many ask.
Must never: hold the contents of files, or a change that is not on its way to the device (change.py pins those pages).
Called by: table.py and stream.py to read, change.py to write.

Whatever is read here is metadata to the block service too (watched): it has to be the same after a re-attach.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from .device import Device

PAGE = 4096
LIMIT = 4096  # pages: 16 MiB


class Sectors:
    """The cache of one volume."""

    def __init__(self, device: Device, limit: int = LIMIT) -> None:
        self._device = device
        self._limit = limit
        self._pages: OrderedDict[int, bytearray] = OrderedDict()
        self._loading: dict[int, trio.Event] = {}
        self.pinned: dict[int, bytes] = {}  # pages with a change that is not on the device yet, as they were before

    def peek(self, number: int) -> bytearray | None:
        """A page that is here already."""
        page = self._pages.get(number)
        if page is not None:
            self._pages.move_to_end(number)
        return page

    async def page(self, number: int) -> bytearray:
        """One page; the last one of a volume may be shorter."""
        page = self._pages.get(number)
        while page is None:
            await self.load(number, number + 1)
            page = self._pages.get(number)
        self._pages.move_to_end(number)
        return page

    async def load(self, first: int, stop: int) -> None:
        """Bring pages in, neighbours by one command. A long range may push its own beginning out again."""
        at = first
        while at < stop:
            if at in self._pages:
                at += 1
            elif at in self._loading:
                await self._loading[at].wait()
                at += 1
            else:
                end = at + 1
                while end < stop and end not in self._pages and end not in self._loading:
                    end += 1
                await self._read(at, end)
                at = end

    async def _read(self, first: int, stop: int) -> None:
        event = trio.Event()
        for number in range(first, stop):
            self._loading[number] = event
        try:
            offset = first * PAGE
            data = await self._device.read(offset, min(stop * PAGE, self._device.size) - offset, watch=True)
            for number in range(first, stop):
                at = (number - first) * PAGE
                self._pages[number] = data[at : at + PAGE]
        finally:
            for number in range(first, stop):
                del self._loading[number]
            event.set()
        self._shrink()

    def _shrink(self) -> None:
        while len(self._pages) > self._limit + len(self.pinned):
            number, page = self._pages.popitem(last=False)
            if number in self.pinned:
                self._pages[number] = page

    async def read(self, offset: int, size: int) -> bytes:
        """Bytes of any range."""
        number, at = divmod(offset, PAGE)
        page = self._pages.get(number)
        if page is not None and at + size <= PAGE:
            self._pages.move_to_end(number)
            return bytes(page[at : at + size])
        stop = (offset + size - 1) // PAGE + 1
        await self.load(number, stop)
        parts = []
        while size > 0:
            number, at = divmod(offset, PAGE)
            part = bytes((await self.page(number))[at : at + size])
            if not part:
                raise EOFError  # the device has checked the range: this cannot be
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def fill(self, offset: int, data: bytes) -> None:
        """These bytes were written past this cache: what is in memory of them is made the same."""
        end = offset + len(data)
        for number in range(offset // PAGE, (end - 1) // PAGE + 1):
            page = self._pages.get(number)
            if page is not None:
                begin, stop = max(offset, number * PAGE), min(end, (number + 1) * PAGE)
                page[begin - number * PAGE : stop - number * PAGE] = data[begin - offset : stop - offset]

    def forget_all(self) -> None:
        """Drop everything: it may not be what the device has."""
        self._pages.clear()
        self.pinned.clear()
