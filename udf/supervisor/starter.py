"""The registry as the binder uses it, and the links below R/dev/by-id.

Owns: the way from a binding to a plan, and those links. Must never: decide anything. Called by: devices.py (makes it),
binder.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from udf.supervisor import catalog
from udf.supervisor.attach import DevicePlan
from udf.supervisor.endpoint import Endpoint as RunningEndpoint
from udf.supervisor.instance import Reason
from udf.supervisor.lease import Lease
from udf.supervisor.registry import Registry
from udf.supervisor.tenants import Endpoint, Starter
from udf.usb.matching import Binding


class RegistryStarter(Starter):
    """Starts what the binder wants, and shows it by id."""

    def __init__(self, registry: Registry, by_id: Path) -> None:
        self._registry = registry
        self._by_id = by_id

    async def start(self, name: str, binding: Binding, lease: Lease) -> Endpoint:
        """See Starter."""
        driver = catalog.from_manifest(binding.driver)
        plan = DevicePlan(name=name, driver=driver, lease=lease, options=binding.options)
        return RegisteredEndpoint(self._registry, await self._registry.start_device(plan))

    def is_taken(self, name: str) -> bool:
        """See Starter."""
        return self._registry.is_taken(name)

    def linked(self, name: str, by_id: str) -> None:
        """See Starter."""
        with suppress(OSError):  # a name is a convenience; the instance is there without
            (self._by_id / by_id).unlink(missing_ok=True)
            os.symlink(f"../{name}", self._by_id / by_id)

    def unlinked(self, by_id: str) -> None:
        """See Starter."""
        with suppress(OSError):
            (self._by_id / by_id).unlink(missing_ok=True)


class RegisteredEndpoint(Endpoint):
    """An endpoint that the registry has started."""

    def __init__(self, registry: Registry, endpoint: RunningEndpoint) -> None:
        self.instance = endpoint.instance
        self.ended = endpoint.ended
        self._registry = registry
        self._endpoint = endpoint

    @property
    def may_return(self) -> bool:
        """See Endpoint."""
        return self._endpoint.may_return

    @property
    def is_waiting(self) -> bool:
        """See Endpoint."""
        return self._endpoint.is_waiting

    def listen(self, told: Callable[[], None]) -> None:
        """See Endpoint."""
        self._endpoint.listen(told)

    async def take_back(self, lease: Lease) -> bool:
        """See Endpoint."""
        return await self._endpoint.take_back(lease)

    def lose(self, reason: Reason, text: str) -> None:
        """See Endpoint."""
        self._endpoint.lose(reason, text)

    async def end(self, reason: Reason) -> None:
        """See Endpoint."""
        await self._registry.end(self._endpoint, reason)
