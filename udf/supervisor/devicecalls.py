"""The methods of io.udf.Supervisor that are about devices.

Owns: their parameters and who may call them. Must never: trust a parameter, or let anybody but root and the
supervisor's own user plug in what drivers then believe. Called by: control.py.
"""

from __future__ import annotations

from contextlib import suppress

import msgspec

from udf.errors import UserError
from udf.supervisor import rights
from udf.supervisor.devices import Devices, NoDeviceError, Row
from udf.supervisor.varlink import Call, Method
from udf.supervisor.volumes import Volumes

MOUNTING_WAIT = 30.0  # for what is mounted by itself, or was before
MAX_FAULTS = 256
MAX_OPTIONS = 100
MAX_TEXT = 4096


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Why(msgspec.Struct, forbid_unknown_fields=True):
    device: str


class _Plug(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    options: dict[str, str] | None = None
    name: str | None = None
    faults: list[str] | None = None


class _Name(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _Faults(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    faults: list[str]


class DeviceCalls:
    """The device methods of one supervisor. A private one has no devices."""

    def __init__(self, devices: Devices | None, volumes: Volumes) -> None:
        self._devices = devices
        self._volumes = volumes

    def methods(self) -> dict[str, Method]:
        """By their names in the interface."""
        return {
            "Devices": self._list,
            "Why": self._why,
            "Plug": self._plug,
            "Unplug": self._unplug,
            "Replug": self._replug,
            "Faults": self._faults,
        }

    async def _list(self, call: Call) -> object:
        call.parameters(_Nothing)
        return {"devices": [] if self._devices is None else [self._with(row) for row in self._devices.rows()]}

    async def _why(self, call: Call) -> object:
        wanted = call.parameters(_Why).device
        devices = self._served()
        known = devices.find(wanted)
        return {"device": self._with(devices.row(known)), "candidates": devices.why(known)}

    async def _plug(self, call: Call) -> object:
        wanted = call.parameters(_Plug)
        devices = self._served(call)
        options, faults = wanted.options or {}, wanted.faults or []
        if len(options) > MAX_OPTIONS:
            raise UserError(f"there are {len(options)} options, and {MAX_OPTIONS} at most are taken: leave some out")
        for key, value in options.items():
            if len(key) > MAX_TEXT or len(value) > MAX_TEXT:
                raise UserError(f"the option {key[:40]!r} has more than {MAX_TEXT} characters: use a shorter value")
        _check_faults(faults)
        row = await devices.plug(wanted.model, options, wanted.name, faults)
        return {"device": await self._settled(devices, row)}

    async def _unplug(self, call: Call) -> object:
        await self._served(call).unplug(call.parameters(_Name).name)
        return None

    async def _replug(self, call: Call) -> object:
        devices = self._served(call)
        return {"device": await self._settled(devices, await devices.replug(call.parameters(_Name).name))}

    async def _faults(self, call: Call) -> object:
        wanted = call.parameters(_Faults)
        _check_faults(wanted.faults)
        await self._served(call).faults(wanted.name, wanted.faults)
        return None

    async def _settled(self, devices: Devices, row: Row) -> Row:
        """The device when its volumes are mounted by themselves, or go on. Who serves it may be another one by then."""
        names: set[str] = set()
        while new := {each["name"] for each in row["instances"]} - names:
            names |= new
            await self._volumes.settled(new, MOUNTING_WAIT)
            with suppress(NoDeviceError):  # it may be gone again
                row = devices.row(devices.find(row["key"]))
        return self._with(row)

    def _with(self, row: Row) -> Row:
        """A device's row with the volumes of each driver that serves it."""
        for instance in row["instances"]:
            instance["volumes"] = self._volumes.rows_of(instance["name"])
        return row

    def _served(self, trusted: Call | None = None) -> Devices:
        if trusted is not None and not rights.is_trusted(trusted.peer.identity):
            raise rights.DeniedError(
                "only root and the daemon's own user may plug and unplug devices: ask as one of them"
            )
        if self._devices is None:
            raise UserError("this supervisor serves one mount and has no devices: start `udf daemon` for that")
        return self._devices


def _check_faults(faults: list[str]) -> None:
    if len(faults) > MAX_FAULTS or any(len(text) > MAX_TEXT for text in faults):
        raise UserError(f"at most {MAX_FAULTS} fault rules of at most {MAX_TEXT} characters: leave some out")
