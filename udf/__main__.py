"""`python -m udf`, for where the `udf` script is not installed."""

from __future__ import annotations

import sys

from udf.cli import main

if __name__ == "__main__":
    sys.exit(main())
