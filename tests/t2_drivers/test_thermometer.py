"""The smallest driver of the README, and files whose size is not known before they are read."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from udf.testing.devices import Emulator, Plugged
from udf.testing.devices.thermometer import Thermometer

from . import lab
from .mounted import mounted

needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no /dev/fuse here")


@pytest.fixture
def plugged() -> Iterator[Plugged]:
    with Emulator() as bus:
        yield bus.plug(Thermometer(celsius=21.5))


@pytest.fixture
def celsius(plugged: Plugged, tmp_path: Path) -> Iterator[Path]:
    with mounted("thermometer.py", "Thermometer", plugged, tmp_path / "mnt") as path:
        yield path / "celsius"


def output(*command: Any) -> bytes:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=60).stdout


def test_it_has_no_more_than_25_lines() -> None:
    assert len((lab.DRIVERS / "thermometer.py").read_text().splitlines()) <= 25


async def test_it_asks_the_device(plugged: Plugged) -> None:
    with lab.opened(lab.Thermometer, plugged) as driver:
        assert await driver.read("/celsius", 0, 100) == b"21.50\n"
        plugged.device.celsius = -0.25
        assert await driver.read("/celsius", 0, 100) == b"-0.25\n"


@needs_fuse
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["cat"], b"21.50\n"),
        (["head", "-c", "2"], b"21"),
        (["head", "-n", "1"], b"21.50\n"),
        (["tail", "-n", "1"], b"21.50\n"),
        (["tail", "-c", "3"], b"50\n"),
        (["dd", "bs=1", "status=none"], b"21.50\n"),
        (["grep", "-c", "21"], b"1\n"),
    ],
)
def test_programs_read_it(celsius: Path, command: list[str], expected: bytes) -> None:
    name = [f"if={celsius}"] if command[0] == "dd" else [str(celsius)]
    assert output(*command, *name) == expected


@needs_fuse
def test_each_open_reads_anew_and_one_open_file_does_not_change(celsius: Path, plugged: Plugged) -> None:
    assert celsius.stat().st_size == 0
    with open(celsius, "rb", buffering=0) as first:
        begin = first.read(2)
        plugged.device.celsius = 99.75
        assert begin + first.read(100) == b"21.50\n"
        with open(celsius, "rb", buffering=0) as second:
            assert second.read() == b"99.75\n"
        first.seek(0)
        assert first.read() == b"21.50\n"
    assert celsius.read_bytes() == b"99.75\n"
    with open(celsius, "rb", buffering=0) as file:
        assert [os.pread(file.fileno(), 1, at) for at in (5, 0, 4)] == [b"\n", b"9", b"5"]
        assert os.pread(file.fileno(), 10, 6) == b""


@needs_fuse
def test_after_an_unplug_reads_end_with_enodev(celsius: Path, plugged: Plugged) -> None:
    assert celsius.read_bytes() == b"21.50\n"
    plugged.unplug()
    began = time.monotonic()
    with pytest.raises(OSError) as caught:
        celsius.read_bytes()
    assert caught.value.errno == errno.ENODEV
    assert time.monotonic() - began < 10
