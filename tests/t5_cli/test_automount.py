"""`udf daemon --automount`: sticks are plugged in and pulled out, and what is on them is mounted by itself."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import make_runtime_dir, mounts_below, wait_for_mounts
from udf.supervisor import naming
from udf.testing.devices import Emulator
from udf.testing.devices.storage import Storage

from .conftest import Command, running_daemon
from .volume_lab import Lab, content, disk, running_lab, volume

BAD = '[[volume]]\nserial = "S-bad"\noptions = { fail = true }\n'
PRIVATE = '[[volume]]\nserial = "S-private"\nautomount = false\n'
OTHERS = '[[volume]]\nlabel = "RO*"\noptions = { ro = true }\n[[volume]]\noptions = { umask = "077", grace = 0 }\n'


@pytest.fixture
def lab(tmp_path: Path, runtime_dir: Path) -> Iterator[Lab]:
    with running_lab(tmp_path / "home", runtime_dir, "--automount") as lab:
        yield lab


def test_a_stick_is_mounted_by_its_label_and_goes_on_after_a_replug(lab: Lab) -> None:
    place = lab.media / "HOLIDAY"
    image = lab.image("stick", volume("HOLIDAY"))
    said = lab.daemon.udf.done("plug", image, "--serial", "S-stick").splitlines()
    assert said[1:] == [f"stick: HOLIDAY (xfs) is mounted on {place}"]
    assert lab.daemon.udf.done("devices").splitlines()[2:] == said[1:]
    with (place / "file").open("r+b", buffering=0) as file:
        file.write(b"one")
        lab.unplug("stick")
        (row,) = lab.call("Devices")["devices"]
        assert row["state"] == "away"
        assert [each["state"] for one in row["instances"] for each in one["volumes"]] == ["DETACHED"]
        assert "plug it in again to go on" in lab.daemon.udf.done("devices")
        assert "was pulled out: plug it in again" in lab.daemon.udf.refused("mount", "disk0", lab.home)
        assert lab.plug("stick") == [place]
        file.write(b"two")
        os.fsync(file.fileno())
    assert content(image) == b"onetwo"
    assert lab.events() == [("mounted", f"HOLIDAY (xfs on disk0/disk) is mounted on {place}")]
    lab.unplug("stick")
    assert lab.daemon.udf.done("eject", "disk0") == "disk0 was pulled out already.\n"
    assert lab.daemon.udf.done("devices") == "No device is there.\n"
    lab.until(lambda: not lab.in_media())
    assert not mounts_below(lab.media)


def test_each_partition_gets_a_directory_and_equal_labels_a_number(lab: Lab) -> None:
    names = ("DATA", "DATA-2", "DATA-3")
    assert lab.plug("one", disk(volume("DATA"), None, volume("DATA", seed=2))) == [
        lab.media / "DATA",
        lab.media / "DATA-2",
    ]
    assert lab.plug("two", volume("DATA", seed=3)) == [lab.media / "DATA-3"]
    for number, name in enumerate(names):
        (lab.media / name / "file").write_text(f"{number}")
    rows = {row["export"]: row["mountpoint"] for row in lab.volumes("one")}
    assert rows["disk"] is None
    assert rows["part2"] is None
    lab.call("Eject", device="one")
    lab.until(lambda: lab.in_media() == ["DATA-3"])
    assert {content(lab.home / "one.img", 1), content(lab.home / "one.img", 3)} == {b"0", b"1"}
    # No label leads out of the directory, or does anything to a terminal.
    evil = lab.plug("evil", disk(volume("../../x"), volume(".udf-made"), volume("\x1b[2J")))
    assert evil == [lab.media / "2J", lab.media / "udf-made", lab.media / "x"]
    assert "\x1b" not in lab.daemon.udf.done("devices") + lab.daemon.udf.done("events")


def test_a_stick_that_comes_back_changed_is_mounted_as_what_it_is(lab: Lab) -> None:
    assert lab.plug("stick", volume("HOLIDAY")) == [lab.media / "HOLIDAY"]
    lab.unplug("stick")
    lab.image("stick", volume("WORK"))
    lab.plug("stick")
    lab.until(lambda: [word for word, _ in lab.events()] == ["mounted", "changed", "mounted"])
    assert lab.in_media() == ["WORK"]


def test_a_medium_that_is_changed_is_mounted_in_its_place(tmp_path: Path, runtime_dir: Path) -> None:
    images = [tmp_path / f"{label}.img" for label in ("FIRST", "SECOND")]
    for image in images:
        image.write_bytes(volume(image.stem))
    with Emulator(listen=("127.0.0.1", 0)) as emulator:
        assert emulator.address is not None
        reader = Storage(str(images[0]), serial="R")
        emulator.plug(reader)
        address = f"127.0.0.1:{emulator.address[1]}"
        with running_lab(tmp_path / "home", runtime_dir, "--automount", "--usbip", address) as lab:
            lab.until(lambda: lab.in_media() == ["FIRST"] and lab.events())
            emulator.loop.call(lambda: reader.change_medium(None))
            lab.until(lambda: not lab.in_media())
            emulator.loop.call(lambda: reader.change_medium(str(images[1])))
            lab.until(lambda: [word for word, _ in lab.events()] == ["mounted", "unplugged", "mounted"])
            assert lab.in_media() == ["SECOND"]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("", "xfs-1234-ABCD"),
        ("..", "xfs-1234-ABCD"),
        ("/", "xfs-1234-ABCD"),
        ("../../etc", "etc"),
        (".hidden", "hidden"),
        ("MY STICK", "MY_STICK"),
        ("\x1b[31mred", "31mred"),
        ("Äpfel", "Äpfel"),
        ("a\nb", "a_b"),
        ("\u202egpj", "gpj"),
        ("x" * 200, "x" * 40),
    ],
)
def test_a_label_is_a_name_whatever_it_says(label: str, name: str) -> None:
    assert naming.volume("xfs", label, "1234-ABCD") == name


def test_what_an_operator_unmounts_stays_unmounted_until_the_next_plug(lab: Lab, tmp_path: Path) -> None:
    lab.plug("stick", disk(volume("A"), volume("B")))
    lab.daemon.udf.done("umount", lab.media / "A")
    subprocess.run(["umount", lab.media / "B"], check=True)
    lab.until(lambda: not lab.in_media())
    assert lab.plug("other", volume("C")) == [lab.media / "C"]
    assert [row["mountpoint"] for row in lab.volumes("stick")] == [None] * 3
    place = tmp_path / "mnt"
    place.mkdir()
    lab.call("Mount", source="LABEL=A", mountpoint=str(place))  # but nothing is in the way of a person
    lab.call("Unmount", device="disk0")
    lab.unplug("stick")
    assert lab.plug("stick") == [lab.media / "A", lab.media / "B"]


def test_rules_say_what_is_mounted_and_how(tmp_path: Path, runtime_dir: Path) -> None:
    with running_lab(tmp_path / "home", runtime_dir, "--automount", rules=BAD + PRIVATE + OTHERS) as lab:
        assert lab.plug("private", volume("PRIVATE")) == []
        assert lab.plug("bad", volume("BAD")) == []
        assert lab.plug("ro", volume("ROM")) == [lab.media / "ROM"]
        assert lab.plug("other", volume("OTHER")) == [lab.media / "OTHER"]
        with pytest.raises(OSError, match="Read-only"):
            (lab.media / "ROM/file").write_text("x")
        assert (lab.media / "OTHER/file").stat().st_mode & 0o777 == 0o600
        # A mount that fails is told once, and the device can be used in any other way.
        ((word, text),) = [each for each in lab.events() if each[0] != "mounted"]
        assert word == "failed"
        assert text.startswith("BAD (xfs on disk1/disk) could not be mounted: the driver shelfdisk did not start: ")
        assert text.endswith(f"it can be used as {lab.dev}/disk1/disk")
        assert (lab.dev / "disk1/disk").read_bytes()[:4] == b"XFSB"
        assert lab.in_media() == ["OTHER", "ROM"]
        # Without a grace a stick's volume goes with it.
        lab.unplug("other")
        lab.until(lambda: lab.in_media() == ["ROM"])
        assert lab.events()[-1][0] == "unplugged"
        # Another rule is another chance.
        lab.rules.write_text("")
        lab.until(lambda: lab.in_media() == ["BAD", "PRIVATE", "ROM"])


def test_a_driver_that_comes_later_mounts_what_is_there_and_a_lost_mount_comes_back(lab: Lab) -> None:
    driver = lab.home / ".local/share/udf/drivers/shelfdisk.py"
    text = driver.read_text()
    driver.unlink()
    lab.until(lambda: all(each["name"] != "shelfdisk" for each in lab.call("Drivers")["drivers"]))
    lab.plug("stick", volume("LATE"))
    driver.write_text(text)
    lab.until(lambda: [word for word, _ in lab.events()] == ["mounted"])
    pid = next(row["shim_pid"] for row in lab.mounts() if row["name"] == "LATE")
    os.kill(pid, signal.SIGKILL)
    lab.until(lambda: [word for word, _ in lab.events()] == ["mounted", "crashed", "mounted"])
    (lab.media / "LATE/file").write_text("hello")


def test_directories_of_others_are_neither_used_nor_removed(tmp_path: Path, runtime_dir: Path) -> None:
    media = tmp_path / "media"
    (media / "HOLIDAY").mkdir(parents=True)
    with running_lab(tmp_path / "home", runtime_dir, "--automount", media) as lab:
        assert lab.plug("stick", volume("HOLIDAY")) == [media / "HOLIDAY-2"]
        with make_runtime_dir() as other:
            udf = Command(other / "udf.sock")
            assert "another daemon mounts below" in udf.refused("daemon", "--automount", media)
            (tmp_path / "open").mkdir(mode=0o777)
            (tmp_path / "open").chmod(0o777)
            assert "can be written by others" in udf.refused("daemon", "--automount", tmp_path / "open")
        (media / "mine").write_text("mine")
    assert sorted(os.listdir(media)) == ["HOLIDAY", "mine"]


def test_the_next_daemon_takes_away_what_a_killed_one_left(tmp_path: Path, runtime_dir: Path) -> None:
    media = tmp_path / "media"
    with running_lab(tmp_path / "home", runtime_dir, "--automount", media) as lab:
        lab.plug("stick", volume("HOLIDAY"))
        lab.daemon.process.kill()
        lab.daemon.process.wait()
        wait_for_mounts(runtime_dir, 0)
        wait_for_mounts(media, 0)
        assert (media / "HOLIDAY").is_dir()
        with running_daemon(runtime_dir, "--rules", lab.rules, "--automount", media, HOME=str(lab.home)):
            assert not (media / "HOLIDAY").exists()
    assert not os.listdir(media)


# ---- eject


def test_an_ejected_stick_is_flushed_and_stays_out_until_it_is_plugged_in_again(lab: Lab) -> None:
    lab.plug("stick", disk(volume("A"), volume("B")))
    (lab.media / "A/file").write_text("hello")
    assert lab.daemon.udf.done("eject", lab.media / "B") == "disk0 may be pulled out.\n"
    assert content(lab.home / "stick.img", 1) == b"hello"
    lab.until(lambda: not lab.in_media())
    lab.plug("other", volume("C"))  # a reason to bind again
    row = lab.device("stick")
    assert (row["state"], row["instances"]) == ("ejected", [])
    assert "may be pulled out" in row["text"]
    assert not (lab.dev / "disk0").exists()
    for name in ("disk0", "stick", "A", "disk0/part1", "LABEL=A", "by-id"):
        lab.call("Replug", name="stick")
        assert (lab.media / "A/file").read_bytes()[:5] == b"hello"
        by_id = str(next((lab.dev / "by-id").glob("*S_stick")))
        answer = lab.call("Eject", device=by_id if name == "by-id" else name)
        assert answer["text"] == "disk0 may be pulled out"


def test_a_stick_in_use_is_not_ejected_and_nothing_is_done(lab: Lab) -> None:
    lab.plug("stick", disk(volume("A"), volume("B"), volume("C")))
    for used in (lab.media / "A/file", lab.media / "C/file", lab.dev / "disk0/disk"):
        with used.open("rb"):
            said = lab.daemon.udf.refused("eject", "disk0")
            assert f"{used.parent} is in use by python" in said
            assert "nothing was ejected" in said
        assert lab.in_media() == ["A", "B", "C"]
    assert [word for word, _ in lab.events()] == ["mounted"] * 3
    lab.call("Eject", device="disk0")
    assert "there is neither a file nor a device disk0" in lab.daemon.udf.refused("eject", "disk0")
