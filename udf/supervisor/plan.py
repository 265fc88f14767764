"""What a mount, a block service or a terminal will be, and how starting or ending one can be refused.

Owns: the plans (requests that have passed every check), their translation into the first messages to host and shim, and
the two errors of an endpoint's life.
Must never: do I/O. Called by: registry.py and devices' makers (make them), endpoint.py and its three kinds (carry them
out), control.py (shows them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from udf import messages
from udf.errors import UserError
from udf.supervisor import options as mount_options
from udf.supervisor import spawn
from udf.supervisor.instance import Reason
from udf.supervisor.lease import Lease
from udf.supervisor.options import MountOptions

HEARTBEAT = 1.0
IDLE_FLUSH = 0.2  # seconds after the last write: a stick that is pulled out without ceremony is usually clean


class StartFailedError(UserError):
    """The mount could not be made; `tree` is the state of each process at that moment."""

    def __init__(self, sentence: str, tree: list[str], reason: Reason = Reason.REFUSED) -> None:
        super().__init__(sentence)
        self.tree = tree
        self.reason = reason


class BusyError(UserError):
    """Files are open on the mount."""

    def __init__(self, mountpoint: str, sentence: str) -> None:
        super().__init__(sentence)
        self.mountpoint = mountpoint


@dataclass(frozen=True, kw_only=True)
class DriverPlan:
    """Which driver to run on what, whatever it serves."""

    name: str
    driver_name: str
    driver: messages.DriverSpec
    source: str | None
    driver_options: dict[str, bool | int | float | str]
    asked_options: dict[str, str]  # as the operator wrote them, for `udf status`
    options: MountOptions
    owner: spawn.Identity
    sandbox: messages.Sandbox
    environment: Mapping[str, str]
    durability: str = "none"
    deadline: float = 30.0
    start_timeout: float = 30.0
    lease: Lease | None = None  # the device that it drives, as it was first plugged in
    place: Path | None = None  # a directory that is made for it and goes with it

    @property
    def where(self) -> str:
        """Where programs find what it serves, as a path."""
        return str(self.place)

    def start_message(self, *, spare: bool = False, device: messages.DeviceSpec | None = None) -> messages.Start:
        """What a driver host is told first; a driver of a device, of which one (`lease` is that of its first plug)."""
        return messages.Start(
            name=self.name,
            driver=self.driver,
            source=self.source,
            options=self.driver_options,
            sandbox=self.sandbox,
            heartbeat=HEARTBEAT,
            spare=spare,
            store=self.durability == "store",
            read_only=self.options.read_only,
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class MountPlan(DriverPlan):
    """A filesystem on a mountpoint."""

    mountpoint: str
    shim_as: spawn.Identity | None  # another user than ours: the shim mounts with that user's rights only
    exclusive: bool = False
    acl: bool = False
    locks: bool = False
    open: str = "known"
    stable_nodes: bool = False
    inodes: str = "stable"

    @property
    def where(self) -> str:
        """Where programs find what it serves, as a path."""
        return self.mountpoint

    def mount_message(self, ready: messages.Ready) -> messages.Mount:
        """What the shim is told, with the options that a foreign program has asked for."""
        chosen = mount_options.merge_foreign(self.options, ready.mount_options, self.asked_options)
        return messages.Mount(
            mountpoint=self.mountpoint,
            name=self.name,
            driver=self.driver_name,
            fsname=chosen.fsname or self.source or self.driver_name,
            read_only=chosen.read_only,
            allow_other=chosen.allow_other,
            nosuid=chosen.nosuid,
            nodev=chosen.nodev,
            noexec=chosen.noexec,
            noatime=chosen.noatime,
            uid=self.owner.uid,
            gid=self.owner.gid,
            max_read=chosen.max_read,
            exclusive=self.exclusive,
            acl=self.acl,
            locks=self.locks,
            open=self.open,
            deadline=self.deadline,
            start_timeout=self.start_timeout,
            spin=chosen.spin,
            recover=True,
            hide=not self.stable_nodes,
            stable_nodes=self.stable_nodes,
            inodes=self.inodes,
            patience=chosen.patience,
            outlive=self.driver.command is not None,
        )


@dataclass(frozen=True, kw_only=True)
class BlockPlan(DriverPlan):
    """Block devices behind a socket, and a mount that shows them as files."""

    socket: Path
    files: MountPlan | None = None

    def serve_message(self) -> messages.Serve:
        """What the shim is told; the socket and the link come with it."""
        return messages.Serve(
            name=self.name,
            driver=self.driver_name,
            read_only=self.options.read_only,
            deadline=self.deadline,
            start_timeout=self.start_timeout,
            patience=self.options.patience,
            idle_flush=IDLE_FLUSH if self.lease is not None else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class TerminalPlan(DriverPlan):
    """A terminal by a stable name."""
