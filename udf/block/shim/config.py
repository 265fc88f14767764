"""What the supervisor tells the block shim about its device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Config:
    """The `serve` message, with the defaults for what it leaves out."""

    name: str
    driver: str
    read_only: bool = False
    deadline: float = 30.0  # seconds without any progress after which the driver counts as hung
    start_timeout: float = 30.0
    patience: float = 60.0  # seconds that a parked request waits for a new generation
    idle_flush: float = 0.0  # seconds after the last write after which the device is told to flush; 0: it is not

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Config:
        """Take the keys that are known."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in message.items() if key in known})
