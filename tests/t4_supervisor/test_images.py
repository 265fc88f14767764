"""Image files: attached as block devices, and mounted by what is in them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from real import Daemon, mounted_at, needs_fuse, wait_for

from udf.supervisor.client import ControlError

MIB = 1 << 20
pytestmark = [
    needs_fuse,
    pytest.mark.skipif(
        not all(map(shutil.which, ("mkfs.ext4", "sfdisk", "fuse2fs"))), reason="needs mkfs.ext4, sfdisk and fuse2fs"
    ),
]


@pytest.fixture
def daemon(runtime_dir: Path) -> Iterator[Daemon]:
    daemon = Daemon(runtime_dir)
    yield daemon
    assert daemon.stop() == 0
    assert not list((runtime_dir / "run" / "block").glob("*"))
    assert not (runtime_dir / "run" / "dev").exists()


def ext4(path: Path, size: int = 8 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", path], check=True)
    return path


def disk(path: Path, *partitions: Path | None) -> Path:
    """A disk whose partitions of 8 MiB hold these filesystems."""
    with path.open("wb") as file:
        file.truncate((1 + 8 * len(partitions)) * MIB + MIB)
    table = "label: gpt\n" + "".join(f"start={(1 + 8 * n) * 2048}, size={8 * 2048}\n" for n in range(len(partitions)))
    subprocess.run(["sfdisk", "-q", path], input=table, text=True, check=True, capture_output=True)
    with path.open("r+b") as file:
        for number, partition in enumerate(partitions):
            if partition is not None:
                file.seek((1 + 8 * number) * MIB)
                file.write(partition.read_bytes())
    return path


def refused(daemon: Daemon, method: str, **parameters: object) -> str:
    with pytest.raises(ControlError) as failure:
        daemon.call(method, **parameters)
    return str(failure.value)


def test_a_file_is_attached_as_a_block_device_until_it_is_unmounted(daemon: Daemon, tmp_path: Path) -> None:
    image = disk(tmp_path / "disk.img", ext4(tmp_path / "fs"))
    answer = daemon.call("Attach", source=str(image))
    assert answer["name"] == "disk0"
    place = Path(answer["mountpoint"])
    assert place.name == "disk0"
    assert sorted(os.listdir(place)) == ["disk", "part1"]
    assert (place / "disk").read_bytes() == image.read_bytes()
    with (place / "part1").open("r+b") as file:
        file.write(b"changed")
        os.fsync(file.fileno())
    with image.open("rb") as file:
        file.seek(MIB)
        assert file.read(7) == b"changed"
    rows = daemon.call("Status")["mounts"]
    assert [(row["kind"], row["name"], row["source"]) for row in rows[:1]] == [("block", "disk0", str(image))]
    daemon.call("Unmount", name="disk0")
    assert not place.exists()
    daemon.call("Attach", source=str(image), name="again")  # its lock is free
    daemon.call("Unmount", name="again")


def test_an_image_that_is_attached_already_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    image = ext4(tmp_path / "fs")
    daemon.call("Attach", source=str(image), name="mine")
    assert "somebody else uses the image" in refused(daemon, "Attach", source=str(image))
    assert "mine" in refused(daemon, "Attach", source=str(ext4(tmp_path / "other")), name="mine")
    assert [row["name"] for row in daemon.call("Status")["mounts"]] == ["mine", "mine-files"]


def test_an_open_file_keeps_what_is_attached(daemon: Daemon, tmp_path: Path) -> None:
    place = Path(daemon.call("Attach", source=str(ext4(tmp_path / "fs")))["mountpoint"])
    with (place / "disk").open("rb"):
        with pytest.raises(ControlError) as failure:
            daemon.call("Unmount", name="disk0")
        assert failure.value.name == "Busy"
    daemon.call("Unmount", mountpoint=str(place))


def test_a_filesystem_image_is_mounted_by_what_is_in_it(daemon: Daemon, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    for _ in range(2):
        daemon.call("Mount", source=str(ext4(tmp_path / "fs")), mountpoint=str(mountpoint))
        assert daemon.status(mountpoint)["driver"] == "fuse2fs"
        (mountpoint / "file").write_text("hello")
        daemon.call("Unmount", mountpoint=str(mountpoint))


def test_the_one_filesystem_of_a_disk_is_mounted_and_the_disk_ends_with_it(daemon: Daemon, tmp_path: Path) -> None:
    image = disk(tmp_path / "disk.img", None, ext4(tmp_path / "fs"))
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    for number in range(3):
        daemon.call("Mount", source=str(image), mountpoint=str(mountpoint))
        assert [row["name"] for row in daemon.call("Status")["mounts"]] == ["disk0", "disk0-files", "mnt"]
        assert len(list(mountpoint.glob("file*"))) == number
        (mountpoint / f"file{number}").write_text("hello")
        daemon.call("Unmount", mountpoint=str(mountpoint))
        assert daemon.call("Status")["mounts"] == []


def test_which_of_several_partitions_is_meant_must_be_said(daemon: Daemon, tmp_path: Path) -> None:
    filesystem = ext4(tmp_path / "fs")
    image = disk(tmp_path / "disk.img", filesystem, None, filesystem)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    request = {"source": str(image), "mountpoint": str(mountpoint)}
    assert "say -o partition=N for one of 1 (ext4), 3 (ext4)" in refused(daemon, "Mount", **request)
    assert "no partition 7: it has 1, 2, 3" in refused(daemon, "Mount", **request, options={"partition": "7"})
    assert "holds no filesystem" in refused(daemon, "Mount", **request, options={"partition": "2"})
    daemon.call("Mount", **request, options={"partition": "3"})
    assert daemon.status(mountpoint)["source"].endswith("/disk0/part3")


def test_a_mount_that_fails_leaves_no_disk(daemon: Daemon, tmp_path: Path) -> None:
    image = disk(tmp_path / "disk.img", ext4(tmp_path / "fs"))
    assert "no_such" in refused(
        daemon, "Mount", source=str(image), mountpoint=str(tmp_path), options={"nonempty": "", "no_such": "1"}
    )
    assert daemon.call("Status")["mounts"] == []


@pytest.mark.parametrize("content", [b"", b"nothing of the kind" * 1000, b"\x55\xaa" * 4096])
def test_what_holds_no_filesystem_is_a_sentence(daemon: Daemon, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert "no filesystem that is known" in refused(
        daemon, "Mount", source=str(tmp_path / "file"), mountpoint=str(tmp_path)
    )


def test_everything_is_ended_in_order_with_the_daemon(runtime_dir: Path, tmp_path: Path) -> None:
    daemon = Daemon(runtime_dir)
    image = disk(tmp_path / "disk.img", ext4(tmp_path / "fs"))
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    daemon.call("Mount", source=str(image), mountpoint=str(mountpoint))
    (mountpoint / "file").write_text("kept")
    assert daemon.stop() == 0
    assert mounted_at(mountpoint) is None
    daemon = Daemon(runtime_dir)
    daemon.call("Mount", source=str(image), mountpoint=str(mountpoint))
    assert (mountpoint / "file").read_text() == "kept"
    assert daemon.stop() == 0
    # fuse2fs ended at a signal and not at the end of its link, where libfuse's threads may lock each other out.
    assert "reading device" not in daemon.log
    assert "short read" not in daemon.log
    wait_for(lambda: not (runtime_dir / "run" / "dev").exists())
