"""A week in a minute: sticks come and go in every way there is, and nothing that was promised is lost.

After each episode every file that was fsynced, closed or ejected is intact on the image, nothing is left of the mount,
and a person was told what happened. `UDF_WEEK_EPISODES` says how many (300 is a week), `UDF_WEEK_SEED` which.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.t5_cli.conftest import running_daemon
from tests.t6_stack.episodes import RULES, Week
from tests.t6_stack.sticks import Desk, Stick

EPISODES = int(os.environ.get("UDF_WEEK_EPISODES", "10"))
SEED = int(os.environ.get("UDF_WEEK_SEED", "0")) or random.randrange(1 << 32)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount with all options")


@pytest.mark.timeout(120 + 20 * EPISODES)
def test_a_week_of_sticks_loses_nothing_that_was_promised(runtime_dir: Path, tmp_path: Path) -> None:
    print(f"UDF_WEEK_SEED={SEED} UDF_WEEK_EPISODES={EPISODES}")
    rng = random.Random(SEED)
    sticks = [
        Stick.made(tmp_path / "holiday.img", "HOLIDAY", kind=16),
        Stick.made(tmp_path / "work.img", "WORK", kind=32),
        Stick.made(tmp_path / "floppy.img", "PATIENT", kind=12, partitioned=False),
        Stick.made(tmp_path / "archive.img", "PATIENT TWO", kind=16),
    ]
    for stick in sticks:
        stick.put("from the beginning.txt", rng.randbytes(3000))
    rules, media = tmp_path / "rules.toml", tmp_path / "media"
    rules.write_text(RULES)
    rules.chmod(0o600)
    with running_daemon(runtime_dir, "--automount", media, "--rules", rules) as running:
        desk = Desk(running)
        week = Week(desk, media, sticks, rng)
        began, times = time.monotonic(), []
        try:
            for number in range(EPISODES):
                at = time.monotonic()
                word = week.episode()
                times.append(time.monotonic() - at)
                print(f"{number:4} {times[-1]:5.2f} s  {word}")
        finally:
            desk.close()
    print(f"{EPISODES} episodes in {time.monotonic() - began:.1f} s; told: {week.told}")
