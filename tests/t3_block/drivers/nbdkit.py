"""nbdkit as a driver: each connection that comes over the link is served by an `nbdkit -s` of its own.

Arguments: the link, then nbdkit's; all connections must therefore share a file.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    children = []
    while True:
        data, fds, _, _ = socket.recv_fds(link, 16, 4)
        if not data:
            break
        for fd in fds:
            children.append(subprocess.Popen(["nbdkit", "-s", *sys.argv[2:]], stdin=fd, stdout=fd))
            os.close(fd)
    for child in children:
        child.kill()
        child.wait()


main()
