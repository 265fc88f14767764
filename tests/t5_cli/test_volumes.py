"""`udf mount` of what a device or an image holds: by name, by path, by label; and what cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Command
from .volume_lab import MIB, Lab, content, disk, running_lab, volume

UUID = "00000000-0000-0000-0000-000000000007"


@pytest.fixture
def lab(tmp_path: Path, runtime_dir: Path) -> Iterator[Lab]:
    """A stick of three partitions, the second of them empty, and one without any; nothing is mounted by itself."""
    with running_lab(tmp_path / "home", runtime_dir) as lab:
        assert lab.plug("stick", disk(volume("ONE"), None, volume("TWO", seed=7))) == []
        assert lab.plug("plain", volume("PLAIN")) == []
        yield lab


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def mounted(lab: Lab, mountpoint: Path) -> dict[str, object]:
    return next(row for row in lab.mounts() if row["mountpoint"] == str(mountpoint))


def test_a_volume_is_mounted_by_any_of_its_names(lab: Lab, mnt: Path, tmp_path: Path) -> None:
    by_id = next(name for name in os.listdir(lab.dev / "by-id") if "S_stick" in name)
    (tmp_path / "link").symlink_to(lab.dev / "disk0/part3")
    for source, export in (
        ("disk0/part1", "disk0/part1"),
        (f"{lab.dev}/disk0/part3", "disk0/part3"),
        (f"{lab.dev}/by-id/{by_id}/part1", "disk0/part1"),
        (f"{tmp_path}/link", "disk0/part3"),
        ("disk1", "disk1/disk"),
        ("plain", "disk1/disk"),
        ("S-plain", "disk1/disk"),
        ("stick/part1", "disk0/part1"),
        ("LABEL=TWO", "disk0/part3"),
        (f"UUID={UUID}", "disk0/part3"),
    ):
        lab.daemon.udf.done("mount", source, mnt)
        row = mounted(lab, mnt)
        assert (row["driver"], row["device"], row["volume"]) == ("shelfdisk", export, True)
        text = source[-20:]
        (mnt / "file").write_text(text)
        disk_name, _, part = export.partition("/")
        lab.daemon.udf.done("umount", mnt if part == "part3" else export)
        image = lab.home / ("stick.img" if disk_name == "disk0" else "plain.img")
        assert content(image, int(part[4:]) if part.startswith("part") else 0).decode()[: len(text)] == text
    lab.daemon.udf.done("mount", "disk0", mnt, "-o", "partition=3")
    assert "  disk0/part3  " in lab.daemon.udf.done("status")
    lab.daemon.udf.done("umount", "disk0")


def test_what_cannot_be_mounted_is_a_sentence(lab: Lab, mnt: Path) -> None:
    for arguments, sentence in (
        (
            "disk0",
            "disk0 holds several filesystems: say which one is meant of disk0/part1 (xfs), disk0/part3 (xfs)",
        ),
        ("disk0/part2", "disk0/part2 holds no filesystem that is known: say with -t DRIVER what mounts it"),
        ("disk0/part9", "disk0 has no part9: it has disk, part1, part2, part3"),
        ("disk0 -o partition=9", "disk0 has no partition 9: it has 1, 2, 3"),
        ("disk9", "there is neither a file nor a device disk9"),
        ("disk9/part1", "there is neither a file nor a device disk9/part1"),
        ("LABEL=NONE", "no volume has LABEL=NONE"),
        ("LABEL=", "no volume has LABEL="),
        ("LABEL=\x1b[31m", "no volume has LABEL=\\x1b[31m"),
        ("disk0/part1 -o suid", "it is mounted nosuid and nodev only"),
        ("disk0/part1 -o dev", "it is mounted nosuid and nodev only"),
        ("-t squashfuse disk9", "there is neither a file nor a device disk9"),
        ("-t hello disk0", "the driver hello takes no source"),
        ("-t passthrough disk9", "the source disk9 does not exist"),
        ("disk0/part1 -o no_such=1", "the driver shelfdisk has no option 'no_such'"),
    ):
        words = arguments.split(" ")
        options = words[words.index("-o") :] if "-o" in words else []
        words = words[: len(words) - len(options)]
        said = lab.daemon.udf.refused("mount", *words, mnt, *options)
        assert sentence in said
        assert "\x1b" not in said


def test_two_volumes_with_one_label_must_be_told_apart(lab: Lab, mnt: Path) -> None:
    lab.plug("copy", volume("PLAIN"))
    said = lab.daemon.udf.refused("mount", "LABEL=PLAIN", mnt)
    assert "several volumes have LABEL=PLAIN (disk1/disk, disk2/disk): say which of these is meant" in said
    lab.unplug("copy")
    assert json.loads(lab.daemon.udf.done("mount", "LABEL=PLAIN", mnt, "--json"))["mountpoint"] == str(mnt)
    assert json.loads(lab.daemon.udf.done("umount", "plain", "--json")) == {"mountpoint": str(mnt)}


def test_a_volume_that_is_mounted_is_not_mounted_twice(lab: Lab, mnt: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    lab.daemon.udf.done("mount", "disk0/part1", mnt)
    said = lab.daemon.udf.refused("mount", "LABEL=ONE", other)
    assert f"disk0/part1 is mounted on {mnt}: unmount it there first" in said
    said = lab.daemon.udf.refused("mount", "-t", "shelfdisk", "disk0/disk", other)
    assert f"disk0/disk overlaps part1, which is mounted on {mnt}" in said
    lab.daemon.udf.done("mount", "disk0/part3", other)
    said = lab.daemon.udf("umount", "disk0")
    assert (said.returncode, said.stderr) == (0, "")
    assert not [row for row in lab.mounts() if row["volume"]]
    assert "nothing of disk0 is mounted" in lab.daemon.udf.refused("umount", "disk0")
    assert "nothing of disk0/part1 is mounted" in lab.daemon.udf.refused("umount", "disk0/part1")


def test_a_volume_in_use_says_by_whom(lab: Lab, mnt: Path) -> None:
    lab.daemon.udf.done("mount", "disk0/part1", mnt)
    with (mnt / "file").open("rb"):
        said = lab.daemon.udf.refused("umount", "disk0/part1")
    assert f"{mnt} is in use by python" in said
    lab.daemon.udf.done("umount", "disk0/part1")


def test_a_read_only_volume_can_be_mounted_twice(lab: Lab, mnt: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    lab.daemon.udf.done("mount", "disk0/part1", mnt, "-o", "ro")
    assert "is mounted on" in lab.daemon.udf.refused("mount", "disk0/part1", other)
    lab.daemon.udf.done("umount", "disk0")


def test_an_image_is_mounted_as_a_block_device_that_ends_with_it(lab: Lab, mnt: Path, tmp_path: Path) -> None:
    for image, number in ((volume("IMAGE"), 0), (disk(None, volume("IMAGE")), 2)):
        path = tmp_path / "x.img"
        path.write_bytes(image)
        lab.daemon.udf.done("mount", path, mnt)
        row = mounted(lab, mnt)
        assert (row["driver"], row["volume"]) == ("shelfdisk", True)
        assert row["device"] == (f"disk2/part{number}" if number else "disk2/disk")
        (mnt / "file").write_text("hello")
        lab.daemon.udf.done("umount", mnt)
        assert content(path, number) == b"hello"
        assert not (lab.dev / "disk2").exists()


def test_an_attached_image_is_a_device_too(lab: Lab, mnt: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(volume("ATTACHED"))
    lab.daemon.udf.done("attach", path, "--name", "mine")
    lab.daemon.udf.done("mount", "LABEL=ATTACHED", mnt)
    (mnt / "file").write_text("hello")
    assert lab.daemon.udf.done("eject", mnt) == "mine is detached.\n"
    assert content(path) == b"hello"
    assert not [row for row in lab.mounts() if row["name"] in ("mine", "mnt")]


def test_a_named_driver_mounts_what_nobody_knows(lab: Lab, mnt: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(bytes(MIB))
    lab.daemon.udf.done("mount", "-t", "shelfdisk", path, mnt)
    lab.daemon.udf.done("umount", mnt)
    lab.daemon.udf.done("mount", "-t", "shelfdisk", "disk0/part2", mnt)
    lab.daemon.udf.done("umount", mnt)


def test_without_a_daemon_an_image_is_mounted_the_same_way(
    no_system_daemon: None, lab: Lab, mnt: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(volume("PRIVATE"))
    udf = Command()
    udf.done("mount", path, mnt, env={**os.environ, "HOME": str(lab.home)})
    (mnt / "file").write_text("hello")
    udf.done("umount", mnt)
    assert content(path) == b"hello"
    assert "no daemon runs that could know LABEL=PRIVATE" in udf.refused("mount", "LABEL=PRIVATE", mnt, code=3)


@pytest.mark.skipif(not shutil.which("fuse2fs"), reason="needs fuse2fs and mkfs.ext4")
def test_a_driver_that_takes_files_gets_the_file_of_the_device(lab: Lab, mnt: Path) -> None:
    image = lab.image("ext", bytes(8 * MIB))
    subprocess.run(["mkfs.ext4", "-q", "-L", "EXT", "-O", "^has_journal", image], check=True)
    lab.plug("ext")
    lab.daemon.udf.done("mount", "LABEL=EXT", mnt)
    row = mounted(lab, mnt)
    assert (row["driver"], row["device"], row["volume"]) == ("fuse2fs", "disk2/disk", False)
    assert "does not live through an unplug" in lab.daemon.udf.done("status")
    (mnt / "new").write_text("hello")
    with (mnt / "new").open("rb"):
        assert f"{mnt} is in use" in lab.daemon.udf.refused("eject", "ext")
    lab.daemon.udf.done("eject", "ext")
    said = subprocess.run(["debugfs", "-R", "cat new", image], check=True, capture_output=True, text=True).stdout
    assert said == "hello"
    lab.unplug("ext")


def test_others_may_not_mount_what_is_on_a_device(
    lab: Lab, as_nobody: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    lab.daemon.socket.chmod(0o666)
    lab.daemon.directory.chmod(0o755)
    try:
        for arguments in (("mount", "disk0/part1", "/tmp"), ("umount", "disk0"), ("eject", "disk0")):
            said = as_nobody(*arguments, "--socket", lab.daemon.socket)
            assert said.returncode == 1
            assert "only root and the daemon's own user may use what is on a device" in said.stderr
        said = as_nobody("mount", "LABEL=ONE", "/tmp", "--socket", lab.daemon.socket)
        assert "no volume that you may use has LABEL=ONE" in said.stderr
    finally:
        lab.daemon.socket.chmod(0o600)
