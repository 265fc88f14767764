"""What a driver of a device serves instead of a filesystem: its units as NBD exports, or a terminal.

Owns: the hooks `start` and `stop` of drivers that have a device, and the two ways of serving without FUSE.
Must never: know FUSE (serve.py does), or let a hook of the author's last for ever.
Called by: serve.py, inside the sandbox.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from udf.driver.block import BlockSource
from udf.errors import ContractError, DeviceGone, UserError
from udf.host.load import failure
from udf.messages import DeviceSpec, DriverSpec

STOP_TIMEOUT = 2.0  # seconds for the driver's own `stop`

Report = Callable[[str, str, str], None]


def face_of(spec: DriverSpec) -> str:
    """What a driver of this kind serves: files, block or terminal."""
    return {"fs": "files", "block": "block"}.get(spec.kind, spec.provides)


def check_class(cls: type, path: str, spec: DriverSpec) -> None:
    """Refuse a class that does not serve what its manifest says, in one sentence."""
    name = cls.__name__
    if spec.kind == "usb":
        from udf.driver.usb import UsbDriver

        if not issubclass(cls, UsbDriver):
            raise UserError(f'{path}: the class {name} is no UsbDriver, which a manifest with kind = "usb" names')
    face = face_of(spec)
    wanted = {"block": "units", "terminal": "serve"}.get(face)
    missing = wanted is not None and getattr(cls, wanted, None) in (None, BlockSource.units)
    if missing:
        raise UserError(
            f"{path}: the class {name} has no {wanted}(), which every driver needs that provides what it does"
        )


def open_device(connection: int, spec: DeviceSpec) -> dict[str, Any]:
    """Take the connection over; what the driver finds in itself before its `__init__` runs."""
    from udf.driver.usb import open_device as open_usb

    try:
        device, transfers = open_usb(socket.socket(fileno=connection), spec)
    except (DeviceGone, OSError) as exc:
        raise UserError(f"the device cannot be used: {exc}") from exc
    return {"device": device, "usb": transfers}


async def start(driver: Any, path: str) -> None:
    """The author's `start`, if there is one. UserError says in one sentence what went wrong in it."""
    hook = getattr(driver, "start", None)
    if hook is None:
        return
    try:
        await hook()
    except (UserError, ContractError):
        raise
    except Exception as exc:
        raise failure(path, "could not be started", exc) from exc


async def stop(driver: Any, *, eject: bool) -> None:
    """The author's `eject`, if that is asked for, and `stop`, as far as there are such; each bounded in time, and what
    goes wrong in it is only printed."""
    for hook in (getattr(driver, "eject", None) if eject else None, getattr(driver, "stop", None)):
        if hook is None:
            continue
        with trio.move_on_after(STOP_TIMEOUT, shield=True):
            try:
                await hook()
            except Exception:
                traceback.print_exc()


def server(driver: Any, face: str, link: int, report: Report) -> Callable[[], Awaitable[None]]:
    """What serves until the link ends."""
    if face == "terminal":
        return lambda: driver.serve(link)
    from udf.block.server import serve_link

    async def serve_units() -> None:
        with socket.socket(fileno=os.dup(link)) as sock:
            await serve_link(sock, driver, report=report)

    return serve_units


async def serve(face: Callable[[], Awaitable[None]]) -> int:
    """Serve until that ends; the exit status. What an author's code raises ends the driver, and is printed."""
    try:
        await face()
    except Exception as exc:
        gone = _gone(exc)
        if gone is not None:
            print(gone, file=sys.stderr)  # an unplug is no mistake of the author's: one line is enough
        else:
            traceback.print_exc()
        return 1
    return 0


def _gone(exc: Exception) -> DeviceGone | None:
    """The DeviceGone that this is, or that it is made of, as what leaves a nursery."""
    if isinstance(exc, DeviceGone):
        return exc
    if not isinstance(exc, ExceptionGroup) or exc.split(DeviceGone)[1] is not None:
        return None
    return next((gone for each in exc.exceptions if (gone := _gone(each)) is not None), None)
