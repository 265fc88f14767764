"""Starting a private supervisor from the command line: `udf mount` when no daemon runs.

Owns: the hand-over of the request and of its result between `udf mount` and the process that goes on.
Must never: import trio or msgspec (the command line reads this file). Called by: udf.cli; the other end is private.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from udf.supervisor.client import ControlError

PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)


def launch_private(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Mount in the background, by a process of its own; `parameters` are those of the Mount method.

    Returns Mount's answer when the mount can be used, raises ControlError with the sentence when it cannot be made.
    The new process is in a session of its own from the start: ^C reaches only the caller, whose end (seen as the end
    of the request pipe) makes it give up and leave nothing behind. After the report it needs nothing of the caller's.
    """
    report_read, report_write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "udf.supervisor.private", str(report_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(report_write,),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _python_path()},
        )
    finally:
        os.close(report_write)
    assert process.stdin is not None
    assert process.stderr is not None
    with os.fdopen(report_read, "rb") as report, process.stdin as request, process.stderr as errors:
        try:
            request.write(json.dumps(dict(parameters)).encode() + b"\n")
            request.flush()  # and it stays open: its end means that we have gone
        except BrokenPipeError:
            pass  # it ended at once; its last words are on stderr
        answer = report.read()
        if not answer:
            process.wait()
            last = errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise ControlError(
                "Failed", f"the supervisor of this mount ended before it was made: {last or 'no reason given'}"
            )
    reply: dict[str, Any] = json.loads(answer)
    if "error" in reply:
        process.wait()
        raise ControlError(reply["error"], reply["parameters"]["sentence"], reply["parameters"])
    # It goes on without us and is init's child soon; it is not ours to wait for.
    process.returncode = 0
    result: dict[str, Any] = reply["parameters"]
    return result


def _python_path() -> str:
    others = os.environ.get("PYTHONPATH")
    return PACKAGE_PARENT if not others else f"{PACKAGE_PARENT}{os.pathsep}{others}"
