"""A short-lived program that looks at paths for the supervisor, so that one that hangs hangs only this process.

Owns: whether a mountpoint and a source can be used, what filesystem is in an image, and the cleaning of a mountpoint
after a shim that died. Must never: import more than the standard library and udf.fuse (unless it looks into an image);
it starts for every mount. It runs with the rights of the user who asked, so that the kernel decides what that user may
see. Called by: paths.py, as `python -m udf.supervisor.pathcheck JSON`; prints one JSON object.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from udf.fuse import mount as mounting

T = TypeVar("T")


class _RefusedError(Exception):
    pass


def check(mountpoint: str, source: str | None, source_kind: str, nonempty: bool) -> dict[str, Any]:
    """Where the mountpoint and the source really are, and what was cleaned away. One sentence in `refused` if not."""
    try:
        target, cleaned = _mountpoint(mountpoint, nonempty)
        return {"mountpoint": target, "cleaned": cleaned, "source": _source(source, source_kind)}
    except _RefusedError as exc:
        return {"refused": str(exc)}
    except OSError as exc:
        return {"refused": f"{exc.filename or mountpoint}: {exc.strerror}"}


def _mountpoint(path: str, nonempty: bool) -> tuple[str, str | None]:
    target = os.path.realpath(path)
    cleaned = None
    try:
        status = os.stat(target)
    except OSError as exc:
        if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise _RefusedError(_missing("the mountpoint", path, exc)) from None
        try:
            cleaned = mounting.clean_stale(target)
        except mounting.MountError as error:
            raise _RefusedError(f"{target} is a mount whose server is gone: {error}") from None
        if cleaned is None:
            raise _RefusedError(f"{target} is a mount that does not answer: unmount it first") from None
        status = os.stat(target)
    if not stat.S_ISDIR(status.st_mode):
        raise _RefusedError(f"the mountpoint {path} is not a directory: name or create one")
    there = mounting.find_mount(target)
    if there is not None:
        raise _RefusedError(
            f"{target} is a mountpoint already ({there.fstype}): unmount it or choose another directory"
        )
    _right(target, status)
    if not nonempty:
        try:
            with os.scandir(target) as entries:
                empty = next(entries, None) is None
        except PermissionError:
            empty = True  # not ours to look into; what a mount would hide is not ours either
        if not empty:
            raise _RefusedError(f"the mountpoint {target} is not empty: choose an empty one, or mount with -o nonempty")
    return target, cleaned


def _right(target: str, status: os.stat_result) -> None:
    # What fusermount3 will demand too; said here as a sentence, before anything is started.
    uid = os.geteuid()
    if uid in (0, status.st_uid):
        return
    if not os.access(target, os.W_OK) or status.st_mode & stat.S_ISVTX:
        raise _RefusedError(f"you may not mount on {target}: it must be your own directory, or one that you may write")


def _source(path: str | None, kind: str) -> str | None:
    if path is None or kind in ("none", "url") or (kind == "block" and not path.startswith("/")):
        return path
    try:
        status = os.stat(path)
    except OSError as exc:
        if kind == "any":
            return path  # not every source is a path
        raise _RefusedError(_missing("the source", path, exc)) from None
    if kind == "directory" and not stat.S_ISDIR(status.st_mode):
        raise _RefusedError(f"the source {path} is not a directory, which is what this driver serves")
    if kind == "file" and stat.S_ISDIR(status.st_mode):
        raise _RefusedError(f"the source {path} is a directory; this driver serves a file")
    if kind == "device" and not (stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        raise _RefusedError(f"the source {path} is not a device, which is what this driver serves")
    if not os.access(path, os.R_OK):
        raise _RefusedError(f"you may not read the source {path}")
    return os.path.realpath(path)


def look(path: str) -> dict[str, Any]:
    """What is in an image, by the magic numbers: its filesystem, or its partitions with theirs."""
    from udf.block.partitions import read_table
    from udf.block.probe import probe

    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            return {"path": os.path.realpath(path), "kind": "socket", "filesystem": "", "partitions": []}
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise _RefusedError(_missing("the source", path, exc)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise _RefusedError(f"the source {path} is neither a file nor a block device")
        size = os.lseek(descriptor, 0, os.SEEK_END)

        def filesystem(begin: int, length: int) -> str:
            async def read(offset: int, count: int) -> bytes:
                return os.pread(descriptor, count, begin + offset)

            volume = _finish(probe(read, length))
            return "" if volume is None else volume.type

        async def read_disk(offset: int, count: int) -> bytes:
            return os.pread(descriptor, count, offset)

        whole = filesystem(0, size)
        table = _finish(read_table(read_disk, size))
        found = [
            {"number": each.number, "size": each.size, "filesystem": filesystem(each.offset, each.size)}
            for each in table.partitions
        ]
        kind = "file" if stat.S_ISREG(mode) else "device"
        return {"path": os.path.realpath(path), "kind": kind, "filesystem": whole, "partitions": found}
    except OSError as exc:
        raise _RefusedError(f"the source {path} cannot be read: {exc.strerror}") from None
    finally:
        os.close(descriptor)


def _finish(steps: Coroutine[Any, Any, T]) -> T:
    """Run what never waits, because its reads do not."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise RuntimeError("a read waits")


def _missing(what: str, path: str, exc: OSError) -> str:
    if exc.errno == errno.ENOENT:
        return f"{what} {path} does not exist"
    if exc.errno in (errno.EACCES, errno.EPERM):
        return f"you may not look at {what} {path}"
    return f"{what} {path} cannot be used: {exc.strerror}"


def clean(mountpoint: str) -> dict[str, Any]:
    """Take a mount of ours, whose shim has died, out of the tree. The path itself is not touched."""
    try:
        there = mounting.find_mount(mountpoint)
        if there is not None and there.fstype == mounting.FSTYPE:
            mounting.unmount(mountpoint, lazy=True)
    except OSError as exc:
        return {"refused": f"{mountpoint} could not be cleaned: {exc}"}
    return {}


def busy(mountpoints: list[str]) -> dict[str, Any]:
    """Which of these could not be unmounted now. None of them is."""
    found = []
    for mountpoint in mountpoints:
        if mounting.is_busy(mountpoint):
            found.append(mountpoint)
    return {"busy": found}


def sweep(mountpoints: list[str]) -> dict[str, Any]:
    """Take away the mounts there that have no server; what was done, in sentences."""
    done = []
    for mountpoint in mountpoints:
        try:
            done.append(mounting.clean_stale(mountpoint))
        except OSError as exc:
            done.append(f"{mountpoint} could not be cleaned: {exc}")
    return {"done": [text for text in done if text]}


def main(argument: str) -> None:
    """Do what the JSON says and print the answer."""
    request = json.loads(argument)
    if "sweep" in request:
        answer = sweep(request["sweep"])
    elif "busy" in request:
        answer = busy(request["busy"])
    elif "clean" in request:
        answer = clean(request["clean"])
    elif "look" in request:
        try:
            answer = look(request["look"])
        except _RefusedError as exc:
            answer = {"refused": str(exc)}
    else:
        answer = check(**request)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
