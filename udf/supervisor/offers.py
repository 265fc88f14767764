"""What is on offer for devices: the drivers on the search path, what they lack, and the operator's rules.

Owns: reading them again whenever a file changes, and the last good rules. Must never: run driver code, read in the
loop, or let a file that cannot be read take away what was there. Called by: devices.py (runs it), binder.py (reads it).
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import trio

from udf.errors import UserError
from udf.manifest import Manifest, Trust, list_drivers, search_path
from udf.supervisor import catalog
from udf.supervisor.filewatch import FileWatch
from udf.usb.rules import NO_RULES, Rules, read_rules, rules_files

LOOK = 30.0  # for what inotify does not tell
SETTLE = 0.02  # an editor or an installer does several things at once
MAX_PACKAGES = 200
MAX_REWATCH = 3

log = logging.getLogger("udf.offers")
T = TypeVar("T")


@dataclass(frozen=True)
class Offer:
    """What could be read at one moment."""

    drivers: tuple[Manifest, ...] = ()  # of kind usb
    mounting: tuple[Manifest, ...] = ()  # of kind fs, which mount filesystems on a block service
    missing: Mapping[str, str] = field(default_factory=dict)  # by driver: the program that it lacks, as a sentence
    rules: Rules = NO_RULES
    problems: tuple[str, ...] = ()  # of rules files; those of drivers are `udf drivers`'


class Offers:
    """The latest offer, kept up to date as long as `run` runs."""

    def __init__(self, rules: str | None, changed: Callable[[], None]) -> None:
        self.now = Offer()
        self._rules = rules
        self._changed = changed
        self._good: dict[Path, Rules] = {}
        self._said = ""  # the last complaint: each is told once, until something goes right
        self._threads = trio.CapacityLimiter(2)  # what hangs here shall not use up the threads of who mounts

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read, say `started`, and read again after every change."""
        with FileWatch() as watch:
            while True:
                for _ in range(MAX_REWATCH):
                    # Watched before it is read: what changes meanwhile is read again.
                    directories = await self._watch(watch)
                    if directories is None:
                        break  # it hangs: whatever is read would hang too
                    await self._read()
                    if directories == await self._look(self._directories, "the search path"):
                        break  # else what was read asks for more to be watched: the directories of a missing program
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                with trio.move_on_after(LOOK):
                    await watch.changed()
                    await trio.sleep(SETTLE)

    async def _look(self, work: Callable[[], T], what: str) -> T | None:
        """Something that touches paths, which may lie on something that hangs."""
        try:
            result = await catalog.in_thread(work, what, self._threads)
        except (UserError, OSError) as exc:
            if str(exc) != self._said:
                log.warning("%s; what was known stays", exc)
            self._said = str(exc)
            return None
        self._said = ""
        return result

    async def _watch(self, watch: FileWatch) -> list[Path] | None:
        def look() -> list[Path]:
            directories = self._directories()
            watch.watch(directories)
            return directories

        return await self._look(look, "the search path")

    async def _read(self) -> None:
        found = await self._look(self._drivers, "the search path")
        if found is None:
            return
        drivers, mounting, missing = found
        rules, problems = await self._read_rules()
        for problem in problems:
            if problem not in self.now.problems:
                log.warning("%s; the last good rules of it stay", problem)
        offer = Offer(drivers, mounting, missing, rules, problems)
        if offer != self.now:
            self.now = offer
            self._changed()

    def _drivers(self) -> tuple[tuple[Manifest, ...], tuple[Manifest, ...], Mapping[str, str]]:
        found, _ = list_drivers(Trust.own())
        drivers = tuple(each for each in found if each.kind == "usb")
        mounting = tuple(each for each in found if each.filesystems and each.source == "block")
        return drivers, mounting, _missing((*drivers, *mounting))

    async def _read_rules(self) -> tuple[Rules, tuple[str, ...]]:
        rules, problems = NO_RULES, []
        for path in rules_files(self._rules):
            try:
                reading = functools.partial(read_rules, path, must_exist=self._rules is not None)
                self._good[path] = await catalog.in_thread(reading, f"the rules file {path}", self._threads)
            except (UserError, OSError) as exc:
                problems.append(str(exc))
            rules = rules.followed_by(self._good.get(path, NO_RULES))
        return rules, tuple(problems)

    def _directories(self) -> list[Path]:
        """Where a change may matter: of a missing program, the directories in which it might appear."""
        trees = search_path(Trust.own())
        found = [*trees, *(path.parent for path in rules_files(self._rules))]
        for tree in trees:
            try:
                found += [Path(entry.path) for entry in os.scandir(tree) if entry.is_dir()][:MAX_PACKAGES]
            except OSError:
                continue
        if self.now.missing:
            found += [Path(each) for each in os.get_exec_path() if os.path.isabs(each)]
        return found


def _missing(drivers: tuple[Manifest, ...]) -> dict[str, str]:
    lacks = {}
    for driver in drivers:
        for program in driver.requires:
            if not program.startswith("drivers:") and shutil.which(program) is None:
                lacks[driver.name] = f"the program {program} is not installed"
                break
    return lacks
