"""The shim's side of a window: where the bytes are that a driver points at.

Owns: the check of what is pointed at, and the count of what was dealt with. Must never: believe an offset or a length,
or copy. The bytes may change while the kernel takes them: they are the driver's word, like any answer.
Called by: link.py (has it), replies.py.
"""

from __future__ import annotations

from udf.window import MAX_SPANS, SPAN, Mapped, NoWindow


class Window(Mapped):
    """One generation's."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._count = self.view[:8].cast("Q")  # stored at once, so that the driver never sees a part of it

    def parts(self, spans: memoryview) -> list[memoryview]:
        """The pieces that an answer is made of. Raises NoWindow."""
        size = len(spans)
        if not size or size % SPAN.size or size > MAX_SPANS * SPAN.size:
            raise NoWindow(f"{size} bytes that should say where an answer is")
        return [self.piece(offset, length) for offset, length in SPAN.iter_unpack(spans)]

    def dealt_with(self) -> None:
        """Nobody will look at what the oldest answer pointed at any more."""
        self._count[0] += 1

    def close(self) -> None:
        """Unmap it."""
        self._count.release()
        super().close()
