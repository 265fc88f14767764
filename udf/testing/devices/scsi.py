"""A disk's SCSI side: commands in, data and sense out (SPC-4, SBC-3; what Linux, Windows and macOS send to a stick).

Owns: one logical unit: its medium, sense data, unit attentions, mode pages. Must never: know how commands travel, or
move data outside of the medium. Called by: storage.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from udf.testing.devices import scsi_blocks
from udf.testing.devices import scsi_pages as pages
from udf.testing.devices.medium import Medium
from udf.testing.devices.scsi_words import (
    ILLEGAL,
    INQUIRY,
    INVALID_FIELD,
    INVALID_OPCODE,
    INVALID_PARAMETER,
    MEDIUM_CHANGED,
    MODE_SELECT_10,
    MODE_SENSE_10,
    NO_MEDIUM,
    NOT_READY,
    OUT_OF_RANGE,
    POWER_ON,
    REPORT_LUNS,
    REQUEST_SENSE,
    SYNCHRONIZE_16,
    WRITE_PROTECTED,
    Check,
    Plan,
    carefully,
    cdb_length,
    reply,
)


@dataclass
class Unit:
    """One logical unit."""

    number: int
    medium: Medium | None
    vendor: str
    product: str
    serial: str
    block_size: int = 512
    removable: bool = True
    protected: bool = False
    max_transfer: int = 0  # blocks of one READ or WRITE; 0: no limit
    trims: bool = True
    bad: tuple[tuple[int, int], ...] = ()  # first and last block of what cannot be read or written
    units: int = 1
    ejected: Medium | None = None  # what START STOP UNIT has put out; it can load it again
    prevented: bool = False
    stopped: bool = False
    caching: bool = True
    sense: tuple[int, int, int] = (0, 0, 0)
    information: int | None = None
    attentions: list[tuple[int, int, int]] = field(default_factory=list)

    # --- life ---

    def power_on(self) -> None:
        """As after a plug or a reset of the bus."""
        self.attentions = [POWER_ON]
        self.sense, self.information = (0, 0, 0), None
        self.prevented = self.stopped = False
        self.caching = True
        if self.medium is None and self.ejected is not None:
            self.medium, self.ejected = self.ejected, None

    def power_off(self) -> None:
        """What the medium's cache holds is gone."""
        for each in (self.medium, self.ejected):
            if each is not None:
                each.lose_power()

    def change(self, medium: Medium | None) -> None:
        """Somebody takes the medium out, or puts another one in."""
        for old in (self.medium, self.ejected):
            if old is not None:
                old.close()
        self.medium, self.ejected = medium, None
        self.stopped = False
        if medium is not None and MEDIUM_CHANGED not in self.attentions:
            self.attentions.append(MEDIUM_CHANGED)

    @property
    def blocks(self) -> int:
        """Of the medium; 0 without one."""
        return self.medium.size // self.block_size if self.medium is not None else 0

    # --- commands ---

    def execute(self, cdb: bytes) -> Plan:
        """Begin a command; Check if it is refused (keep it with `failed`)."""
        opcode = cdb[0]
        handler = _COMMANDS.get(opcode)
        if opcode not in (INQUIRY, REQUEST_SENSE, REPORT_LUNS):
            if self.attentions:
                raise Check(*self.attentions.pop(0))
            self.sense, self.information = (0, 0, 0), None
        if handler is None:
            raise Check(*INVALID_OPCODE)
        return handler(self, cdb)

    def failed(self, check: Check) -> None:
        """Remember why, for REQUEST SENSE."""
        self.sense, self.information = check.sense, check.information

    def ready(self) -> Medium:
        """The medium, if commands can reach it."""
        if self.medium is None:
            raise Check(*NO_MEDIUM)
        if self.stopped:
            raise Check(NOT_READY, 0x04, 0x02)
        return self.medium

    def writable(self) -> Medium:
        """The medium, if it can be written."""
        medium = self.ready()
        if self.protected or medium.read_only:
            raise Check(*WRITE_PROTECTED)
        return medium

    def unit_ready(self, _cdb: bytes) -> Plan:
        """00."""
        self.ready()
        return Plan()

    def request_sense(self, cdb: bytes) -> Plan:
        """03: and forget it."""
        if self.sense == (0, 0, 0) and self.attentions:
            self.sense = self.attentions.pop(0)
        elif self.sense == (0, 0, 0) and self.medium is None:
            self.sense = NO_MEDIUM
        data = pages.sense(*self.sense, self.information, descriptors=bool(cdb[1] & 1))
        self.sense, self.information = (0, 0, 0), None
        return reply(data, cdb[4])

    def inquiry(self, cdb: bytes) -> Plan:
        """12: what it is, and vital product data."""
        allocation = int.from_bytes(cdb[3:5], "big")
        if cdb[1] & ~1 or (cdb[2] and not cdb[1]):
            raise Check(*INVALID_FIELD)
        data = pages.vital(self, cdb[2]) if cdb[1] & 1 else pages.standard(self)
        if data is None:
            raise Check(*INVALID_FIELD)
        return reply(data, allocation)

    def report_luns(self, cdb: bytes) -> Plan:
        """A0."""
        allocation = int.from_bytes(cdb[6:10], "big")
        if allocation < 16 or cdb[2] > 2:
            raise Check(*INVALID_FIELD)
        luns = b"".join(struct.pack(">BB6x", 0, number) for number in range(self.units))
        return reply(struct.pack(">I4x", len(luns)) + luns, allocation)

    def read_capacity_10(self, cdb: bytes) -> Plan:
        """25."""
        self.ready()
        if int.from_bytes(cdb[2:6], "big") and not cdb[8] & 1:
            raise Check(*INVALID_FIELD)
        return reply(struct.pack(">II", min(max(self.blocks - 1, 0), 0xFFFFFFFF), self.block_size), 8)

    def service_action_in(self, cdb: bytes) -> Plan:
        """9E/10: READ CAPACITY(16)."""
        if cdb[1] & 0x1F != 0x10:
            raise Check(*INVALID_FIELD)
        self.ready()
        provisioning = 0xC0 if self.trims else 0
        data = struct.pack(">QIBBBB16x", max(self.blocks - 1, 0), self.block_size, 0, 0, provisioning, 0)
        return reply(data, int.from_bytes(cdb[10:14], "big"))

    def read_format_capacities(self, cdb: bytes) -> Plan:
        """23."""
        if self.medium is None:
            row = struct.pack(">II", 0xFFFFFFFF, 3 << 24 | self.block_size)
        else:
            row = struct.pack(">II", min(self.blocks, 0xFFFFFFFF), 2 << 24 | self.block_size)
        return reply(struct.pack(">3xB", len(row)) + row, int.from_bytes(cdb[7:9], "big"))

    def mode_sense(self, cdb: bytes) -> Plan:
        """1A and 5A."""
        ten = cdb[0] == MODE_SENSE_10
        if cdb[2] >> 6 == 3:
            raise Check(ILLEGAL, 0x39, 0)  # nothing is saved
        body = pages.mode(self, cdb[2] & 0x3F, cdb[3], changeable=cdb[2] >> 6 == 1)
        if body is None:
            raise Check(*INVALID_FIELD)
        descriptor = b""
        if not cdb[1] & 0x08 and self.medium is not None:
            descriptor = struct.pack(">II", min(self.blocks, 0xFFFFFFFF), self.block_size)
        flags = (0x80 if self.protected or (self.medium is not None and self.medium.read_only) else 0) | 0x10
        if ten:
            head = struct.pack(">HBBHH", 6 + len(descriptor) + len(body), 0, flags, 0, len(descriptor))
            return reply(head + descriptor + body, int.from_bytes(cdb[7:9], "big"))
        head = struct.pack(">BBBB", 3 + len(descriptor) + len(body), 0, flags, len(descriptor))
        return reply(head + descriptor + body, cdb[4])

    def mode_select(self, cdb: bytes) -> Plan:
        """15 and 55: the write cache can be switched."""
        ten = cdb[0] == MODE_SELECT_10
        length = int.from_bytes(cdb[7:9], "big") if ten else cdb[4]
        if not cdb[1] & 0x10 or cdb[1] & 1:
            raise Check(*INVALID_FIELD)
        received = bytearray()

        def finish() -> None:
            self._select(bytes(received), 8 if ten else 4)

        return Plan(from_host=length, write=lambda _position, data: received.extend(data), finish=finish)

    def _select(self, data: bytes, header: int) -> None:
        if not data:
            return
        if len(data) < header:
            raise Check(ILLEGAL, 0x1A, 0)
        position = header + (int.from_bytes(data[6:8], "big") if header == 8 else data[3])
        if position > len(data):
            raise Check(ILLEGAL, 0x1A, 0)
        while position < len(data):
            page = data[position : position + 2]
            size = page[1] + 2 if len(page) == 2 else 0
            if not size or position + size > len(data):
                raise Check(ILLEGAL, 0x1A, 0)
            mine = pages.mode(self, page[0] & 0x3F, 0, changeable=False) if page[0] & 0x3F != 0x3F else None
            if mine is None or len(mine) != size:
                raise Check(*INVALID_PARAMETER)
            if page[0] & 0x3F == pages.CACHING:
                self._switch_cache(bool(data[position + 2] & 4))
            position += size

    def _switch_cache(self, on: bool) -> None:
        if on and (self.medium is None or not self.medium.cache):
            raise Check(*INVALID_PARAMETER)
        if not on and self.medium is not None:
            self.medium.flush()
        self.caching = on

    def start_stop(self, cdb: bytes) -> Plan:
        """1B: start, stop, eject, load."""
        start, eject = bool(cdb[4] & 1), bool(cdb[4] & 2)
        if cdb[4] >> 4:
            return Plan()  # power conditions: as it likes
        if self.medium is not None and not start:
            self.medium.flush()
        if eject and self.removable:
            if start and self.medium is None and self.ejected is not None:
                self.medium, self.ejected = self.ejected, None
                self.attentions.append(MEDIUM_CHANGED)
            elif not start and self.medium is not None:
                if self.prevented:
                    raise Check(ILLEGAL, 0x53, 2)
                self.medium, self.ejected = None, self.medium
        elif start and self.medium is None:
            raise Check(*NO_MEDIUM)
        self.stopped = not start and not eject
        return Plan()

    def prevent_allow(self, cdb: bytes) -> Plan:
        """1E."""
        self.prevented = bool(cdb[4] & 1) and self.removable
        return Plan()

    def synchronize(self, cdb: bytes) -> Plan:
        """35 and 91: everything, whatever range is asked for."""
        medium = self.ready()
        size = 8 if cdb[0] == SYNCHRONIZE_16 else 4
        lba = int.from_bytes(cdb[2 : 2 + size], "big")
        count = int.from_bytes(cdb[10:14] if size == 8 else cdb[7:9], "big")
        if lba + count > self.blocks:
            raise Check(*OUT_OF_RANGE)
        carefully(medium.flush, 0x0C)
        return Plan()

    def nothing(self, _cdb: bytes) -> Plan:
        """Accepted, without effect: SEEK, RESERVE, RELEASE, SEND DIAGNOSTIC."""
        return Plan()

    def report_opcodes(self, cdb: bytes) -> Plan:
        """A3/0C: which commands it knows."""
        if cdb[1] & 0x1F != 0x0C:
            raise Check(*INVALID_FIELD)
        option = cdb[2] & 7
        allocation = int.from_bytes(cdb[6:10], "big")
        if option == 0:
            rows = b"".join(
                struct.pack(">BxHxBH", code, _ACTIONS.get(code, 0), code in _ACTIONS, cdb_length(code))
                for code in sorted(_COMMANDS)
            )
            return reply(struct.pack(">I", len(rows)) + rows, allocation)
        if option > 3:
            raise Check(*INVALID_FIELD)
        code = cdb[3]
        if code not in _COMMANDS:
            return reply(bytes((0, 1, 0, 0)), allocation)
        usage = bytes((code,)) + b"\xff" * (cdb_length(code) - 1)
        return reply(struct.pack(">BBH", 0, 3, len(usage)) + usage, allocation)


_COMMANDS: dict[int, Callable[[Unit, bytes], Plan]] = {
    0x00: Unit.unit_ready,
    0x03: Unit.request_sense,
    0x08: scsi_blocks.read_blocks,
    0x0A: scsi_blocks.write_blocks,
    0x0B: Unit.nothing,  # SEEK(6)
    0x12: Unit.inquiry,
    0x15: Unit.mode_select,
    0x16: Unit.nothing,  # RESERVE(6)
    0x17: Unit.nothing,  # RELEASE(6)
    0x1A: Unit.mode_sense,
    0x1B: Unit.start_stop,
    0x1D: Unit.nothing,  # SEND DIAGNOSTIC
    0x1E: Unit.prevent_allow,
    0x23: Unit.read_format_capacities,
    0x25: Unit.read_capacity_10,
    0x28: scsi_blocks.read_blocks,
    0x2A: scsi_blocks.write_blocks,
    0x2B: Unit.nothing,  # SEEK(10)
    0x2E: scsi_blocks.write_blocks,
    0x2F: scsi_blocks.verify,
    0x35: Unit.synchronize,
    0x41: scsi_blocks.write_same,
    0x42: scsi_blocks.unmap,
    0x55: Unit.mode_select,
    0x5A: Unit.mode_sense,
    0x88: scsi_blocks.read_blocks,
    0x8A: scsi_blocks.write_blocks,
    0x8F: scsi_blocks.verify,
    0x91: Unit.synchronize,
    0x93: scsi_blocks.write_same,
    0x9E: Unit.service_action_in,
    0xA0: Unit.report_luns,
    0xA3: Unit.report_opcodes,
    0xA8: scsi_blocks.read_blocks,
    0xAA: scsi_blocks.write_blocks,
    0xAF: scsi_blocks.verify,
}
_ACTIONS = {0x9E: 0x10, 0xA3: 0x0C}  # commands that are one of their service actions only
