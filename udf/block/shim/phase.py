"""What becomes of a request: one enum, changed by Service.set_phase only.

OPENING ──▶ SERVING ◀──▶ PARKED ──▶ GREETING ──▶ REPLAYING ──▶ SERVING
               │            └──▶ FAILED: EIO for everything    (an `attach` leads out of both,
               └──▶ DETACHED: ESHUTDOWN for everything          and of PARKED, to GREETING)

After a DETACHED the way is GREETING ──▶ VERIFYING ──▶ REPLAYING, and back to DETACHED from wherever it stops.
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """What becomes of a request."""

    OPENING = "nobody can ask yet"
    SERVING = "the driver is asked"
    PARKED = "it waits for a new generation"
    GREETING = "it waits for a new generation that is being opened"
    VERIFYING = "it waits until the device that is back is known to be the same"
    REPLAYING = "it waits for what is asked again"
    FAILED = "EIO"
    DETACHED = "ESHUTDOWN"
