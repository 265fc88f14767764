"""Clients at work while devices are pulled, put back and broken: nothing is left behind, all works afterwards."""

from __future__ import annotations

import logging
import os
import random
import struct
import threading

import pytest

from tests.t1_devices.bot import INQUIRY, good, write_10
from tests.t1_devices.raw import Failed, connected
from udf.testing.devices import Device, Emulator, Plugged
from udf.testing.devices.loopback import Loopback
from udf.testing.devices.storage import Storage
from udf.testing.devices.thermometer import Thermometer

FAULTS = [
    "stall rate=0.1 seed=1",
    "eio rate=0.05",
    "short rate=0.1",
    "delay ms=1 rate=0.2; corrupt rate=0.1",
    "unplug at=20 back=5",
    "babble rate=0.1; delay ms=1 late=yes rate=0.1",
]


def use(bus: Emulator, plugged: Plugged, choice: random.Random) -> None:
    """One import and some work; whatever the faults make of it."""
    with connected(bus, plugged) as raw:
        raw.sock.settimeout(1)  # a fault may leave both sides waiting
        for _ in range(choice.randrange(20)):
            if isinstance(plugged.device, Storage):
                good(raw, write_10(choice.randrange(100), 8), data=bytes(4096))
            elif isinstance(plugged.device, Loopback):
                raw.write(1, bytes(choice.randrange(2000)))
                waiting = raw.submit(0x81, 4096)
                if choice.random() < 0.5:
                    raw.unlink(waiting)
            else:
                raw.control(0xC0, 1, data=2)


def test_storm_leaves_nothing_and_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    print("seeds: 0 to 4")
    before = set(os.listdir("/proc/self/fd"))
    makers = [lambda: Storage(size=1 << 20, cache=1 << 18), Loopback, Thermometer]
    with Emulator() as bus:
        inside = set(os.listdir("/proc/self/fd"))
        devices: list[Device] = [makers[i % 3]() for i in range(30)]
        plugs = [bus.plug(each) for each in devices]
        over = threading.Event()

        def client(seed: int) -> None:
            choice = random.Random(seed)
            while not over.is_set():
                try:
                    use(bus, choice.choice(plugs), choice)
                except (OSError, EOFError, Failed, AssertionError, struct.error):
                    pass  # pulled, in use, or spoiled by a fault

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
        for each in threads:
            each.start()
        choice = random.Random(4)
        for _ in range(1500):
            plugged = choice.choice(plugs)
            action = choice.choice(["unplug", "replug", "replug", "later", "faults"])
            if action == "unplug":
                plugged.unplug()
            elif action == "replug":
                plugged.replug()
            elif action == "later":
                plugged.replug(0.002)
            else:
                plugged.set_faults([choice.choice(FAULTS)])
        over.set()
        for each in threads:
            each.join(30)
            assert not each.is_alive()
        for plugged in plugs:
            plugged.set_faults([])
            plugged.replug()
            with connected(bus, plugged) as raw:
                if isinstance(plugged.device, Storage):
                    assert good(raw, INQUIRY, 36)[8:11] == b"UDF"
                elif isinstance(plugged.device, Loopback):
                    raw.write(1, b"x")
                    assert raw.read(0x81, 64) == b"x"
                else:
                    assert struct.unpack("<h", raw.control(0xC0, 1, data=2)) == (2150,)
            plugged.wait(lambda plugged: not plugged.imported)
            bus.unplug(plugged)
        assert not bus.clients
        assert set(os.listdir("/proc/self/fd")) == inside
    assert set(os.listdir("/proc/self/fd")) == before
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
