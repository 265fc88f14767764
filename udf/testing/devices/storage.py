"""A USB stick: mass storage over Bulk-Only Transport 1.0, with everything that can go wrong in it.

Owns: the transport's states: command, data, status; the thirteen cases of who expects what (clause 6.7), invalid
command wrappers, Reset Recovery. Must never: interpret a SCSI command (scsi.py does). Called by: models.py, tests.

Where the specification leaves a choice, it is what sticks do: too little data to the host end with a short packet, or
with a stall if there is no short packet; data from the host that are not wanted are stalled.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from enum import Enum
from typing import Any

from udf.errors import UserError
from udf.testing.devices import scsi_pages
from udf.testing.devices.device import Device, Option, number, yes_no
from udf.testing.devices.layout import BulkIn, BulkOut, Configuration, Interface
from udf.testing.devices.medium import Medium
from udf.testing.devices.scsi import Unit
from udf.testing.devices.scsi_words import INQUIRY, LUN_UNKNOWN, REQUEST_SENSE, Check, Plan
from udf.testing.devices.transfers import Nak, Setup, Stall

log = logging.getLogger("udf.devices")
CBW = struct.Struct("<4sIIBBB16s")
CSW = struct.Struct("<4sIIB")
PASSED, FAILED, PHASE_ERROR = 0, 1, 2
GET_MAX_LUN, BULK_ONLY_RESET = 0xFE, 0xFF
_IN, _OUT = 0x81, 0x02
MAX_SIZE = 1 << 50


class Phase(Enum):
    """What the device waits for."""

    COMMAND = "command"
    DATA_IN = "data to the host"
    DATA_OUT = "data from the host"
    STATUS = "the host to take the status"
    BROKEN = "reset recovery"


class Storage(Device):
    """A stick with an image file in it, or (size=) with memory."""

    vendor, product = 0x1209, 0x7E53
    product_name = "Stick"
    configurations = [Configuration([Interface(8, 6, 0x50, [BulkIn(1), BulkOut(2)])], milliamperes=200)]
    options = {
        "file": Option(str, "the image file; it is locked while it is plugged in"),
        "size": Option(number, "instead of a file: bytes of memory, 16M for instance"),
        "luns": Option(str, "files of further units, separated by commas; an empty one is a slot without a medium"),
        "block_size": Option(number, "512, 1024, 2048 or 4096"),
        "read_only": Option(yes_no, "write-protected"),
        "removable": Option(yes_no, "whether the medium can be taken out; yes if not given"),
        "cache": Option(number, "bytes of a write cache: what is not flushed is lost when it is unplugged"),
        "keep": Option(float, "chance of a page of the cache to survive that nevertheless, 0 if not given"),
        "seed": Option(number, "for that choice"),
        "max_transfer": Option(number, "the most bytes of one READ or WRITE; more is refused"),
        "trim": Option(yes_no, "whether it knows UNMAP; yes if not given"),
        "bad": Option(str, "blocks that cannot be read or written: 100,200-210"),
        "stall_short": Option(yes_no, "stall after data that are shorter than asked for, short packet or not"),
        "stall_max_lun": Option(yes_no, "refuse GET MAX LUN, as sticks with one unit may"),
    }

    def __init__(
        self,
        file: str | None = None,
        *,
        size: int = 0,
        luns: str | Sequence[str | None] = (),
        block_size: int = 512,
        read_only: bool = False,
        removable: bool = True,
        cache: int = 0,
        keep: float = 0.0,
        seed: int = 0,
        max_transfer: int = 0,
        trim: bool = True,
        bad: str = "",
        stall_short: bool = False,
        stall_max_lun: bool = False,
        **identity: Any,
    ) -> None:
        super().__init__(**identity)
        if block_size not in (512, 1024, 2048, 4096):
            raise ValueError(f"block_size is 512, 1024, 2048 or 4096, not {block_size}")
        if file and size:
            raise ValueError("file= and size= are two media for one unit")
        if not 0 <= keep <= 1:
            raise ValueError("keep is a chance from 0 to 1")
        self._block_size = block_size
        self._medium = {"read_only": read_only, "cache": cache, "keep": keep, "seed": seed}
        files: list[str | None] = [file or None, *(luns.split(",") if isinstance(luns, str) and luns else luns)]
        if len(files) > 16:
            raise ValueError("there can be 16 units at most")
        self._stall_short = stall_short
        self._stall_max_lun = stall_max_lun
        self._phase = Phase.COMMAND
        self._tag = 0
        self._unit: Unit | None = None
        self._plan = Plan()
        self._wanted = 0  # dCBWDataTransferLength
        self._done = 0  # bytes that were moved and count
        self._passed = 0  # bytes that the host has sent
        self._status = PASSED
        self._reads = False  # the host wants data
        self._csw: bytes | None = None
        self.units: list[Unit] = []
        try:
            for index, each in enumerate(files):
                medium = None
                if each or (index == 0 and size):
                    medium = self._open(each or None, size if index == 0 else 0)
                self.units.append(
                    Unit(
                        number=index,
                        medium=medium,
                        vendor=self.manufacturer or "",
                        product=self.product_name or "",
                        serial=self.serial or "",
                        block_size=block_size,
                        removable=removable,
                        protected=read_only,
                        max_transfer=max_transfer // block_size,
                        trims=trim,
                        bad=_ranges(bad),
                        units=len(files),
                    )
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the image files back."""
        for unit in self.units:
            for medium in (unit.medium, unit.ejected):
                if medium is not None:
                    medium.close()

    def change_medium(self, file: str | None, lun: int = 0) -> None:
        """Take the medium out (None), or put another one in. UserError if that cannot be."""
        self.inside(lambda: self._change(file, lun))

    def _change(self, file: str | None, lun: int) -> None:
        if not 0 <= lun < len(self.units):
            raise UserError(f"This device has {len(self.units)} units, from 0 on; there is no {lun}.")
        if not self.units[lun].removable:
            raise UserError("The medium of this device cannot be changed.")
        unit = self.units[lun]
        for old in (unit.medium, unit.ejected):
            if old is not None and file is not None and old.path == file:
                old.close()  # the same file again: its lock must go first
        try:
            medium = self._open(file, 0) if file is not None else None
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}.") from None
        unit.change(medium)

    # --- the bus ---

    def on_plugged(self) -> None:
        """Units come up with a unit attention."""
        for unit in self.units:
            unit.power_on()
        self._begin()

    def on_unplugged(self) -> None:
        """What was not flushed is lost."""
        for unit in self.units:
            unit.power_off()

    def on_reset(self) -> None:
        """A reset of the bus leaves the caches as they are."""
        for unit in self.units:
            unit.power_on()
        self._begin()

    def on_configured(self, value: int) -> None:
        """Begin anew."""
        self._begin()

    def on_control(self, setup: Setup, data: bytes) -> bytes | None:
        """The two requests of the class."""
        if setup.type != 1 or setup.recipient != 1 or setup.index != 0 or setup.value != 0:
            raise Stall
        if setup.is_in and setup.request == GET_MAX_LUN and setup.length == 1:
            if self._stall_max_lun:
                raise Stall
            return bytes((len(self.units) - 1,))
        if not setup.is_in and setup.request == BULK_ONLY_RESET and setup.length == 0:
            # Halts stay: the host clears them next, and now that works again.
            self._begin()
            self.unhalt(_IN)
            self.unhalt(_OUT)
            self.ready(_OUT)
            return None
        raise Stall

    def on_out(self, endpoint: int, data: bytes) -> None:
        """A command or its data."""
        if self._phase is Phase.COMMAND:
            self._command(data)
        elif self._phase is Phase.DATA_OUT:
            self._take(data)
        else:
            raise Nak  # until the host has taken the status

    def on_in(self, endpoint: int, length: int) -> bytes | memoryview | None:
        """The command's data, then its status."""
        if self._phase is Phase.DATA_IN:
            return self._give(length)
        if self._csw is None:
            return None
        csw, self._csw = self._csw, None
        self._phase = Phase.COMMAND
        self.ready(_OUT)
        return csw

    # --- the transport ---

    def _begin(self) -> None:
        self._phase = Phase.COMMAND
        self._csw = None
        self._plan = Plan()

    def _break(self) -> None:
        """Clause 6.6.1: whatever the host clears, nothing works before Reset Recovery."""
        self._phase = Phase.BROKEN
        self._csw = None
        self.halt(_IN, wedge=True)
        self.halt(_OUT, wedge=True)
        raise Stall

    def _command(self, data: bytes) -> None:
        if len(data) != CBW.size:
            self._break()
        signature, self._tag, self._wanted, flags, lun, length, cdb = CBW.unpack(data)
        if signature != b"USBC" or lun > 15 or not 1 <= length <= 16 or flags & 0x7F:
            self._break()
        self._done = self._passed = 0
        self._status = PASSED
        self._unit = self.units[lun] if lun < len(self.units) else None
        self._plan = self._execute(cdb[:length].ljust(16, b"\0"))
        to_host, from_host = self._plan.to_host, self._plan.from_host
        self._reads = host_reads = bool(flags & 0x80) and self._wanted > 0
        host_writes = not flags & 0x80 and self._wanted > 0
        if (to_host and host_writes) or (from_host and host_reads):
            self._refuse(PHASE_ERROR)  # cases 8 and 10
        elif (to_host or from_host) and not self._wanted:
            self._finish(PHASE_ERROR)  # cases 2 and 3
        elif to_host:
            self._phase = Phase.DATA_IN  # cases 5, 6, 7
            self.ready(_IN)  # the host may ask before it has sent the command
        elif from_host:
            self._phase = Phase.DATA_OUT  # cases 11, 12, 13
        else:
            if self._status == PASSED:
                self._complete()
            if self._wanted:
                self._refuse(self._status)  # cases 4 and 9
            else:
                self._finish(self._status)  # case 1

    def _execute(self, cdb: bytes) -> Plan:
        if self._unit is None:
            return self._absent(cdb)
        try:
            return self._unit.execute(cdb)
        except Check as check:
            self._fail(check)
            return Plan()

    def _absent(self, cdb: bytes) -> Plan:
        """A logical unit that is not there still says so."""
        data = b""
        if cdb[0] == INQUIRY:
            data = scsi_pages.unknown()[: int.from_bytes(cdb[3:5], "big")]
        elif cdb[0] == REQUEST_SENSE:
            data = scsi_pages.sense(*LUN_UNKNOWN, None, descriptors=bool(cdb[1] & 1))[: cdb[4]]
        else:
            self._status = FAILED
        return Plan(to_host=len(data), read=lambda position, size: data[position : position + size])

    def _fail(self, check: Check) -> None:
        self._status = FAILED
        if self._unit is not None:
            self._unit.failed(check)

    def _give(self, length: int) -> bytes | memoryview | None:
        end = min(self._plan.to_host, self._wanted)
        size = min(length, end - self._done)
        assert self._plan.read is not None
        try:
            data = self._plan.read(self._done, size)
        except Check as check:
            self._fail(check)
            self._finish(FAILED)
            self.halt(_IN)
            raise Stall from None
        self._done += len(data)
        if self._done >= end:
            if self._plan.to_host > self._wanted:
                self._status = PHASE_ERROR  # case 7
            short = self._done < self._wanted
            full = self._done % self._packet(_IN) == 0
            self._finish(self._status)
            if short and (full or self._stall_short):
                self.halt(_IN)  # case 5: no short packet says that this is all
        return data

    def _take(self, data: bytes) -> None:
        end = min(self._plan.from_host, self._wanted)
        part = data[: end - self._done]
        self._passed += len(data)
        assert self._plan.write is not None
        if part and self._status == PASSED:
            try:
                self._plan.write(self._done, part)
            except Check as check:
                self._fail(check)
            else:
                self._done += len(part)
        short = not data or len(data) % self._packet(_OUT) != 0
        if self._status == PASSED and self._done < end and not short and self._passed < self._wanted:
            return
        if self._status != PASSED and not short and self._passed < self._wanted:
            # The rest is not wanted: the stall says so, and the status follows.
            self._finish(FAILED)
            self.halt(_OUT)
            raise Stall
        if self._status == PASSED:
            if self._plan.from_host > self._wanted:
                self._status = PHASE_ERROR  # case 13
            else:
                self._complete()
        self._finish(self._status)
        if self._passed > self._done and self._status == PASSED:
            raise Stall  # case 11, all in one transfer
        if self._passed < self._wanted and not short:
            self.halt(_OUT)  # case 11, the rest is still to come

    def _complete(self) -> None:
        if self._plan.finish is not None and self._done == self._plan.from_host:
            try:
                self._plan.finish()
            except Check as check:
                self._fail(check)

    def _refuse(self, status: int) -> None:
        """The host expects data that will not be moved: stall where it waits, then give the status."""
        self.halt(_IN if self._reads else _OUT)  # before the status is there to be taken
        self._finish(status)

    def _finish(self, status: int) -> None:
        self._phase = Phase.STATUS
        self._csw = CSW.pack(b"USBS", self._tag, self._wanted - self._done, status)
        self.ready(_IN)

    def _packet(self, endpoint: int) -> int:
        assert self._engine is not None
        pipe = self._engine.pipes.get(endpoint)
        return pipe.size if pipe is not None else 512

    def _open(self, file: str | None, size: int) -> Medium:
        options: Any = self._medium
        if not 0 <= size <= MAX_SIZE:
            raise UserError(f"The size {size} is not from 0 to {MAX_SIZE}.")
        try:
            medium = Medium(file, size=size, **options)
        except OSError as error:
            if file is None or error.filename:
                raise
            raise OSError(error.errno, error.strerror, file) from None  # it is open, and has no size
        if medium.size < self._block_size:
            medium.close()
            raise UserError(f"{file or 'The medium'} has {medium.size} bytes, less than a block of {self._block_size}.")
        return medium


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    """`100,200-210` as first and last blocks."""
    found = []
    for each in filter(None, text.split(",")):
        first, _, last = each.partition("-")
        try:
            found.append((int(first), int(last or first)))
        except ValueError:
            raise ValueError(f"bad={text} is not like 100,200-210") from None
    return tuple(found)
