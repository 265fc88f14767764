"""`python -m udf.host FD`: a driver host, started by the supervisor with its control socket."""

from __future__ import annotations

import sys

from udf.host.launcher import main

sys.exit(main(sys.argv))
