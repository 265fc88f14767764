"""The channel to shims and hosts: framing, bounds, descriptors, and anything at all as input."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from udf import messages
from udf.errors import ContractError
from udf.supervisor import channel as channel_module
from udf.supervisor import spawn
from udf.supervisor.channel import Channel, ChannelClosedError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
TAGS = ["mounted", "failed", "busy", "unmounted", "link_lost", "state", "fault", "counters", "heartbeat", "started"]
KEYS = ["t", "pid", "error", "errno", "id", "counters", "loop_age", "op", "traceback", "state", "services"]
ALMOST = st.builds(
    lambda tag, rest: json.dumps({**rest, "t": tag}).encode(),
    st.sampled_from(TAGS),
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5),
)


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Channel[messages.FromShim], socket.socket]]:
    ours, theirs = spawn.control_pair()
    with theirs:
        channel = Channel(ours, messages.decode_from_shim, "shim x")
        yield channel, theirs
        channel.close()


def send_fds(sock: socket.socket, data: bytes, count: int) -> None:
    with open(os.devnull) as null:
        fds = array.array("i", [null.fileno()] * count)
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


async def test_a_message_arrives_with_its_descriptor(pair: tuple[Channel[messages.FromShim], socket.socket]) -> None:
    channel, theirs = pair
    send_fds(theirs, b'{"t":"mounted"}', 1)
    message, fds = await channel.receive()
    assert isinstance(message, messages.Mounted)
    assert len(fds) == 1
    assert not os.get_inheritable(fds[0])
    os.close(fds[0])


@pytest.mark.parametrize(("data", "count"), [(b'{"t":"mounted"}', 3), (b'{"t":"busy"}', 1), (b"nonsense", 2)])
async def test_descriptors_that_nobody_asked_for_are_closed(
    pair: tuple[Channel[messages.FromShim], socket.socket], data: bytes, count: int
) -> None:
    channel, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    send_fds(theirs, data, count)
    expected = 0
    try:
        _, fds = await channel.receive()
        expected = len(fds)
        assert len(os.listdir("/proc/self/fd")) == before + expected
        for fd in fds:
            os.close(fd)
    except ContractError:
        pass
    assert len(os.listdir("/proc/self/fd")) == before


async def test_more_descriptors_than_any_message_has_break_the_contract(
    pair: tuple[Channel[messages.FromShim], socket.socket],
) -> None:
    channel, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    send_fds(theirs, b'{"t":"mounted"}', 40)
    with pytest.raises(ContractError, match="too large"):
        await channel.receive()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_mounted_without_its_descriptor_breaks_the_contract(
    pair: tuple[Channel[messages.FromShim], socket.socket],
) -> None:
    channel, theirs = pair
    theirs.send(b'{"t":"mounted"}')
    with pytest.raises(ContractError, match="without its descriptor"):
        await channel.receive()


async def test_a_message_that_is_too_large_breaks_the_contract(
    pair: tuple[Channel[messages.FromShim], socket.socket],
) -> None:
    channel, theirs = pair
    theirs.send(b'{"t":"failed","error":"' + b"x" * messages.MAX_MESSAGE + b'"}')
    with pytest.raises(ContractError):
        await channel.receive()


async def test_the_end_of_the_peer_is_the_end_of_the_channel(
    pair: tuple[Channel[messages.FromShim], socket.socket],
) -> None:
    channel, theirs = pair
    theirs.send(b'{"t":"busy"}')
    theirs.close()
    assert isinstance((await channel.receive())[0], messages.Busy)
    with pytest.raises(ChannelClosedError):
        await channel.receive()
    with pytest.raises(ChannelClosedError):
        await channel.send(messages.Unmount())


async def test_closing_wakes_the_receiver(pair: tuple[Channel[messages.FromShim], socket.socket]) -> None:
    channel, _ = pair
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            with pytest.raises(ChannelClosedError):
                await channel.receive()

        await trio.testing.wait_all_tasks_blocked()
        channel.close()


async def test_a_flood_of_messages_breaks_the_contract(
    pair: tuple[Channel[messages.FromShim], socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    channel, theirs = pair

    async def flood() -> None:
        for _ in range(channel_module.MAX_RATE + 1):
            theirs.send(b'{"t":"heartbeat"}')
            await channel.receive()

    with pytest.raises(ContractError, match="in a second"):
        await flood()


async def test_a_peer_that_takes_nothing_is_as_good_as_closed(
    pair: tuple[Channel[messages.FromShim], socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    channel, _ = pair

    async def fill() -> None:
        for _ in range(10_000):
            await channel.send(messages.Unmount())

    with pytest.raises(ChannelClosedError, match="takes no messages"):
        await fill()


@given(data=st.binary(min_size=1, max_size=300) | ALMOST)
@pytest.mark.parametrize("decode", [messages.decode_from_shim, messages.decode_from_host])
def test_whatever_a_peer_sends_is_a_message_or_breaks_the_contract(decode: object, data: bytes) -> None:
    async def receive() -> None:
        ours, theirs = spawn.control_pair()
        with theirs:
            channel = Channel(ours, decode, "peer")  # type: ignore[arg-type]
            try:
                send_fds(theirs, data, 1)
                message, fds = await channel.receive()
            except ContractError:
                return
            finally:
                channel.close()
        assert isinstance(message, messages.Message)
        for fd in fds:
            os.close(fd)

    before = len(os.listdir("/proc/self/fd"))
    trio.run(receive)
    assert len(os.listdir("/proc/self/fd")) == before
