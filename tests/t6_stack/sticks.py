"""Sticks with FAT volumes, and what a person does with them at a running daemon.

Owns: making the images, plugging, mounting and pulling by the control socket, what a volume must hold. An image is
looked at by mtools and fsck.fat alone, never by our own driver. Called by: the tests of this folder that have a stick.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import make_runtime_dir
from tests.t3_fat import oracle
from tests.t5_cli.conftest import Daemon, running_daemon
from udf.supervisor.client import Connection, ControlError

KIB, MIB = 1 << 10, 1 << 20
OFFSET = MIB  # of the only partition
SIZES = {12: 4 * MIB, 16: 16 * MIB, 32: 34 * MIB}
CLUSTERS = {12: 2048, 16: 1024, 32: 512}
LOOK = 0.2  # seconds; not everything that changes is an event
Row = dict[str, Any]


@dataclass
class Stick:
    """An image that can be plugged in; its name is the emulated device's, its serial number the stick's own."""

    image: Path
    serial: str
    label: str
    kind: int = 16
    partitioned: bool = True
    name: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # what must be on it, whatever happens
    growing: set[str] = field(default_factory=set)  # those that may have more behind that
    others: dict[str, set[str]] = field(default_factory=dict)  # names under which they may be found instead

    @classmethod
    def made(
        cls,
        image: Path,
        label: str,
        *,
        kind: int = 16,
        partitioned: bool = True,
        serial: str = "",
        size: int = 0,
    ) -> Stick:
        """A new one with an empty volume."""
        size = size or SIZES[kind]
        offset = OFFSET if partitioned else 0
        oracle.made(image, size, kind=kind, cluster=CLUSTERS[kind], label=label, offset=offset)
        if partitioned:
            _write_table(image, offset, size)
        return cls(image, serial or f"S-{label}", label, kind, partitioned, name=image.stem)

    @property
    def offset(self) -> int:
        """Where its volume begins."""
        return OFFSET if self.partitioned else 0

    @property
    def export(self) -> str:
        """What its volume is called by UDF."""
        return "part1" if self.partitioned else "disk"

    def put(self, path: str, data: bytes) -> None:
        """Write a file by mtools, which must not be done while it is plugged in; a directory above it is made."""
        above = Path(path).parent
        if above != Path() and not any(Path(each).parent == above for each in self.files):
            oracle.mtools("mmd", self.image, f"::{above}", offset=self.offset)
        scratch = self.image.with_suffix(".put")
        scratch.write_bytes(data)
        oracle.mtools("mcopy", self.image, "-o", scratch, f"::{path}", offset=self.offset)
        scratch.unlink()
        self.files[path] = data

    def copy(self, image: Path) -> Stick:
        """The same stick to the last bit, in another file: what it holds now, as if it had been pulled out."""
        shutil.copyfile(self.image, image)
        return Stick(image, self.serial, self.label, self.kind, self.partitioned, self.name, dict(self.files))

    def found(self) -> dict[str, bytes]:
        """The files that mtools finds on it."""
        scratch = self.image.with_suffix(".seen")
        seen = oracle.extracted(self.image, scratch, offset=self.offset)
        return {name: data for name, (data, _) in seen.items() if data is not None}

    def renames(self, old: str, new: str) -> None:
        """A rename is under way: the file has the one name or the other."""
        self.others.setdefault(old, set()).add(new)

    def renamed(self, old: str, new: str) -> None:
        """It is done, though it may be undone by a cut until something is flushed."""
        self.files[new] = self.files.pop(old)
        self.others[new] = (self.others.pop(old) | {old}) - {new}

    def flushed(self) -> None:
        """Something was: all that was done before is there for good."""
        self.others.clear()

    def restart(self) -> None:
        """What is on it now is what must be on it; it must not be plugged in."""
        self.growing.clear()
        self.others.clear()
        self.files = self.found()

    def check(self, *, clean: bool, why: str = "") -> dict[str, bytes]:
        """What must be on it is; `clean`: without a repair, else after one by `fsck.fat -a`. Gives all that is there.

        The stick itself is left as it is.
        """
        with self._volume() as volume:
            if clean:
                oracle.check(volume.image, why)
            else:
                oracle.repaired(volume.image)
            found = volume.found()
        lost = {
            path: (len(data), None if path not in found else len(found[path]))
            for path, data in self.files.items()
            if not any(self._is_kept(path, data, found.get(name)) for name in (path, *self.others.get(path, ())))
        }
        assert not lost, f"{why}: what was promised is not there (size, size found): {lost}; found {sorted(found)}"
        return found

    def _is_kept(self, path: str, data: bytes, found: bytes | None) -> bool:
        return found == data or (found is not None and path in self.growing and found.startswith(data))

    def complaints(self) -> str:
        """What fsck.fat finds; "" if it is clean."""
        with self._volume() as volume:
            return oracle.complaints(volume.image)

    def repair(self) -> None:
        """`fsck.fat -a` on the stick itself, which must not be plugged in."""
        with self._volume() as volume:
            oracle.repaired(volume.image)
            if self.partitioned:
                with open(volume.image, "rb") as source, open(self.image, "r+b") as target:
                    target.seek(OFFSET)
                    shutil.copyfileobj(source, target, MIB)
            else:
                shutil.copyfile(volume.image, self.image)

    @contextlib.contextmanager
    def _volume(self) -> Iterator[Stick]:
        """Its volume alone, in a copy: fsck.fat knows no partitions."""
        path = self.image.with_suffix(".volume")
        with open(self.image, "rb") as source, open(path, "wb") as target:
            source.seek(self.offset)
            shutil.copyfileobj(source, target, MIB)
        try:
            yield Stick(
                path, self.serial, self.label, self.kind, partitioned=False, files=self.files, growing=self.growing
            )
        finally:
            path.unlink()


def _write_table(image: Path, offset: int, size: int) -> None:
    """A partition table with one entry."""
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x0C, b"\xfe\xff\xff", offset // 512, size // 512)
    with open(image, "r+b") as file:
        file.seek(446)
        file.write(entry + bytes(48) + b"\x55\xaa")


class Desk:
    """One daemon, and a person before it. Errors are those of the control socket."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.home = daemon.socket.parent
        self._connection = Connection(daemon.socket)
        self._told = Connection(daemon.socket)
        next(self._told.stream("Events"))

    def close(self) -> None:
        """Of its connections."""
        self._connection.close()
        self._told.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Any method."""
        return self._connection.call(method, **parameters)

    # ---- the stick

    def plug(self, stick: Stick, *faults: str, cache: str = "1M", **options: str) -> Row:
        """Put it in, wait until it is served (and mounted, if that goes by itself)."""
        options = {"file": str(stick.image), "serial": stick.serial, "cache": cache, **options}
        return dict(self.call("Plug", model="storage", name=stick.name, options=options, faults=list(faults))["device"])

    def unplug(self, stick: Stick) -> None:
        """Pull it out, if it is in, and forget it; what it had in its cache is lost."""
        with contextlib.suppress(ControlError):
            self.call("Unplug", name=stick.name)

    def replug(self, stick: Stick) -> Row:
        """Put it back where it was."""
        return dict(self.call("Replug", name=stick.name)["device"])

    def faults(self, stick: Stick, *rules: str) -> None:
        """What goes wrong with it from now on."""
        self.call("Faults", name=stick.name, faults=list(rules))

    def disk(self, row: Row) -> str:
        """What UDF calls the disk of a device that was plugged in."""
        assert row["state"] == "bound", row
        return str(row["instances"][0]["name"])

    def port(self, stick: Stick) -> str:
        """Where it is plugged in."""
        return next(str(each["port"]) for each in self.call("Devices")["devices"] if each["name"] == stick.name)

    # ---- the volume

    def mount(self, source: str, where: Path, **options: str) -> None:
        """Mount it on a directory, which is made."""
        where.mkdir(exist_ok=True)
        self.call("Mount", source=source, mountpoint=str(where), options=options)

    def umount(self, where: Path, *, lazy: bool = False) -> None:
        """Unmount in order."""
        self.call("Unmount", mountpoint=str(where), lazy=lazy or None)

    def eject(self, text: str) -> str:
        """End a device in order; the sentence."""
        return str(self.call("Eject", device=text)["text"])

    def rows(self) -> list[Row]:
        """Everything that serves."""
        return list(self.call("Status")["mounts"])

    def row(self, where: Path | str) -> Row | None:
        """A mount by its mountpoint, or anything by its name."""
        return next((row for row in self.rows() if str(where) in (row["mountpoint"], row["name"])), None)

    def state(self, where: Path | str) -> str:
        """Of a mount: GONE when there is none."""
        row = self.row(where)
        return "GONE" if row is None else str(row["state"])

    # ---- what is told

    def until(self, what: Callable[[], bool], why: str, seconds: float = 40.0) -> None:
        """Wait for something that comes with an event; it is looked for after each."""
        end = time.monotonic() + seconds
        while not what():
            left = end - time.monotonic()
            assert left > 0, f"not in {seconds} s: {why}; there is {self._summary()}\n{self.daemon.text()[-3000:]}"
            self._told._sock.settimeout(min(left, LOOK))
            with contextlib.suppress(ControlError):  # nothing came in time
                self._told._receive()

    def until_state(self, where: Path | str, *states: str, seconds: float = 40.0) -> None:
        """Wait until a mount is in one of these states."""
        self.until(lambda: self.state(where) in states, f"{where} is {states}", seconds)

    def events(self, since: int = 0) -> list[Row]:
        """What was told since an event."""
        return list(self.call("Events", since=since)["events"])

    def mark(self) -> int:
        """The number of the last event."""
        return max((int(event["seq"]) for event in self.events()), default=0)

    def _summary(self) -> list[tuple[str, str, str]]:
        return [(row["name"], row["state"], row["text"]) for row in self.rows()]

    def clear(self) -> None:
        """End everything, whatever it takes; for what a test that failed has left."""
        for row in self.rows():
            if row["kind"] == "mount" and not row["lazy"]:
                with contextlib.suppress(ControlError):
                    self.call("Unmount", mountpoint=row["mountpoint"], lazy=True)
        for device in self.call("Devices")["devices"]:
            self.call("Unplug", name=device["name"])

    @contextlib.contextmanager
    def left_as_found(self) -> Iterator[None]:
        """For one test, of which nothing may be left."""
        yield
        try:
            self.nothing_is_left()
        finally:
            self.clear()  # one test that fails is enough

    def nothing_is_left(self) -> None:
        """No mount, no device, no name and no socket of a device, soon."""
        self.until(lambda: not self.rows(), "nothing serves any more")
        assert [each["name"] for each in self.call("Devices")["devices"]] == []
        left = [str(path) for path in (self.home / "dev").glob("*[0-9]")]
        left += [str(path) for path in (self.home / "block").glob("*")]
        assert left == []


@contextlib.contextmanager
def running_desk(*arguments: str) -> Iterator[Desk]:
    """A daemon of its own, with these arguments, whose emulator is there before any test needs it."""
    with make_runtime_dir() as directory, running_daemon(directory, *arguments) as running:
        running.udf.done("plug", "thermometer", "--name", "first")
        running.udf.done("unplug", "first")
        desk = Desk(running)
        try:
            yield desk
        finally:
            desk.close()
