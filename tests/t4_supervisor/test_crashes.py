"""Crash reports are bounded, and what the driver did by itself is kept longer than what was done to it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from udf import messages
from udf.supervisor import crashes, procfs
from udf.supervisor.crashes import CrashLog
from udf.supervisor.restart import Kind


def add(log: CrashLog, number: int, kind: Kind, **lost: Any) -> crashes.CrashReport:
    dead = SimpleNamespace(number=number, status=-9, served=1.0, memory=4096, resident=4096, traceback=[])
    return log.add(float(number), cast(Any, dead), kind, "it died", messages.LinkLost(**lost))


def test_reports_are_bounded_and_kills_from_outside_go_first() -> None:
    log = CrashLog()
    add(log, 1, Kind.EXTERNAL)
    for number in range(2, 5):
        add(log, number, Kind.FAULT)
    for number in range(5, 200):
        add(log, number, Kind.EXTERNAL)
    kept = [report.generation for report in log.reports()]
    assert len(kept) == crashes.MAX_REPORTS
    assert kept[:4] == [2, 3, 4, 183]
    assert kept[-1] == 199
    for number in range(200, 240):
        add(log, number, Kind.HUNG)
    assert [report.generation for report in log.reports()] == list(range(220, 240))


def test_what_a_shim_says_of_a_driver_is_cut_and_cannot_steer_a_terminal() -> None:
    report = add(CrashLog(), 1, Kind.FAULT, recent=[f"LOOKUP \x1b[2J{n}" + "x" * 1000 for n in range(80)])
    assert len(report.operations) == crashes.MAX_LINES
    assert report.operations[0].startswith("LOOKUP \\x1b[2J30xxx")
    assert max(map(len, report.operations)) <= crashes.MAX_LINE + 3
    assert (report.signal, report.status, report.counted) == ("SIGKILL", None, True)


def test_poison_belongs_to_the_last_death_that_counted() -> None:
    log = CrashLog()
    log.add_poison("LOOKUP /before any death")
    add(log, 1, Kind.FAULT)
    add(log, 2, Kind.EXTERNAL)
    log.add_poison("LOOKUP /cursed")
    assert [report.poison for report in log.reports()] == [["LOOKUP /cursed"], []]


def test_a_process_is_named_and_its_memory_seen_as_long_as_it_is_there() -> None:
    with open("/proc/self/comm") as comm:
        assert procfs.command_of(os.getpid()) == comm.read().strip()
    assert (procfs.resident(os.getpid()) or 0) > 1 << 20
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert procfs.command_of(pid) == ""
    assert procfs.resident(pid) is None


@pytest.mark.parametrize("pid", [0, -1, 1 << 40])
def test_a_pid_that_cannot_be_is_nobodys(pid: int) -> None:
    assert procfs.command_of(pid) == ""
