"""What people are told while the device of a mount is away.

Must never: do I/O, or read a clock: the age is given. Called by: whoever shows a mount that is DETACHED.
"""

from __future__ import annotations

from math import ceil

from udf.supervisor.options import MountOptions


def text_of(options: MountOptions, age: float, cause: str = "the device was unplugged") -> str:
    """The state of a mount whose device went away *age* seconds ago, as one sentence."""
    parts = [cause]
    readable, left = ceil(options.max_stale - age), ceil(options.grace - age)
    if readable > 0:
        parts.append(f"cached files can be read for {readable} s more")
    elif options.grace > 0:
        parts.append("nothing can be read")
    if options.on_unplug_wait > 0 and left > 0:
        parts.append(f"requests wait for it, {options.on_unplug_wait:g} s at most")
    if left > 0:
        parts.append(f"plug it back within {left} s to go on")
    return "; ".join(parts)
