"""`make test`: all tests, in two lanes beside each other, so that the whole run stays short.

What runs in one process, or drives devices and images without a daemon, waits more than it computes: a pytest of its
own runs it beside the rest. Of that only the last line is shown, unless something failed. Arguments are pytest's; with
a path among them there is one lane.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
BESIDE = (
    *("t1_block", "t1_devices", "t1_manifest", "t1_usb", "t2_drivers", "t3_fat", "t3_fs", "t7_hotplug"),
    *("t3_block", "t5_foreign"),
)
PYTEST = [sys.executable, "-m", "pytest"]


def main(arguments: Sequence[str]) -> int:
    """Run them; 0 if all passed."""
    if any(not each.startswith("-") and Path(each.partition("::")[0]).exists() for each in arguments):
        return subprocess.run([*PYTEST, *arguments], check=False).returncode
    beside = [str(TESTS / name) for name in BESIDE]
    with tempfile.TemporaryFile() as output:
        second = subprocess.Popen([*PYTEST, *arguments, *beside], stdout=output, stderr=subprocess.STDOUT)
        try:
            rest = [f"--ignore={path}" for path in beside]
            first = subprocess.run([*PYTEST, *arguments, *rest, str(TESTS)], check=False)
            second.wait()
        finally:
            if second.poll() is None:
                second.terminate()
                second.wait()
        output.seek(0)
        text = output.read().decode(errors="replace").rstrip()
    print("\nbeside them:", text if second.returncode else text.rpartition("\n")[2], flush=True)
    return first.returncode or second.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
