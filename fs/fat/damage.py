"""What is raised where the image is nonsense.

Owns: one exception class. Must never: do anything. Called by: every module of this driver that reads the volume.
"""

from __future__ import annotations

import errno


class Damaged(OSError):
    """The volume says something that cannot be: one sentence, and EIO for the program that came across it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(errno.EIO, sentence)
