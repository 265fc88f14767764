"""What a logical unit is: the questions, in an order that old sticks stand, and the answers, checked.

Owns: which questions are asked of which device, and what sizes can be served. Must never: ask a device for more than
it says that it knows (there are sticks that hang at a page they never heard of), or believe a number.
Called by: unit.py, at the start and whenever the unit should be looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from . import scsi
from .scsi import Capacity, Command, Inquiry, Limits, Mode
from .sense import Action

MIN_BLOCK, MAX_BLOCK = 256, 64 * 1024
MAX_SIZE = (1 << 63) - 1  # bytes: what offsets in files can say
SPC_3 = 5  # the INQUIRY version from which on vital product data and READ CAPACITY(16) can be asked for
MAX_TRIM = 1 << 22  # blocks in one command, whatever the device says: trimming takes time


@dataclass(frozen=True)
class Facts:
    """What is known of a unit and the medium in it. Sizes are in bytes; `size` 0: no medium."""

    name: str = ""
    removable: bool = False
    size: int = 0
    block_size: int = 512
    read_only: bool = False
    write_cache: bool | None = None
    fua: bool = False
    trim_by: str = ""  # unmap, write_same or nothing
    max_trim: int = 0  # blocks in one command
    max_trim_ranges: int = 1
    trim_zeroes: bool = False
    max_transfer: int = 0  # 0: not said

    @property
    def shape(self) -> tuple[object, ...]:
        """What must be the same for a medium to be the same."""
        return self.name, self.size, self.block_size


class NotUsable(Exception):
    """The unit is there, but what it says cannot be served; one sentence. `facts` has what is known."""

    def __init__(self, text: str, facts: Facts) -> None:
        super().__init__(text)
        self.facts = facts


class Asker(Protocol):
    """The part of a LogicalUnit that asks."""

    def demand(self, command: Command, least: int) -> bytes:
        """The answer, of so many bytes at least, to a question that every device must know; an OSError without it."""

    def ask(self, command: Command) -> bytes | None:
        """The answer to one that it need not know."""

    def ready(self) -> Action:
        """DONE when the unit is ready, EMPTY without a medium; else an OSError."""


def facts_of(unit: Asker) -> Facts | None:
    """Ask a unit for everything that is needed to serve it. None: this LUN has no blocks."""
    who = scsi.parse_inquiry(unit.demand(scsi.inquiry(), 5))
    if who is None or not who.is_present:
        return None
    name = " ".join(filter(None, (who.vendor, who.product))) or "a disk without a name"
    try:
        if unit.ready() is Action.EMPTY:
            return Facts(name, who.removable)
    except OSError as exc:
        raise NotUsable(f"{name} does not become ready: {exc.strerror}", Facts(name, who.removable)) from exc
    capacity = _capacity(unit, who)
    refusal = size_refusal(capacity)
    if refusal or capacity is None:
        raise NotUsable(f"{name} {refusal}", Facts(name, who.removable))
    mode = _mode(unit)
    # A medium may change the transfer limits, and only what says that it can trim is asked how.
    pages = _pages(unit, who)
    limits = scsi.Limits()
    if scsi.VPD_LIMITS in pages:
        limits = scsi.parse_limits(unit.ask(scsi.inquiry_page(scsi.VPD_LIMITS)) or b"")
    trim_by, max_trim, ranges = _trim(unit, pages, capacity, limits)
    return Facts(
        name=name,
        removable=who.removable,
        size=capacity.blocks * capacity.block_size,
        block_size=capacity.block_size,
        read_only=mode.write_protected or who.type == scsi.CD,
        write_cache=mode.write_cache,
        fua=mode.fua,
        trim_by=trim_by,
        max_trim=max_trim,
        max_trim_ranges=ranges,
        trim_zeroes=capacity.zeroes and bool(trim_by),
        max_transfer=limits.max_transfer * capacity.block_size,
    )


def size_refusal(capacity: Capacity | None) -> str:
    """Why a medium of this capacity cannot be served; empty if it can."""
    if capacity is None:
        return "does not say how large it is"
    size = capacity.block_size
    if not MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
        return f"says that its blocks have {size} bytes, which no disk's have"
    if capacity.blocks * size > MAX_SIZE:
        return f"says that it has {capacity.blocks} blocks of {size} bytes, more than any disk can have"
    return ""


def _capacity(unit: Asker, who: Inquiry) -> Capacity | None:
    try:
        short = scsi.parse_capacity_10(unit.demand(scsi.read_capacity_10(), 8))
    except OSError:
        short = None  # very large ones know the other question only
    if short is not None and short.blocks <= scsi.MAX_32 and who.version < SPC_3:
        return short
    long = scsi.parse_capacity_16(unit.ask(scsi.read_capacity_16()) or b"")
    if long is None or (short is not None and short.blocks <= scsi.MAX_32 and long.blocks != short.blocks):
        return short  # two answers that contradict each other: the one that every system asks for
    return long


def _mode(unit: Asker) -> Mode:
    mode = scsi.parse_mode(unit.ask(scsi.mode_sense(scsi.PAGE_ALL)) or b"")
    if mode is None or mode.write_cache is None:
        caching = scsi.parse_mode(unit.ask(scsi.mode_sense(scsi.PAGE_CACHING)) or b"")
        if caching is not None:
            mode = Mode(
                caching.write_protected or (mode is not None and mode.write_protected),
                caching.fua or (mode is not None and mode.fua),
                caching.write_cache,
            )
    return mode or Mode()


def _pages(unit: Asker, who: Inquiry) -> frozenset[int]:
    if who.version < SPC_3:
        return frozenset()
    return scsi.parse_supported_pages(unit.ask(scsi.inquiry_page(scsi.VPD_SUPPORTED)) or b"")


def _trim(unit: Asker, pages: frozenset[int], capacity: Capacity, limits: Limits) -> tuple[str, int, int]:
    if not capacity.thin or scsi.VPD_PROVISIONING not in pages:
        return "", 0, 1
    how = scsi.parse_provisioning(unit.ask(scsi.inquiry_page(scsi.VPD_PROVISIONING)) or b"")
    if how.unmap and limits.max_unmap and limits.max_unmap_ranges:
        return "unmap", min(limits.max_unmap, MAX_TRIM), limits.max_unmap_ranges
    if how.write_same:
        return "write_same", min(limits.max_write_same or MAX_TRIM, MAX_TRIM), 1
    return "", 0, 1
