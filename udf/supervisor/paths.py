"""The supervisor's side of looking at paths: always in a process of its own, always bounded in time.

Owns: starting udf.supervisor.pathcheck and believing what it says. Must never: touch a path itself; a hanging mount
would take the whole supervisor with it. Called by: registry.py, mounts.py.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import trio

from udf.errors import UserError
from udf.supervisor import sockets, spawn

CHECK_TIMEOUT = 15.0
MAX_ANSWER = 64 * 1024
log = logging.getLogger("udf.paths")
_MODULE = "udf.supervisor.pathcheck"


@dataclass(frozen=True)
class Checked:
    """Paths that can be used."""

    mountpoint: str
    source: str | None
    cleaned: str | None  # what stale mount had to be taken away, as a sentence


async def check(
    mountpoint: str, source: str | None, source_kind: str, *, nonempty: bool, run_as: spawn.Identity | None
) -> Checked:
    """Check with the rights of `run_as` (None: ours). UserError says what is wrong."""
    request = {"mountpoint": mountpoint, "source": source, "source_kind": source_kind, "nonempty": nonempty}
    answer = await _ask(request, run_as)
    if answer is None:
        raise UserError(f"{mountpoint} or {source} does not answer: something that it lies on hangs")
    if "refused" in answer:
        raise UserError(str(answer["refused"]))
    return Checked(str(answer["mountpoint"]), answer["source"], answer["cleaned"])


@dataclass(frozen=True)
class Image:
    """What is in a file or a block device that may be mounted."""

    path: str  # its real one
    kind: str  # file, device (the kernel's), or socket: of a block service
    filesystem: str  # by the name that mount(8) has for it; empty: none that is known
    partitions: dict[int, str]  # the filesystem of each


async def look(source: str, run_as: spawn.Identity | None) -> Image:
    """Look into an image with the rights of `run_as` (None: ours). UserError says why that cannot be done."""
    answer = await _ask({"look": source}, run_as)
    if answer is None:
        raise UserError(f"{source} does not answer: something that it lies on hangs")
    if "refused" in answer:
        raise UserError(str(answer["refused"]))
    partitions = {int(each["number"]): str(each["filesystem"]) for each in answer["partitions"]}
    return Image(str(answer["path"]), str(answer["kind"]), str(answer["filesystem"]), partitions)


async def busy(mountpoints: list[str]) -> list[str]:
    """Those of them that are in use, as far as the kernel tells us: only root is told. They may be so in a moment."""
    if not mountpoints or os.geteuid() != 0:
        return []
    answer = await _ask({"busy": mountpoints}, None)
    return [each for each in mountpoints if each in (answer or {}).get("busy", [])]


async def clean(mountpoint: str, run_as: spawn.Identity | None) -> str:
    """Take a mount whose shim has died out of the tree; an empty text, or what is left behind."""
    answer = await _ask({"clean": mountpoint}, run_as)
    if answer is None:
        return f"{mountpoint} could not be cleaned in time: run `umount -l {mountpoint}`"
    return str(answer.get("refused", ""))


async def sweep() -> None:
    """Take away mounts that killed supervisors of this user have left without a server, and say so in the log."""
    abandoned = sockets.abandoned_mountpoints()
    try:
        if abandoned:
            answer = await _ask({"sweep": [mountpoint for mountpoint, _ in abandoned]}, None)
            for text in (answer or {}).get("done", []):
                log.warning("%s", text)
    finally:
        for _, lock in abandoned:
            lock.release()


async def _ask(request: dict[str, Any], run_as: spawn.Identity | None) -> dict[str, Any] | None:
    """Its answer, or None if there was none in time."""
    read_end, write_end = os.pipe()
    data = b""
    async with trio.lowlevel.FdStream(read_end) as stream:
        try:
            child = spawn.start_program(_MODULE, [json.dumps(request)], write_end, run_as)
        finally:
            os.close(write_end)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.watch)
            try:
                with trio.move_on_after(CHECK_TIMEOUT):
                    while (chunk := await stream.receive_some(4096)) and len(data) <= MAX_ANSWER:
                        data += chunk
                    await child.ended.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await child.end(0)
            nursery.cancel_scope.cancel()
    try:
        answer = json.loads(data)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
