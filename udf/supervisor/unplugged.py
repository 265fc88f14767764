"""What people are told while the device of a mount is away.

Must never: do I/O, or read a clock: how long things last is given. Called by: whoever shows a mount that is DETACHED.
"""

from __future__ import annotations

from math import ceil, isinf


def text_of(left: float, *, readable: float, wait: float = 0.0, cause: str = "the device was unplugged") -> str:
    """The state of a mount that waits *left* seconds more for its device (0: not at all; infinity: it looks at one).

    What is cached is answered for *readable* seconds more, and each request waits up to *wait* seconds.
    """
    if left <= 0:
        return cause
    parts = [cause]
    parts.append(f"cached files can be read for {ceil(readable)} s more" if readable > 0 else "nothing can be read")
    if wait > 0:
        parts.append(f"requests wait for it, {wait:g} s at most")
    if isinf(left):
        parts.append("one was plugged in and is looked at")
    else:
        parts.append(f"plug it back within {ceil(left)} s to go on")
    return "; ".join(parts)
