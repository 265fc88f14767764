"""The supervisor's private wire: what does not belong there is refused, and nothing is too large."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udf import messages
from udf.errors import ContractError, InternalError

DECODERS = {
    messages.ToShim: messages.decode_to_shim,
    messages.FromShim: messages.decode_from_shim,
    messages.ToHost: messages.decode_to_host,
    messages.FromHost: messages.decode_from_host,
    messages.FromAnchor: messages.decode_from_anchor,
}
SAMPLES: dict[type, dict[str, Any]] = {
    messages.Mount: {"mountpoint": "/mnt", "name": "x", "driver": "hello", "fsname": "x"},
    messages.AskCounters: {"id": 1},
    messages.Trace: {"on": True},
    messages.Attach: {"generation": 2},
    messages.AskRequests: {"id": 1},
    messages.Abort: {"request": 7},
    messages.Serve: {"name": "disk0", "driver": "usb_storage"},
    messages.Serving: {"exports": [messages.Export(name="disk", unit="", offset=0, size=512, block_size=512)]},
    messages.ShimFailed: {"error": "x"},
    messages.Attached: {"generation": 2},
    messages.Refused: {"generation": 2, "error": "x"},
    messages.Overdue: {"op": "READ", "age": 30.5},
    messages.Poison: {"op": "LOOKUP", "path": "/x"},
    messages.Requests: {"id": 1, "total": 1, "requests": [messages.WaitingRequest(id=2, op="READ", age=1.5, pid=3)]},
    messages.StateChange: {"state": "ACTIVE", "reason": "started"},
    messages.ShimFault: {"op": "READ", "error": "x"},
    messages.Counters: {"id": 1, "counters": {"hits": 3, "ratio": 0.5}},
    messages.Start: {
        "name": "x",
        "driver": messages.DriverSpec(path="/x.py", class_name="X"),
        "sandbox": messages.Sandbox(uid=1, gid=2),
        "options": {"a": True, "b": 1, "c": 0.5, "d": "text"},
        "device": messages.DeviceSpec(bus="usbip", key="1", busnum=1, devnum=2),
    },
    messages.Started: {"pid": 1},
    messages.Tree: {"private": True},
    messages.Ended: {"status": -9, "max_rss": 20_000},
    messages.HostFailed: {"error": "x"},
    messages.HostHeartbeat: {"loop_age": 0.5},
    messages.HostFault: {"op": "read", "error": "x"},
}
PAIRS = [(cls, decode) for union, decode in DECODERS.items() for cls in get_args(union)]


@pytest.mark.parametrize(("cls", "decode"), PAIRS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_message_comes_out_as_it_went_in(cls: Any, decode: Any) -> None:
    message = cls(**SAMPLES.get(cls, {}))
    assert decode(messages.encode(message)) == message
    assert "t" in json.loads(messages.encode(message)), "the shim reads it with json"


def test_a_class_is_called_class_on_the_wire() -> None:
    start = messages.Start(**SAMPLES[messages.Start])
    assert json.loads(messages.encode(start))["driver"]["class"] == "X"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"7", b"\xff", b'{"t":"unknown"}', b'{"t":"started"}', b'{"t":"started","pid":"7"}']
)
def test_what_is_no_message_is_a_contract_error(data: bytes) -> None:
    with pytest.raises(ContractError):
        messages.decode_from_host(data)


def test_bounds_hold_in_both_directions() -> None:
    with pytest.raises(InternalError):
        messages.encode(messages.HostFailed(error="x" * messages.MAX_MESSAGE))
    with pytest.raises(ContractError):
        messages.decode_from_host(b" " * messages.MAX_MESSAGE + b'{"t":"heartbeat","loop_age":0}')


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_contract_error(data: bytes) -> None:
    for decode in DECODERS.values():
        try:
            decode(data)
        except ContractError:
            continue
