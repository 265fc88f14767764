"""`udf daemon --automount`: sticks are plugged in and pulled out, and what is on them is mounted by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import mounts_below

from .volume_lab import Lab, content, running_lab, volume


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
