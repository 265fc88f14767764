"""UsbipBus: servers that come, go, and lie."""

from __future__ import annotations

import base64
import errno
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from udf.errors import DeviceGone, UserError
from udf.testing.devices import Emulator
from udf.testing.devices.loopback import Loopback
from udf.testing.usb_conformance import Changes
from udf.usb import operations, remote, usbip
from udf.usb.bus import BusDevice
from udf.usb.operations import Address
from udf.usb.remote import UsbipBus

DEVICE = bytes.fromhex("12 01 00 02 ff 00 00 40 09 12 57 7e 00 01 01 02 03 01")
CONFIGURATION = bytes.fromhex("09 02 12 00 01 01 00 80 32 09 04 00 00 00 ff 00 00 00")
Handler = Callable[[trio.SocketStream], Awaitable[None]]


@pytest.fixture
def unwatchable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus asks for an operation that no server knows, so that it polls."""
    monkeypatch.setattr(operations, "REQUEST_WATCH", 0x80FE)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait of the bus is short."""
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(remote, "BACK_IN_LIST", 0.1)
    monkeypatch.setattr(remote, "SLOWEST_POLL", 0.05)
    monkeypatch.setattr(remote, "WATCH_TIMEOUT", 0.2)
    monkeypatch.setattr(remote, "RETRY_DESCRIBE", 0.05)
    monkeypatch.setattr(remote, "RELEASED", 0.5)
    monkeypatch.setattr(operations, "OPERATION_TIMEOUT", 0.3)
    monkeypatch.setattr(operations, "REQUEST_TIMEOUT", 0.2)


@asynccontextmanager
async def running(address: Address | str) -> AsyncIterator[tuple[UsbipBus, Changes]]:
    bus = UsbipBus(address)
    changes = Changes(bus)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(40):
            await nursery.start(bus.run, changes.changed)
        yield bus, changes
        nursery.cancel_scope.cancel()


def let_go(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_RDWR)  # the bus has a duplicate, so closing alone would end nothing
    sock.close()


def record(busid: str = "1-1", devnum: int = 2, **changes: Any) -> usbip.DeviceRecord:
    fields: dict[str, Any] = {
        "path": "/sys/devices/x",
        "busid": busid,
        "busnum": 1,
        "devnum": devnum,
        "speed": 3,
        "vendor": 0x1209,
        "product": 0x7E57,
        "bcd_device": 0x100,
        "device_class": (0xFF, 0, 0),
        "configuration": 1,
        "configurations": 1,
        "interface_count": 1,
        "interfaces": ((0xFF, 0, 0),),
    }
    return usbip.DeviceRecord(**(fields | changes))


class Server:
    """A USB/IP server as usbipd is: it lists, and what is imported is not in the list."""

    def __init__(self, *records: usbip.DeviceRecord) -> None:
        self.records = list(records)
        self.strings = {0: b"\x04\x03\x09\x04", 1: _string("Maker"), 2: _string("Thing"), 3: _string("S1")}
        self.answers = True
        self.noise = b""
        self.imported: set[str] = set()
        self.refusals: list[int] = []
        self._listed = trio.Event()

    async def lists(self, number: int) -> None:
        """Until it has been asked for its list so many times more."""
        with trio.fail_after(40):
            for _ in range(number):
                await self._listed.wait()

    async def handle(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                header = await operations.receive_exactly(stream, usbip.OPERATION.size)
                code = usbip.OPERATION.unpack(header)[1]
                if code == usbip.REQUEST_DEVLIST:
                    await self._list(stream)
                elif code == usbip.REQUEST_IMPORT:
                    await self._import(stream)
        except (OSError, trio.BrokenResourceError):
            pass

    async def _list(self, stream: trio.SocketStream) -> None:
        shown = [each for each in self.records if each.busid not in self.imported]
        head = usbip.OPERATION.pack(usbip.VERSION, usbip.REPLY_DEVLIST, 0) + usbip.COUNT.pack(len(shown))
        await stream.send_all(head + b"".join(each.pack(interfaces=True) for each in shown))
        self._listed.set()
        self._listed = trio.Event()

    async def _import(self, stream: trio.SocketStream) -> None:
        raw = await operations.receive_exactly(stream, usbip.BUSID_SIZE)
        busid = raw.rstrip(b"\0").decode()
        found = next((each for each in self.records if each.busid == busid), None)
        status = usbip.ST_NODEV if found is None else usbip.ST_DEV_BUSY if busid in self.imported else usbip.ST_OK
        status = self.refusals.pop() if self.refusals else status
        reply = usbip.OPERATION.pack(usbip.VERSION, usbip.REPLY_IMPORT, status)
        if found is None or status:
            await stream.send_all(reply)
            return
        await stream.send_all(reply + found.pack(interfaces=False))
        self.imported.add(busid)
        try:
            while True:
                submit = usbip.unpack_submit(await operations.receive_exactly(stream, usbip.URB_SIZE))
                if self.noise:
                    await stream.send_all(self.noise)
                elif self.answers:
                    await stream.send_all(self._answer(submit))
        finally:
            self.imported.discard(busid)

    def _answer(self, submit: usbip.Submit) -> bytes:
        kind_index = struct.unpack_from("<H", submit.setup, 2)[0]
        data = {1: DEVICE, 2: CONFIGURATION, 3: self.strings.get(kind_index & 0xFF, b"")}.get(kind_index >> 8, b"")
        status = 0 if data else -errno.EPIPE
        data = data[: submit.length]
        return usbip.RetSubmit(submit.seqnum, status, len(data)).pack() + data


def _string(text: str) -> bytes:
    data = text.encode("utf-16-le")
    return bytes([len(data) + 2, 3]) + data


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Address]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        yield Address(host="127.0.0.1", port=listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", Address(host="host", port=3240)),
        ("10.0.0.1:99", Address(host="10.0.0.1", port=99)),
        ("::1", Address(host="::1", port=3240)),
        ("[::1]:99", Address(host="::1", port=99)),
        ("[::1]", Address(host="::1", port=3240)),
        ("/run/usbip.sock", Address(path="/run/usbip.sock")),
    ],
)
def test_an_address_is_a_host_or_a_path(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize("text", ["", ":99", "host:", "host:x", "host:0", "host:65536", "[]:9"])
def test_what_is_no_address_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="no address of a USB/IP server"):
        Address.parse(text)


async def test_a_foreign_servers_device_is_read_by_a_short_import(hasty: None) -> None:
    server = Server(record())
    async with serving(server.handle) as address, running(address) as (_, changes):
        device = await changes.one()
        assert (device.manufacturer, device.product_name, device.serial) == ("Maker", "Thing", "S1")
        assert (device.device_descriptor, device.configurations) == (DEVICE, (CONFIGURATION,))
        assert (device.port, device.busnum, device.devnum, device.speed) == ("1-1", 1, 2, 3)
        spec = device.spec(0)
        assert base64.b64decode(spec.device_descriptor) == DEVICE
        assert (spec.port, spec.interface, spec.key) == ("1-1", 0, device.key)
        assert not server.imported, "it lets go again"


async def test_an_imported_device_is_present_although_its_server_hides_it(hasty: None) -> None:
    server = Server(record())
    async with serving(server.handle) as address, running(address) as (bus, changes):
        key = (await changes.one()).key
        sock = await bus.open(key)
        await server.lists(4)
        assert list(bus.devices()) == [key]
        let_go(sock)
        await server.lists(6)
        assert list(bus.devices()) == [key], "it was only let go, not pulled"


async def test_a_device_that_was_pulled_while_imported_goes_when_its_connection_ends(hasty: None) -> None:
    server = Server(record())
    async with serving(server.handle) as address, running(address) as (bus, changes):
        sock = await bus.open((await changes.one()).key)
        server.records.clear()
        sock.shutdown(2)  # as the server would end it
        await changes.until(lambda: not bus.devices())
        sock.close()


async def test_another_device_in_the_same_port_has_another_key(hasty: None) -> None:
    server = Server(record())
    async with serving(server.handle) as address, running(address) as (bus, changes):
        before = (await changes.one()).key
        server.records[:] = [record(devnum=3)]
        await changes.until(lambda: bool(bus.devices()) and before not in bus.devices())
        with pytest.raises(DeviceGone):
            await bus.open(before)


async def test_a_device_that_was_replaced_between_two_lists_is_not_opened_by_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(record())
    async with serving(server.handle) as address, running(address) as (bus, changes):
        key = (await changes.one()).key
        server.records[:] = [record(devnum=3)]
        with pytest.raises(DeviceGone, match="replaced"):
            await bus.open(key)


async def test_the_configuration_is_known_anew_at_each_open(hasty: None) -> None:
    server = Server(record(configuration=0))
    async with serving(server.handle) as address, running(address) as (bus, changes):
        device = await changes.one()
        assert device.configuration == 0
        server.records[:] = [record(configuration=1)]
        let_go(await bus.open(device.key))
        assert bus.devices()[device.key].configuration == 1


async def test_a_device_that_does_not_answer_is_listed_without_what_it_did_not_say(hasty: None) -> None:
    server = Server(record())
    server.answers = False
    async with serving(server.handle) as address, running(address) as (_, changes):
        device = await changes.one()
        assert (device.vendor, device.product, device.device_class) == (0x1209, 0x7E57, (0xFF, 0, 0))
        assert (device.device_descriptor, device.configurations, device.serial) == (b"", (), "")


@pytest.mark.parametrize(
    "noise", [bytes(48), b"\xff" * 48, usbip.RetSubmit(1, 0, 2**31 - 1).pack(), usbip.RetSubmit(1, 0, -1).pack()]
)
async def test_a_server_that_answers_nonsense_for_a_device_does_not_hurt(hasty: None, noise: bytes) -> None:
    server = Server(record())
    server.noise = noise
    async with serving(server.handle) as address, running(address) as (_, changes):
        assert (await changes.one()).device_descriptor == b""


async def test_a_device_without_strings_or_with_broken_ones_is_listed_without(hasty: None) -> None:
    server = Server(record())
    server.strings = {0: b"\x04\x03\x07\x04", 2: b"\x05\x03x", 3: b"\xff\x03" + b"\x00\xd8" * 3}
    async with serving(server.handle) as address, running(address) as (_, changes):
        device = await changes.one()
        assert (device.manufacturer, device.product_name, device.serial) == ("", "", "\ufffd" * 3)


async def test_a_device_that_somebody_else_uses_is_met_when_it_is_free(hasty: None) -> None:
    server = Server(record())
    async with serving(server.handle) as address:
        stream, _ = await operations.import_device(address, "1-1")
        async with running(address) as (bus, changes):
            assert not bus.devices()
            await trio.aclose_forcefully(stream)
            await changes.one()
            other, _ = await operations.import_device(address, "1-1")
            with pytest.raises(OSError, match="in use") as caught:
                await bus.open(next(iter(bus.devices())))
            assert caught.value.errno == errno.EBUSY
            await trio.aclose_forcefully(other)


async def test_a_server_that_needs_a_moment_after_an_import_is_waited_for(hasty: None) -> None:
    server = Server(record())
    async with serving(server.handle) as address, running(address) as (bus, changes):
        key = (await changes.one()).key
        for status in (usbip.ST_DEV_BUSY, usbip.ST_DEV_ERR):
            server.refusals = [status] * 3
            let_go(await bus.open(key))
            assert not server.refusals
        server.refusals = [usbip.ST_DEV_ERR] * 1000
        with pytest.raises(OSError, match="does not give") as caught:
            await bus.open(key)
        assert caught.value.errno == errno.EIO


async def test_a_server_that_is_not_there_is_found_when_it_comes(hasty: None, runtime_dir: Path) -> None:
    path = str(runtime_dir / "usbip.sock")
    async with running(path) as (bus, changes):
        assert not bus.devices()
        with Emulator(path) as emulator:
            emulator.plug(Loopback())
            first = (await changes.one()).key
        await changes.until(lambda: not bus.devices())
        with Emulator(path) as emulator:
            emulator.plug(Loopback())
            assert (await changes.one()).key != first, "another life of the server, another arrival"


async def test_a_watched_server_that_only_cut_us_off_has_the_same_devices(hasty: None, runtime_dir: Path) -> None:
    with Emulator(runtime_dir / "s") as emulator:
        plugged = emulator.plug(Loopback())
        async with running(emulator.path) as (bus, changes):
            key = (await changes.one()).key
            sock = await bus.open(key)
            emulator.loop.call(lambda: [each.close() for each in list(emulator.clients) if each.watches])
            second = emulator.plug(Loopback(), "second")
            await changes.until(lambda: len(bus.devices()) == 2)
            assert key in bus.devices()
            second.unplug()
            await changes.until(lambda: len(bus.devices()) == 1)
            await trio.to_thread.run_sync(plugged.unplug)
            await changes.until(lambda: not bus.devices())
            sock.close()


@pytest.mark.usefixtures("unwatchable")
async def test_a_polled_server_that_goes_takes_its_devices_along(hasty: None, runtime_dir: Path) -> None:
    path = str(runtime_dir / "usbip.sock")
    async with running(path) as (bus, changes):
        with Emulator(path) as emulator:
            emulator.plug(Loopback())
            sock = await bus.open((await changes.one()).key)
        await changes.until(lambda: not bus.devices())
        sock.close()


async def test_many_devices_come_and_go(runtime_dir: Path) -> None:
    with Emulator(runtime_dir / "s") as emulator:
        plugged = [emulator.plug(Loopback(serial=f"S{number}")) for number in range(100)]
        async with running(emulator.path) as (bus, changes):
            await changes.until(lambda: len(bus.devices()) == 100)
            assert [each.serial for each in bus.devices().values()] == [f"S{number}" for number in range(100)]
            for each in plugged[::2]:
                each.unplug()
            await changes.until(lambda: len(bus.devices()) == 50)


LIST = usbip.OPERATION.pack(usbip.VERSION, usbip.REPLY_DEVLIST, 0)


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"\0" * 8,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        usbip.OPERATION.pack(usbip.VERSION, usbip.REPLY_DEVLIST, 1),
        LIST,
        LIST + usbip.COUNT.pack(2**32 - 1),
        LIST + usbip.COUNT.pack(1),
        LIST + usbip.COUNT.pack(2) + record().pack(interfaces=True),
        LIST + usbip.COUNT.pack(1) + b"\xff" * 312,
    ],
)
@pytest.mark.parametrize("hangs", [False, True])
async def test_a_hostile_server_has_no_devices_and_holds_nobody(hasty: None, says: bytes, hangs: bool) -> None:
    asked = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        try:
            code = usbip.OPERATION.unpack(await operations.receive_exactly(stream, 8))[1]
            if code == usbip.REQUEST_DEVLIST:
                await stream.send_all(says)
                asked.set()
            if hangs:
                await trio.sleep_forever()
        except (OSError, trio.BrokenResourceError):
            pass

    async with serving(handle) as address, running(address) as (bus, _):
        with trio.fail_after(40):
            await asked.wait()
        assert not bus.devices()


def event(kind: str, **fields: Any) -> bytes:
    return json.dumps({"t": kind, **fields}).encode() + b"\n"


DESCRIBED = {"busid": "1-1", "arrival": 1, "device_descriptor": base64.b64encode(DEVICE).decode(), "busnum": 1}


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (event("devices", devices=[DESCRIBED]), 1),
        (event("devices", devices=[]) + event("arrived", **DESCRIBED) + event("arrived", **DESCRIBED), 1),
        (event("devices", devices=[DESCRIBED]) + event("removed", busid="1-1", arrival=2), 1),
        (event("devices", devices=[DESCRIBED]) + event("removed", busid="1-1", arrival=1), 0),
        (event("devices", devices=[]) + event("changed", **DESCRIBED), 0),
        (event("devices", devices=[]) + event("exploded", **DESCRIBED), 0),
        (event("devices", devices=[{"busid": "1-1", "arrival": 1, "device_descriptor": "AAAA"}]), 1),
        (event("devices", devices=[DESCRIBED | {"serial": "x" * 5000, "configurations": ["AAAA" * 9000]}]), 1),
    ],
)
async def test_events_are_taken_as_they_come(hasty: None, lines: bytes, count: int) -> None:
    told = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        try:
            await stream.receive_some(8)
            for at in range(0, len(lines), 1000):
                await stream.send_all(lines[at : at + 1000])
            told.set()
            await trio.sleep_forever()
        except trio.BrokenResourceError:
            pass

    async with serving(handle) as address, running(address) as (bus, changes):
        with trio.fail_after(40):
            await told.wait()
            await changes.until(lambda: len(bus.devices()) == count)
        for device in bus.devices().values():
            assert isinstance(device, BusDevice)
            assert len(device.serial) <= 126
            assert sum(map(len, device.configurations)) <= 32768


@pytest.mark.parametrize(
    "noise",
    [
        b"nonsense\n",
        b'{"t":"devices","devices":[{"busid":7}]}\n',
        b"[" * 100_000 + b"\n",
        b"x" * 70_000,
        b'{"t":"devices","devices":[{"busid":"1-1","arrival":1,"device_descriptor":"???"}]}\n',
    ],
)
async def test_events_that_make_no_sense_end_the_watching_and_its_devices(
    hasty: None, monkeypatch: pytest.MonkeyPatch, noise: bytes
) -> None:
    monkeypatch.setattr(operations, "MAX_LINE", 65536)
    again = trio.Event()
    begun = 0

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal begun
        try:
            await stream.receive_some(8)
            begun += 1
            if begun > 1:
                again.set()
                await trio.sleep_forever()
            await stream.send_all(event("devices", devices=[DESCRIBED]))
            await stream.send_all(noise)
            await trio.sleep_forever()
        except trio.BrokenResourceError:
            pass

    async with serving(handle) as address, running(address) as (bus, changes):
        with trio.fail_after(40):
            await again.wait()
        await changes.until(lambda: not bus.devices())
