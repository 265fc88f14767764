"""The serial port on the bus: which interfaces it has, and its requests.

Owns: the binding of the interface pair, and what the device has been told so that nothing is told twice. Must never:
know terminals. Called by: driver.py.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import usb.core
import usb.util

from udf import ContractError

from .functional import CLASS_OUT, DTR, RTS, SET_CONTROL_LINE_STATE, SET_LINE_CODING, Coding, parse_functions

log = logging.getLogger("cdc_acm")

COMMUNICATION, ACM, DATA = 0x02, 0x02, 0x0A


class Endpoints(NamedTuple):
    """Where a port is on the bus. `notify` 0: it has no interrupt endpoint."""

    interface: int
    data_interface: int
    bulk_in: int
    bulk_out: int
    notify: int
    packet: int  # bytes in one packet of `bulk_in`
    notify_packet: int


class Bus(Protocol):
    """The part of `self.usb` that is needed here."""

    async def control_out(self, request_type: int, request: int, value: int, index: int, data: bytes) -> int:
        """A control request."""


def find_port(device: Any) -> Endpoints:
    """The port that this driver was bound to; its interfaces are claimed. ContractError if it has no usable one."""
    interfaces = list(device.get_active_configuration())
    refusal = "it has no communication interface of the class CDC-ACM"
    for control in interfaces:
        if (control.bInterfaceClass, control.bInterfaceSubClass) != (COMMUNICATION, ACM):
            continue
        data = _data_interface(control, interfaces)
        if data is None:
            refusal = f"its interface {control.bInterfaceNumber} has no data interface with two bulk endpoints"
            continue
        try:
            # Of several ports only the one that this driver was bound to can be claimed.
            for number in dict.fromkeys((control.bInterfaceNumber, data.bInterfaceNumber)):
                usb.util.claim_interface(device, number)
            if data.bAlternateSetting:
                device.set_interface_altsetting(data.bInterfaceNumber, data.bAlternateSetting)
        except usb.core.USBError as exc:
            if exc.errno == errno.ENODEV:
                raise
            refusal = f"its interface {control.bInterfaceNumber} cannot be used: {exc}"
            continue
        bulk_in, bulk_out = _bulk(data)
        notify = next((each for each in control if _type(each) == usb.util.ENDPOINT_TYPE_INTR and _is_in(each)), None)
        return Endpoints(
            control.bInterfaceNumber,
            data.bInterfaceNumber,
            bulk_in.bEndpointAddress,
            bulk_out.bEndpointAddress,
            notify.bEndpointAddress if notify is not None else 0,
            max(8, bulk_in.wMaxPacketSize & 0x7FF),
            max(8, notify.wMaxPacketSize & 0x7FF) if notify is not None else 0,
        )
    raise ContractError(f"this is no serial port that can be used: {refusal}")


def _data_interface(control: Any, interfaces: Iterable[Any]) -> Any:
    """By the union descriptor, else call management, else the next one; or the interface itself has all endpoints."""
    functions = parse_functions(bytes(control.extra_descriptors))
    wanted = [
        functions.union[1] if functions.union else None,
        functions.call_management,
        control.bInterfaceNumber + 1,
        control.bInterfaceNumber,
    ]
    for number in wanted:
        for each in interfaces:
            if each.bInterfaceNumber == number and all(_bulk(each)):
                return each
    return None


def _bulk(interface: Any) -> tuple[Any, Any]:
    bulk = [each for each in interface if _type(each) == usb.util.ENDPOINT_TYPE_BULK]
    return next(filter(_is_in, bulk), None), next((each for each in bulk if not _is_in(each)), None)


def _type(endpoint: Any) -> int:
    return int(usb.util.endpoint_type(endpoint.bmAttributes))


def _is_in(endpoint: Any) -> bool:
    return bool(endpoint.bEndpointAddress & usb.util.ENDPOINT_IN)


class Port:
    """What the device is told about its line."""

    def __init__(self, bus: Bus, endpoints: Endpoints) -> None:
        self._bus = bus
        self._interface = endpoints.interface
        self._coding: Coding | None = None
        self._lines: int | None = None

    async def set_coding(self, coding: Coding) -> None:
        """Speed and format."""
        if coding != self._coding:
            self._coding = coding
            await self._tell(SET_LINE_CODING, 0, coding.pack())

    async def set_lines(self, *, raised: bool) -> None:
        """DTR and RTS together, as opening and closing set them."""
        lines = DTR | RTS if raised else 0
        if lines != self._lines:
            self._lines = lines
            await self._tell(SET_CONTROL_LINE_STATE, lines, b"")

    async def _tell(self, request: int, value: int, data: bytes) -> None:
        try:
            await self._bus.control_out(CLASS_OUT, request, value, self._interface, data)
        except usb.core.USBError as exc:
            # Devices without a real line behind them stall what has no meaning for them.
            log.info("the device does not take the request %#04x: %s", request, exc)
