"""The process that driver hosts are forked from: `python -m udf.host.zygote FD`, with everything imported.

Owns: the imports and the forks; what a fork does is standby.py's. Must never: run a driver's code,
start a thread (its forks would lack it), or wait for anything but the supervisor.
Called by: the supervisor (udf/supervisor/zygote.py), as whose child each fork is made, so that it is reaped, killed and
outlived like a host that was started by exec; the one difference is that hosts share their address-space layout.

Each request is one packet with one descriptor: the report socket of the fork, which says `standing` there, and becomes
a host when `become` comes on it with the control socket and the output.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys

import trio

from udf.host import standby
from udf.host import syscalls as sys_

# What our own drivers and most others import besides what serving needs; all of it is of the standard library.
_COMMON = ("array", "dataclasses", "enum", "hashlib", "math", "mmap", "random", "re", "stat", "struct", "zlib")

# What drivers of devices need besides, so that one serves soon after a plug. It costs each fork ten microseconds, and
# two megabytes that all of them share.
_DEVICES = ("udf.driver.usb", "udf.block.server")


def main(argv: list[str]) -> int:
    """Fork for as long as the supervisor asks. Returns the exit status."""
    if len(argv) != 2 or not argv[1].isdigit():
        print("usage: python -m udf.host.zygote FD (it is started by udf itself)", file=sys.stderr)
        return 2
    requests = socket.socket(fileno=int(argv[1]))
    requests.set_inheritable(False)
    sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
    sys_.set_name("udf-zygote")
    # In order for a fork to be cheap nothing may be left to do: no import, no first run of the loop, no garbage.
    for name in ("udf.host.serve", *_COMMON, *_DEVICES):
        importlib.import_module(name)
    trio.run(trio.lowlevel.checkpoint)
    gc.collect()
    gc.freeze()
    while True:
        word, fds, _, _ = socket.recv_fds(requests, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not word:
            return 0
        if not fds:
            continue
        try:
            if sys_.fork(sys_.CLONE_PARENT) == 0:
                requests.close()
                standby.stand_by(socket.socket(fileno=fds[0]))
        except OSError as exc:
            print(f"udf zygote: {exc}", file=sys.stderr, flush=True)
        os.close(fds[0])  # if there is no fork now, its end is all that the supervisor hears


if __name__ == "__main__":
    sys.exit(main(sys.argv))
