"""The shim's side of a window: where the bytes are that a driver points at.

Owns: the mapping, the check of what is pointed at, and the count of what was dealt with. Must never: believe an offset
or a length, or copy. The bytes may change while the kernel takes them: they are the driver's word, like any answer.
Called by: link.py (has it), replies.py.
"""

from __future__ import annotations

import os

from udf.window import HEAD, MAX_SPANS, SPAN, map_window


def take_window(fds: list[int]) -> Window | None:
    """The window that came with a link, whose descriptor is closed; None if there is none. Raises NoWindow, OSError."""
    if not fds:
        return None
    try:
        return Window(fds[0])
    finally:
        os.close(fds.pop())


class BadSpans(Exception):
    """What is pointed at is not in the window; one sentence."""


class Window:
    """One generation's."""

    def __init__(self, fd: int) -> None:
        """Raises NoWindow, OSError; the descriptor stays the caller's."""
        self._memory = map_window(fd)
        self._view = memoryview(self._memory)
        self._count = self._view[:8].cast("Q")  # stored at once, so that the driver never sees a part of it

    def parts(self, spans: memoryview) -> list[memoryview]:
        """The pieces that an answer is made of. Raises BadSpans."""
        size = len(spans)
        if not size or size % SPAN.size or size > MAX_SPANS * SPAN.size:
            raise BadSpans(f"{size} bytes that should say where an answer is")
        view, end = self._view, len(self._view)
        parts = []
        for offset, length in SPAN.iter_unpack(spans):
            if offset < HEAD or not length or offset + length > end:
                raise BadSpans(f"{length} bytes at {offset}, which is not in a window of {end}")
            parts.append(view[offset : offset + length])
        return parts

    def dealt_with(self) -> None:
        """Nobody will look at what the oldest answer pointed at any more."""
        self._count[0] += 1

    def close(self) -> None:
        """Unmap it."""
        self._count.release()
        self._view.release()
        try:
            self._memory.close()
        except BufferError:
            pass  # somebody still has a piece: it goes with that
