"""The memfds that are a mount's state store: made once for a mount, given to each generation of its driver.

Owns: their making. Must never: look into them. Called by: recovery.py.
"""

from __future__ import annotations

import os


def create_memfds(name: str) -> list[int]:
    """An empty store; the caller closes the descriptors when the mount ends."""
    return [os.memfd_create(f"udf:{name}")]
