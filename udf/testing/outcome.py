"""What came of a section: results and the tree that is left; and how two of these differ.

Owns: the comparison. Must never: do I/O. Called by: matrix.py.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from udf.testing.workload import Operation, Section

_LONGEST = 200
Difference = tuple[str, str, str]  # operation, path, text


@dataclass
class Outcome:
    """One run of a section."""

    results: list[tuple[str, object]]
    tree: Any  # path -> what is there
    source: Any = None  # the same in a mirrored source; None: not looked at
    rest: list[str] = field(default_factory=list)  # names that nobody made

    def forget_root(self) -> None:
        """Leave out the chosen directory itself, which the program has not made."""
        if isinstance(self.tree, dict):
            self.tree.pop(".", None)


def differences(section: Section, expected: Outcome, found: Outcome) -> Iterator[Difference]:
    """Where the second one differs: in its results, in the order of the operations, then in what is left."""
    for operation, wanted, got in zip(section.operations, expected.results, found.results, strict=True):
        if wanted != got:
            yield describe(operation), "", f"{_result(got)} instead of {_result(wanted)}"
    yield from _in_tree(expected.tree, found.tree, "")
    if expected.source is not None and found.source is not None:
        yield from _in_tree(expected.source, found.source, "source/")
    for name in found.rest:
        yield "", name, "was left behind"


def _in_tree(expected: object, found: object, prefix: str) -> Iterator[Difference]:
    if not isinstance(expected, dict) or not isinstance(found, dict):
        if expected != found:
            yield "", prefix or ".", f"could not be read: {_short(found)} instead of {_short(expected)}"
        return
    for path in sorted({*expected, *found}):
        if path not in found:
            yield "", prefix + path, "is missing"
        elif path not in expected:
            yield "", prefix + path, "should not be there"
        elif expected[path] != found[path]:
            for key in sorted({*expected[path], *found[path]}):
                wanted, got = expected[path].get(key), found[path].get(key)
                if wanted != got:
                    yield "", prefix + path, f"{key} is {_short(got)} instead of {_short(wanted)}"


def describe(operation: Operation) -> str:
    """An operation as it was written down."""
    call, args = operation
    return f"{call}({', '.join(_short(arg, 40) for arg in args)})"


def _result(result: tuple[str, object]) -> str:
    kind, value = result
    return errno.errorcode.get(int(str(value)), str(value)) if kind == "errno" else _short(value)


def _short(value: object, longest: int = _LONGEST) -> str:
    if isinstance(value, bytes) and len(value) > longest // 4:
        return f"{value[: longest // 8]!r}… ({len(value)} bytes)"
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}…"
