"""The standard requests of USB 2.0 chapter 9.4, as every device answers them.

Owns: this table of requests. Must never: call a handler for what the specification settles. Called by: device.py.
What is not defined for a recipient goes to the model's on_control, which stalls by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from udf.testing.devices.layout import CONFIGURATION, DEVICE, OTHER_SPEED, QUALIFIER, STRING
from udf.testing.devices.transfers import Setup, Stall
from udf.usb.usbip import Speed

if TYPE_CHECKING:
    from udf.testing.devices.device import Device
    from udf.testing.devices.engine import Engine

GET_STATUS, CLEAR_FEATURE, SET_FEATURE, SET_ADDRESS = 0, 1, 3, 5
GET_DESCRIPTOR, SET_DESCRIPTOR, GET_CONFIGURATION, SET_CONFIGURATION = 6, 7, 8, 9
GET_INTERFACE, SET_INTERFACE, SYNCH_FRAME = 10, 11, 12
ENDPOINT_HALT, REMOTE_WAKEUP = 0, 1
BOS = 15
# What the kernel's USB/IP server takes for "reset this device's port" (stub_rx.c): a request to the hub's port.
RESET_TYPE, PORT_RESET = 0x23, 4


def is_reset(setup: Setup) -> bool:
    """Whether it is no request to the device, but to the port that it is in."""
    return setup.request_type == RESET_TYPE and setup.request == SET_FEATURE and setup.value == PORT_RESET


def reset(device: Device, engine: Engine) -> None:
    """A reset of the port, and what hosts do after it: the configuration and the settings are chosen again."""
    configuration, alternates = engine.configuration, list(engine.alternates)
    engine.configure(None)
    device.on_reset()
    if configuration is not None:
        engine.configure(configuration)
        device.on_configured(configuration.value)
        for number, alternate in enumerate(alternates):
            if alternate and engine.set_alternate(number, alternate):
                device.on_alternate(number, alternate)


def answer(device: Device, engine: Engine, setup: Setup, data: bytes) -> bytes | None:
    """The reply of an IN request, or Stall."""
    handler = _TABLE.get((setup.request_type & 0x9F, setup.request))
    if handler is None:
        return device.on_control(setup, data)
    return handler(device, engine, setup)


def _device_status(_device: Device, engine: Engine, _setup: Setup) -> bytes:
    current = engine.configuration
    return bytes((bool(current and current.self_powered) | engine.remote_wakeup << 1, 0))


def _interface_status(_device: Device, engine: Engine, setup: Setup) -> bytes:
    _interface(engine, setup)
    return b"\0\0"


def _endpoint_status(_device: Device, engine: Engine, setup: Setup) -> bytes:
    if not setup.index & 0x7F:
        return b"\0\0"
    pipe = engine.pipes.get(setup.index)
    if pipe is None:
        raise Stall
    return bytes((pipe.halted, 0))


def _device_feature(_device: Device, engine: Engine, setup: Setup) -> None:
    if setup.value != REMOTE_WAKEUP:
        raise Stall
    engine.remote_wakeup = setup.request == SET_FEATURE


def _clear_halt(device: Device, engine: Engine, setup: Setup) -> None:
    if setup.value != ENDPOINT_HALT or not engine.clear_halt(setup.index):
        raise Stall
    device.on_clear_halt(setup.index)


def _set_halt(_device: Device, engine: Engine, setup: Setup) -> None:
    if setup.value != ENDPOINT_HALT or setup.index not in engine.pipes:
        raise Stall
    engine.halt(setup.index, False)


def _accept(_device: Device, _engine: Engine, _setup: Setup) -> None:
    """SET_ADDRESS: the address is the host controller's matter, and over USB/IP nobody's."""


def _descriptor(device: Device, engine: Engine, setup: Setup) -> bytes:
    kind, index = setup.value >> 8, setup.value & 0xFF
    data: bytes | None = None
    if kind == DEVICE:
        data = device.device_descriptor()
    elif kind == CONFIGURATION:
        data = device.configuration_descriptor(index)
    elif kind == STRING:
        data = device.string_descriptor(index, setup.index)
    elif kind == QUALIFIER and device.speed is Speed.HIGH:
        whole = device.device_descriptor()
        data = bytes((10, QUALIFIER)) + whole[2:8] + whole[17:18] + b"\0"
    elif kind == OTHER_SPEED and device.speed is Speed.HIGH:
        whole = device.configuration_descriptor(index) or b""
        data = whole[:1] + bytes((OTHER_SPEED,)) + whole[2:] if whole else None
    elif kind == BOS and device.speed >= Speed.SUPER:
        capability = bytes((10, 16, 3, 0, 0x0E, 0, 1, 10, 0, 0))
        data = bytes((5, BOS, 5 + len(capability), 0, 1)) + capability
    if data is None:
        reply = device.on_control(setup, b"")
        return reply or b""
    return data


def _get_configuration(device: Device, _engine: Engine, _setup: Setup) -> bytes:
    return bytes((device.configuration,))


def _set_configuration(device: Device, engine: Engine, setup: Setup) -> None:
    value = setup.value & 0xFF
    chosen = next((each for each in device.configurations if each.value == value), None) if value else None
    if value and chosen is None:
        raise Stall
    engine.configure(chosen)
    device.on_configured(value)


def _get_interface(_device: Device, engine: Engine, setup: Setup) -> bytes:
    return bytes((engine.alternates[_interface(engine, setup)],))


def _set_interface(device: Device, engine: Engine, setup: Setup) -> None:
    if not engine.set_alternate(_interface(engine, setup), setup.value):
        raise Stall
    device.on_alternate(setup.index, setup.value)


def _synch_frame(_device: Device, engine: Engine, setup: Setup) -> bytes:
    if setup.index not in engine.pipes:
        raise Stall
    return b"\0\0"


def _interface(engine: Engine, setup: Setup) -> int:
    if setup.index >= len(engine.alternates):
        raise Stall
    return setup.index


# (direction and recipient of bmRequestType, bRequest)
_TABLE = {
    (0x80, GET_STATUS): _device_status,
    (0x81, GET_STATUS): _interface_status,
    (0x82, GET_STATUS): _endpoint_status,
    (0x00, CLEAR_FEATURE): _device_feature,
    (0x00, SET_FEATURE): _device_feature,
    (0x02, CLEAR_FEATURE): _clear_halt,
    (0x02, SET_FEATURE): _set_halt,
    (0x00, SET_ADDRESS): _accept,
    (0x80, GET_DESCRIPTOR): _descriptor,
    (0x80, GET_CONFIGURATION): _get_configuration,
    (0x00, SET_CONFIGURATION): _set_configuration,
    (0x81, GET_INTERFACE): _get_interface,
    (0x01, SET_INTERFACE): _set_interface,
    (0x82, SYNCH_FRAME): _synch_frame,
}
