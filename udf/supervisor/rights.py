"""Who may ask for what: decided from the kernel's word about the peer, never from the request.

Owns: the rules. Must never: do I/O. Called by: registry.py and control.py.

Root and the supervisor's own user may do everything. Others can reach the socket only when an administrator has
widened its mode; they get what a setuid fusermount would give them, and nothing of anybody else's.
"""

from __future__ import annotations

import os

from udf.errors import UserError
from udf.supervisor.options import MountOptions
from udf.supervisor.spawn import Identity


class DeniedError(UserError):
    """The caller has not the right to do this."""


def is_trusted(caller: Identity) -> bool:
    """Root, or the user that this supervisor runs as."""
    return caller.uid in (0, os.geteuid())


def acts_as(caller: Identity) -> Identity | None:
    """The user whose rights a mount for this caller has; None: this process's own.

    A supervisor that is not root cannot become anybody, so what it does for root it does as itself.
    """
    return caller if os.geteuid() == 0 and caller.uid != 0 else None


def check_driver(caller: Identity, driver: str | None) -> None:
    """Refuse code from a path to those for whom we would run it with a daemon's means."""
    if driver is not None and "/" in driver and not is_trusted(caller):
        raise DeniedError(
            f"only root may have the daemon run a driver from a path: name an installed one instead of {driver},"
            " or mount without the daemon"
        )


def check_options(caller: Identity, options: MountOptions) -> None:
    """Refuse what would let a user make devices or setuid programs out of files."""
    if (os.geteuid() != 0 or caller.uid != 0) and not (options.nosuid and options.nodev):
        raise DeniedError("only root may mount with suid or dev: leave them out")


def may_touch(caller: Identity, owner: Identity) -> bool:
    """Whether the caller may see and unmount what this owner has mounted."""
    return is_trusted(caller) or caller.uid == owner.uid
