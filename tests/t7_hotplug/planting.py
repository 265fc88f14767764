"""The planted drivers, each with its bug and without.

A file in planted/ is the correct driver. Its bug is in it as comments: a line that ends with `# FIX` is not there in
the version with the bug, and one that begins with `# BUG: ` is code there. So the two differ in the bug and no more.
"""

from __future__ import annotations

import linecache
import types
from pathlib import Path

FOLDER = Path(__file__).with_name("planted")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def source(name: str, *, bug: bool) -> str:
    lines = []
    for line in (FOLDER / f"{name}.py").read_text().splitlines():
        if bug and line.rstrip().endswith("# FIX"):
            continue
        lines.append(line.replace("# BUG: ", "", 1) if bug else line)
    return "\n".join(lines) + "\n"


def load(name: str, *, bug: bool) -> types.ModuleType:
    """The driver as a module of its own, fresh each time, whose lines a traceback can show."""
    text = source(name, bug=bug)
    path = f"/planted/{name}{'_bug' if bug else ''}.py"
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    module = types.ModuleType(name)
    exec(compile(text, path, "exec"), module.__dict__)
    return module
