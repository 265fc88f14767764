"""Whatever a host sends to a stick: it answers, stays in its image, and works again after reset recovery."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.t1_devices.bot import EPIPE, INQUIRY, cbw, good, reset_recovery
from tests.t1_devices.raw import Raw, connected
from udf.testing.devices import Emulator, Plugged
from udf.testing.devices.scsi import _COMMANDS
from udf.testing.devices.storage import Storage


@pytest.fixture(scope="module")
def stick() -> Iterator[tuple[Emulator, Plugged]]:
    with Emulator() as bus:
        yield bus, bus.plug(Storage(size=1 << 20, cache=65536, bad="77", luns=[""]))


@pytest.fixture
def raw(stick: tuple[Emulator, Plugged]) -> Iterator[Raw]:
    bus, plugged = stick
    with connected(bus, plugged) as raw:
        yield raw
    plugged.wait(lambda plugged: not plugged.imported)


MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Real commands with random fields find more than random bytes, which are refused by their first one.
CDB = st.one_of(
    st.binary(min_size=1, max_size=16),
    st.builds(lambda code, rest: bytes((code,)) + rest, st.sampled_from(sorted(_COMMANDS)), st.binary(max_size=15)),
    st.builds(
        lambda code, lba, count: bytes((code, 0, 0, 0)) + lba.to_bytes(2, "big") + bytes(2) + bytes((count, 0)),
        st.sampled_from(sorted(_COMMANDS)), st.integers(0, 3000), st.integers(0, 9),
    ),
)  # fmt: skip


@MANY
@given(cdb=CDB, length=st.integers(0, 8192), reads=st.booleans(), lun=st.integers(0, 3), data=st.binary(max_size=64))
def test_any_command_is_answered_or_stalled(
    raw: Raw, caplog: pytest.LogCaptureFixture, cdb: bytes, length: int, reads: bool, lun: int, data: bytes
) -> None:
    raw.write(2, cbw(cdb, length, reads=reads, lun=lun))
    if length:
        payload = (data * (length // max(len(data), 1) + 1))[:length].ljust(length, b"\0")
        answer = raw.wait(raw.submit(0x81, length) if reads else raw.submit(2, payload))
        assert answer.status in (0, EPIPE)
        if answer.status == EPIPE:
            raw.clear_halt(0x81 if reads else 2)
    answer = raw.wait(raw.submit(0x81, 13))
    if answer.status == EPIPE:
        raw.clear_halt(0x81)
        answer = raw.wait(raw.submit(0x81, 13))
    assert (answer.status, answer.data[:8]) == (0, b"USBS\x07\0\0\0")
    assert int.from_bytes(answer.data[8:12], "little") <= length
    assert answer.data[12] in (0, 1, 2)
    assert good(raw, INQUIRY, 36)[8:11] == b"UDF"
    assert "a handler failed" not in caplog.text


@MANY
@given(parts=st.lists(st.binary(max_size=600), min_size=1, max_size=4))
def test_any_bytes_are_survived_by_reset_recovery(
    raw: Raw, caplog: pytest.LogCaptureFixture, parts: list[bytes]
) -> None:
    waiting = [raw.submit(2, part) for part in parts] + [raw.submit(0x81, 512)]
    for each in waiting:
        raw.unlink(each)
    reset_recovery(raw)
    with contextlib.suppress(AssertionError):  # a unit attention after what may have been a command
        good(raw, INQUIRY, 36)
    assert good(raw, INQUIRY, 36)[8:11] == b"UDF"
    assert "a handler failed" not in caplog.text


def test_every_command_of_the_table_has_a_description() -> None:
    assert all(handler.__doc__ for handler in _COMMANDS.values())
