"""The driver is killed at any line of its code, and its successor goes on with the state store: nothing is lost.

A child process runs random operations and is killed (SIGKILL) at a random line of fs/fat or of the store. The next one
has the same store, finishes what was under way, and is told the unanswered operation again, as the mount's shim would:
then the volume is clean without any repair (nothing leaked) and the tree is what the model says.
FAT_KILLS is the number of operations per volume (20), FAT_KILLS_SEED the seed.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.killing import KILLED, in_child
from tests.t3_fat import oracle
from tests.t3_fat.driving import Driven, Medium, driven
from tests.t3_fat.model import Chooser, Operation, World
from tests.t3_fat.rawfat import Image
from tests.t3_fat.zoo import Geometry
from udf import Store
from udf.driver.memory import create_memfds

OPERATIONS = int(os.environ.get("FAT_KILLS", "20"))
SEED = int(os.environ.get("FAT_KILLS_SEED", "1"))
CODE = "fs/fat/|udf/driver/journal|udf/driver/shelf"
KINDS = [Geometry(12, 1024, clusters=400), Geometry(16, 512), Geometry(32, 512, clusters=900, few=True)]
VERBS = ("create", "mkdir", "write", "truncate", "rename", "unlink", "rmdir")
Picture = dict[str, bytes | None]


def planned(dice: random.Random, cluster: int, count: int) -> tuple[list[Operation], list[Picture]]:
    """Operations that all succeed, and the tree before and after each."""
    world = World()
    chooser = Chooser(dice, cluster, 120_000)
    todo: list[Operation] = []
    pictures: list[Picture] = [{}]
    while len(todo) < count:
        operation = chooser.choose(world)
        verb, arguments = str(operation[0]), operation[1:]
        try:
            if verb not in VERBS or (verb in ("write", "truncate") and world.find(str(arguments[0])).directory):
                continue
            getattr(world, verb)(*arguments)
        except OSError:
            continue
        todo.append(operation)
        pictures.append(world.picture())
    return todo, pictures


async def perform(driver: Driven, operation: Operation) -> None:
    verb, arguments = str(operation[0]), operation[1:]
    if verb == "truncate":
        await driver.setattr(str(arguments[0]), size=int(arguments[1]))  # type: ignore[call-overload]
    else:
        await getattr(driver, verb)(*arguments)


async def perform_again(driver: Driven, operation: Operation, before: Picture, after: Picture) -> None:
    """As the shim does for a request that was not answered: the ones that may be done only once are looked at first."""
    verb = str(operation[0])
    now = await driver.tree()
    if verb == "create":
        # CREATE and the WRITE behind it are two requests.
        path, data = str(operation[1]), operation[2]
        if set(now) == set(before):
            await driver.create(path)
        if data:
            await driver.write(path, 0, data)  # type: ignore[arg-type]
        return
    if verb in ("write", "truncate"):
        await perform(driver, operation)
        return
    if now == after:
        return
    assert now == before, f"{verb} is neither done nor not done: {set(now) ^ set(before)}"
    await perform(driver, operation)


@pytest.mark.timeout(max(300, OPERATIONS * 3))
@pytest.mark.parametrize("geometry", KINDS, ids=str)
def test_a_driver_killed_at_any_line_leaves_nothing_to_repair(
    tmp_path: Path, runtime_dir: Path, geometry: Geometry
) -> None:
    oracle.need()
    path = geometry.make(tmp_path / "image")
    dice = random.Random(f"{SEED} {geometry}")
    todo, pictures = planned(dice, Image.of(path).cluster, OPERATIONS)
    memories = create_memfds("test")
    progress = memoryview(mmap.mmap(-1, 4096)).cast("Q")

    def on_the_store(work: Callable[[Driven], Any]) -> Callable[[], Any]:
        async def main() -> Any:
            medium = Medium(path)
            store = Store([os.dup(fd) for fd in memories])
            async with driven(medium, store=store, directory=runtime_dir) as driver:
                return await work(driver)

        return lambda: trio.run(main)

    async def serve(driver: Driven) -> str:
        for number in range(int(progress[0]), len(todo)):
            await perform(driver, todo[number])
            progress[0] = number + 1
        await driver.sync()
        return "all"

    async def recover(driver: Driven) -> None:
        number = int(progress[0])
        if number < len(todo):
            await perform_again(driver, todo[number], pictures[number], pictures[number + 1])
            progress[0] = number + 1
        await driver.sync()
        assert await driver.tree() == pictures[progress[0]]

    generations = 0
    try:
        while True:
            step = dice.randrange(dice.choice((300, 3000, 20_000)))
            result = in_child(on_the_store(serve), step=step, files=CODE, lines=True)
            generations += result == KILLED
            where = f"seed {SEED}, {geometry}, generation {generations}, operation {progress[0]}"
            print(where, todo[min(int(progress[0]), len(todo) - 1)][:2])
            # Now and then the successor is killed too, while it finishes what the first one left.
            if dice.random() < 0.3:
                in_child(on_the_store(recover), step=dice.randrange(3000), files=CODE, lines=True)
            in_child(on_the_store(recover))
            oracle.check(path, where)
            seen = Image.of(path).tree()
            assert {p: None if f.is_directory else f.contents for p, f in seen.items()} == pictures[progress[0]], where
            if result != KILLED:
                break
        assert generations > 1
    finally:
        for fd in memories:
            os.close(fd)
