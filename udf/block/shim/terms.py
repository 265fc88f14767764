"""What a driver says of a unit when it is opened, which is as untrusted as all that it says.

Owns: the check of it. Called by: driver.py at the end of a handshake; units.py has the result.
"""

from __future__ import annotations

from typing import NamedTuple

from udf.block import wire


class BrokenDriver(Exception):
    """The driver said what the protocol does not allow; with the operation that it was about."""

    def __init__(self, op: str, sentence: str) -> None:
        super().__init__(sentence)
        self.op = op


class Terms(NamedTuple):
    """What the driver has said of a unit."""

    size: int
    flags: int
    minimum: int
    preferred: int
    maximum: int
    block: int  # what its partition table counts in
    structured: bool
    context: int | None  # of base:allocation


def terms_of(infos: list[bytes], *, structured: bool, context: int | None) -> Terms:
    """Check what the driver says of a unit. Raises BrokenDriver."""
    size = flags = None
    sizes = wire.BlockSizes(preferred=512)
    for info in infos:
        kind = int.from_bytes(info[:2], "big")
        if kind == wire.INFO_EXPORT and len(info) == wire.EXPORT_INFO.size:
            _, size, flags = wire.EXPORT_INFO.unpack(info)
        elif kind == wire.INFO_BLOCK_SIZE and len(info) == wire.BLOCK_SIZE_INFO.size:
            sizes = wire.BlockSizes(*wire.BLOCK_SIZE_INFO.unpack(info)[1:])
    if size is None or flags is None or not flags & wire.HAS_FLAGS:
        raise BrokenDriver("open", "it does not say how large its unit is")
    minimum, preferred, maximum = sizes
    if size > wire.MAX_SIZE or not _is_power(minimum) or minimum > 65536 or not minimum <= maximum:
        raise BrokenDriver("open", f"its unit has {size} bytes in blocks of {minimum} to {maximum}")
    if not _is_power(preferred) or not minimum <= preferred <= wire.MAX_PAYLOAD:
        preferred = max(4096, minimum)
    maximum = min(maximum, wire.MAX_PAYLOAD)
    maximum -= maximum % minimum
    # Our server takes any byte, and prefers the device's own blocks.
    block = min(max(512, minimum if minimum > 1 else preferred), 65536)
    return Terms(size - size % minimum, flags, minimum, preferred, maximum, block, structured, context)


def _is_power(number: int) -> bool:
    return number > 0 and not number & (number - 1)
