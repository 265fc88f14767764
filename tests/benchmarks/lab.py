"""The place of one run: a scratch folder with sources, the contestants that can take part, and their mounts.

Owns: everything that exists only for the run, and its end, also after Ctrl-C. Called by __main__.py (makes it) and by
every benchmark (uses it).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from tests.benchmarks import machine, peers
from tests.benchmarks.machine import RequestCounter
from tests.benchmarks.peers import Daemon, Mount, Peer, UnavailableError
from udf.shim.spin import Spin

MIB = 1 << 20
PAGE = 4096
C, DIRECT, SPIN, NOSPIN = "C", "direct", "UDF spin", "UDF nospin"  # names of contestants
BEFORE = "UDF before"  # of another checkout, if one is given
UDF = SPIN if Spin(None).enabled else NOSPIN  # as a user gets it: the one that targets are about


class Lab:
    """One run's scratch folder and contestants."""

    def __init__(self, *, quick: bool, folder: str | None, seed: int, before: str | None = None) -> None:
        self.quick = quick
        self.random = random.Random(seed)
        self.daemon = Daemon()
        self._before = before
        self._daemon_before = Daemon(before, "before") if before else None
        self.skipped: dict[str, list[str]] = {}
        self.counter: RequestCounter | None = None
        self.why_not_counted = ""
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._number = 0
        self.root = Path()
        self._peers: list[Peer] = []

    def __enter__(self) -> Lab:
        with contextlib.ExitStack() as stack:
            self.root = Path(os.path.realpath(tempfile.mkdtemp(prefix="udf-bench-", dir=self._folder)))
            stack.callback(self._remove)
            stack.callback(self.daemon.stop)
            before: list[Peer] = []
            if self._daemon_before is not None:
                stack.callback(self._daemon_before.stop)
                before.append(peers.Udf(self._daemon_before, "spin", before=str(self._before)))
            counter = stack.enter_context(machine.request_counter())
            if isinstance(counter, str):
                self.why_not_counted = counter
            else:
                self.counter = counter
            self._peers = self._prepared(
                peers.Native(),
                peers.PassthroughLL("auto"),
                peers.PassthroughLL("always"),
                peers.Direct("pyfuse3"),
                peers.Direct("udf"),
                peers.Udf(self.daemon, "spin"),
                peers.Udf(self.daemon, "nospin"),
                *before,
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not stop the cleaning up
            signal.signal(number, signal.SIG_IGN)
        self._stack.close()

    def _remove(self) -> None:
        for point in machine.mounts_below(self.root):
            print(f"{point} was left mounted", file=sys.stderr)
            peers.unmount(Path(point))
        if not machine.mounts_below(self.root):  # never delete through a mount
            shutil.rmtree(self.root, ignore_errors=True)

    def _prepared(self, *candidates: Peer) -> list[Peer]:
        able = []
        for peer in candidates:
            try:
                peer.prepare(self.root)
            except UnavailableError as error:
                self.skip(peer.name, str(error))
            else:
                able.append(peer)
        return able

    def skip(self, name: str, reason: str) -> None:
        """Say why a contestant does not take part (in this benchmark, when only its mount failed)."""
        if reason not in self.skipped.setdefault(name, []):
            self.skipped[name].append(reason)
        print(f"skipped: {name}: {reason}", flush=True)

    def why_missing(self, name: str) -> str:
        """The reasons for which a contestant did not take part."""
        return f"{name} is missing: {'; '.join(self.skipped.get(name, ['no reason given']))}"

    # ---- mounts

    def peers(self, names: Collection[str] | None = None) -> list[Peer]:
        """The contestants that can take part, of those that are wanted."""
        return [peer for peer in self._peers if names is None or peer.name in names]

    @contextlib.contextmanager
    def mounted(self, peer: Peer, source: Path) -> Iterator[Mount]:
        """One contestant on a new mountpoint. Raises UnavailableError."""
        self._number += 1
        at = self.root / f"mount-{self._number}"
        at.mkdir()
        try:
            with peer.mounted(source, at) as mount:
                yield mount
        finally:
            if not machine.mounts_below(at):
                at.rmdir()

    @contextlib.contextmanager
    def all_mounted(self, source: Path, names: Collection[str] | None = None) -> Iterator[dict[str, Mount]]:
        """All that can take part, side by side."""
        with contextlib.ExitStack() as stack:
            mounts = {}
            for peer in self.peers(names):
                try:
                    mounts[peer.name] = stack.enter_context(self.mounted(peer, source))
                except UnavailableError as error:
                    self.skip(peer.name, str(error))
            yield mounts

    def rounds(self, count: int, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """The rounds, each with the contestants in another order."""
        for number in range(count):
            start = number % len(names)
            yield number, [*names[start:], *names[:start]]

    # ---- sources

    def folder(self, name: str) -> Path:
        """A new directory for a source."""
        path = self.root / name
        path.mkdir()
        return path


def make_big_file(path: Path, size: int) -> None:
    """A file of random bytes, written back, in the page cache."""
    block = os.urandom(MIB)
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(start.to_bytes(8, "little") + block[8:])
        file.flush()
        os.fsync(file.fileno())


def make_names(folder: Path, count: int) -> list[str]:
    """Empty files."""
    names = [f"name-{number:06}" for number in range(count)]
    directory = os.open(folder, os.O_RDONLY)
    try:
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=directory))
    finally:
        os.close(directory)
    return names
