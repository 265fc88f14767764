"""A daemon with sticks whose volumes a driver of the tests' own mounts: one file, the last 4 KiB of the export."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.conftest import mounts_below
from udf.supervisor.client import Connection

from .conftest import PATIENCE, Daemon, running_daemon

MIB = 1 << 20
DRIVERS = Path(__file__).with_name("volume_drivers")
SIZE = 4096  # of the one file


def volume(label: str = "", *, seed: int = 1, size: int = MIB) -> bytes:
    """What is taken for an XFS with this label; our driver needs no more of one."""
    head = b"XFSB" + bytes(28) + uuid.UUID(int=seed).bytes
    return (head.ljust(108, b"\0") + label.encode().ljust(12, b"\0")).ljust(size, b"\0")


def disk(*volumes: bytes | None) -> bytes:
    """An MBR with a partition of 1 MiB for each."""
    table = bytearray(512)
    for number, _ in enumerate(volumes):
        at = 446 + 16 * number
        table[at + 4] = 0x83
        table[at + 8 : at + 16] = (2048 * (number + 1)).to_bytes(4, "little") + (2048).to_bytes(4, "little")
    table[510:] = b"\x55\xaa"
    return bytes(table).ljust(MIB, b"\0") + b"".join(each or bytes(MIB) for each in volumes)


def content(image: Path, number: int = 0) -> bytes:
    """What an image holds of the file of a volume: of all of it, or of this partition."""
    data = image.read_bytes()
    return (data[number * MIB : (number + 1) * MIB] if number else data)[-SIZE:].rstrip(b"\0")


class Lab:
    """A daemon, a place for images and rules, and what happened."""

    def __init__(self, home: Path) -> None:
        self.home = home
        drivers = home / ".local/share/udf/drivers"
        drivers.mkdir(parents=True)
        for each in DRIVERS.glob("*.py"):
            shutil.copy(each, drivers)
        self.rules = home / "rules.toml"
        self.rules.write_text("")
        self.daemon: Daemon

    @property
    def media(self) -> Path:
        return self.daemon.directory / "media"

    @property
    def dev(self) -> Path:
        return self.daemon.directory / "dev"

    def image(self, name: str, data: bytes) -> Path:
        path = self.home / f"{name}.img"
        path.write_bytes(data)
        return path

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command asks, without the time that a command takes to start."""
        with Connection(self.daemon.socket) as connection:
            return connection.call(method, **parameters)

    def plug(self, name: str, data: bytes | None = None) -> list[Path]:
        """A stick with this content, or the one that was there before; where its volumes are mounted."""
        path = self.home / f"{name}.img" if data is None else self.image(name, data)
        options = {"file": str(path), "serial": f"S-{name}"}
        row = self.call("Plug", model="storage", options=options, name=name)["device"]
        assert row["state"] == "bound", row
        places = [each["mountpoint"] for one in row["instances"] for each in one["volumes"]]
        return sorted(Path(place) for place in places if place is not None)

    def unplug(self, name: str) -> None:
        self.call("Unplug", name=name)

    def device(self, name: str) -> dict[str, Any]:
        return next(row for row in self.call("Devices")["devices"] if row["name"] == name)

    def volumes(self, name: str) -> list[dict[str, Any]]:
        return [each for one in self.device(name)["instances"] for each in one["volumes"]]

    def mounts(self) -> list[dict[str, Any]]:
        return list(self.call("Status")["mounts"])

    def events(self) -> list[tuple[str, str]]:
        """Reason and text of what was told of volumes."""
        events = self.call("Events")["events"]
        return [(event["reason"], event["text"]) for event in events if event["what"] == "volume"]

    def in_media(self) -> list[str]:
        return sorted(name for name in os.listdir(self.media) if not name.startswith("."))

    def until(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Until it is true: each event of the daemon is a reason to look again."""
        until = time.monotonic() + seconds
        with Connection(self.daemon.socket) as connection:
            stream = connection.stream("Events")
            next(stream)
            while not (found := condition()):
                assert time.monotonic() < until, self.daemon.text()
                if select.select([connection._sock], [], [], 0.25)[0]:  # not everything that changes is an event
                    next(stream)
            return found


@contextlib.contextmanager
def running_lab(home: Path, directory: Path, *arguments: str | Path, rules: str = "") -> Iterator[Lab]:
    lab = Lab(home)
    lab.rules.write_text(rules)
    with running_daemon(directory, "--rules", lab.rules, *arguments, HOME=str(home)) as lab.daemon:
        yield lab
    assert not mounts_below(directory)
    assert sorted(os.listdir(directory)) == ["daemon.log"], sorted(directory.rglob("*"))
