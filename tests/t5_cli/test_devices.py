"""Devices as a user has them: a real daemon, emulated devices, drivers of the test's own, and answers in words."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, make_runtime_dir, mounts_below
from udf.supervisor.client import Connection
from udf.testing.devices import Association, BulkIn, Configuration, Device, Emulator, Interface
from udf.testing.devices.loopback import Loopback
from udf.testing.devices.thermometer import Thermometer

from .conftest import PATIENCE, Daemon, running_daemon

THERMOMETER = '''"""Reads the temperature."""
# /// udf
# kind = "usb"
# interface = 1
# class = "{name}"
# match = [{{ {match} }}]
# {more}
# ///

from udf import Attr, UsbDriver


class {name}(UsbDriver):
    async def list(self, path: str) -> list[str]:
        return ["celsius"]

    async def stat(self, path: str) -> Attr:
        if path not in ("/", "/celsius"):
            raise FileNotFoundError(path)
        return Attr("dir") if path == "/" else Attr(size=6)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        raw = await self.usb.control_in(0xC0, 1, length=2)
        return b"%6.2f" % (int.from_bytes(raw, "little", signed=True) / 100)
'''
# Not the product that the thermometer of the built-in drivers is for: the tests bring drivers of their own.
MATCH = "vendor = 0x1209, product = 0x7e58"
MODEL = ("thermometer", "-o", "product=0x7e58")


class Lab:
    """A daemon with a home of its own, where drivers and rules can be put."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.drivers = home / ".local/share/udf/drivers"
        self.drivers.mkdir(parents=True)
        self.rules = home / "rules.toml"
        self.rules.write_text("")
        self.daemon: Daemon

    def driver(self, name: str = "probe", match: str = MATCH, more: str = "") -> Path:
        """Install a driver as an installer does it: complete, then renamed into place."""
        path = self.drivers / f"{name}.py"
        new = path.with_suffix(".new")
        new.write_text(THERMOMETER.format(name=name.title().replace("_", ""), match=match, more=more))
        new.replace(path)
        return path

    def devices(self) -> list[dict[str, Any]]:
        return list(json.loads(self.daemon.udf.done("devices", "--json"))["devices"])

    def device(self, name: str) -> dict[str, Any]:
        return next(row for row in self.devices() if row["name"] == name)

    def plug(self, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self.daemon.udf.done("plug", *arguments, "--json"))["device"])

    def until(self, name: str, state: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Until a device is in a state: each event of the daemon is a reason to look again."""
        until = time.monotonic() + seconds
        with Connection(self.daemon.socket) as connection, Connection(self.daemon.socket) as asking:
            stream = connection.stream("Events")
            next(stream)
            while True:
                row = next((row for row in asking.call("Devices")["devices"] if row["name"] == name), None)
                if row is not None and row["state"] == state:
                    return dict(row)
                assert time.monotonic() < until, (row, self.daemon.text())
                if select.select([connection._sock], [], [], 1.0)[0]:
                    next(stream)

    @property
    def dev(self) -> Path:
        return self.daemon.directory / "dev"


@contextlib.contextmanager
def running_lab(
    home: Path, directory: Path, *arguments: str | Path, before: Callable[[Lab], object] = lambda _: None
) -> Iterator[Lab]:
    lab = Lab(home)
    before(lab)
    with running_daemon(directory, "--rules", lab.rules, *arguments, HOME=str(home)) as lab.daemon:
        yield lab
    assert not mounts_below(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["daemon.log"] or not any(
        path.is_socket() for path in directory.rglob("*")
    )
    assert not list((directory / "dev").glob("*")), "places are left"


@pytest.fixture
def lab(tmp_path: Path, runtime_dir: Path) -> Iterator[Lab]:
    with running_lab(tmp_path / "home", runtime_dir) as lab:
        yield lab


def read(path: Path) -> str:
    return path.read_text()


def test_a_device_is_plugged_in_read_and_pulled_out(lab: Lab) -> None:
    lab.driver()
    udf = lab.daemon.udf
    place = lab.dev / "probe0"
    said = udf.done("plug", *MODEL, "--name", "bath", "--serial", "T 1", "-o", "celsius=36.6")
    assert said == f"bath: probe serves it as probe0: {place}\n"
    assert read(place / "celsius") == " 36.60"
    assert read(lab.dev / "by-id/UDF-Thermometer-T_1/celsius") == " 36.60"
    table = udf.done("devices").splitlines()
    assert table[0].split()[:4] == ["STATE", "ID", "NAME", "PORT"]
    assert table[1].split()[:4] == ["bound", "1209:7e58", "bath", "emulated/1-1"]
    assert table[1].endswith(f"probe        {place}") or str(place) in table[1]
    udf.done("unplug", "bath")
    assert udf.done("devices") == "No device is there.\n"
    assert not place.exists()
    assert not list((lab.dev / "by-id").iterdir())
    assert not mounts_below(lab.dev)


def test_an_image_file_is_plugged_in_as_a_stick(lab: Lab, tmp_path: Path) -> None:
    image = tmp_path / "stick.img"
    content = random.Random(1).randbytes(3 * 1024 * 1024)
    image.write_bytes(content)
    disk = lab.dev / "disk0/disk"
    assert lab.daemon.udf.done("plug", image) == f"stick: usb_storage serves it as disk0: {disk}\n"
    assert disk.read_bytes() == content
    with disk.open("r+b") as file:
        file.seek(4096)
        file.write(b"written" * 1000)
        file.flush()
        os.fsync(file.fileno())
    lab.daemon.udf.done("unplug", "stick")
    assert image.read_bytes() == content[:4096] + b"written" * 1000 + content[4096 + 7000 :]
    assert not disk.exists()
    (tmp_path / "stick").mkdir()
    assert "stick" in lab.daemon.udf.refused("plug", tmp_path / "stick")


def test_a_stick_is_called_after_its_file_as_far_as_that_is_a_name(lab: Lab, tmp_path: Path) -> None:
    """A blank in the file's name was a refusal."""
    for file, name in (("my stick (1).img", "my-stick-1-"), ("..ä.img", "storage0"), ("x" * 250 + ".img", "x" * 64)):
        image = tmp_path / file
        image.write_bytes(bytes(1024 * 1024))
        assert lab.plug(str(image))["name"] == name
        lab.daemon.udf.done("unplug", name)


def test_a_disk_of_the_daemon_is_no_image_for_it(lab: Lab, tmp_path: Path) -> None:
    """The emulator waited for itself, and all emulated devices with it, for half a minute."""
    image = tmp_path / "stick.img"
    image.write_bytes(bytes(1024 * 1024))
    lab.plug(str(image))
    began = time.monotonic()
    said = lab.daemon.udf.refused("plug", lab.dev / "disk0/disk")
    assert "is served by this daemon itself" in said
    assert time.monotonic() - began < 25
    assert (lab.dev / "disk0/disk").read_bytes() == bytes(1024 * 1024)


def test_what_cannot_be_a_medium_is_refused_in_words_that_fit(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(bytes(511))
    udf = lab.daemon.udf
    assert "empty has 0 bytes, less than a block of 512" in udf.refused("plug", tmp_path / "empty")
    assert "short has 511 bytes, less than a block of 512" in udf.refused("plug", tmp_path / "short")
    assert "the option 'file' has more than 4096 characters" in udf.refused("plug", "/" + "y" * 5000)
    assert "/proc/self/mem: Invalid argument" in udf.refused("plug", "/proc/self/mem")
    for size in ("-4", "9" * 24):
        assert f"size {size} is not from 0 to" in udf.refused("plug", "storage", "-o", f"size={size}")
    assert json.loads(udf.done("devices", "--json")) == {"devices": []}


def test_why_tells_of_every_driver(lab: Lab) -> None:
    lab.driver()
    lab.driver("other", "vendor = 0x1209")
    lab.driver("disk", "class = 8")
    lab.plug(*MODEL, "--name", "bath")
    said = lab.daemon.udf.done("why", "bath").splitlines()
    assert said[0] == "bath is UDF Thermometer, 1209:7e58, at 1-1."
    assert said[1].startswith("bath: probe serves it as probe0: ")
    assert [line.strip() for line in said[2:] if line.split()[1] in ("probe", "other", "disk")] == [
        "* probe is chosen for the device: vendor 1209, product 7e58",
        "- other matches the device (vendor 1209), but probe is more specific",
        "- disk is not for it: it is for interface class 08/*/*",
    ]
    for name in ("probe0", "1-1", "1209:7e58", "UDF-Thermometer-0"):
        assert lab.daemon.udf.done("why", name).splitlines()[0] == said[0]
    answer = json.loads(lab.daemon.udf.done("why", "bath", "--json"))
    assert [each["driver"] for each in answer["candidates"]][:2] == ["probe", "other"]
    assert [each["driver"] for each in answer["candidates"] if each["chosen"]] == ["probe"]
    assert lab.daemon.udf.refused("why", "nothing") == (
        "udf: there is no device 'nothing': `udf devices` lists those that are there"
    )
    lab.plug(*MODEL, "--name", "pool")
    assert "may be any of" in lab.daemon.udf.refused("why", "1209:7e58")


def test_a_driver_that_appears_after_its_device_gets_it(lab: Lab) -> None:
    said = lab.daemon.udf.done("plug", *MODEL, "--name", "bath")
    assert said == "bath: no_driver: no driver is for it\n"
    lab.driver()
    row = lab.until("bath", "bound")
    assert [each["name"] for each in row["instances"]] == ["probe0"]
    assert read(lab.dev / "probe0/celsius") == " 21.50"


def test_a_tie_is_reported_and_a_rule_settles_it(lab: Lab) -> None:
    lab.driver("probe")
    lab.driver("sonde")
    said = lab.daemon.udf.refused("plug", *MODEL, "--name", "bath")
    assert "the drivers probe and sonde fit the device equally well, so none is started" in said
    assert lab.device("bath")["state"] == "tie"
    lab.rules.write_text('[[prefer]]\nvendor = 0x1209\ndriver = "sonde"\n')
    assert [each["driver"] for each in lab.until("bath", "bound")["instances"]] == ["sonde"]
    lab.rules.write_text("[[deny]]\nvendor = 0x1209\n")
    row = lab.until("bath", "denied")
    assert row["text"] == f"it is denied by rule deny[0] of {lab.rules}"
    assert not mounts_below(lab.dev)


def test_rules_with_a_mistake_leave_the_last_good_ones(lab: Lab) -> None:
    lab.driver()
    lab.rules.write_text("[[deny]]\nvendor = 0x1209\n")
    assert lab.plug(*MODEL, "--name", "a")["state"] in ("denied", "bound")
    lab.until("a", "denied")
    lab.rules.write_text("[[deny\n")
    lab.driver("other", "class = 8")  # so that everything is read again
    lab.plug(*MODEL, "--name", "b")
    assert lab.device("b")["state"] == "denied"


def test_a_daemon_is_not_started_with_rules_that_cannot_be_used(tmp_path: Path, runtime_dir: Path) -> None:
    from .conftest import Command

    udf = Command(runtime_dir / "udf.sock")
    rules = tmp_path / "rules.toml"
    assert "cannot be examined" in udf.refused("daemon", "--rules", rules)
    rules.write_text("[[deny]]\nvendor = 'x'\n")
    assert "the rule 'deny[0].vendor' must be a number" in udf.refused("daemon", "--rules", rules)
    assert "is no address of a USB/IP server" in udf.refused("daemon", "--usbip", "box:99999")


def test_a_driver_waits_for_its_requisites(lab: Lab) -> None:
    lab.driver("probe", more='requires = ["frobnicate-7"]')
    said = lab.daemon.udf.done("plug", *MODEL, "--name", "bath")
    assert said == "bath: waiting: the driver probe waits: the program frobnicate-7 is not installed\n"
    lab.driver("probe", more='requires = ["drivers:relay"]')
    lab.driver("relay", "vendor = 0x1209, product = 0x0001")
    lab.plug("loopback", "--name", "relay")
    said = lab.daemon.udf.done("why", "bath")
    assert "probe" in said


def test_a_replug_gets_the_same_name_and_open_files_end(lab: Lab) -> None:
    lab.driver()
    lab.plug(*MODEL, "--name", "bath", "--serial", "A")
    lab.plug(*MODEL, "--name", "pool", "--serial", "B")
    with (lab.dev / "probe0/celsius").open("rb", buffering=0) as file:
        said = lab.daemon.udf.done("replug", "bath")
        assert said.startswith("bath: probe serves it as probe0: ")
        with pytest.raises(OSError, match=r"No such device|Transport endpoint|Input/output|Software caused"):
            os.pread(file.fileno(), 6, 0)
    assert read(lab.dev / "probe0/celsius") == " 21.50"
    assert read(lab.dev / "probe1/celsius") == " 21.50"


def test_a_killed_driver_is_not_noticed(lab: Lab) -> None:
    lab.driver()
    lab.plug(*MODEL, "--name", "bath")
    for _ in range(3):
        pid = next(row["driver_pid"] for row in lab.daemon.udf.mounts() if row["name"] == "probe0")
        os.kill(pid, signal.SIGKILL)
        assert read(lab.dev / "probe0/celsius") == " 21.50"
    assert lab.device("bath")["state"] == "bound"


def test_the_death_of_the_emulator_is_an_unplug_of_everything(lab: Lab) -> None:
    lab.driver()
    for number in range(3):
        lab.plug(*MODEL, "--name", f"t{number}")
    pid = int(_emulator(lab).name)
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    while lab.devices():
        assert time.monotonic() < until
    assert "nothing emulated is plugged in" in lab.daemon.udf.refused("unplug", "t0")
    assert lab.plug(*MODEL, "--name", "t0")["state"] == "bound"
    assert read(lab.dev / "probe0/celsius") == " 21.50"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to give up")
def test_the_emulator_may_do_nothing_but_read_and_write_files(lab: Lab) -> None:
    lab.plug(*MODEL)
    status = dict(
        line.split(":\t", 1) for line in (_emulator(lab) / "status").read_text().splitlines() if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1"
    dac_override, dac_read_search, fowner = 1 << 1, 1 << 2, 1 << 3
    assert int(status["CapEff"], 16) & ~(dac_override | dac_read_search | fowner) == 0
    assert int(status["CapBnd"], 16) & ~(dac_override | dac_read_search | fowner) == 0


def test_two_daemons_do_not_share_a_directory_of_devices(lab: Lab) -> None:
    from .conftest import Command

    second = Command(lab.daemon.directory / "second.sock")
    assert "another daemon keeps its devices in" in second.refused("daemon")


def test_where_others_can_write_a_daemon_has_a_directory_of_its_own(tmp_path: Path, runtime_dir: Path) -> None:
    runtime_dir.chmod(0o1777)
    with running_daemon(runtime_dir, HOME=str(tmp_path)) as daemon:
        assert (runtime_dir / "udf.sock.d/dev/by-id").is_dir()
        assert daemon.udf.done("devices") == "No device is there.\n"


def _emulator(lab: Lab) -> Path:
    return next(
        entry
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(lab.daemon.directory / "usbip.sock").encode() in _cmdline(entry)
    )


def _cmdline(entry: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (entry / "cmdline").read_bytes()
    return b""


def test_a_driver_that_cannot_start_is_one_sentence(lab: Lab) -> None:
    path = lab.driver()
    path.write_text(path.read_text() + "\nraise RuntimeError('smoke')\n")
    said = lab.daemon.udf.refused("plug", *MODEL, "--name", "bath")
    assert said.startswith("udf: bath is plugged in, but no driver serves it: ")
    assert "smoke" in said
    assert lab.device("bath")["state"] == "failed"
    lab.driver()  # mended
    lab.until("bath", "bound")


def test_faults_can_be_changed_while_it_is_plugged_in(lab: Lab) -> None:
    lab.driver()
    lab.plug(*MODEL, "--name", "bath")
    lab.daemon.udf.done("faults", "bath", "stall ep=0 request=1")
    with pytest.raises(OSError, match=r"Broken pipe|Input/output"):
        read(lab.dev / "probe0/celsius")
    lab.daemon.udf.done("faults", "bath")
    assert read(lab.dev / "probe0/celsius") == " 21.50"
    assert "bath" not in lab.daemon.udf.refused("faults", "bath", "explode")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("plug", "teapot"), "there is no file and no device model 'teapot'"),
        (("plug", "thermometer", "-o", "colour=red"), "has no option 'colour'"),
        (("plug", "thermometer", "-o", "celsius=warm"), "celsius=warm is wrong"),
        (("plug", "thermometer", "--faults", "explode"), "explode"),
        (("plug", "/nonexistent.img"), ""),
        (("unplug", "nothing"), "nothing"),
        (("replug", "nothing"), "nothing"),
        (("faults", "nothing", "stall"), "nothing"),
        (("why", "nothing"), "nothing"),
    ],
)
def test_mistakes_are_one_sentence(lab: Lab, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in lab.daemon.udf.refused(*arguments)


@pytest.mark.parametrize("arguments", [("devices",), ("why", "x"), ("plug", "x"), ("unplug", "x"), ("replug", "x")])
def test_without_a_daemon_the_advice_is_to_start_one(
    udf: Any, arguments: tuple[str, ...], tmp_path: Path, no_system_daemon: None
) -> None:
    assert "start `udf daemon`" in udf.refused(*arguments, code=3)
    assert "start `udf daemon`" in udf.refused(*arguments, "--socket", tmp_path / "none", code=3)


def test_what_a_device_says_of_itself_never_reaches_a_path_or_a_terminal_as_it_is(lab: Lab) -> None:
    lab.driver()
    evil = "../../etc\x1b[31m/passwd\n"
    row = lab.plug(*MODEL, "--name", "bath", "--serial", evil)
    assert row["state"] == "bound"
    links = list((lab.dev / "by-id").iterdir())
    assert [link.name for link in links] == ["UDF-Thermometer-etc_31m_passwd"]
    for command in (("devices",), ("devices", "--json"), ("why", "bath"), ("status",), ("events",)):
        said = lab.daemon.udf.done(*command)
        assert "\x1b" not in said
        assert "\\x1b" in said or command[0] in ("status", "events")


def test_devices_of_another_server_come_by_usbip(tmp_path: Path, runtime_dir: Path) -> None:
    with Emulator(listen=("127.0.0.1", 0)) as emulator:
        assert emulator.address is not None
        plugged = emulator.plug(Thermometer(celsius=-3.0, product=0x7E58))
        emulator.plug(Loopback())
        with running_lab(tmp_path / "home", runtime_dir, "--usbip", f"127.0.0.1:{emulator.address[1]}") as lab:
            lab.driver()
            bus = f"usbip:127.0.0.1:{emulator.address[1]}"
            until = time.monotonic() + PATIENCE
            while not any(row["state"] == "bound" for row in lab.devices()):
                assert time.monotonic() < until, lab.devices()
            assert [(row["bus"], row["state"]) for row in lab.devices()] == [(bus, "bound"), (bus, "no_driver")]
            assert read(lab.dev / "probe0/celsius") == " -3.00"
            assert "is not an emulated device" in lab.daemon.udf.refused("unplug", "probe0")
            emulator.unplug(plugged)
            until = time.monotonic() + PATIENCE
            while len(lab.devices()) != 1:
                assert time.monotonic() < until, lab.devices()
            assert not mounts_below(lab.dev)


class Pair(Device):
    """Two sensors in one case: an interface for each, and a third one that belongs to the second."""

    vendor, product = 0x1209, 0x0002
    configurations = [
        Configuration(
            [
                Interface(0xFF, 1, 0, endpoints=[BulkIn(1)]),
                Interface(0xFF, 2, 0, endpoints=[BulkIn(2)], association=Association(2, 0xFF)),
                Interface(0xFF, 9, 0, endpoints=[BulkIn(3)]),
            ]
        )
    ]

    def on_in(self, endpoint: int, length: int) -> bytes:
        return b"from%2d" % (endpoint & 0x0F)


def test_the_interfaces_of_a_composite_device_have_drivers_of_their_own(tmp_path: Path, runtime_dir: Path) -> None:
    def install(lab: Lab) -> None:
        for name, subclass, endpoint in (("one", 1, 1), ("two", 2, 3)):
            text = THERMOMETER.format(name=name.title(), match=f"class = 0xff, subclass = {subclass}", more="")
            text = text[: text.index("        raw = ")] + f"        return await self.usb.read({endpoint}, 512)\n"
            (lab.drivers / f"{name}.py").write_text(text)

    with Emulator(listen=("127.0.0.1", 0)) as emulator:
        assert emulator.address is not None
        plugged = emulator.plug(Pair())
        address = f"127.0.0.1:{emulator.address[1]}"
        with running_lab(tmp_path / "home", runtime_dir, "--usbip", address, before=install) as lab:
            until = time.monotonic() + PATIENCE
            while [row["state"] for row in lab.devices()] != ["bound"]:
                assert time.monotonic() < until, (lab.devices(), lab.daemon.text())
            (row,) = lab.devices()
            assert {each["name"]: each["interface"] for each in row["instances"]} == {"one0": 0, "two0": 1}
            for _ in range(3):
                assert read(lab.dev / "one0/celsius") == "from 1"
                assert read(lab.dev / "two0/celsius") == "from 3"
                pid = next(row["driver_pid"] for row in lab.daemon.udf.mounts() if row["name"] == "one0")
                os.kill(pid, signal.SIGKILL)
            assert "interface 1: two serves it as two0" in lab.daemon.udf.done("why", "1209:0002")
            emulator.unplug(plugged)
            until = time.monotonic() + PATIENCE
            while lab.devices():
                assert time.monotonic() < until, lab.devices()


class Hostile(Device):
    """Its descriptors are whatever came out of the random numbers."""

    vendor, product = 0x1209, 0x0003
    configurations = [Configuration([Interface(0xFF, endpoints=[BulkIn(1)])])]

    def __init__(self, seed: int) -> None:
        super().__init__(serial="\0\u202e" * seed)
        chance = random.Random(seed)
        good = bytearray(super().configuration_descriptor(0) or b"")
        for _ in range(seed % 7):
            good[chance.randrange(len(good))] = chance.choice([0, 1, 9, 255, chance.randrange(256)])
        self.said = bytes(good) * chance.choice([1, 1, 3, 500])

    def configuration_descriptor(self, index: int) -> bytes | None:
        return self.said if index == 0 else None


@pytest.mark.timeout(400)
def test_hostile_descriptors_hurt_nobody_else(tmp_path: Path, runtime_dir: Path) -> None:
    def install(lab: Lab) -> None:
        lab.driver()
        lab.driver("greedy", "any = true")
        lab.driver("vendor", "class = 0xff")

    with Emulator(listen=("127.0.0.1", 0)) as emulator:
        assert emulator.address is not None
        address = f"127.0.0.1:{emulator.address[1]}"
        with running_lab(tmp_path / "home", runtime_dir, "--usbip", address, before=install) as lab:
            lab.plug(*MODEL, "--name", "good")
            for seed in range(40):
                emulator.plug(Hostile(seed))
            until = time.monotonic() + 240
            while len(rows := lab.devices()) != 41 or any(row["state"] in ("starting", "ending") for row in rows):
                assert time.monotonic() < until, [(row["state"], row["text"]) for row in rows]
                assert read(lab.dev / "probe0/celsius") == " 21.50"
            assert "our own mistake" not in lab.daemon.text()
            assert lab.device("good")["state"] == "bound"
            emulator.stop()
            until = time.monotonic() + PATIENCE
            while len(lab.devices()) != 1:
                assert time.monotonic() < until, lab.devices()


def test_the_end_of_the_daemon_ends_everything(tmp_path: Path, runtime_dir: Path) -> None:
    with running_lab(tmp_path / "home", runtime_dir) as lab:
        lab.driver()
        for number in range(4):
            lab.plug(*MODEL, "--name", f"t{number}")
        descriptor = os.open(lab.dev / "probe0/celsius", os.O_RDONLY)  # in use: unmounted lazily
        assert lab.daemon.stop() == 0
        with pytest.raises(OSError, match="not connected"):
            os.read(descriptor, 1)
        os.close(descriptor)


def test_after_a_killed_daemon_the_next_one_begins_clean(tmp_path: Path) -> None:
    with make_runtime_dir() as directory, running_lab(tmp_path / "home", directory) as lab:
        lab.driver()
        lab.plug(*MODEL, "--name", "bath")
        lab.daemon.process.kill()
        lab.daemon.process.wait()
        with running_daemon(directory, HOME=str(lab.home)) as lab.daemon:
            assert lab.devices() == []
            assert lab.plug(*MODEL, "--name", "bath")["state"] == "bound"
            assert read(lab.dev / "probe0/celsius") == " 21.50"


def test_only_the_daemons_own_user_and_root_may_plug_in(lab: Lab, as_nobody: Any) -> None:
    lab.daemon.socket.chmod(0o666)
    for directory in (lab.daemon.directory, lab.home):
        directory.chmod(0o755)
    assert as_nobody("devices", "--socket", lab.daemon.socket).returncode == 0
    for command in (("plug", "thermometer"), ("unplug", "x"), ("replug", "x"), ("faults", "x")):
        result = as_nobody(*command, "--socket", lab.daemon.socket)
        assert result.returncode == 1, result
        assert "only root and the daemon's own user" in result.stderr


STORM = float(os.environ.get("UDF_STORM_SECONDS", "10"))


@pytest.mark.timeout(STORM * 3 + 240)
def test_a_hundred_devices_in_random_order_leave_what_is_plugged_in_and_nothing_else(lab: Lab) -> None:
    """UDF_STORM_SECONDS=300 makes it long, UDF_STORM_SEED another one."""
    seed = int(os.environ.get("UDF_STORM_SEED", "4"))
    print(f"seed {seed}")
    chance = random.Random(seed)
    lab.driver()
    here: set[str] = set()
    until = time.monotonic() + STORM
    processes = _processes_below(lab.daemon.process.pid)
    with Connection(lab.daemon.socket) as connection:
        while time.monotonic() < until or here:
            ending = time.monotonic() >= until
            batch: list[tuple[str, str]] = []
            for _ in range(chance.randrange(1, 12)):
                name = f"t{chance.randrange(100)}"
                if ending:
                    batch += [("unplug", name) for name in sorted(here)]
                    here.clear()
                    break
                if name not in here:
                    batch.append(("plug", name))
                    here.add(name)
                elif chance.random() < 0.3:
                    batch.append(("replug", name))
                else:
                    batch.append(("unplug", name))
                    here.discard(name)
            _all_at_once(lab.daemon.socket, batch)
            # A quiet moment.
            quiet = time.monotonic() + 60
            while True:
                rows = {row["name"]: row for row in connection.call("Devices")["devices"]}
                if set(rows) == here and all(row["state"] == "bound" for row in rows.values()):
                    break
                assert time.monotonic() < quiet, (here ^ set(rows), lab.daemon.text()[-3000:])
            places = {each["name"] for row in rows.values() for each in row["instances"]}
            assert len(places) == len(here)
            assert {path.name for path in lab.dev.iterdir()} - {"by-id"} == places
            assert {os.readlink(link) for link in (lab.dev / "by-id").iterdir()} == {f"../{name}" for name in places}
            for name in chance.sample(sorted(places), min(3, len(places))):
                assert read(lab.dev / name / "celsius") == " 21.50"
    assert not mounts_below(lab.dev)
    left = _processes_below(lab.daemon.process.pid) - processes
    assert len(left) <= 8, left  # the emulator, and hosts that were forked ahead
    assert "our own mistake" not in lab.daemon.text()


def _all_at_once(control: Path, batch: list[tuple[str, str]]) -> None:
    """So many calls on as many connections; the commands about one device stay in their order."""
    waiting: dict[str, list[str]] = {}
    for what, name in batch:
        waiting.setdefault(name, []).append(what)
    script = (
        "import sys, threading\n"
        "from udf.supervisor.client import Connection\n"
        "def run(name, words):\n"
        "    with Connection(sys.argv[1]) as connection:\n"
        "        for word in words:\n"
        "            options = {'serial': name, 'product': '0x7e58'}\n"
        "            more = {'model': 'thermometer', 'options': options} if word == 'Plug' else {}\n"
        "            connection.call(word, name=name, **more)\n"
        "todo = [argument.split('=') for argument in sys.argv[2:]]\n"
        "jobs = [threading.Thread(target=run, args=(name, words.split(','))) for name, words in todo]\n"
        "[job.start() for job in jobs]\n"
        "[job.join() for job in jobs]\n"
    )
    words = [f"{name}={','.join(what.title() for what in todo)}" for name, todo in waiting.items()]
    argv = [sys.executable, "-c", script, str(control), *words]
    done = subprocess.run(argv, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def _processes_below(pid: int) -> set[int]:
    found: set[int] = set()
    pending = [pid]
    while pending:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pending[-1]}/task"):
                children = Path(f"/proc/{pending[-1]}/task/{task}/children").read_text().split()
                pending[:0] = map(int, children)
                found |= set(map(int, children))
        pending.pop()
    return found
