"""What the supervisor tells the shim about its mount."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Config:
    """The `mount` message, with the defaults for what it leaves out."""

    mountpoint: str
    name: str
    driver: str
    fsname: str
    read_only: bool = False
    allow_other: bool = False
    nosuid: bool = True
    nodev: bool = True
    noexec: bool = False
    noatime: bool = False
    uid: int = 0
    gid: int = 0
    max_read: int = 0
    exclusive: bool = False  # nothing but this mount can change the source: caches are valid for ever
    acl: bool = False
    locks: bool = False
    open: str = "known"  # whether OPEN is answered without the driver: known, lazy or driver
    deadline: float = 30.0
    start_timeout: float = 30.0
    spin: bool | None = None  # None: by what the machine has
    recover: bool = False  # the driver's death is not the end of what it served
    hide: bool = True  # keep a file that is removed while open under a hidden name
    stable_nodes: bool = False  # the driver's node ids mean the same file in each generation
    inodes: str = "stable"  # by what a file is known again: its number, its entry's generation, nothing (volatile)
    patience: float = 60.0  # seconds that a parked request waits for a new generation
    outlive: bool = False  # once unmounted, keep the link until the driver has ended

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Config:
        """Take the keys that are known."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in message.items() if key in known})
