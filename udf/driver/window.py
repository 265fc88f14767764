"""The driver's side of a window: memory from which the shim passes bytes on without their being sent.

Owns: which of it is free, and where in it a view lies. Must never: give memory away again that an answer points at,
until the shim has dealt with that answer.
Called by: udf/host/at_once.py (answers), drivers as `udf.Window`; a BlockClient has what it reads put there.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque

from udf.window import HEAD, MAX_READ, STAGE, Mapped

PIECE = 2 * 1024 * 1024  # bytes of what `take` gives


class Window:
    """Memory for what is read. A driver puts bytes into what it takes, and answers `read_now` with views of that."""

    def __init__(self, fd: int) -> None:
        """Map it; the descriptor is ours from here on. Raises NoWindow, OSError."""
        self.fd = fd
        self._mapped = mapped = Mapped(fd)
        view = mapped.view
        self._dealt_with = view[:8].cast("Q")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(view))
        self._end = mapped.size
        stage = self._end - STAGE
        self._answers = 0  # that point into it
        # With the number of answers before which a piece may not be written again.
        self._free = deque((0, view[at : at + PIECE]) for at in range(HEAD, stage - PIECE + 1, PIECE))
        self._stages = deque((0, view[at : at + MAX_READ]) for at in range(stage, self._end, MAX_READ))

    def take(self) -> memoryview | None:
        """`PIECE` bytes of it; None: all is in use."""
        return self._take(self._free)

    def give_back(self, piece: memoryview) -> None:
        """What `take` gave is of no use any more. Answers that point into it were given, or there are none.

        They may still be on their way.
        """
        self._free.append((self._answers, piece))

    def stage(self) -> memoryview | None:
        """Room for one answer of `MAX_READ` bytes at most, which is to be sent at once; None: wait for the shim."""
        stage = self._take(self._stages)
        if stage is not None:
            self._stages.append((self._answers + 1, stage))
        return stage

    def _take(self, free: deque[tuple[int, memoryview]]) -> memoryview | None:
        if free and free[0][0] <= self._dealt_with[0]:
            return free.popleft()[1]
        return None

    def span(self, view: memoryview) -> tuple[int, int] | None:
        """Offset and length of a view that lies in it; None if it lies elsewhere."""
        if view.readonly or not view.nbytes:
            return None
        offset = ctypes.addressof(ctypes.c_char.from_buffer(view)) - self._base
        return (offset, view.nbytes) if HEAD <= offset < self._end else None

    def close(self) -> None:
        """Let go of the descriptor, and of the memory when nobody has a view of it any more."""
        os.close(self.fd)
        self._free.clear()
        self._stages.clear()
        self._dealt_with.release()
        self._mapped.close()

    def answered(self) -> None:
        """An answer was sent that points into it."""
        self._answers += 1
