"""`udf daemon --automount`: sticks are plugged in and pulled out, and what is on them is mounted by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import make_runtime_dir, mounts_below, wait_for_mounts
from udf.supervisor import naming

from .conftest import Command, running_daemon
from .volume_lab import Lab, content, disk, running_lab, volume


@pytest.fixture
def lab(tmp_path: Path, runtime_dir: Path) -> Iterator[Lab]:
    with running_lab(tmp_path / "home", runtime_dir, "--automount") as lab:
        yield lab


def test_a_stick_is_mounted_by_its_label_and_leaves_nothing(lab: Lab) -> None:
    said = lab.plug("stick", volume("HOLIDAY"))
    place = lab.media / "HOLIDAY"
    assert said == f"stick: HOLIDAY (xfs) is mounted on {place}"
    (place / "file").write_text("hello")
    assert [(row["export"], row["label"], row["mountpoint"], row["state"]) for row in lab.volumes("stick")] == [
        ("disk", "HOLIDAY", str(place), "ACTIVE")
    ]
    lab.unplug("stick")
    lab.until(lambda: not place.exists())
    assert not mounts_below(lab.media)
    assert content(lab.home / "stick.img") == b"hello"
    assert [word for word, _ in lab.events()] == ["mounted", "unplugged"]
    assert lab.events()[0][1] == f"HOLIDAY (xfs on disk0/disk) is mounted on {place}"
    assert lab.plug("stick") == said
    assert (place / "file").read_bytes()[:5] == b"hello"


def test_each_partition_gets_a_directory_and_equal_labels_a_number(lab: Lab) -> None:
    said = lab.plug("one", disk(volume("DATA"), None, volume("DATA", seed=2)))
    assert sorted(said.splitlines()) == [
        f"one: DATA (xfs) is mounted on {lab.media / name}" for name in ("DATA", "DATA-2")
    ]
    assert lab.plug("two", volume("DATA", seed=3)).endswith("DATA-3")
    for number, name in enumerate(("DATA", "DATA-2", "DATA-3")):
        (lab.media / name / "file").write_text(f"{number}")
    rows = {row["export"]: row["mountpoint"] for row in lab.volumes("one")}
    assert rows["disk"] is None
    assert rows["part2"] is None
    lab.unplug("one")
    lab.until(lambda: sorted(os.listdir(lab.media)) == [".udf-made", ".udf-made.lock", "DATA-3"])
    written = {content(lab.home / "one.img", 1), content(lab.home / "one.img", 3)}
    assert written == {b"0", b"1"}
    assert lab.plug("one").count("is mounted on") == 2


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("", "xfs-00000000_0000_0000_0000_000000000001"),
        ("..", "xfs-00000000_0000_0000_0000_000000000001"),
        ("../../etc", "etc"),
        ("/", "xfs-00000000_0000_0000_0000_000000000001"),
        (".hidden", "hidden"),
        ("MY STICK", "MY_STICK"),
        ("\x1b[31mred", "31mred"),
        ("Äpfel", "Äpfel"),
        ("a\nb", "a_b"),
    ],
)
def test_a_label_is_a_name_whatever_it_says(label: str, name: str) -> None:
    uuid = "00000000-0000-0000-0000-000000000001"
    assert naming.volume("xfs", label, uuid) == name.replace("00000000_0000_0000_0000_000000000001", uuid)


def test_no_label_leads_out_of_the_directory(lab: Lab) -> None:
    said = lab.plug("evil", disk(volume("../../x"), volume(".udf-made"), volume("\x1b[2J")))
    assert {Path(line.rpartition(" is mounted on ")[2]) for line in said.splitlines()} == {
        lab.media / name for name in ("x", "udf-made", "2J")
    }
    assert "\x1b" not in lab.daemon.udf.done("devices")
    assert "\x1b" not in lab.daemon.udf.done("events")


def test_what_an_operator_unmounts_stays_unmounted_until_the_next_plug(lab: Lab) -> None:
    lab.plug("stick", disk(volume("A"), volume("B")))
    lab.daemon.udf.done("umount", lab.media / "A")
    subprocess.run(["umount", lab.media / "B"], check=True)
    lab.until(lambda: not [name for name in os.listdir(lab.media) if not name.startswith(".")])
    lab.rules.write_text("# read again\n")  # a reason to look at everything once more
    lab.plug("other", volume("C"))
    assert [row["mountpoint"] for row in lab.volumes("stick")] == [None] * 3
    place = lab.home / "mnt"
    place.mkdir()
    assert lab.daemon.udf.done("mount", "LABEL=A", place) == ""  # but nothing is in the way of a person
    lab.daemon.udf.done("umount", "disk0")
    lab.unplug("stick")
    assert lab.plug("stick").count("is mounted on") == 2


def test_a_mount_that_fails_is_one_sentence_and_the_device_can_be_used(lab: Lab) -> None:
    lab.rules.write_text('[[volume]]\nserial = "S-bad"\noptions = { fail = true }\n')
    lab.plug("good", volume("GOOD"))
    lab.plug("bad", volume("BAD"))
    failed = [text for word, text in lab.events() if word == "failed"]
    assert len(failed) == 1
    assert failed[0].startswith("BAD (xfs on disk1/disk) could not be mounted: the driver shelfdisk did not start: ")
    assert failed[0].endswith(f"it can be used as {lab.dev}/disk1/disk")
    assert (lab.dev / "disk1/disk").read_bytes()[:4] == b"XFSB"
    assert sorted(os.listdir(lab.media)) == [".udf-made", ".udf-made.lock", "GOOD"]


def test_rules_leave_volumes_alone_and_give_options(lab: Lab) -> None:
    lab.rules.write_text(
        '[[volume]]\nserial = "S-private"\nautomount = false\n'
        '[[volume]]\nlabel = "RO*"\noptions = { ro = true }\n[[volume]]\noptions = { umask = "077" }\n'
    )
    assert lab.plug("private", volume("PRIVATE")) == ""
    assert lab.plug("ro", volume("ROM")).endswith("ROM")
    assert lab.plug("other", volume("OTHER")).endswith("OTHER")
    with pytest.raises(OSError, match="Read-only"):
        (lab.media / "ROM/file").write_text("x")
    assert (lab.media / "OTHER/file").stat().st_mode & 0o777 == 0o600
    lab.rules.write_text("")
    lab.until((lab.media / "PRIVATE").is_dir)
    assert lab.events()[-1][0] == "mounted"


def test_a_driver_that_comes_later_mounts_what_is_there(lab: Lab) -> None:
    driver = lab.home / ".local/share/udf/drivers/shelfdisk.py"
    text = driver.read_text()
    driver.unlink()
    lab.until(lambda: "shelfdisk" not in lab.daemon.udf.done("drivers"))
    assert lab.plug("stick", volume("LATE")) == ""
    driver.write_text(text)
    lab.until(lambda: [row["mountpoint"] for row in lab.volumes("stick")] == [str(lab.media / "LATE")])


def test_directories_of_others_are_neither_used_nor_removed(tmp_path: Path, runtime_dir: Path) -> None:
    media = tmp_path / "media"
    (media / "HOLIDAY").mkdir(parents=True)
    with running_lab(tmp_path / "home", runtime_dir, "--automount", media) as lab:
        assert lab.plug("stick", volume("HOLIDAY")).endswith(str(media / "HOLIDAY-2"))
        with make_runtime_dir() as other:
            said = Command(other / "udf.sock").refused("daemon", "--automount", media)
        assert "another daemon mounts below" in said
        (media / "mine").write_text("mine")
    assert sorted(os.listdir(media)) == ["HOLIDAY", "mine"]


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path, runtime_dir: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    media.chmod(0o777)
    assert "can be written by others" in Command(runtime_dir / "udf.sock").refused("daemon", "--automount", media)


def test_the_next_daemon_takes_away_what_a_killed_one_left(tmp_path: Path, runtime_dir: Path) -> None:
    media = tmp_path / "media"
    with running_lab(tmp_path / "home", runtime_dir, "--automount", media) as lab:
        lab.plug("stick", volume("HOLIDAY"))
        lab.daemon.process.kill()
        lab.daemon.process.wait()
        wait_for_mounts(runtime_dir, 0)
        wait_for_mounts(media, 0)
        (media / "HOLIDAY").mkdir(exist_ok=True)
        with running_daemon(runtime_dir, "--rules", lab.rules, "--automount", media, HOME=str(lab.home)):
            assert not (media / "HOLIDAY").exists()
    assert not media.exists() or not os.listdir(media)


def test_a_lost_mount_comes_back(lab: Lab) -> None:
    lab.plug("stick", volume("DATA"))
    pid = next(row["shim_pid"] for row in lab.daemon.udf.mounts() if row["mountpoint"] == str(lab.media / "DATA"))
    os.kill(pid, signal.SIGKILL)
    lab.until(lambda: [word for word, _ in lab.events()] == ["mounted", "crashed", "mounted"])
    (lab.media / "DATA/file").write_text("hello")


# ---- eject


def test_an_ejected_stick_is_flushed_and_stays_out_until_it_is_plugged_in_again(lab: Lab) -> None:
    lab.plug("stick", disk(volume("A"), volume("B")))
    (lab.media / "A/file").write_text("hello")
    assert lab.daemon.udf.done("eject", lab.media / "B") == "disk0 may be pulled out.\n"
    assert content(lab.home / "stick.img", 1) == b"hello"
    lab.until(lambda: sorted(os.listdir(lab.media)) == [".udf-made.lock"])
    (row,) = json.loads(lab.daemon.udf.done("devices", "--json"))["devices"]
    assert (row["state"], row["instances"]) == ("ejected", [])
    assert "may be pulled out" in row["text"]
    assert not (lab.dev / "disk0").exists()
    lab.rules.write_text("# a reason to bind again\n")
    lab.plug("other", volume("C"))
    assert json.loads(lab.daemon.udf.done("why", "stick", "--json"))["device"]["state"] == "ejected"
    lab.daemon.udf.done("replug", "stick")
    assert (lab.media / "A/file").read_bytes()[:5] == b"hello"


@pytest.mark.parametrize("what", ["disk0", "stick", "by-id", "mount"])
def test_eject_takes_any_name_of_a_stick(lab: Lab, what: str) -> None:
    lab.plug("stick", volume("A"))
    by_id = next((lab.dev / "by-id").iterdir())
    name = {"by-id": str(by_id), "mount": "A"}.get(what, what)
    assert lab.daemon.udf.done("eject", name) == "disk0 may be pulled out.\n"


def test_a_stick_in_use_is_not_ejected_and_nothing_is_done(lab: Lab) -> None:
    lab.plug("stick", disk(volume("A"), volume("B"), volume("C")))
    for used in (lab.media / "A/file", lab.media / "C/file", lab.dev / "disk0/disk"):
        with used.open("rb"):
            said = lab.daemon.udf.refused("eject", "disk0")
            assert f"{used.parent} is in use by python" in said
            assert "nothing was ejected" in said
        assert sorted(each for each in os.listdir(lab.media) if not each.startswith(".")) == ["A", "B", "C"]
        assert [row["mountpoint"] is None for row in lab.volumes("stick")] == [True, False, False, False]
    assert [word for word, _ in lab.events()] == ["mounted"] * 3
    lab.daemon.udf.done("eject", "disk0")
    assert "there is neither a file nor a device disk0" in lab.daemon.udf.refused("eject", "disk0")
