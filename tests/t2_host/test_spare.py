"""A spare: ready as far as that goes, without having touched its source."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_for_end
from tests.t2_host.peer import REPO, Host
from tests.t2_host.peer import host as make_host
from tests.t2_host.test_authority import needs_root
from udf import messages


@pytest.fixture(params=[False, True], ids=["executed", "forked"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(Host, "forked", request.param)
    with make_host() as peer:
        yield peer


def open_files(pid: int) -> list[str]:
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return found


def spare(host: Host, path: Path | str = "", class_name: str | None = None, **fields: object) -> int:
    """Start a spare and wait until it is warm; the pid of the driver's process."""
    host.start(path, class_name, spare=True, **fields)
    assert isinstance(host.wait_for(messages.Warm), messages.Warm)
    return host.driver_pid()


def test_a_spare_makes_its_driver_only_when_its_turn_comes(host: Host, drivers: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pid = spare(host, drivers / "odd_starts.py", "LeavesAMark", source=str(source))
    host.wait_for(messages.HostHeartbeat)
    assert not list(source.iterdir())
    assert not any(name.startswith(str(tmp_path)) for name in open_files(pid))
    host.give_link(messages.TakeOver())
    host.ready()
    assert [path.name for path in source.iterdir()] == ["mark"]
    assert str(source) in open_files(pid)
    host.link.init()
    node = host.link.lookup("file")["nodeid"]
    assert host.link.read(node, host.link.open(node)) == b"text"


@pytest.mark.parametrize(
    ("path", "class_name", "name"),
    [("fs/passthrough/__init__.py", "Passthrough", "file"), ("fs/hello.py", "Hello", "hello.txt")],
)
def test_our_own_drivers_take_over(host: Host, tmp_path: Path, path: str, class_name: str, name: str) -> None:
    (tmp_path / "file").write_bytes(b"what is there")
    source = {"source": str(tmp_path)} if class_name == "Passthrough" else {}
    spare(host, REPO / path, class_name, sandbox={"keep_paths": [str(REPO), str(tmp_path)]}, **source)
    host.give_link(messages.TakeOver())
    host.ready()
    host.link.init()
    node = host.link.lookup(name)["nodeid"]
    assert host.link.read(node, host.link.open(node))


def test_a_driver_that_cannot_be_made_says_so_at_its_turn(host: Host, drivers: Path) -> None:
    spare(host, drivers / "odd_starts.py", "RaisesAtStart")
    host.give_link(messages.TakeOver())
    assert "ValueError: no such thing as this" in host.wait_for(messages.HostFailed).error
    assert host.wait() == 1


def test_a_driver_that_cannot_be_loaded_says_so_at_once(host: Host, drivers: Path) -> None:
    host.start(drivers / "odd_starts.py", "Missing", spare=True)
    assert "there is no class Missing" in host.wait_for(messages.HostFailed).error


def test_a_spare_that_is_not_needed_ends(host: Host, drivers: Path) -> None:
    spare(host, drivers / "odd_starts.py", "Plain")
    host.control.send(messages.encode(messages.Stop()))
    assert host.wait() == 0


def test_a_spare_does_not_outlive_its_supervisor(host: Host, drivers: Path) -> None:
    pid = spare(host, drivers / "odd_starts.py", "Plain")
    host.control.close()
    host.wait()
    wait_for_end(pid)


def test_a_spare_that_is_killed_ends_with_all_it_has(host: Host, drivers: Path) -> None:
    os.kill(spare(host, drivers / "odd_starts.py", "Plain"), signal.SIGKILL)
    assert host.wait() == -signal.SIGKILL


def test_a_take_over_without_a_link_is_none(host: Host, drivers: Path) -> None:
    spare(host, drivers / "odd_starts.py", "Plain")
    host.control.send(messages.encode(messages.TakeOver()))
    host.wait_for(messages.HostHeartbeat)
    host.give_link(messages.TakeOver())
    host.ready()


@needs_root
@pytest.mark.parametrize("namespaces", [True, False])
def test_a_foreign_program_is_executed_only_when_its_turn_comes(host: Host, tmp_path: Path, namespaces: bool) -> None:
    for program in ("squashfuse_ll", "mksquashfs"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"what is there")
    image = tmp_path / "image"
    subprocess.run(["mksquashfs", str(tmp_path / "tree"), str(image)], check=True, capture_output=True)
    pid = spare(
        host,
        command="squashfuse_ll -f {source} {mountpoint}",
        source=str(image),
        sandbox={"keep_paths": [str(tmp_path)], "namespaces": namespaces},
    )
    assert "squashfuse" not in os.readlink(f"/proc/{pid}/exe")
    assert str(image) not in open_files(pid)
    host.wait_for(messages.HostHeartbeat)
    host.give_link(messages.TakeOver())
    host.ready()
    host.link.init()
    assert "squashfuse" in os.readlink(f"/proc/{pid}/exe")
    node = host.link.lookup("file")["nodeid"]
    assert host.link.read(node, host.link.open(node)) == b"what is there"


@needs_root
def test_a_foreign_spare_ends_when_it_is_not_needed_or_is_killed(tmp_path: Path) -> None:
    for end in ("stop", "kill", "hang up"):
        with make_host() as host:
            pid = spare(host, command="sleep {mountpoint}")
            if end == "kill":
                os.kill(pid, signal.SIGKILL)
            elif end == "stop":
                host.control.send(messages.encode(messages.Stop()))
            else:
                host.control.close()
            host.wait()
            wait_for_end(pid)
