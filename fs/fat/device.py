"""The block service below the volume: one connection, its bounds and its errors.

Owns: the connection. Whatever goes wrong on it is an OSError: ENODEV when the device is gone, EIO else.
Must never: know what the bytes mean, or ask for anything outside the volume.
Called by: sectors.py (metadata), contents.py and ahead.py (the contents of files), volume.py (flush).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import trio

from udf import BlockClient, DeviceGone

Data = bytes | bytearray | memoryview

GOODBYE = 5.0  # seconds for the server to be done with the connection
_AT_ONCE = 8  # pieces of one file that are on their way at the same time


class Device:
    """The volume's bytes, by ranges."""

    def __init__(self, client: BlockClient) -> None:
        self._client = client
        self.size = client.size
        self.most = client.maximum
        self.block = client.block_size if 512 <= client.block_size <= 4096 else 512
        self.read_only = client.read_only
        self.gone = False  # nothing more will be read or written by this process
        self.writes = 0  # that were done

    def limit(self, size: int) -> None:
        """Keep everything within the first *size* bytes."""
        self.size = min(self.size, size)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or offset + size > self.size:
            raise OSError(errno.EIO, f"{size} bytes at {offset} are not on the volume")

    def _failure(self, exc: OSError | DeviceGone) -> OSError:
        if isinstance(exc, DeviceGone) or self._client.ended:
            self.gone = True
            return OSError(errno.ENODEV, "the device is gone")
        return OSError(errno.EIO, f"the device: {exc.strerror or exc}")

    async def read(self, offset: int, size: int, *, watch: bool = False) -> bytearray:
        """Exactly these bytes, which may be more than one command carries. *watch*: they are metadata."""
        self._check(offset, size)
        try:
            if size <= self.most:
                return await self._client.read(offset, size, watch=watch)
            whole = bytearray()
            while len(whole) < size:
                whole += await self._client.read(offset + len(whole), min(self.most, size - len(whole)), watch=watch)
            return whole
        except (OSError, DeviceGone) as exc:
            raise self._failure(exc) from None

    async def read_into(self, offset: int, target: memoryview) -> None:
        """The same into a buffer, which must not be used again if this fails."""
        self._check(offset, len(target))
        try:
            for at in range(0, len(target), self.most):
                await self._client.read_into(offset + at, target[at : at + self.most])
        except (OSError, DeviceGone) as exc:
            raise self._failure(exc) from None

    async def write(self, offset: int, data: Data, *, watch: bool = False) -> None:
        """Write all of them; they must not change any more."""
        self._check(offset, len(data))
        try:
            if len(data) <= self.most:
                await self._client.write(offset, data, watch=watch)
            else:
                view = memoryview(data)
                for at in range(0, len(view), self.most):
                    await self._client.write(offset + at, view[at : at + self.most], watch=watch)
        except (OSError, DeviceGone) as exc:
            raise self._failure(exc) from None
        self.writes += 1

    async def write_all(self, pieces: Sequence[tuple[int, Data]], *, watch: bool = False) -> None:
        """Write several ranges, in no order."""
        if len(pieces) == 1:
            await self.write(*pieces[0], watch=watch)
            return
        room = trio.CapacityLimiter(_AT_ONCE)
        failures: list[OSError] = []

        async def put(offset: int, data: Data) -> None:
            async with room:
                try:
                    await self.write(offset, data, watch=watch)
                except OSError as exc:
                    failures.append(exc)

        async with trio.open_nursery() as nursery:
            for offset, data in pieces:
                nursery.start_soon(put, offset, data)
        if failures:
            raise failures[0]

    async def zero(self, offset: int, size: int) -> None:
        """Write zeros; the space is not given up."""
        self._check(offset, size)
        try:
            await self._client.zero(offset, size, hole=False)
        except (OSError, DeviceGone) as exc:
            raise self._failure(exc) from None
        self.writes += 1

    async def flush(self) -> None:
        """Until everything that was written is durable."""
        try:
            await self._client.flush()
        except (OSError, DeviceGone) as exc:
            raise self._failure(exc) from None

    async def aclose(self) -> None:
        """End the connection; the claim is given up by then."""
        await self._client.aclose(GOODBYE)
