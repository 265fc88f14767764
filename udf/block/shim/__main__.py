"""Start of a block shim: `python -m udf.block.shim FD`, FD being its control socket.

Takes the `serve` message with the listening socket and the link, opens the driver's units, says `serving` and serves.
A failure before that is one `failed` message. When the supervisor is gone the shim ends.
"""

from __future__ import annotations

import errno
import gc
import resource
import signal
import socket
import sys

from udf.block.shim.config import Config
from udf.block.shim.loop import Loop, StartFailed
from udf.shim.control import Control, SupervisorGone


def start(control: Control) -> Loop:
    """Take the first message. Raises StartFailed, SupervisorGone."""
    message, fds = control.receive(timeout=None)
    if message.get("t") != "serve" or len(fds) != 2:
        raise StartFailed("the first message was not a serve with a listening socket and a link")
    return Loop(Config.from_message(message), control, socket.socket(fileno=fds[0]), fds[1])


def main() -> int:
    """Run one block shim."""
    control = Control(int(sys.argv[1]))
    # The terminal's signals are the supervisor's business; SIGTERM to a shim alone stops it in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard >= 0 else 4096, hard))
    try:
        loop = start(control)
        signal.signal(signal.SIGTERM, lambda *_: loop.stop())
        gc.collect()
        gc.freeze()
        loop.run()
    except StartFailed as failure:
        try:
            control.send({"t": "failed", "error": str(failure)[:500], "errno": errno.EIO})
        except SupervisorGone:
            pass
        return 1
    except SupervisorGone:
        return 1
    loop.tell({"t": "unmounted", "external": False})
    try:
        control.flush(5.0)
    except SupervisorGone:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
