"""Drivers as the registry needs them: from a manifest on the search path, or from a command to execute.

Owns: the call of udf.manifest in worker threads (a search path may lie on something slow), bounded in time.
Must never: run driver code. Called by: registry.py, control.py.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import trio

from udf import manifest as manifests
from udf import messages
from udf.errors import UserError
from udf.manifest import Manifest, OptionValue, Trust
from udf.supervisor.spawn import Identity

LOOKUP_TIMEOUT = 10.0
NOFILE = 65536  # a driver that mirrors a tree keeps a descriptor for each file that the kernel knows
_NO_TREES = ("none", "file", "url", "block")
_BLOCK_SERVICES = ("nbd://", "nbd+unix://")
_THREADS = 8  # for look-ups alone, so that hanging ones use up nobody else's threads

T = TypeVar("T")
_threads: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("udf_catalog_threads")


@dataclass(frozen=True)
class Driver:
    """What is known of a driver before it runs."""

    name: str
    spec: messages.DriverSpec
    source_kind: str = "any"
    capabilities: tuple[str, ...] = ()
    exclusive: bool = False
    acl: bool = False
    locks: bool = False
    open: str = "known"
    durability: str = "none"  # what is not known of a command
    stable_nodes: bool = False
    inodes: str = "volatile"
    deadline: float = 30.0
    warnings: tuple[str, ...] = ()
    manifest: Manifest | None = None  # None: a command

    @property
    def provides(self) -> str:
        """What it serves: files, block or terminal."""
        return "files" if self.manifest is None or self.manifest.kind == "fs" else self.manifest.provides

    def sandbox(self, owner: Identity, source: str | None) -> messages.Sandbox:
        """What its process may be and have, for this user."""
        # Capabilities are only for root's own: with them a mirror would show a user what only root may read.
        is_root = os.geteuid() == 0
        # Without root, namespaces cost a user namespace, in which all other users' ids look the same. A program needs
        # them for the fusermount in its place; a driver that mirrors a tree would show wrong owners, and goes without.
        mirrors = self.spec.command is None and self.source_kind not in _NO_TREES
        return messages.Sandbox(
            uid=owner.uid,
            gid=owner.gid,
            groups=list(owner.groups),
            capabilities=list(self.capabilities) if is_root and owner.uid == 0 else [],
            namespaces=is_root or not mirrors,
            nofile=NOFILE,
            keep_paths=[source] if source is not None and source.startswith("/") else [],
        )

    def check_options(self, given: Mapping[str, str]) -> dict[str, OptionValue]:
        """The driver's options with the types that its manifest declares. UserError for a wrong one."""
        if self.manifest is not None:
            return manifests.driver_options(self.manifest, given)
        if given:
            word = next(iter(given))
            raise UserError(f"the option {word!r} is not one of a mount: write a command's own options in the command")
        return {}

    def check_source(self, source: str | None) -> str | None:
        """The source to use; UserError when there is one too many or too few, or of the wrong kind by its looks."""
        kind = self.source_kind
        if kind == "none" and source == "none":
            return None  # as in `mount -t tmpfs none DIR`
        if kind == "none" and source is not None:
            raise UserError(f"the driver {self.name} takes no source: leave out {source}")
        if kind not in ("none", "any") and source is None:
            raise UserError(f"the driver {self.name} needs a source (a {kind}): name it before the mountpoint")
        if source is None or kind in ("none", "any"):
            return source
        if kind == "url" and "://" not in source:
            raise UserError(f"the source {source} is not a URL, which is what the driver {self.name} serves")
        if kind == "block" and source.startswith(_BLOCK_SERVICES):
            return source
        if kind != "url" and not source.startswith("/"):
            raise UserError(f"the source {source} must be an absolute path")
        return source


def from_command(command: str, source: str | None) -> Driver:
    """A program that the operator wants executed; the command has been checked."""
    if source is not None and "{source}" not in command:
        raise UserError("the command has no {source} in it: put it where the program expects the source")
    if source is None and "{source}" in command:
        raise UserError("the command has {source} in it: name the source before the mountpoint")
    name = os.path.basename(shlex.split(command)[0])[:64]
    return Driver(name=name, spec=messages.DriverSpec(command=command))


_INSTEAD = {
    "usb": "it is started for each device that it is for (`udf devices` lists them)",
    "block": "it makes a block device of its source, which is attached, not mounted",
    "fs": "it serves a filesystem, which is mounted, not attached",
}


async def find(name: str, *, trusted_only: bool, kinds: Collection[str] = ("fs",)) -> Driver:
    """Look a driver up and check its manifest and requisites. UserError for one of another kind than these.

    `trusted_only`: the caller is neither root nor our own user, so only what root installed for everyone counts.
    """
    trust = Trust(0, 0) if trusted_only else Trust.own()

    def look() -> Manifest:
        found = manifests.find_driver(name, trust)
        manifests.check_requires(found)
        return found

    found = await in_thread(look, f"the driver {name}")
    if found.kind not in kinds:
        raise UserError(f"the driver {found.name} cannot be mounted: {_INSTEAD[found.kind]}")
    return from_manifest(found)


async def for_filesystem(filesystem: str, *, trusted_only: bool) -> Driver:
    """The one driver whose manifest says that it mounts such a filesystem; one that takes a block service before one
    that takes a file, because it lives through an unplug."""
    trust = Trust(0, 0) if trusted_only else Trust.own()

    def look() -> list[Manifest]:
        fitting = fitting_for(filesystem, manifests.list_drivers(trust)[0])
        if len(fitting) == 1:
            manifests.check_requires(fitting[0])
        return fitting

    fitting = await in_thread(look, "the search path")
    if len(fitting) == 1:
        return from_manifest(fitting[0])
    which = (
        f"{len(fitting)} drivers mount {filesystem} ({', '.join(each.name for each in fitting)})"
        if fitting
        else f"no driver here mounts {filesystem}"
    )
    raise UserError(f"{which}: say which one is meant with -t DRIVER (`udf drivers` lists them)")


def fitting_for(filesystem: str, drivers: Iterable[Manifest]) -> list[Manifest]:
    """Those for a filesystem that come into question: if some take a block service, only they."""
    fitting = [each for each in drivers if filesystem in each.filesystems]
    return [each for each in fitting if each.source == "block"] or fitting


def from_manifest(found: Manifest) -> Driver:
    """The same from a manifest that has been read and checked."""
    return Driver(
        name=found.name,
        spec=messages.DriverSpec(
            path=found.path,
            class_name=found.class_name,
            command=found.command,
            kind=found.kind,
            provides=found.provides,
            window=found.window,
        ),
        source_kind=found.source,
        capabilities=found.capabilities,
        exclusive=found.exclusive,
        acl=found.acl,
        locks=found.locks,
        open=found.open,
        durability=found.durability,
        stable_nodes=found.nodes == "stable",
        inodes=found.inodes,
        deadline=found.deadline,
        warnings=found.warnings,
        manifest=found,
    )


async def listing(*, trusted_only: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Every usable driver on the search path as the interface describes it, and a sentence for each unusable one."""
    trust = Trust(0, 0) if trusted_only else Trust.own()
    found, warnings = await in_thread(lambda: manifests.list_drivers(trust), "the search path")
    return [_describe(each) for each in found], warnings


def _describe(found: Manifest) -> dict[str, Any]:
    return {
        "name": found.name,
        "path": found.path,
        "kind": found.kind,
        "description": found.description,
        "source": found.source,
        "provides": "" if found.kind == "fs" else found.provides,
        "names": found.names,
        "match": [str(entry) for entry in found.match],
        "requires": list(found.requires),
        "filesystems": list(found.filesystems),
        "durability": found.durability,
        "capabilities": list(found.capabilities),
        "options": [
            {
                "name": option.name,
                "type": option.type,
                "default": None if option.default is None else msgspec.json.encode(option.default).decode(),
                "help": option.help,
                "required": option.required,
            }
            for option in found.options.values()
        ],
    }


async def in_thread(work: Callable[[], T], what: str, limiter: trio.CapacityLimiter | None = None) -> T:
    """Do some reading in a worker thread; UserError if it takes too long. A thread that hangs is one less of `limiter`,
    which is ours for look-ups by default."""
    if limiter is None:
        try:
            limiter = _threads.get()
        except LookupError:
            limiter = trio.CapacityLimiter(_THREADS)
            _threads.set(limiter)
    with trio.move_on_after(LOOKUP_TIMEOUT):
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    raise UserError(f"{what} could not be read within {LOOKUP_TIMEOUT:g} s: something that it lies on hangs")
