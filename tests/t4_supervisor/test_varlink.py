"""The control socket: the Varlink wire, its bounds, and who may do what."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
import varlink
from hypothesis import given, settings
from hypothesis import strategies as st
from real import AT_ONCE, PATIENCE
from varlink.scanner import Interface

from udf import __version__
from udf.errors import UserError
from udf.supervisor import control as control_module
from udf.supervisor import devicecalls, images, rights, sockets, trace
from udf.supervisor import varlink as wire
from udf.supervisor.client import INTERFACE, PROTOCOL, Connection, ControlError
from udf.supervisor.control import Control, interface_description
from udf.supervisor.crashes import CrashReport
from udf.supervisor.instance import Event, EventLog, Instance, State
from udf.supervisor.registry import MountRequest, Registry
from udf.supervisor.spawn import Identity

STRANGER = 4242


@pytest.fixture
async def registry(nursery: trio.Nursery) -> Registry:
    return Registry(EventLog(), nursery, nursery)


@pytest.fixture
async def address(tmp_path: Path, registry: Registry, nursery: trio.Nursery) -> AsyncIterator[Path]:
    listening = sockets.ControlSocket.bind(tmp_path / "control")
    scope = trio.CancelScope()

    async def serve() -> None:
        with scope:
            await Control(registry, nursery, private=False).server().serve(listening.sock)

    nursery.start_soon(serve)
    yield listening.path
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    listening.remove()


class Raw:
    """A client that sends bytes as they are."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    @classmethod
    async def connect(cls, path: Path) -> Raw:
        return cls(await trio.open_unix_socket(str(path)))

    async def send(self, method: str, **more: Any) -> None:
        await self.stream.send_all(json.dumps({"method": f"{INTERFACE}.{method}", **more}).encode() + b"\0")

    async def receive(self) -> dict[str, Any] | None:
        while b"\0" not in self._buffer:
            chunk = await self.stream.receive_some(65536)
            if not chunk:
                return None
            self._buffer += chunk
        data, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(data)  # type: ignore[no-any-return]


async def in_thread(work: Callable[[], Any]) -> Any:
    with trio.fail_after(PATIENCE):
        return await trio.to_thread.run_sync(work)


async def test_a_foreign_client_can_introspect_and_call(address: Path) -> None:
    def talk() -> tuple[Any, Any, Any, Any]:
        with varlink.Client(address=f"unix:{address}") as client, client.open(INTERFACE) as connection:
            names = client.get_interfaces()
            info = connection.Info(PROTOCOL)
            drivers = connection.Drivers()
            return names, info, drivers, connection.Status(None, None)

    names, info, drivers, status = await in_thread(talk)
    assert INTERFACE in names
    assert "org.varlink.service" in names
    assert (info["version"], info["pid"], info["private"]) == (__version__, os.getpid(), False)
    assert "hello" in [driver["name"] for driver in drivers["drivers"]]
    assert status == {"mounts": []}


async def test_a_foreign_client_gets_an_error_with_its_sentence(address: Path, tmp_path: Path) -> None:
    def talk() -> varlink.VarlinkError:
        with varlink.Client(address=f"unix:{address}") as client, client.open(INTERFACE) as connection:
            with pytest.raises(varlink.VarlinkError) as caught:
                connection.Unmount("nothing", None, None)
            return caught.value

    error = await in_thread(talk)
    assert error.error() == f"{INTERFACE}.NotFound"
    assert error.parameters()["sentence"] == "nothing is mounted by the name nothing here"


async def test_a_foreign_client_streams_events(address: Path, registry: Registry) -> None:
    def first_two() -> list[Any]:
        with varlink.Client(address=f"unix:{address}") as client, client.open(INTERFACE) as connection:
            events: list[Any] = []
            for reply in connection.Events(_more=True):
                events += reply["events"]
                if len(events) >= 2:
                    return events
                if not reply["events"]:  # it is subscribed now
                    trio.from_thread.run_sync(lambda: Instance("new", "mount", registry.events))
        return []

    Instance("old", "mount", registry.events)
    assert [event["name"] for event in await in_thread(first_two)] == ["old", "new"]


def test_the_interface_file_and_the_code_agree_on_every_name() -> None:
    interface = Interface(interface_description())

    def fields(name: str, side: str = "type") -> set[str]:
        return set(getattr(interface.members[name], side).fields)

    code = {
        "Info": control_module._Info,
        "Mount": MountRequest,
        "Unmount": control_module._Unmount,
        "Eject": control_module._Eject,
        "Status": control_module._Which,
        "Drivers": control_module._Nothing,
        "Events": control_module._Events,
        "Trace": control_module._Which,
        "Restart": control_module._Which,
        "Hung": control_module._Which,
        "Abort": control_module._Abort,
        "Crashes": control_module._Which,
        "Attach": images.AttachRequest,
        "Devices": devicecalls._Nothing,
        "Why": devicecalls._Why,
        "Plug": devicecalls._Plug,
        "Unplug": devicecalls._Name,
        "Replug": devicecalls._Name,
        "Faults": devicecalls._Faults,
    }
    methods = {name for name, member in interface.members.items() if hasattr(member, "in_type")}
    assert methods == set(code)
    for name, struct in code.items():
        assert fields(name, "in_type") == {field.encode_name for field in msgspec.structs.fields(struct)}, name
    assert fields("Event") == {field.encode_name for field in msgspec.structs.fields(Event)}
    assert fields("Operation") == {field.encode_name for field in msgspec.structs.fields(trace.Operation)}
    report = {field.encode_name for field in msgspec.structs.fields(CrashReport)}
    assert fields("CrashReport") == {"name", "mountpoint", *report}
    description = interface_description()
    for state in State:
        assert str(state) in description
    # Each method and each error says what it does.
    lines = description.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("method ", "error ", "type ")):
            assert lines[number - 1].startswith("#"), line


def test_every_error_of_the_interface_is_in_the_table_and_carries_its_sentence() -> None:
    made = [
        control_module.as_varlink(control_module.StartFailedError("a", ["b"])),
        control_module.as_varlink(control_module.BusyError("/m", "a")),
        control_module.as_varlink(rights.DeniedError("a")),
        control_module.as_varlink(control_module.NotFoundError("a")),
        control_module.as_varlink(UserError("a")),
    ]
    interface = Interface(interface_description())
    for error in made:
        name = error.name.rpartition(".")[2]
        assert set(interface.members[name].type.fields) == set(error.parameters), name
        assert error.parameters["sentence"] == "a"
    assert [error.name.rpartition(".")[2] for error in made] == ["Failed", "Busy", "Denied", "NotFound", "Refused"]


def test_a_mistake_of_ours_is_logged_and_told_as_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    error = control_module.as_varlink(ZeroDivisionError("x"))
    assert error.name == f"{INTERFACE}.Failed"
    assert "ZeroDivisionError" in error.parameters["sentence"]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("org.varlink.service.Nothing", {}, "org.varlink.service.MethodNotFound"),
        (f"{INTERFACE}.Nothing", {}, "org.varlink.service.MethodNotFound"),
        ("com.example.Nothing", {}, "org.varlink.service.InterfaceNotFound"),
        ("", {}, "org.varlink.service.InterfaceNotFound"),
        ("org.varlink.service.GetInterfaceDescription", {"interface": "a.b"}, "org.varlink.service.InterfaceNotFound"),
        (f"{INTERFACE}.Unmount", {"name": 1}, "org.varlink.service.InvalidParameter"),
        (f"{INTERFACE}.Unmount", {"nome": "x"}, "org.varlink.service.InvalidParameter"),
        (f"{INTERFACE}.Unmount", [], "org.varlink.service.InvalidParameter"),
        (f"{INTERFACE}.Mount", {"driver": "hello"}, "org.varlink.service.InvalidParameter"),
        (f"{INTERFACE}.Info", {"protocol": 99}, f"{INTERFACE}.VersionMismatch"),
        (f"{INTERFACE}.Trace", {"name": "x"}, f"{INTERFACE}.NotFound"),
        (f"{INTERFACE}.Status", {"name": "x"}, f"{INTERFACE}.NotFound"),
        (f"{INTERFACE}.Unmount", {}, f"{INTERFACE}.Refused"),
        (f"{INTERFACE}.Mount", {"mountpoint": "/tmp"}, f"{INTERFACE}.Refused"),
        (f"{INTERFACE}.Mount", {"mountpoint": "tmp", "driver": "hello"}, f"{INTERFACE}.Refused"),
        (f"{INTERFACE}.Mount", {"mountpoint": "/tmp\0", "driver": "hello"}, f"{INTERFACE}.Refused"),
        (f"{INTERFACE}.Mount", {"mountpoint": "/tmp", "driver": "none such"}, f"{INTERFACE}.Refused"),
        (f"{INTERFACE}.Mount", {"mountpoint": "/tmp", "driver": "x", "exec": "y"}, f"{INTERFACE}.Refused"),
        (f"{INTERFACE}.Mount", {"mountpoint": "/tmp", "exec": "sshfs"}, f"{INTERFACE}.Refused"),
        (
            f"{INTERFACE}.Mount",
            {"mountpoint": "/tmp", "exec": "x", "options": {"a": "b" * 40000}},
            f"{INTERFACE}.Refused",
        ),
        (f"{INTERFACE}.Mount", {"mountpoint": "/tmp", "exec": "a '{mountpoint}"}, f"{INTERFACE}.Refused"),
    ],
)
async def test_a_bad_call_gets_its_error_and_the_connection_goes_on(
    address: Path, method: str, parameters: object, error: str
) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        await client.stream.send_all(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")
        reply = await client.receive()
        assert reply is not None
        assert reply["error"] == error
        await client.send("Info")
        assert (await client.receive() or {})["parameters"]["pid"] == os.getpid()


async def test_a_call_in_pieces_and_several_in_one_piece_are_answered_in_order(address: Path) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        call = json.dumps({"method": f"{INTERFACE}.Info"}).encode() + b"\0"
        for number in range(len(call)):
            await client.stream.send_all(call[number : number + 1])
        assert "parameters" in (await client.receive() or {})
        other = json.dumps({"method": f"{INTERFACE}.Status", "parameters": {"name": "x"}}).encode() + b"\0"
        await client.stream.send_all(call + other + call)
        assert ["error" in (await client.receive() or {}) for _ in range(3)] == [False, True, False]


async def test_a_oneway_call_is_carried_out_and_not_answered(address: Path) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        await client.send("Status", parameters={"name": "x"}, oneway=True)
        await client.send("Info")
        assert "version" in (await client.receive() or {})["parameters"]


async def test_null_parameters_are_no_parameters(address: Path) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        await client.send("Info", parameters=None)
        assert "version" in (await client.receive() or {})["parameters"]


async def test_an_upgrade_is_refused(address: Path) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        await client.send("Info", upgrade=True)
        assert (await client.receive() or {})["error"] == "org.varlink.service.InvalidParameter"


@pytest.mark.parametrize("size", [wire.MAX_MESSAGE + 1, 8 * wire.MAX_MESSAGE])
async def test_a_message_that_is_too_large_is_cut_off(address: Path, size: int) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        with trio.fail_after(PATIENCE):
            try:
                await client.stream.send_all(b"x" * size)
                assert (await client.receive() or {})["error"] == f"{INTERFACE}.TooMany"
                assert await client.receive() is None
            except trio.BrokenResourceError:
                pass  # it did not listen to the end


async def test_the_largest_message_is_still_read(address: Path) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        call = json.dumps({"method": f"{INTERFACE}.Status", "parameters": {"name": ""}}).encode()
        call = call.replace(b'""', b'"' + b"x" * (wire.MAX_MESSAGE - len(call)) + b'"')
        await client.stream.send_all(call + b"\0")
        assert (await client.receive() or {})["error"] == f"{INTERFACE}.NotFound"


async def test_too_many_calls_ahead_are_cut_off(address: Path) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        await client.send("Events", more=True)
        for _ in range(wire.MAX_WAITING + 1):
            await client.send("Info")
        errors = []
        with trio.fail_after(PATIENCE):
            while reply := await client.receive():
                errors.append(reply.get("error"))
        assert f"{INTERFACE}.TooMany" in errors


async def test_what_is_not_varlink_ends_the_connection(address: Path) -> None:
    for data in (b"GET / HTTP/1.1\r\n\r\n\0", b"[]\0", b'{"method": 1}\0', b"\0", b"\xff\0"):
        client = await Raw.connect(address)
        async with client.stream:
            await client.stream.send_all(data)
            with trio.fail_after(PATIENCE):
                assert await client.receive() is None


async def test_a_client_that_reads_nothing_does_not_keep_others_waiting(
    address: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "SEND_TIMEOUT", 0.5)
    slow = await Raw.connect(address)
    async with slow.stream:
        await slow.send("Events", more=True)
        assert await slow.receive() == {"parameters": {"events": [], "lost": 0}, "continues": True}
        instance = Instance("noisy", "driver", registry.events)
        with trio.fail_after(PATIENCE):
            while registry.events._subscribers:  # until it is cut off
                for _ in range(200):
                    instance.fault("READ", "x" * 900)
                other = await Raw.connect(address)
                async with other.stream:
                    with trio.fail_after(AT_ONCE):
                        await other.send("Info")
                        assert "parameters" in (await other.receive() or {})
                await trio.sleep(0.05)


async def test_a_slow_client_is_told_how_many_events_it_missed(address: Path, registry: Registry) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        await client.send("Events", more=True)
        await client.receive()
        instance = Instance("noisy", "driver", registry.events)
        for _ in range(control_module.MAX_EVENT_QUEUE + 9):  # without letting the server send in between
            instance.fault("READ", "x")
        told = lost = 0
        with trio.fail_after(PATIENCE):
            while told < control_module.MAX_EVENT_QUEUE:
                reply = await client.receive()
                assert reply is not None
                told += len(reply["parameters"]["events"])
                lost += reply["parameters"]["lost"]
        assert lost == 10


async def test_a_stream_ends_with_its_client(address: Path, registry: Registry) -> None:
    client = await Raw.connect(address)
    await client.send("Events", more=True)
    await client.receive()
    assert registry.events._subscribers
    await client.stream.aclose()
    with trio.fail_after(PATIENCE):
        while registry.events._subscribers:
            await trio.sleep(0.01)


async def test_a_client_that_closes_its_sending_side_still_gets_its_answer(address: Path) -> None:
    client = await Raw.connect(address)
    async with client.stream:
        await client.send("Info")
        client.stream.socket.shutdown(socket.SHUT_WR)
        with trio.fail_after(PATIENCE):
            assert "parameters" in (await client.receive() or {})
            assert await client.receive() is None


async def test_connections_are_bounded(address: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_CONNECTIONS", 3)
    clients = [await Raw.connect(address) for _ in range(3)]
    for client in clients:
        await client.send("Info")
        assert "parameters" in (await client.receive() or {})
    fourth = await Raw.connect(address)
    assert "too many connections" in (await fourth.receive() or {})["parameters"]["sentence"]
    await clients[0].stream.aclose()
    await trio.testing.wait_all_tasks_blocked(0.05)
    fifth = await Raw.connect(address)
    await fifth.send("Info")
    assert "parameters" in (await fifth.receive() or {})
    for client in (*clients, fourth, fifth):
        await client.stream.aclose()


async def test_the_peer_is_who_the_kernel_says(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with left, right:
        peer = wire.Peer.of(left)
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert peer.identity.gid == os.getegid()


def test_rights_follow_the_callers_user() -> None:
    root, own = Identity(0, 0), Identity(os.geteuid(), os.getegid())
    stranger, other = Identity(STRANGER, STRANGER), Identity(STRANGER + 1, STRANGER + 1)
    assert rights.is_trusted(root)
    assert rights.is_trusted(own)
    assert not rights.is_trusted(stranger)
    assert rights.may_touch(root, stranger)
    assert rights.may_touch(stranger, stranger)
    assert not rights.may_touch(stranger, other)
    assert not rights.may_touch(stranger, own)
    rights.check_driver(stranger, "hello")
    rights.check_driver(root, "/x/hello.py")
    with pytest.raises(rights.DeniedError, match="from a path"):
        rights.check_driver(stranger, "/x/hello.py")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ({"driver": "/tmp/evil.py"}, "Denied", "from a path"),
        ({"driver": "hello", "options": {"suid": ""}}, "Denied", "only root may mount with suid"),
        ({"driver": "hello", "options": {"dev": ""}}, "Denied", "only root may mount with suid or dev"),
        ({"driver": "hello"}, "Refused", "you may not mount on"),
    ],
)
async def test_another_user_is_refused_what_is_not_his(
    address: Path, tmp_path: Path, parameters: dict[str, Any], error: str, words: str
) -> None:
    for directory in (tmp_path, *tmp_path.parents[:3]):
        if str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    address.chmod(0o666)  # as an administrator would open it
    target = tmp_path / "mnt"
    target.mkdir()
    read_end, write_end = os.pipe()
    call = {"method": f"{INTERFACE}.Mount", "parameters": {"mountpoint": str(target), **parameters}}

    def as_stranger() -> None:
        os.setgroups([])
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(address))
            sock.sendall(json.dumps(call).encode() + b"\0")
            answer = b""
            while not answer.endswith(b"\0"):
                answer += sock.recv(65536) or b"\0"
        os.write(write_end, answer)

    pid = os.fork()
    if pid == 0:
        try:
            as_stranger()
        finally:
            os._exit(0)
    os.close(write_end)
    with trio.fail_after(PATIENCE):
        answer = await trio.to_thread.run_sync(os.read, read_end, 65536)
        await trio.to_thread.run_sync(os.waitpid, pid, 0)
    os.close(read_end)
    reply = json.loads(answer.rstrip(b"\0"))
    assert reply["error"] == f"{INTERFACE}.{error}"
    if "may not run" in reply["parameters"]["sentence"]:
        pytest.skip("this interpreter lies where other users cannot run it")
    assert words in reply["parameters"]["sentence"]


async def test_our_client_speaks_with_our_server(address: Path) -> None:
    def talk() -> None:
        with Connection(address) as connection:
            assert connection.info["version"] == __version__
            assert connection.call("Status") == {"mounts": []}
            stream = connection.stream("Events")
            assert next(stream) == {"events": [], "lost": 0}
        with Connection(address) as connection:
            with pytest.raises(ControlError) as caught:
                connection.call("Unmount", mountpoint="/x")
            assert caught.value.name == "NotFound"
            assert str(caught.value) == "nothing is mounted on /x here"
            with pytest.raises(UserError, match="not UTF-8"):
                connection.call("Mount", driver="hello", mountpoint="/\udc80")
            with pytest.raises(ControlError, match="MethodNotFound Replace") as caught:
                connection.call("Replace")

    await in_thread(talk)


async def test_a_client_of_another_version_gets_one_sentence(address: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udf.supervisor.client.PROTOCOL", 2)

    def talk() -> None:
        with pytest.raises(ControlError, match="speaks control protocol 1 and the client 2") as caught:
            Connection(address)
        assert caught.value.name == "VersionMismatch"

    await in_thread(talk)


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.binary(max_size=80) | st.just(b'{"method":"io.udf.Supervisor.Info"}'), max_size=6))
def test_no_bytes_at_all_stop_the_server(data: list[bytes]) -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        async with trio.open_nursery() as nursery:
            registry = Registry(EventLog(), nursery, nursery)
            server = Control(registry, nursery, private=False).server()
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(left))
            client = Raw(trio.SocketStream(trio.socket.from_stdlib_socket(right)))
            nursery.start_soon(server._handle, stream)
            with trio.fail_after(PATIENCE):
                try:
                    await client.stream.send_all(b"\0".join(data))
                    client.stream.socket.shutdown(socket.SHUT_WR)
                    while await client.receive() is not None:
                        pass
                except trio.BrokenResourceError:
                    pass
            await client.stream.aclose()

    trio.run(main)
