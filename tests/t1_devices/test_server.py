"""The USB/IP server: what any client may ask, what our own asks besides, and what hostile ones get."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.t1_devices.bot import good, read_10, sense
from tests.t1_devices.raw import Raw, connected
from udf.errors import UserError
from udf.testing.devices import Emulator
from udf.testing.devices.loopback import Loopback, Request
from udf.testing.devices.server import MAX_LINE, REQUEST_CONTROL, REQUEST_WATCH
from udf.testing.devices.session import MAX_PENDING
from udf.testing.devices.storage import Storage
from udf.testing.devices.thermometer import Thermometer
from udf.usb import usbip

USBIP = shutil.which("usbip", path="/usr/sbin:/usr/bin:/sbin")


class Client:
    """A connection in the operations phase."""

    def __init__(self, path: str | tuple[str, int], code: int, rest: bytes = b"", version: int = usbip.VERSION) -> None:
        if isinstance(path, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(path)
        else:
            self.sock = socket.create_connection(path)
        self.sock.settimeout(10)
        self.sock.sendall(usbip.OPERATION.pack(version, code, 0) + rest)
        self.file = self.sock.makefile("rwb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()

    def line(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.readline())
        return found

    def do(self, **command: Any) -> dict[str, Any]:
        self.file.write(json.dumps(command).encode() + b"\n")
        self.file.flush()
        return self.line()

    def ended(self) -> bool:
        try:
            return not self.file.read(1)
        except ConnectionResetError:
            return True


@pytest.fixture
def bus() -> Iterator[Emulator]:
    with Emulator(listen=("127.0.0.1", 0)) as bus:
        yield bus


def listed(path: str | tuple[str, int]) -> list[usbip.DeviceRecord]:
    with Client(path, usbip.REQUEST_DEVLIST) as client:
        assert usbip.OPERATION.unpack(client.file.read(8)) == (usbip.VERSION, usbip.REPLY_DEVLIST, usbip.ST_OK)
        (count,) = usbip.COUNT.unpack(client.file.read(4))
        found = []
        for _ in range(count):
            record = usbip.unpack_device(client.file.read(usbip.DEVICE.size))
            client.file.read(usbip.INTERFACE.size * record.interface_count)
            found.append(record)
        assert client.ended()
    return found


def imported(path: str | tuple[str, int], busid: str) -> tuple[Client, int, usbip.DeviceRecord | None]:
    client = Client(path, usbip.REQUEST_IMPORT, busid.encode().ljust(usbip.BUSID_SIZE, b"\0"))
    _, code, status = usbip.OPERATION.unpack(client.file.read(8))
    assert code == usbip.REPLY_IMPORT
    if status:
        assert client.ended()
        return client, status, None
    return client, status, usbip.unpack_device(client.file.read(usbip.DEVICE.size))


def test_list_and_import_over_both_kinds_of_sockets(bus: Emulator) -> None:
    bus.plug(Thermometer())
    assert bus.address is not None
    for path in (bus.path, bus.address):
        (record,) = listed(path)
        assert (record.busid, record.vendor, record.product, record.speed) == ("1-1", 0x1209, 0x7E57, 3)
        client, status, device = imported(path, record.busid)
        with client:
            assert status == usbip.ST_OK
            assert device is not None
            assert device.devid == record.devid
            raw = Raw(client.sock, device.devid)
            raw.configure()
            assert struct.unpack("<h", raw.control(0xC0, 1, data=2)) == (2150,)
            assert listed(path) == []  # like usbipd, what is imported is not offered
        bus.find("thermometer0").wait(lambda plugged: not plugged.imported)


def test_only_one_import_at_a_time_and_the_next_one_after_it(bus: Emulator) -> None:
    plugged = bus.plug(Thermometer())
    first, status, _ = imported(bus.path, "1-1")
    with first:
        assert status == usbip.ST_OK
        second, status, _ = imported(bus.path, "1-1")
        second.__exit__()
        assert status == usbip.ST_DEV_BUSY
        with pytest.raises(OSError, match="busy"):
            bus.connect(plugged)
    plugged.wait(lambda plugged: not plugged.imported)
    third, status, _ = imported(bus.path, "1-1")
    third.__exit__()
    assert status == usbip.ST_OK
    fourth, status, _ = imported(bus.path, "9-9")
    fourth.__exit__()
    assert status == usbip.ST_NODEV


@pytest.mark.skipif(USBIP is None, reason="needs the program usbip")
def test_usbip_list_accepts_us(bus: Emulator) -> None:
    bus.plug(Thermometer())
    bus.plug(Storage(size=1 << 20))
    bus.plug(Loopback())
    assert bus.address is not None
    assert USBIP is not None
    done = subprocess.run(
        [USBIP, "--tcp-port", str(bus.address[1]), "list", "-r", bus.address[0]],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("1-1:", "1209:7e57", "1-2:", "08/06/50", "1-3:", "ff/01/00"):
        assert text in done.stdout


def test_watcher_is_told_of_everything_that_changes(bus: Emulator) -> None:
    first = bus.plug(Thermometer(serial="T1"))
    with Client(bus.path, REQUEST_WATCH) as watcher:
        told = watcher.line()
        assert told["t"] == "devices"
        (device,) = told["devices"]
        assert base64.b64decode(device["device_descriptor"]) == first.device.device_descriptor()
        assert [base64.b64decode(each) for each in device["configurations"]] == [
            first.device.configuration_descriptor(0)
        ]
        assert (device["busid"], device["arrival"], device["imported"]) == ("1-1", 1, False)
        assert (device["serial"], device["product"], device["name"]) == ("T1", "Thermometer", "thermometer0")
        second = bus.plug(Loopback())
        told = watcher.line()
        assert (told["t"], told["busid"], told["name"]) == ("arrived", "1-2", "loopback0")
        with connected(bus, second, 0):
            assert watcher.line()["imported"] is True
        told = watcher.line()
        assert (told["t"], told["busid"], told["imported"]) == ("changed", "1-2", False)
        second.replug()
        told = watcher.line()
        assert (told["t"], told["busid"], told["arrival"]) == ("removed", "1-2", 2)
        told = watcher.line()
        assert (told["t"], told["busid"], told["arrival"]) == ("arrived", "1-2", 3)
        bus.unplug(first)
        assert watcher.line()["t"] == "removed"


def test_commands_do_what_udf_plug_needs(bus: Emulator, tmp_path: Path) -> None:
    image = tmp_path / "stick.img"
    image.write_bytes(b"I" * 8192)
    with Client(bus.path, REQUEST_CONTROL) as control:
        told = control.do(do="plug", model="storage", name="stick", options={"file": str(image), "serial": "S1"})
        assert told == {"ok": True, "name": "stick", "busid": "1-1", "arrival": 1}
        with connected(bus, bus.find("stick")) as raw:
            sense(raw)
            assert good(raw, read_10(3, 1), 512) == b"I" * 512
        assert control.do(do="faults", name="stick", faults=["unplug at=1"]) == {"ok": True}
        (row,) = control.do(do="list")["devices"]
        assert (row["name"], row["present"], row["serial"]) == ("stick", True, "S1")
        assert control.do(do="medium", name="stick", file=None) == {"ok": True}
        assert control.do(do="medium", name="stick", file=str(image)) == {"ok": True}
        assert control.do(do="replug", name="stick")["arrival"] == 2
        assert control.do(do="unplug", name="stick") == {"ok": True}
        assert control.do(do="list")["devices"] == []
        assert control.do(do="plug", model="storage", options={"file": str(image)})["ok"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"nonsense", "A command is one line of JSON."),
        (b"[" * 30000, "A command is one line of JSON."),
        (b"[]", "A command is a JSON object."),
        (b'{"do":"explode"}', "There is no command 'explode'; there are plug"),
        (b'{"do":"plug"}', "must say 'model'"),
        (b'{"do":"plug","model":"toaster"}', "There is no file and no device model 'toaster'"),
        (b'{"do":"plug","model":"loopback","name":"../x"}', "is no name for a device"),
        (b'{"do":"plug","model":"loopback","name":"taken"}', "is called 'taken' already"),
        (b'{"do":"plug","model":"loopback","options":[1]}', "'options' is a JSON object."),
        (b'{"do":"plug","model":"loopback","faults":["boom"]}', "There is no fault 'boom'"),
        (b'{"do":"plug","model":"loopback","faults":[5]}', "'faults' is a list of texts."),
        (
            b'{"do":"unplug","name":"nobody"}',
            "No emulated device is called 'nobody': `udf devices` lists those that are plugged in.",
        ),
        (b'{"do":"unplug","name":5}', "must say 'name'"),
        (b'{"do":"medium","name":"taken","file":null}', "has no medium that could be changed."),
    ],
)
def test_wrong_command_is_one_sentence(bus: Emulator, line: bytes, sentence: str) -> None:
    bus.plug(Loopback(), "taken")
    with Client(bus.path, REQUEST_CONTROL) as control:
        control.file.write(line + b"\n")
        control.file.flush()
        told = control.line()
        assert told["ok"] is False
        assert sentence in told["error"]
        assert control.do(do="list")["ok"]


def test_network_may_not_command_but_watch(bus: Emulator) -> None:
    assert bus.address is not None
    with Client(bus.address, REQUEST_CONTROL) as client:
        assert client.ended()
    with Client(bus.address, REQUEST_WATCH) as client:
        assert client.line()["t"] == "devices"
    assert stat.S_IMODE(os.stat(bus.path).st_mode) == 0o600


def test_client_that_breaks_the_operations_is_cut_off(bus: Emulator) -> None:
    for code, version in ((usbip.REQUEST_DEVLIST, 0x0106), (0x8099, usbip.VERSION), (0, 0)):
        with Client(bus.path, code, version=version) as client:
            assert client.ended()
    with Client(bus.path, REQUEST_CONTROL, b"x" * (MAX_LINE + 70000)) as client:
        assert client.ended()
    assert listed(bus.path) == []


def header(
    code: int = 1, devid: int = 0, direction: int = 0, endpoint: int = 4, length: int = 0, packets: int = 0
) -> bytes:
    return usbip.SUBMIT.pack(code, 1, devid, direction, endpoint, 0, length, 0, packets, 0, bytes(8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"code": 3},
        {"code": 0xFFFFFFFF},
        {"devid": 5},
        {"length": -1},
        {"length": usbip.MAX_TRANSFER + 1},
        {"direction": 2},
        {"endpoint": 16},
        {"packets": usbip.MAX_ISO_PACKETS + 1},
    ],
)
def test_client_that_breaks_the_urb_phase_loses_its_import_only(bus: Emulator, wrong: dict[str, int]) -> None:
    plugged = bus.plug(Loopback())
    with connected(bus, plugged) as raw:
        raw.sock.sendall(header(**{"devid": plugged.devid, **wrong}))
        with pytest.raises((EOFError, ConnectionResetError)):
            raw.receive()
    with connected(bus, plugged) as raw:
        assert raw.write(4, b"fine") == 4


def test_isochronous_packets_outside_of_their_transfer_are_refused(bus: Emulator) -> None:
    plugged = bus.plug(Loopback())
    with connected(bus, plugged) as raw:
        raw.sock.sendall(
            header(devid=plugged.devid, endpoint=3, length=4, packets=1) + b"data" + usbip.ISO_PACKET.pack(2, 3, 0, 0)
        )
        with pytest.raises((EOFError, ConnectionResetError)):
            raw.receive()


def test_client_cannot_have_transfers_without_end(bus: Emulator) -> None:
    plugged = bus.plug(Loopback())
    with connected(bus, plugged) as raw:
        with contextlib.suppress(ConnectionError):  # it may be cut off before the last one
            for _ in range(MAX_PENDING + 1):
                raw.submit(0x81, 1)
        with pytest.raises((EOFError, ConnectionError)):
            raw.receive()


def test_client_that_does_not_read_is_not_read_from(bus: Emulator) -> None:
    plugged = bus.plug(Loopback())
    with plugged.record() as seen, connected(bus, plugged) as raw:
        raw.sock.setblocking(False)
        wanted = 0
        one = usbip.Submit(0, plugged.devid, 1, 4, 0, 1 << 20, 0, 0, 0, bytes(8))
        try:
            while wanted < 1000:
                data = one._replace(seqnum=1000 + wanted).pack()
                assert raw.sock.send(data) == len(data)
                wanted += 1
        except BlockingIOError:
            pass
        raw.sock.settimeout(10)
        bus.loop.call(lambda: None)
        assert len(seen) < 20  # the rest waits in the socket
        other = bus.plug(Loopback())
        with connected(bus, other) as second:
            assert second.write(4, b"fine") == 4
        for number in range(wanted):
            raw.wanted[1000 + number] = True
        for _ in range(min(wanted, 40)):
            _, answer = raw.receive()
            assert answer.actual == 1 << 20


def test_transfer_of_the_biggest_size_passes_both_ways(bus: Emulator) -> None:
    with connected(bus, bus.plug(Loopback())) as raw:
        data = random.Random(1).randbytes(usbip.MAX_TRANSFER)
        raw.write(1, data)
        answer = raw.wait(raw.submit(0x81, usbip.MAX_TRANSFER))
        assert answer.data == data


def test_request_may_arrive_in_any_pieces(bus: Emulator) -> None:
    plugged = bus.plug(Loopback())
    with connected(bus, plugged) as raw:
        packets = b"".join(
            usbip.Submit(100 + n, raw.devid, 0, 4, 0, n, 0, 0, 0, bytes(8)).pack() + bytes(n) for n in range(50)
        )
        choice = random.Random(7)
        while packets:
            size = choice.randrange(1, 90)
            raw.sock.sendall(packets[:size])
            packets = packets[size:]
        for n in range(50):
            raw.wanted[100 + n] = False
        assert [raw.receive()[1].actual for _ in range(50)] == list(range(50))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), operations=st.booleans())
def test_noise_on_a_connection_ends_nothing_but_the_connection(data: bytes, operations: bool) -> None:
    bus = _shared()
    plugged = bus.find("noise")
    if operations:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(bus.path)
            _send(sock, data)
    else:
        with bus.connect(plugged) as sock:
            _send(sock, struct.pack(">IIIII", 1, 5, plugged.devid, data[0] & 1 if data else 0, 4) + data)
    plugged.wait(lambda plugged: not plugged.imported)
    with connected(bus, plugged) as raw:
        assert raw.write(4, b"fine") == 4
    plugged.wait(lambda plugged: not plugged.imported)


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except OSError:
        pass


_bus: list[Emulator] = []


def _shared() -> Emulator:
    if not _bus:
        bus = Emulator()
        bus.start()
        bus.plug(Loopback(), "noise")
        _bus.append(bus)
    return _bus[0]


@pytest.fixture(scope="module", autouse=True)
def _shared_ends() -> Iterator[None]:
    yield
    for each in _bus:
        each.stop()
    _bus.clear()


def test_hundred_devices_work_beside_each_other(bus: Emulator) -> None:
    devices = [bus.plug(Thermometer(celsius=i, serial=str(i))) for i in range(100)]
    assert len({each.busid for each in devices}) == 100
    assert len({each.devid for each in devices}) == 100
    assert len(listed(bus.path)) == 100
    raws = [connected(bus, each) for each in devices]
    for i, raw in enumerate(raws):
        assert struct.unpack("<h", raw.control(0xC0, 1, data=2)) == (i * 100,)
    choice = random.Random(4)
    gone = choice.sample(range(100), 50)
    for i in gone:
        bus.unplug(devices[i])
    for i, raw in enumerate(raws):
        if i in gone:
            with pytest.raises((EOFError, ConnectionError)):
                raw.control(0xC0, 1, data=2)
        else:
            assert struct.unpack("<h", raw.control(0xC0, 1, data=2)) == (i * 100,)
        raw.sock.close()
    again = bus.plug(Thermometer())
    assert again.port == min(gone) + 1  # the first free port
    assert len(listed(bus.path)) + sum(each.imported for each in [*devices, again]) == 51


def test_more_devices_than_a_bus_has_addresses_are_on_two(bus: Emulator) -> None:
    devices = [bus.plug(Thermometer()) for _ in range(130)]
    assert devices[-1].busid == "2-4"
    for _ in range(140):  # addresses go round
        devices[0].replug()
    assert len({each.devid for each in devices}) == 130


def test_name_is_taken_once_and_free_again(bus: Emulator) -> None:
    plugged = bus.plug(Thermometer(), "t")
    with pytest.raises(UserError, match="called 't' already"):
        bus.plug(Thermometer(), "t")
    with pytest.raises(UserError, match="plugged in already"):
        bus.plug(plugged.device)
    plugged.unplug()
    plugged.unplug()
    with pytest.raises(UserError, match="called 't' already"):
        bus.plug(Thermometer(), "t")  # pulled, but its port waits for it
    bus.unplug(plugged)
    bus.plug(Thermometer(), "t")
    plugged.replug()
    assert not plugged.present  # it was forgotten: its port may be somebody else's


def test_unplug_from_many_threads_happens_once(bus: Emulator) -> None:
    plugged = bus.plug(Loopback())
    with Client(bus.path, REQUEST_WATCH) as watcher:
        watcher.line()
        threads = [threading.Thread(target=plugged.unplug) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        plugged.replug()
        assert [watcher.line()["t"], watcher.line()["t"]] == ["removed", "arrived"]


def test_device_can_pull_itself(bus: Emulator) -> None:
    plugged = bus.plug(Loopback())
    with connected(bus, plugged) as raw:
        raw.submit(0, b"", struct.pack("<BBHHH", 0x40, Request.UNPLUG, 10, 0, 0))
        assert raw.receive()[1].status == 0
        with pytest.raises((EOFError, ConnectionError)):
            raw.receive()
    plugged.wait(lambda plugged: plugged.arrival == 2)


def test_path_in_use_is_refused_and_a_stale_one_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Emulator(path), pytest.raises(OSError, match="in use"):
        Emulator(path).start()
    assert not Path(path).exists()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    with Emulator(path):
        assert listed(path) == []


def started(python: str, *arguments: str, **more: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    process = subprocess.Popen(
        [python, "-P", "-m", "udf.testing.devices", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline()) if "--control" not in arguments else {}
    return process, ready


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_process_serves_and_ends_cleanly(python: str, runtime_dir: Path, ending: signal.Signals) -> None:
    path = str(runtime_dir / "usbip.sock")
    process, ready = started(
        python, "--socket", path, "--listen", "127.0.0.1:0", "--plug", "thermometer,celsius=30,serial=A"
    )
    with process:
        assert ready["t"] == "ready"
        assert ready["socket"] == path
        (record,) = listed(tuple(ready["listen"]))
        client, status, device = imported(path, record.busid)
        with client:
            assert status == usbip.ST_OK
            assert device is not None
            assert struct.unpack("<h", Raw(client.sock, device.devid).control(0xC0, 1, data=2)) == (3000,)
            process.send_signal(ending)
            assert process.wait(15) == 0
            assert client.ended()
    assert not Path(path).exists()


def test_process_ends_with_its_control_connection(python: str, runtime_dir: Path) -> None:
    path = str(runtime_dir / "usbip.sock")
    ours, theirs = socket.socketpair()
    process, _ = started(python, "--socket", path, "--control", str(theirs.fileno()), pass_fds=[theirs.fileno()])
    theirs.close()
    with process:
        with ours, ours.makefile("rwb") as control:
            assert json.loads(control.readline()) == {"t": "ready", "socket": path, "listen": None}
            control.write(b'{"do":"plug","model":"thermometer"}\n')
            control.flush()
            assert json.loads(control.readline())["ok"]
        assert process.wait(15) == 0
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--socket", "/nonexistent/s"], "cannot serve on /nonexistent/s: No such file or directory."),
        (["--socket", "{dir}/s", "--plug", "toaster"], "There is no file and no device model 'toaster'"),
        (["--socket", "{dir}/s", "--control", "77"], "--control 77: Bad file descriptor."),
        (["--socket", "{dir}/s", "--listen", "here"], "'here' is not HOST:PORT"),
    ],
)
def test_process_that_cannot_serve_says_why(
    python: str, runtime_dir: Path, arguments: list[str], sentence: str
) -> None:
    done = subprocess.run(
        [python, "-P", "-m", "udf.testing.devices", *(each.format(dir=runtime_dir) for each in arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
