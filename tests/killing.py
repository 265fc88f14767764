"""Runs a piece of work in a forked child that is killed with SIGKILL at its n-th step, for as many n as there are.

A step is a bytecode (or a line) of the files under test, so "at any moment" is meant literally. The child is a real
process and the signal a real SIGKILL: what is left is what a driver's death leaves in its store.

UDF_KILLS_FULL=1 takes every step that a test asks for; without it every third one is enough, to keep the run short.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

KILLED = "killed"
FULL = bool(os.environ.get("UDF_KILLS_FULL"))


def in_child(work: Callable[[], Any], *, step: int | None = None, files: str = "", lines: bool = False) -> Any:
    """What work returns, done in a child; KILLED if the child was killed, at that step in files whose path matches
    *files* (a step is a bytecode or a line). An exception in the child is raised here."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            if step is not None:
                _kill_at(step, files, lines)
            try:
                answer = (True, work())
            except BaseException:
                answer = (False, traceback.format_exc())
            sys.settrace(None)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(answer, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return KILLED
    assert status == 0, f"the child ended with {status}"
    good, answer = pickle.loads(data)
    if not good:
        raise AssertionError(f"in the child:\n{answer}")
    return answer


def _kill_at(step: int, files: str, lines: bool) -> None:
    left = step
    wanted = re.compile(files).search
    event_wanted = "line" if lines else "opcode"

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not wanted(frame.f_code.co_filename):
            return None
        if not lines:
            frame.f_trace_opcodes = True
        if event == event_wanted:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return trace

    sys.settrace(trace)


def steps(
    work: Callable[[int], Callable[[], Any]], *, files: str, lines: bool = False, stride: int = 1, first: int = 0
) -> Iterator[tuple[int, Any]]:
    """For each step: make the work anew by work(step), kill it there, yield (step, KILLED); at last, when there were
    no more steps, yield (step, what it returned)."""
    step = first
    stride *= 1 if FULL else 3
    while True:
        result = in_child(work(step), step=step, files=files, lines=lines)
        yield step, result
        if result != KILLED:
            return
        step += stride


def copy(source: int, target: int) -> None:
    """Make a memfd the copy of another one, holes included."""
    size = os.fstat(source).st_size
    os.ftruncate(target, 0)
    os.ftruncate(target, size)
    end = 0
    while True:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError:
            return  # no data behind the last hole
        end = os.lseek(source, start, os.SEEK_HOLE)
        os.pwrite(target, os.pread(source, end - start, start), start)


def memory_of(fd: int) -> int:
    """How many bytes of memory a memfd takes."""
    return Path(f"/proc/self/fd/{fd}").stat().st_blocks * 512
