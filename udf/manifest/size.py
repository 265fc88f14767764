"""Sizes as people write them.

Owns: "64M" and its like. Called by: check.py and options.py, for options of type `size`.
"""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,18})([KMGTP]?)(?:i?B)?\Z", re.IGNORECASE)


def parse_size(text: str) -> int:
    """A number of bytes, with K, M, G, T or P for powers of 1024 (64M, 64MiB). ValueError otherwise."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError(text)
    return int(match[1]) << (10 * " KMGTP".index(match[2].upper() or " "))
