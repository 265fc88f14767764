"""`python -m udf.host CONTROL [REPORT]`: a driver host, started by the supervisor with its sockets."""

from __future__ import annotations

import os
import sys

from udf.host.launcher import main

status = main(sys.argv)
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # the supervisor waits for our end, and the interpreter's own would take its time
