"""Serves a pyfuse3 driver class directly on /dev/fuse, without shim and supervisor: the peer that UDF is compared to.

Run as a program: `direct.py {"driver": …, "class": …, "source": …, "options": {…}, "mountpoint": …, "receive": …}`.
`receive` says whose receive loop serves: "pyfuse3" is the stock one, "udf" the one that UDF's driver host puts in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

NOFILE = 65536  # what UDF's supervisor gives its drivers


def load(path: Path, class_name: str) -> Any:
    """The driver's class, loaded by its path as the driver host does."""
    spec = importlib.util.spec_from_file_location("driver", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["driver"] = module
    spec.loader.exec_module(module)
    return getattr(module, class_name)


def main() -> None:
    job = json.loads(sys.argv[1])
    import pyfuse3
    import trio

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (NOFILE if hard == resource.RLIM_INFINITY else min(NOFILE, hard), hard))
    operations = load(Path(job["driver"]), job["class"])(job["source"], **job["options"])
    os.umask(0)  # only now: what importing writes beside the sources must not be writable by everybody
    options = {"default_permissions", "fsname=udf-bench"}
    if os.geteuid() == 0:
        options.add("allow_other")
    if job["receive"] == "udf":
        from udf.host.pump import Pump

        Pump().install()
    pyfuse3.init(operations, job["mountpoint"], options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
