"""Drivers that misbehave before or while they start, or beside serving."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from udf import Attr, FsDriver


class Plain(FsDriver):
    async def list(self, path: str) -> list[str]:
        return ["file"]

    async def stat(self, path: str) -> Attr:
        return Attr("dir") if path == "/" else Attr(size=4)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        return b"text"[offset : offset + size]


class RaisesAtStart(Plain):
    def __init__(self) -> None:
        raise ValueError("no such thing\nas this")


class ExitsAtStart(Plain):
    def __init__(self) -> None:
        sys.exit("good bye")


class HardExitAtStart(Plain):
    def __init__(self) -> None:
        os._exit(7)


class WantsOption(Plain):
    def __init__(self, source: str, *, colour: str = "red") -> None:
        if colour != "blue" or source != "thing":
            raise ValueError(colour)


class NoRead(FsDriver):
    async def list(self, path: str) -> list[str]:
        return []

    async def stat(self, path: str) -> Attr:
        return Attr("dir")


class NotADriver:
    pass


not_a_class = 7


class Chatty(Plain):
    """Prints for ever, from a thread."""

    def __init__(self) -> None:
        threading.Thread(target=self.chat, daemon=True).start()

    def chat(self) -> None:
        while True:
            print("chatter " * 20)


class Stuck(Plain):
    """The loop stops at a read."""

    async def read(self, path: str, offset: int, size: int) -> bytes:
        time.sleep(30)
        return b""


class Parent(Plain):
    """Has a child process that ignores every polite signal, and a grandchild in a session of its own."""

    def __init__(self) -> None:
        code = "import signal,subprocess,time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)];"
        code += " subprocess.Popen(['sleep', '1000'], start_new_session=True); time.sleep(1000)"
        self.child = subprocess.Popen([sys.executable, "-c", code])


class Reports(Plain):
    """Its one file tells what the driver's process is and has."""

    def __init__(self, source: str | None = None) -> None:
        self.source = source

    def report(self) -> bytes:
        lines = [f"pid {os.getpid()}", f"umask {os.umask(0)}"]
        for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
            try:
                lines.append(f"fd {fd} {os.readlink(f'/proc/self/fd/{fd}')}")
            except OSError:
                continue
        for name in ("mnt", "pid", "user"):
            lines.append(f"ns {name} {os.readlink(f'/proc/self/ns/{name}')}")
        with open("/proc/self/status") as status:
            lines.append(status.read())
        with open("/proc/self/limits") as limits:
            lines.append(limits.read())
        with open("/proc/self/mountinfo") as mounts:
            lines += ["mount " + line.strip() for line in mounts]
        lines.append("processes " + " ".join(sorted(p for p in os.listdir("/proc") if p.isdigit())))
        with open("/proc/self/oom_score_adj") as score:
            lines.append("oom " + score.read().strip())
        return "\n".join(lines).encode()

    async def stat(self, path: str) -> Attr:
        return Attr("dir") if path == "/" else Attr(size=len(self.report()))

    async def read(self, path: str, offset: int, size: int) -> bytes:
        return self.report()[offset : offset + size]


class Surroundings(Plain):
    """Its one file is what an author's code finds around it."""

    def found(self) -> bytes:
        limits = [getattr(resource, name) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")]
        status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        found = {
            "environment": dict(os.environ),
            "variables of a child": sorted(subprocess.check_output(["env"]).decode().split("\n")),
            "directory": os.getcwd(),
            "import path": sys.path,
            "flags": list(sys.flags),
            "dispositions": {number: str(signal.getsignal(number)) for number in range(1, 65) if number != 15},
            "limits": [resource.getrlimit(limit) for limit in limits],
            "nice": os.nice(0),
            "descriptors": sorted(os.listdir("/proc/self/fd")),
            "is session leader": os.getsid(0) == os.getpid(),
            "status": {key: status[key] for key in ("Uid", "Gid", "Groups", "NoNewPrivs", "CapEff", "SigBlk", "Name")},
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "parents": [os.getppid()],
        }
        return json.dumps(found).encode()

    async def stat(self, path: str) -> Attr:
        return Attr("dir") if path == "/" else Attr(size=1 << 20)

    async def read(self, path: str, offset: int, size: int) -> bytes:
        return self.found()[offset : offset + size]


class Hungry(Plain):
    """Eats memory without end when it gets a signal."""

    def __init__(self) -> None:
        signal.signal(signal.SIGUSR1, self.eat)

    def eat(self, *_: object) -> None:
        eaten = []
        while True:
            eaten.append(b"x" * (1 << 20))


class LeavesAMark(Plain):
    """Making it leaves a mark at its source; loading it does not."""

    def __init__(self, source: str) -> None:
        Path(source, "mark").touch()
        self.descriptor = os.open(source, os.O_RDONLY)
