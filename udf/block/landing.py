"""The window of a client on the server's side: where it wants what it reads.

Owns: taking it from what came with a handshake. Must never: believe an offset (udf/window.py checks each).
Called by: handshake.py, and the block shim's options.py.
"""

from __future__ import annotations

import os

from udf.block.wire import MalformedError
from udf.window import Mapped, NoWindow


def take_window(descriptors: list[int], payload: bytes, *, structured: bool) -> Mapped:
    """The window that came with OPT_WINDOW; all descriptors are closed. Raises MalformedError."""
    try:
        if payload:
            raise MalformedError("it has a payload")
        if not structured:
            raise MalformedError("structured replies come first")
        if not descriptors:
            raise MalformedError("no descriptor came with it")
        try:
            return Mapped(descriptors[-1])
        except (NoWindow, OSError) as error:
            raise MalformedError(f"it is no window: {error}") from None
    finally:
        for fd in descriptors:
            os.close(fd)
        descriptors.clear()
