"""Mounts one pyfuse3 driver of fs/ directly on /dev/fuse, without shim or supervisor, for the drivers' own tests.

Owns the child process and the mount: both are gone when the context ends, whatever happened in between. Run as a
program it is that child: it loads the driver by path, mounts, says READY and serves until it is unmounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import os
import re
import resource
import select
import struct
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
READY = b"READY\n"


@dataclasses.dataclass
class Direct:
    """A live direct mount: where it is and the process that serves it."""

    path: Path
    process: subprocess.Popen[bytes]

    def descriptors(self) -> int:
        """How many descriptors the serving process has open now."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def fuse_works() -> bool:
    """Whether this machine lets us mount at all."""
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


@contextlib.contextmanager
def direct_mount(
    driver: str,
    mountpoint: Path,
    source: Path | None = None,
    *,
    options: dict[str, object] | None = None,
    fuse_options: tuple[str, ...] = ("default_permissions",),
    nofile: int | None = None,
    user: int | None = None,
    without: tuple[int, ...] = (),
) -> Iterator[Direct]:
    """Mount the driver NAME of fs/ at mountpoint, as user (an uid; capabilities are lost) when one is given, with
    nofile as the limit of descriptors, and without some capabilities (numbers)."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        fuse_options = (*fuse_options, "allow_other")
    job = json.dumps(
        {
            "driver": driver,
            "mountpoint": str(mountpoint),
            "source": None if source is None else str(source),
            "options": options or {},
            "fuse_options": sorted({*fuse_options, "fsname=direct"}),
            "nofile": nofile,
            "without": without,
            "user": user,
        }
    )
    process = subprocess.Popen(
        [sys.executable, __file__, job],
        stdout=subprocess.PIPE,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(TREE)},
    )
    assert process.stdout is not None
    try:
        _await_ready(process)
        yield Direct(mountpoint, process)
    finally:
        clean = _unmount(mountpoint)
        try:
            code = process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = -9
        process.stdout.close()
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
    assert clean, f"{mountpoint} was still busy at the end of the test"
    assert code == 0, f"the serving process ended with {code}"


def _await_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], 20)
    line = process.stdout.readline() if readable else b""
    if line != READY:
        raise RuntimeError(f"the driver did not become ready: {line!r}, exit code {process.poll()}")


def _unmount(mountpoint: Path) -> bool:
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    done = subprocess.run([*command, str(mountpoint)], check=False, capture_output=True)
    if done.returncode == 0 or b"not mounted" in done.stderr or b"not found" in done.stderr:
        return True
    subprocess.run([*command, "-l" if command == ["umount"] else "-z", str(mountpoint)], check=False)
    return False


def load_driver(name: str) -> type[typing.Any]:
    """The driver's class, found as the host finds it: by path, the class name from the manifest block."""
    path = TREE / "fs" / name / "__init__.py"
    if not path.exists():
        path = TREE / "fs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(
        f"driver_{name}", path, submodule_search_locations=[str(path.parent)] if path.name == "__init__.py" else None
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found = re.search(r'^# class = "(\w+)"$', path.read_text(), re.MULTILINE)
    assert found, f"{path} names no class in its manifest"
    driver: type[typing.Any] = getattr(module, found[1])
    return driver


def _drop_capabilities(numbers: list[int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("<Ii", 0x20080522, 0)
    sets = ctypes.create_string_buffer(24)
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("<6I", sets.raw))
    for number in numbers:
        for which in range(3):
            words[which + 3 * (number // 32)] &= ~(1 << number % 32)
    if libc.capset(header, struct.pack("<6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")


def _mount_for(user: int, mountpoint: str) -> str:
    """Mount as root what user will serve (that user may lack fusermount3 or /dev/fuse): the name for libfuse."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={fd},rootmode=40000,user_id={user},group_id={user},default_permissions,allow_other"
    if libc.mount(b"direct", os.fsencode(mountpoint), b"fuse", 0, data.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    return f"/dev/fd/{fd}"


def _serve(job: dict[str, typing.Any]) -> None:
    import pyfuse3
    import trio

    if job["nofile"] is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (job["nofile"], job["nofile"]))
    driver = load_driver(job["driver"])
    os.umask(0)  # only now: what Python caches of the driver's code must not be writable by everybody
    mountpoint = job["mountpoint"]
    if job.get("user") is not None:  # only now: another user may not be able to read the interpreter's files
        mountpoint = _mount_for(job["user"], mountpoint)
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    _drop_capabilities(job.get("without", []))
    arguments = [] if job["source"] is None else [job["source"]]
    operations = driver(*arguments, **job["options"])
    pyfuse3.init(operations, mountpoint, set(job["fuse_options"]))
    os.write(1, READY)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
