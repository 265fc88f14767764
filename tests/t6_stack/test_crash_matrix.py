"""The crash matrix: both drivers die over every request in three places, and it finds drivers that may not die.

UDF_CRASH_FULL=1 tries every point of the work instead of the middle; UDF_CRASH='SECTION:STEP/PLACE' only one death.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.t3_shim.supervising import can_mount
from tests.t5_cli.test_readme import FILES
from udf.errors import UserError
from udf.fuse.opcodes import UNANSWERED, Opcode
from udf.shim.requests import HANDLERS
from udf.testing import STANDARD, CrashMatrix, Place, Section, Step, section
from udf.testing.outcome import Outcome, differences
from udf.testing.steps import Address, Target, name_of

pytestmark = [can_mount, pytest.mark.timeout(900)]

PLANTED = Path(__file__).with_name("drivers") / "planted.py"
# What the shim forwards and the standard workload does not bring about, and why.
EXCEPTIONS = {
    Opcode.ACCESS: "the kernel checks permissions itself",
    Opcode.BMAP: "the kernel asks only filesystems on block devices of its own",
    Opcode.IOCTL: "refused after a death: nobody can know what it did",
    Opcode.GETLK: "locks are the kernel's unless a manifest wants them",
    Opcode.SETLK: "the same, and refused after a death",
    Opcode.SETLKW: "the same, and refused after a death",
    Opcode.READDIR: "a driver that has READDIRPLUS is asked for nothing else",
    Opcode.SYNCFS: "the kernel does not send it on such mounts",
    Opcode.DESTROY: "has no answer, like the end of a mount",
}
HARD = ("directories",)
SMALL = {
    "early": section("write", ("put", "a", b"one"), ("put", "a", b"two"), ("get", "a")),
    "copies": section("rename", ("put", "a", b"one"), ("rename", "a", "b"), ("get", "b")),
    "forgets": section("mode", ("put", "a", b"one"), ("chmod", "a", 0o600), ("stat", "a")),
}


@pytest.mark.parametrize("driver", ["memfs", "passthrough"])
def test_no_program_notices_the_death_of_a_driver(driver, tmp_path):
    matrix = CrashMatrix(driver, directory=tmp_path, mirrors=driver == "passthrough")
    report = matrix.run()
    assert report, str(report)
    forwarded = {int(op) for op in HANDLERS} - UNANSWERED - EXCEPTIONS.keys()
    missing = {name_of(op) for op in forwarded} - report.requests
    # One of two numbers for one request: which one depends on the kernel.
    assert missing <= {"COPY_FILE_RANGE", "COPY_FILE_RANGE_64"}
    assert report.places == ["before", "half", "after"]
    assert not report.unreached, report.missing
    changes = {step.name for step in report.steps if step.points}
    assert {"CREATE", "MKDIR", "RENAME", "UNLINK", "WRITE", "SETATTR"} <= changes


def test_no_program_notices_where_the_kernel_asks_for_everything(tmp_path):
    """Without caches there are three times as many steps; all sections are tried with UDF_CRASH_FULL only."""
    sections = STANDARD if os.environ.get("UDF_CRASH_FULL") else [each for each in STANDARD if each.name in HARD]
    options = {"timeout": "0"}
    report = CrashMatrix("passthrough", directory=tmp_path, mirrors=True, options=options, sections=sections).run()
    assert report, str(report)


def planted(directory: Path, bug: str) -> CrashMatrix:
    sections = [SMALL[bug]] if bug in SMALL else list(SMALL.values())
    return CrashMatrix(PLANTED, directory=directory, options={"bug": bug}, sections=sections)


def test_a_driver_without_a_mistake_passes(tmp_path):
    report = planted(tmp_path, "none").run()
    assert report, str(report)


def test_a_change_that_is_acknowledged_too_early_fails_at_the_request_behind_it(tmp_path):
    report = planted(tmp_path, "early").run()
    section = [step for step in report.steps if step.section == "write"]
    last_write = max(step.number for step in section if step.name == "WRITE")
    behind = next(step for step in section if step.number > last_write)
    deaths = [failure.death for failure in report.failures if failure.death.startswith("write:")]
    assert deaths[0] == f"{behind}/before"
    assert any(failure.difference == "get('a'): b'one' instead of b'two'" for failure in report.failures)


def test_a_rename_by_copying_fails_when_its_reply_is_lost(tmp_path):
    report = planted(tmp_path, "copies").run()
    rename = next(step for step in report.steps if step.name == "RENAME")
    assert {failure.death for failure in report.failures} == {f"{rename}/after"}


def test_state_that_only_the_process_has_fails_at_every_request_after_the_change(tmp_path):
    report = planted(tmp_path, "forgets").run()
    change = next(step for step in report.steps if step.section == "mode" and step.name == "SETATTR")
    deaths = {failure.death for failure in report.failures}
    later = [step for step in report.steps if step.section == "mode" and step.number > change.number]
    assert {f"{step}/before" for step in later[:-1]} <= deaths
    assert not [death for death in deaths if not death.startswith("mode:")]
    assert {failure.path for failure in report.failures} == {"", "a"}


def test_a_failure_is_found_again_by_its_name(tmp_path, monkeypatch):
    report = planted(tmp_path / "all", "copies").run()
    (death,) = {failure.death for failure in report.failures}
    step, _, place = death.partition("/")
    again = planted(tmp_path / "one", "copies").run_one(step, place)
    assert (again.tried, [failure.death for failure in again.failures]) == (1, [death])
    monkeypatch.setenv("UDF_CRASH", death)
    by_name = planted(tmp_path / "name", "copies").run()
    assert by_name.failures == again.failures
    assert planted(tmp_path / "other", "copies").run_one(step, Place.BEFORE)


def test_a_driver_that_does_not_start_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no driver"):
        CrashMatrix("nonesuch", directory=tmp_path, sections=STANDARD[:1]).run()


def test_a_step_that_is_not_there_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no step write:999"):
        planted(tmp_path, "none").run_one("write:999", "after")


def test_the_example_in_the_readme_works_as_it_stands(tmp_path):
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    test = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_notes.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert test.returncode == 0, test.stdout + test.stderr
    assert "1 passed" in test.stdout


# ---- the parts


def test_deaths_have_names_that_can_be_read_back():
    step = Step("rename", 7, Opcode.RENAME, 1, points=3)
    for target in (
        Target(step, Place.BEFORE),
        Target(step, Place.HALF, 2),
        Target(step, Place.AFTER, cold=True),
    ):
        address = Address.parse(str(target))
        assert (address.section, address.number, address.place) == ("rename", 7, target.place)
        assert (address.point or 0, address.cold) == (target.point, target.cold)
    for wrong in ("rename", "rename:x/after", "rename:7", "rename:7/later", "rename:7/half.x"):
        with pytest.raises(UserError):
            Address.parse(wrong)


@pytest.mark.parametrize(
    ("points", "middle", "all_points"),
    [(0, 1, [1]), (1, 2, [2]), (2, 2, [2, 3]), (3, 2, [2, 3, 4]), (9, 5, [2, 4, 7, 10])],
)
def test_the_points_of_a_work(points, middle, all_points):
    step = Step("s", 1, Opcode.WRITE, 0, points=points)
    assert step.middle() == middle
    assert step.all_points(4) == all_points


def test_a_section_of_the_standard_workload_has_a_name_of_its_own():
    assert len({each.name for each in STANDARD}) == len(STANDARD)
    with pytest.raises(UserError, match="same name"):
        CrashMatrix("memfs", directory=Path("/"), sections=[STANDARD[0], STANDARD[0]])


def test_differences_say_where_and_what():
    what = Section("s", (("get", ("a",)),))
    file = {"mode": 0o100644, "data": b"x"}
    expected = Outcome([("value", b"x")], {"a": file, "b": file}, source={"a": file})
    assert not list(differences(what, expected, expected))
    found = Outcome(
        [("errno", 116)], {"a": {**file, "data": b"y"}, "c": file}, source={}, rest=["source/.udf-hidden-1"]
    )
    assert list(differences(what, expected, found)) == [
        ("get('a')", "", "ESTALE instead of b'x'"),
        ("", "a", "data is b'y' instead of b'x'"),
        ("", "b", "is missing"),
        ("", "c", "should not be there"),
        ("", "source/a", "is missing"),
        ("", "source/.udf-hidden-1", "was left behind"),
    ]
