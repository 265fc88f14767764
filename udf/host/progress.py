"""A handler that takes long says that it gets on, so that its driver is not taken for one that hangs.

Owns: which request a handler serves, as far as that is known here (its kind), and the message over the link: a
notification that only a shim of UDF knows; without a shim nobody hears it.
Called by: authors, through `udf.still_working`; guard.py notes the kind; serve.py says where the link is.
"""

from __future__ import annotations

import os
import struct
import time
from contextvars import ContextVar

from udf.fuse.opcodes import STILL_WORKING, Opcode

_HEADER = struct.Struct("=IiQI")  # length, code, unique 0; the opcode
_BETWEEN = 0.2  # seconds between two messages of one kind

kind: ContextVar[int] = ContextVar("kind of request", default=0)
OPCODES = {op.name.lower(): int(op) for op in Opcode}
_link = -1
_told: dict[int, float] = {}


def serve_on(link: int) -> None:
    """Say over which link this process serves."""
    global _link  # noqa: PLW0603 - one driver for each process
    _link = link


def still_working() -> None:
    """Tell that the handler which calls this gets on, though slowly: its deadline begins anew.

    At most ten times over, and for all requests of the same kind that are under way. Costs nothing when it is called
    often; may be called from a thread that the handler waits for. Outside of a handler it does nothing.
    """
    opcode, now = kind.get(), time.monotonic()
    if not opcode or _link < 0 or now - _told.get(opcode, 0.0) < _BETWEEN:
        return
    _told[opcode] = now
    try:
        os.write(_link, _HEADER.pack(_HEADER.size, STILL_WORKING, 0, opcode))
    except OSError:
        pass  # the link is full or gone: the next call, or nobody, will tell
