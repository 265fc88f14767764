"""Sticks that lie: the least that answers Bulk-Only Transport, with every answer open to be spoilt.

The good stick is udf.testing.devices.storage; these are for what no good device does.
"""

from __future__ import annotations

import struct
from typing import Any

from udf.testing.devices import BulkIn, BulkOut, Configuration, Device, Interface, Setup, Stall

FIXED = bytes((0x70, 0, 0, 0, 0, 0, 0, 10))


class Stick(Device):
    """A small disk in memory. A test replaces what it wants to be odd."""

    vendor, product = 0x1209, 0x5714
    configurations = [Configuration([Interface(0x08, 0x06, 0x50, endpoints=[BulkIn(1), BulkOut(2)])])]
    removable = False
    version = 4
    blocks, block_size = 64, 512
    luns = 1

    def __init__(self, **identity: Any) -> None:
        super().__init__(**identity)
        self.disk = bytearray(min(self.blocks * self.block_size, 1 << 20))
        self.sense = (0, 0, 0)
        self.pending: list[tuple[int, int, int]] = []  # senses to report, one for each command
        self.log: list[int] = []  # operation codes
        self.resets = 0
        self._out: tuple[int, bytes, int] | None = None
        self._got = b""

    # --- transport ---

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        if setup.request == 0xFE:
            return bytes((self.luns - 1,))
        if setup.request == 0xFF:
            self.resets += 1
            self._out, self._got = None, b""
            self.clear(0x81)
            return None
        raise Stall

    def on_out(self, endpoint: int, data: bytes) -> None:
        if self._out is not None:
            self._got += data
            tag, cdb, length = self._out
            if len(self._got) >= length:
                self._out = None
                self.finish(tag, length, 0, self.write_command(cdb, self._got))
            return
        if len(data) != 31 or data[:4] != b"USBC":
            self.halt(0x81, wedge=True)
            raise Stall
        _, tag, length, flags, _lun, size, cdb = struct.unpack("<4sIIBBB16s", data)
        cdb = cdb[:size]
        self.log.append(cdb[0])
        if length and not flags & 0x80:
            self._out, self._got = (tag, cdb, length), b""
            return
        answer = self.read_command(cdb)
        if answer is None:
            if length:
                self.halt(0x81)
            self.push_csw(tag, length, 1)
            return
        self.answer(tag, length, answer)

    def answer(self, tag: int, length: int, answer: bytes) -> None:
        answer = answer[:length]
        if length:
            self.push(1, answer, zlp=len(answer) < length)
        self.push_csw(tag, length - len(answer), 0)

    def finish(self, tag: int, length: int, residue: int, is_done: bool) -> None:
        self.push_csw(tag, residue if is_done else length, 0 if is_done else 1)

    def push_csw(self, tag: int, residue: int, status: int) -> None:
        self.push(1, struct.pack("<4sIIB", b"USBS", tag, residue, status))

    # --- commands ---

    def refuse(self, key: int, asc: int, ascq: int = 0) -> None:
        self.sense = (key, asc, ascq)

    def check(self, cdb: bytes) -> bool:
        """Whether something is to be reported instead of doing the command."""
        if self.pending and cdb[0] not in (0x03, 0x12):
            self.refuse(*self.pending.pop(0))
            return True
        return False

    def read_command(self, cdb: bytes) -> bytes | None:
        code = cdb[0]
        if code == 0x03:
            key, asc, ascq = self.sense
            self.sense = (0, 0, 0)
            return bytes((0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0))
        if self.check(cdb):
            return None
        if code == 0x12 and not cdb[1]:
            return self.inquiry()
        if code == 0x00:
            return b""
        if code == 0x25:
            return struct.pack(">II", min(self.blocks - 1, 0xFFFFFFFF), self.block_size)
        if code == 0x9E:
            return struct.pack(">QI20x", self.blocks - 1, self.block_size)
        if code == 0x28:
            lba, count = struct.unpack(">xxIxHx", cdb)
            return self.read_blocks(lba, count)
        if code == 0x35:
            return b""
        self.refuse(5, 0x20)
        return None

    def inquiry(self) -> bytes:
        text = b"Tests   Stick           1.00"
        return bytes((0, 0x80 if self.removable else 0, self.version, 2, 31, 0, 0, 0)) + text

    def read_blocks(self, lba: int, count: int) -> bytes | None:
        return bytes(self.disk[lba * self.block_size : (lba + count) * self.block_size])

    def write_command(self, cdb: bytes, data: bytes) -> bool:
        if self.check(cdb):
            return False
        if cdb[0] != 0x2A:
            self.refuse(5, 0x20)
            return False
        (lba,) = struct.unpack_from(">I", cdb, 2)
        self.disk[lba * self.block_size : lba * self.block_size + len(data)] = data
        return True
