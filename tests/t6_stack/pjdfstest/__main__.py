"""Prints which assertions pass in a directory, a line for each script of which any does: see the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import Suite, written

PATIENCE = 3600.0  # seconds for one script: this is also for slow machines


def main(directory: str, *patterns: str) -> None:
    """Run the scripts that fit any pattern, or all."""
    with Suite() as suite:
        found = suite.run_all(suite.names(*(patterns or ("*/*.t",))), Path(directory), PATIENCE)
    passed = {name: written(outcome.passed) for name, outcome in sorted(found.items()) if outcome.passed}
    print(json.dumps(passed, indent=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
