"""The zoo is what it claims to be: mtools, fsck.fat and the second opinion agree on it before our driver is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.t3_fat import oracle, zoo
from tests.t3_fat.rawfat import Image

SOME = [zoo.Geometry(12, 512), zoo.Geometry(16, 2048), zoo.Geometry(32, 1024), zoo.Geometry(16, 4096, 4096)]


@pytest.mark.parametrize("geometry", SOME, ids=str)
def test_mtools_and_the_second_opinion_see_the_same_tree(tmp_path: Path, geometry: zoo.Geometry) -> None:
    oracle.need()
    image = geometry.make(tmp_path / "image")
    top = zoo.tree(tmp_path / "tree", geometry.cluster)
    oracle.filled(image, top)
    oracle.check(image)
    known = oracle.pictured(top)
    assert oracle.extracted(image, tmp_path / "out") == known
    seen = Image.of(image).tree()
    assert {path: (None if found.is_directory else found.contents) for path, found in seen.items()} == {
        path: contents for path, (contents, _) in known.items()
    }
    for path, (contents, seconds) in known.items():
        if contents is not None:
            assert seen[path].modified == oracle.moment(seconds), path


@pytest.mark.parametrize("name", sorted(zoo.ODDITIES))
@pytest.mark.parametrize("kind", [12, 16, 32])
def test_every_oddity_is_seen_as_it_claims(tmp_path: Path, kind: int, name: str) -> None:
    oracle.need()
    path = tmp_path / "image"
    expected = zoo.odd(path, name, kind)
    seen = Image.of(path).tree()
    assert {path: (None if found.is_directory else found.contents) for path, found in seen.items()} == expected
    if name not in zoo.COMPLAINED_OF:
        oracle.check(path)
