"""Manifests: what can be known of a driver without running it.

Must never: run, import or compile driver code. Called by: the supervisor and the command line.
"""

from __future__ import annotations

from udf.manifest.check import Manifest, Option, OptionValue, check_manifest, read_manifest
from udf.manifest.match import Match
from udf.manifest.options import check_requires, driver_options
from udf.manifest.search import Trust, find_driver, list_drivers, search_path

__all__ = [
    "Manifest",
    "Match",
    "Option",
    "OptionValue",
    "Trust",
    "check_manifest",
    "check_requires",
    "driver_options",
    "find_driver",
    "list_drivers",
    "read_manifest",
    "search_path",
]
