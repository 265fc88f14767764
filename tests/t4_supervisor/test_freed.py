"""What an ended mount leaves in the memory of its supervisor: nothing, and at once."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import trio
from staging import Stage, generation_of, gone

from udf.supervisor.channel import Channel
from udf.supervisor.child import Child
from udf.supervisor.generation import Generation
from udf.supervisor.hosts import Hosts
from udf.supervisor.instance import Instance, Reason
from udf.supervisor.mounts import Mount
from udf.supervisor.output import Output
from udf.supervisor.plan import MountPlan, StartFailedError
from udf.supervisor.process import Process
from udf.supervisor.recovery import Recovery
from udf.supervisor.shim import MountShim
from udf.supervisor.spares import Spares
from udf.supervisor.trace import Operation, TraceFeed

PARTS = frozenset(
    {Mount, Instance, Process, Child, Channel, Output, TraceFeed, MountPlan, StartFailedError}
    | {Recovery, Hosts, Spares, Generation, MountShim}
)


def parts() -> Counter[type]:
    return Counter(type(each) for each in gc.get_objects() if type(each) in PARTS)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def live_and_end(stage: Stage, end: str) -> trio.Event:
    """The life of a mount, in a frame of its own, so that the test itself holds nothing of it; set when it is freed."""
    mount, freed = stage.make(), trio.Event()
    weakref.finalize(mount, freed.set)
    if end == "cancelled":
        with trio.move_on_after(0.2):
            await stage.nursery.start(mount.run)
        return freed
    try:
        await stage.nursery.start(mount.run)
    except StartFailedError:
        return freed
    match end:
        case "traced":
            listening = trio.Event()

            async def deliver(_operations: list[Operation], _lost: int) -> None:
                listening.set()

            stage.nursery.start_soon(mount.trace.listen, stage.nursery, deliver)
            await listening.wait()
        case "driver" | "shim":
            instance = mount.driver if end == "driver" else mount.shim
            assert instance.pid is not None
            os.kill(instance.pid, signal.SIGKILL)
            if end == "driver":
                await generation_of(mount, 2)
    await mount.counters()
    await mount.unmount(Reason.OPERATOR, lazy=False)
    await gone(mount)
    return freed


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("end", ["unmounted", "traced", "driver", "shim", "refused", "cancelled"])
async def test_nothing_of_an_ended_mount_waits_for_the_garbage_collector(stage: Stage, end: str) -> None:
    """A mount was in a circle with its trace feed, and one that could not start with its own exception. Hundreds of
    ended ones stayed in a daemon's memory, about 80 objects each, because a full collection is rare there."""
    if end == "refused":
        stage.host = ("receive", "failed=no")
    elif end == "cancelled":
        stage.host = ("hang",)
    before = parts()
    freed = await live_and_end(stage, end)
    with trio.move_on_after(10):
        await freed.wait()
    left = parts() - before
    assert not left, left
