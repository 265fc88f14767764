"""The crash matrix: every request of a workload, and three places where the driver can die over it.

The workload runs on an ordinary directory (the model) and on the undisturbed driver, which numbers the steps. Then it
runs once for each step and place, with the driver killed there and a new one in its place, and must look to its
program, and afterwards in the tree, as it did undisturbed.

Owns: what is run, in which order, and what counts as a difference. Must never: be kinder to the second run than a
program would be. Called by: tests, also those of driver authors, through udf.testing.

Many deaths are tried on one mount, each in a directory of its own, because a mount takes longer to make than a workload
to run: so the mount's age is a part of the trial. What fails is tried again alone, on a new mount, and the report says
whether it failed there too. The order is fixed; no clock and no chance decides what is killed when.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from udf.errors import UserError
from udf.supervisor import catalog, spawn
from udf.supervisor.instance import EventLog
from udf.supervisor.plan import MountPlan
from udf.supervisor.registry import MountRequest, Registry
from udf.testing.bench import Bench, mounted
from udf.testing.outcome import Outcome, differences
from udf.testing.program import NoAnswerError, Program
from udf.testing.report import Failure, Report
from udf.testing.steps import Address, Place, Record, Step, Target
from udf.testing.targets import describe_target, find, places, targets_of, without_barrier
from udf.testing.watch import BenchFailedError
from udf.testing.workload import STANDARD, Section

ONE = "UDF_CRASH"  # environment: only this death, as a report names it
FULL = "UDF_CRASH_FULL"  # environment: not only the middle of each work, but all of it, as far as `MOST_POINTS`
_FEW = 0.2  # of the deaths may be without the request that was numbered, because a cache of the kernel answered
_SETTLE = 5.0  # seconds for what is done after the last close: files that were kept for who had them open

MakeSource = Callable[[Path], str | os.PathLike[str]]


class CrashMatrix:
    """The crash matrix of one driver. `run` tries all of it, `run_one` a single death."""

    def __init__(
        self,
        driver: str | os.PathLike[str] | None = None,
        *,
        directory: Path,
        command: str | None = None,
        source: MakeSource | None = None,
        options: Mapping[str, str] | None = None,
        mirrors: bool = False,
        flat: bool = False,
        model: bool = True,
        sections: Sequence[Section] = STANDARD,
        jobs: int = 2,
    ) -> None:
        """Say what is tried.

        `driver`: a driver's name, or its path. `command`: a foreign program instead, with `{mountpoint}`.
        `directory`: an empty one for mountpoints and sources. `source`: makes the source of one mount in the
        folder that it is given, and returns it; a driver whose source is a directory gets an empty one by itself.
        `options`: as after `udf mount -o`. `mirrors`: the source is a directory that must look as the mount does,
        with nothing more in it. `flat`: the driver makes no directories, so each section is done at the root, on a
        mount of its own. `model`: False for a driver that differs from an ordinary directory also while it lives; then
        it is compared with itself only. `jobs`: so many mounts at a time.
        """
        self._driver = None if driver is None else os.fspath(driver)
        self._command = command
        if self._driver is not None and "/" in self._driver:
            self._driver = os.path.abspath(self._driver)
        self._directory = Path(directory)
        self._source = source
        self._options = dict(options or {})
        self._mirrors = mirrors
        self._flat = flat
        self._compares = model
        self._sections = {section.name: section for section in sections}
        if len(self._sections) != len(sections):
            raise UserError("two sections have the same name: rename one")
        self._jobs = jobs
        self._mounts = 0
        self._registry: Registry | None = None
        self._reaper: trio.Nursery | None = None
        self._model: dict[str, Outcome] = {}
        self._normal: dict[str, Outcome] = {}
        self._plain: Program | None = None  # works beside the mounts
        self._plain_alone = trio.Lock()

    # ---- what tests call

    def run(self, *, full: bool | None = None) -> Report:
        """Try every step in every place, as the environment says: see `ONE` and `FULL`."""
        one = os.environ.get(ONE)
        if one:
            return self._in_trio(lambda: self._run([Address.parse(one)], full=False))
        if full is None:
            full = os.environ.get(FULL, "") not in ("", "0")
        return self._in_trio(lambda: self._run(None, full=full))

    def run_one(self, step: str, place: Place | str, point: int | None = None) -> Report:
        """Try one death on a new mount: `run_one("rename:7", "after")`."""
        address = dataclasses.replace(Address.parse(f"{step}/{Place(place)}"), point=point)
        return self._in_trio(lambda: self._run([address], full=False))

    # ---- all of it

    def _in_trio(self, work: Callable[[], Awaitable[Report]]) -> Report:
        async def main() -> Report:
            async with trio.open_nursery() as self._reaper, trio.open_nursery() as nursery:
                self._registry = Registry(EventLog(), nursery, self._reaper, private_environment=True)
                nursery.start_soon(spawn.new_zygote().run, self._reaper)
                self._plain = Program()
                try:
                    report = await work()
                finally:
                    await self._plain.end()
                nursery.cancel_scope.cancel()
            return report

        try:
            return trio.run(main)
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None

    async def _run(self, addresses: Sequence[Address] | None, *, full: bool) -> Report:
        report = Report(self._driver or self._command or "")
        await self._make_model()
        steps, cold = await self._number(report)
        if report.failures:
            return report
        if addresses is None:
            targets = [*targets_of(steps, full=full), *(targets_of(cold, full=full, cold=True))]
            report.places = [str(place) for place in places()]
        else:
            targets = [find(address, steps, cold) for address in addresses]
        report.steps = [*steps, *cold]
        warm = [target for target in targets if not target.cold]
        shares = [warm[index :: self._jobs] for index in range(self._jobs)]
        async with trio.open_nursery() as nursery:
            for share in filter(None, shares):
                nursery.start_soon(self._try_share, share, report)
        for target in targets:
            if target.cold:
                await self._try_alone(target, report, "")
        order = {str(target): index for index, target in enumerate(targets)}
        report.failures.sort(key=lambda failure: order.get(failure.death, -1))
        if report.tried and report.unreached > max(1, report.tried * _FEW):
            report.add(Failure("the whole", "", "", f"{report.unreached} of {report.tried} deaths found no such step"))
        return report

    async def _try_share(self, targets: list[Target], report: Report) -> None:
        """Try these on one mount, and go on with a new one whenever one has failed."""
        if self._flat:
            for each in targets:
                await self._try_alone(each, report, "")
            return
        pending = iter(targets)
        target: Target | None = next(pending, None)
        while target is not None:
            async with self._mount() as bench:
                await self._warm_up(bench)
                deaths = 0
                while target is not None:
                    problems = await self._try(bench, target)
                    deaths += 1
                    current, target = target, next(pending, None)
                    if problems is None or problems:
                        break
                    report.tried += 1
            if problems is None:
                await self._try_alone(current, report, "")
            elif problems:
                after = f"it came after {deaths - 1} other deaths on the same mount, and not alone"
                if not await self._try_alone(current, report, after):
                    for problem in problems:
                        report.add(dataclasses.replace(problem, note=after))

    async def _try_alone(self, target: Target, report: Report, other: str) -> bool:
        """Try one on a mount of its own; whether it failed."""
        problems = None
        for _ in range(2):
            async with self._mount() as bench:
                if not self._flat:
                    await self._warm_up(bench, until=target.step.section if target.cold else "")
                problems = await self._try(bench, target)
            if problems is not None:
                break
        report.tried += 1
        if problems is None:
            report.unreached += 1
            report.missing.append(str(target))
        for problem in problems or ():
            report.add(problem)
        return bool(problems)

    # ---- runs

    @asynccontextmanager
    async def _mount(self) -> AsyncIterator[Bench]:
        assert self._reaper is not None
        async with mounted(await self._plan(), self._reaper) as bench:
            await bench.program.do("begin", bench.mountpoint)
            bench.names.update(_list((await bench.program.do("names", ""))[1]))
            yield bench

    async def _plan(self) -> MountPlan:
        assert self._registry is not None
        self._mounts += 1
        base = self._directory / f"mount-{self._mounts}"
        point = base / "m"
        point.mkdir(parents=True)
        (base / "source").mkdir()
        source = None if self._source is None else os.fspath(self._source(base / "source"))
        if source is None and self._driver is not None:
            found = await catalog.find(self._driver, trusted_only=False)
            source = str(base / "source") if found.source_kind == "directory" else None
        request = MountRequest(
            mountpoint=str(point), driver=self._driver, command=self._command, source=source, options=self._options
        )
        plan = await self._registry.plan(request, spawn.Identity.own())
        return dataclasses.replace(plan, name=f"matrix-{self._mounts}")

    async def _make_model(self) -> None:
        assert self._plain is not None
        base = self._directory / "model"
        base.mkdir(parents=True, exist_ok=True)
        for section in self._sections.values():
            place = base / f"{section.name}-{self._mounts}"
            place.mkdir()
            await self._plain.do("begin", str(place))
            results = [await self._plain.do(call, *args) for call, args in section.operations]
            _, tree = await self._plain.do("tree")
            self._model[section.name] = Outcome(results, tree)
            if self._flat:
                self._model[section.name].forget_root()
            await self._plain.do("begin", "/")

    async def _number(self, report: Report) -> tuple[list[Step], list[Step]]:
        """Number the steps on an undisturbed mount, and compare with the model. Steps that come only once apart."""
        steps: list[Step] = []
        cold: list[Step] = []
        if self._flat:
            for section in self._sections.values():
                async with self._mount() as bench:
                    steps += await self._number_section(bench, section, report)
            return steps, cold
        async with self._mount() as bench:
            lacking: set[int] = set()
            for section in self._sections.values():
                record = Record()
                first = await self._do(bench, section, partial(bench.record, section.name, record))
                for step in without_barrier(record, section):
                    if step.opcode in record.unsupported - lacking:
                        lacking.add(step.opcode)
                        cold.append(step)
                self._compare_with_model(section, first, report)
            for section in self._sections.values():
                steps += await self._number_section(bench, section, report)
        return steps, cold

    async def _number_section(self, bench: Bench, section: Section, report: Report) -> list[Step]:
        if Place.HALF in places() and not bench.is_traced:
            await bench.trace()
        record = Record()
        self._normal[section.name] = await self._do(bench, section, partial(bench.record, section.name, record))
        self._compare_with_model(section, self._normal[section.name], report)
        for remark in bench.remarks:
            report.add(Failure("undisturbed", section.name, "", remark))
        return without_barrier(record, section)

    def _compare_with_model(self, section: Section, found: Outcome, report: Report) -> None:
        if self._compares and section.portable and not report.failures:
            for operation, path, text in differences(section, self._model[section.name], found):
                report.add(Failure("undisturbed", operation, path, f"an ordinary directory differs: {text}"))

    async def _warm_up(self, bench: Bench, until: str = "") -> None:
        """What a mount does only once is done before the deaths, as it was before the steps were numbered."""
        for section in self._sections.values():
            if section.name == until:
                return
            await self._do(bench, section)

    async def _do(self, bench: Bench, section: Section, arm: Callable[[], object] | None = None) -> Outcome:
        """Do a section in a new directory; at its end nothing is open, and nothing is under way.

        `arm` is called when the directory is made: the steps count from there.
        """
        program, root = bench.program, bench.mountpoint
        name = ""
        if not self._flat:
            name = f"{section.name}-{len(bench.names)}"
            bench.names.add(name)
            await program.do("begin", f"{root}/{name}")
            kind, value = await bench.do("mkdir", "")
            if kind == "errno":
                raise BenchFailedError(f"no directory could be made: {os.strerror(int(str(value)))}")
        if arm is not None:
            await bench.quiet()
            arm()
        results = []
        for index, (call, args) in enumerate(section.operations):
            bench.at(index)
            results.append(await bench.do(call, *args))
        bench.at(len(section.operations))
        await bench.do("access", "barrier", os.F_OK)  # what close(2) has left to do is asked for when this comes back
        await bench.settle()
        bench.rest()
        _, tree = await bench.do("tree")
        await bench.do("begin", root)
        outcome = Outcome(results, tree)
        if self._flat:
            outcome.forget_root()
            return outcome
        await self._look_for_rest(bench, outcome)
        if self._mirrors:
            outcome.source = await self._tree_of_source(bench, name)
        return outcome

    async def _look_for_rest(self, bench: Bench, outcome: Outcome) -> None:
        """What is at the root, or in the root of a mirrored source, and was not put there by the program."""
        _, names = await bench.do("names", "")
        outcome.rest = sorted(set(_list(names)) - bench.names)
        if not self._mirrors:
            return
        with trio.move_on_after(_SETTLE):
            # Files that were kept for who had them open go after the last close.
            while rest := sorted(set(os.listdir(bench.plan.source)) - bench.names):
                await bench.do("access", "barrier", os.F_OK)
                await trio.sleep(0.005)
        outcome.rest += [f"source/{name}" for name in rest]

    async def _tree_of_source(self, bench: Bench, name: str) -> object:
        assert self._plain is not None
        async with self._plain_alone:
            await self._plain.do("begin", f"{bench.plan.source}/{name}")
            _, tree = await self._plain.do("tree")
        return tree

    async def _try(self, bench: Bench, target: Target) -> list[Failure] | None:
        """Do the section with a death in it; what differs from an undisturbed run. None: there was no such step."""
        section = self._sections[target.step.section]
        bench.remarks.clear()
        try:
            found = await self._do(bench, section, partial(bench.aim, target))
            await bench.ready()
        except (NoAnswerError, BenchFailedError) as error:
            waits = "; ".join(await bench.waiting())
            text = f"{error}" + (f" (the shim waits for: {waits})" if waits else "")
            return [Failure(str(target), describe_target(target, section), "", text)]
        problems = [
            Failure(str(target), describe_target(target, section), path, f"{operation}: {text}" if operation else text)
            for operation, path, text in differences(section, self._normal[section.name], found)
        ]
        problems += [Failure(str(target), describe_target(target, section), "", remark) for remark in bench.remarks]
        return problems if bench.hit or problems else None


def _list(value: object) -> list[str]:
    """What `names` gave, or nothing when it failed."""
    return value if isinstance(value, list) else []
